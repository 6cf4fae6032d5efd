"""The selective scan of Mamba over images: K directions at once, channels last, with named backends.

Sequences lie in scan order. The tables of `arm_zoo.layers.order` say which token each step visits. They are needed
only where sequences are made from tokens (`causal_conv`) and where the directions are merged (`selective_scan`). If
all directions share their input, no sequences are made: `selective_scan` reads each step's token where it lies.
"""

from arm_zoo.ops.backends import available_backends, get_scan_backend, scan_backend, set_scan_backend
from arm_zoo.ops.functional import causal_conv, mamba_inner, selective_scan

__all__ = [
    "available_backends",
    "causal_conv",
    "get_scan_backend",
    "mamba_inner",
    "scan_backend",
    "selective_scan",
    "set_scan_backend",
]
