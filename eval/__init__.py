"""Measuring models: accuracy, speed and the leaderboard; runs from a checkout."""
