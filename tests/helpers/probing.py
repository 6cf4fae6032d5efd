"""Features made by hand, as if a model had made them."""

import torch

from recipes.probing.features import Extracted


def extracted(classes: torch.Tensor, width: int, **arrays: torch.Tensor) -> Extracted:
    """A split of arrays (N, ...) by name, without damaged images."""
    return Extracted(arrays, classes, None, 0, width, "training")


def clusters(images: int, classes: int, width: int, distance: float, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Values (images, width) around centres so far apart, and classes in turn."""
    labels = torch.arange(images) % classes
    centres = distance * torch.randn(classes, width, generator=torch.Generator().manual_seed(0))
    return centres[labels] + torch.randn(images, width, generator=torch.Generator().manual_seed(seed)), labels
