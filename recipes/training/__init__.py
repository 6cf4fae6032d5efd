"""What all recipes share between the configuration and the exported weights."""
