"""Conversion, publishing, checking and export of weights: `python -m hub`."""
