"""Images in files: which files are images, in which order they come, and how they are decoded, everywhere the same."""
