"""The pretraining objectives, a file each."""
