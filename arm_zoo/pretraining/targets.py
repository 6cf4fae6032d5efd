"""The targets of pretraining: the pixels of patches, plain or normalised patch by patch."""

from collections.abc import Callable

from torch import Tensor


def patchify(images: Tensor, patch_size: tuple[int, int]) -> Tensor:
    """(B, C, H, W) -> (B, N, pixels) patches row by row, channels fastest."""
    rows, columns = patch_size
    patches = images.unflatten(3, (-1, columns)).unflatten(2, (-1, rows))  # (B, C, h, p, w, q)
    return patches.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)


def unpatchify(patches: Tensor, patch_size: tuple[int, int], grid: tuple[int, int]) -> Tensor:
    """(B, N, pixels) patches of a grid -> (B, C, H, W); inverse of `patchify`."""
    patches = patches.unflatten(2, (*patch_size, -1)).unflatten(1, grid).permute(0, 5, 1, 3, 2, 4)
    return patches.flatten(4).flatten(2, 3)


def statistics(patches: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation (..., 1) of every patch; the variance is the unbiased one."""
    return patches.mean(-1, keepdim=True), (patches.var(-1, keepdim=True) + 1e-6).sqrt()


def normalised(patches: Tensor) -> Tensor:
    """Every patch minus its mean, divided by its standard deviation."""
    mean, deviation = statistics(patches)
    return (patches - mean) / deviation


NORMED_PIXEL, PIXEL = "normed_pixel", "pixel"
PIXEL_TARGETS: dict[str, Callable[[Tensor], Tensor]] = {  # what is predicted for patches (paper, table 7)
    NORMED_PIXEL: normalised,
    PIXEL: lambda patches: patches,
}
