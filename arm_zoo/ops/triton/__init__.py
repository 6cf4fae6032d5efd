"""The `triton` backend: GPU kernels that Triton compiles on first use, for scans, convolutions, gates and norms."""

from arm_zoo.ops.triton.conv import causal_conv, causal_conv_backward
from arm_zoo.ops.triton.gates import gate_backward
from arm_zoo.ops.triton.scan import selective_scan, selective_scan_backward

__all__ = ["causal_conv", "causal_conv_backward", "gate_backward", "selective_scan", "selective_scan_backward"]
