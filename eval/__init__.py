"""Measuring models: throughput."""
