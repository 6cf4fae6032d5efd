"""The families of backbones, a file each."""
