"""Where the weights of the entries are: the one table that loading needs.

Nothing is hosted yet. An entry is hosted from the commit on that sets `hosted`, the revision and the sha256 that
`python -m hub publish` prints; it is bundled when its file lies in `arm_zoo/bundled/` and its line says so.
"""

import os
from dataclasses import dataclass
from pathlib import Path

__all__ = ["TABLE", "Weights", "bundled_file", "organisation"]

BUNDLED_FOLDER = Path(__file__).parent / "bundled"


@dataclass(frozen=True)
class Weights:
    """Where an entry's weights are, or will be.

    Attributes:
        repository: name on the Hub, within the organisation.
        revision: tag or commit to load.
        sha256: of model.safetensors, or of the bundled file.
        hosted: whether the repository is there.
        bundled: whether the package itself has the weights, in `arm_zoo/bundled/ENTRY.safetensors`.
    """

    repository: str
    revision: str = "main"
    sha256: str | None = None
    hosted: bool = False
    bundled: bool = False


TABLE: dict[str, Weights] = {
    name: Weights(repository=name)
    for name in (
        "arm_base_patch16_224.arm_in1k_ft_in1k",
        "arm_base_patch16_224.arm_in1k",
        "arm_base_patch16_224.in1k",
        "arm_base_patch16_384.arm_in1k_ft_in1k",
        "arm_base_patch16_stride8_448.arm_in1k_ft_in1k",
        "arm_large_patch16_224.arm_in1k_ft_in1k",
        "arm_large_patch16_224.arm_in1k",
        "arm_large_patch16_224.in1k",
        "arm_large_patch16_384.arm_in1k_ft_in1k",
        "arm_huge_patch16_224.arm_in1k_ft_in1k",
        "arm_huge_patch16_224.arm_in1k",
        "arm_huge_patch16_384.arm_in1k_ft_in1k",
    )
}


def organisation() -> str:
    """The Hub organisation of the entries; the environment variable ARM_ZOO_HUB_ORG changes it, whenever it is set."""
    return os.environ.get("ARM_ZOO_HUB_ORG") or "arm-zoo"


def bundled_file(entry: str) -> Path:
    """Where the package has, or would have, the weights of an entry."""
    return BUNDLED_FOLDER / f"{entry}.safetensors"
