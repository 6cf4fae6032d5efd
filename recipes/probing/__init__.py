"""Scores of frozen features: they are extracted once and kept, and a file of its own holds each protocol."""
