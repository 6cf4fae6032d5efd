"""Scoring: from sets and models to rows of scores."""
