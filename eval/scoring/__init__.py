"""From sets and models to rows of scores."""
