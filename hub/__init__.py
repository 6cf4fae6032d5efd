"""Conversion and publishing of weights; nothing here yet."""
