"""Weights: read, translated to our names, adapted to a model, fetched by name."""
