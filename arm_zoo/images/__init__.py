"""Images in files: which files are images, in which order they come, and how they are decoded, in all programs alike.

The modules columns, hub, labels, shards and tables need `datasets`, filelock or pyarrow, which the extras train
and eval bring.
"""
