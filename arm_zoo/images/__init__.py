"""Images in files: which files are images, in which order they come, and how they are decoded, everywhere the same.

What needs `datasets`, filelock or pyarrow comes with the extras train and eval: columns, hub, labels, shards, tables.
"""
