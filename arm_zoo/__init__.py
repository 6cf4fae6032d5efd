"""ARM and MambaMLP vision models for timm: importing this package registers them."""

from arm_zoo import arm as arm
from arm_zoo.hosted import DownloadError
from arm_zoo.loading import from_pretrained
from arm_zoo.pretrain import ARMPretrain, create_pretraining_model
from arm_zoo.scan import available_backends, get_scan_backend, scan_backend, set_scan_backend
from arm_zoo.weights import CheckpointError, from_official, to_official

__version__ = "0.1.0"

__all__ = [
    "ARMPretrain",
    "CheckpointError",
    "DownloadError",
    "__version__",
    "available_backends",
    "create_pretraining_model",
    "from_official",
    "from_pretrained",
    "get_scan_backend",
    "scan_backend",
    "set_scan_backend",
    "to_official",
]
