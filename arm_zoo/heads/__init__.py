"""Heads that are trained on the features of a frozen model."""
