"""What the leaderboard shows."""
