# Everything is set up in .venv; the machine needs only make and Python with its venv module.
PYTHON ?= python3
BIN := .venv/bin

.DEFAULT_GOAL := help
.PHONY: help test quickstart clean
.NOTPARALLEL:  # the targets share one .venv

help:  ## list the targets
	@sed -n 's/^\([a-z]*\):.*##\(.*\)/  make \1\t\2/p' Makefile | expand -t 20

test: .venv/dev.stamp  ## lint, types and tests
	$(BIN)/ruff check .
	$(BIN)/mypy arm_zoo
	$(BIN)/pytest --numprocesses 2 --timeout 300

quickstart: .venv/train.stamp  ## pretrain, finetune and score a small ARM on real pictures, in minutes on a CPU
	$(BIN)/python -m recipes.quickstart

clean:  ## remove the environment, caches and what the quickstart wrote
	rm -rf .venv .mypy_cache .pytest_cache .ruff_cache build dist *.egg-info quickstart
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# One stamp per extra, so that unchanged requirements are not resolved again.
.venv/%.stamp: pyproject.toml | $(BIN)/pip
	$(BIN)/python -m pip install --editable '.[$*]'
	@touch $@

# pip is what venv installs last: without it the environment is unfinished and made anew.
$(BIN)/pip:
	$(PYTHON) -m venv --clear .venv
