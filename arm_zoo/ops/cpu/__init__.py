"""Backends for the CPU: PyTorch operations in chunks, and Numba."""
