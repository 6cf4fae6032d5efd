"""Training recipes: pretraining, finetuning and the quickstart; run from a checkout, not part of the wheel."""
