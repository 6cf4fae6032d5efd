"""Vision Mambas for timm, ARM, Vim and VMamba: importing this package registers them."""

from arm_zoo.files import CheckpointError, DownloadError
from arm_zoo.loading import from_pretrained
from arm_zoo.models.arm import ARM
from arm_zoo.models.vim import Vim
from arm_zoo.models.vmamba import VMamba
from arm_zoo.ops import available_backends, get_scan_backend, scan_backend, set_scan_backend
from arm_zoo.pretraining._registry import create_pretraining_model
from arm_zoo.pretraining.autoregressive import ARMPretrain
from arm_zoo.pretraining.mae import MAEPretrain
from arm_zoo.pretraining.moco import MoCoPretrain
from arm_zoo.weights.adapt import from_official
from arm_zoo.weights.tensor_names import to_official

__version__ = "0.1.0"

__all__ = [
    "ARM",
    "ARMPretrain",
    "CheckpointError",
    "DownloadError",
    "MAEPretrain",
    "MoCoPretrain",
    "VMamba",
    "Vim",
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
