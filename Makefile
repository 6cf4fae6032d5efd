# Everything is set up in .venv; the machine needs only make and Python with its venv module.
PYTHON ?= python3
BIN := .venv/bin
OLDEST := .venv-oldest/bin
PYTEST := pytest --numprocesses 2 --dist worksteal --timeout 300

.DEFAULT_GOAL := help
.PHONY: help test test-all test-oldest quickstart clean
.NOTPARALLEL:  # the targets share one .venv

help:  ## list the targets
	@sed -n 's/^\([a-z-]*\):.*##\(.*\)/  make \1\t\2/p' Makefile | expand -t 20

test: .venv/clients.stamp  ## lint, types and all tests but the slow ones
	$(BIN)/ruff check .
	$(BIN)/mypy arm_zoo recipes eval hub
	$(BIN)/$(PYTEST) -m "not slow"

test-all: .venv/clients.stamp  ## all tests, also the slow ones, which take minutes more
	$(BIN)/$(PYTEST)

test-oldest: | $(OLDEST)/pip  ## the tests of `make test` with the oldest version of every requirement
	$(PYTHON) tests/floors.py > .venv-oldest/floors.txt
	$(OLDEST)/python -m pip install --editable '.[dev]' --constraint .venv-oldest/floors.txt
	$(OLDEST)/$(PYTEST) -m "not slow"

quickstart: .venv/train.stamp  ## compare few labels from scratch and from a pretrained encoder, in minutes on a CPU
	$(BIN)/python -m recipes.quickstart

clean:  ## remove the environments, caches and what the quickstart wrote
	rm -rf .venv .venv-oldest .mypy_cache .pytest_cache .ruff_cache build dist *.egg-info quickstart
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# One stamp per extra, so that unchanged requirements are not resolved again.
.venv/%.stamp: pyproject.toml | $(BIN)/pip
	$(BIN)/python -m pip install --editable '.[$*]'
	@touch $@

# pip is what venv installs last: without it the environment is unfinished and made anew.
$(BIN)/pip $(OLDEST)/pip:
	$(PYTHON) -m venv --clear $(@:/bin/pip=)
