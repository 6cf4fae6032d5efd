"""The selective scan of Mamba over images: K directions at once, channels last, with named backends.

Sequences lie in scan order. The tables of `arm_zoo.layers.order` say which token a step is; they are read where a
sequence is made (`causal_conv`) and where the directions meet again (`selective_scan`), and nowhere else. Directions
that share their input need no sequences: then `selective_scan` reads tokens where they lie, step by step.
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
