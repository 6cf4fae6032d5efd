"""Timing of models, kernels and the loader."""
