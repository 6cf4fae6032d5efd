"""The paper's tables 4 to 8: their rows and presets, which are the YAML files here, their runs and their results."""

from pathlib import Path

FOLDER = Path(__file__).parent
PHASES = ("dvae", "pretrain", "finetune")  # in this order; every row ends with finetuning
