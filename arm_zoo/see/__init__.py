"""What a model sees in an image, as panels of one picture: features, receptive field, and the work of the scan."""
