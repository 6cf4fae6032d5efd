"""CUDA kernels of the scans, compiled when they are first used."""
