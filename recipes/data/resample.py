"""Crops of images of many sizes resized, mirrored and normalised on the GPU in one go, equal to torchvision's on the CPU.

`crop_resize` gives what `torchvision.transforms.v2.functional.resized_crop` gives for images of 8 bits on the CPU with
bicubic interpolation and antialiasing: to the bit but for weights that lie halfway between two roundings, and within
one grey level there.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

# Pixels of a program of the kernel, and rows of the crop that it resamples at a time.
ROWS, COLUMNS, CHUNK = 32, 64, 32


@dataclass(frozen=True)
class RaggedImages:
    """Images of 8 bits with as many channels each, of any sizes and strides, in the memory of one device.

    The tensors of numbers lie on the CPU, where they are checked and joined with the crops.
    """

    addresses: Tensor  # (N,) int64, of each image's first byte
    sizes: Tensor  # (N, 2) int32, height and width
    strides: Tensor  # (N, 3) int64, bytes from a channel, row and column to the next
    channels: int
    device: torch.device
    owners: tuple[Tensor, ...]  # keep the memory alive

    @classmethod
    def of(cls, images: Sequence[Tensor]) -> "RaggedImages":
        """One or more images (C, H, W), planar, interleaved or views of others: nothing is copied."""
        if not images:
            raise ValueError("RaggedImages.of takes one image or more, got none")
        channels, device = images[0].shape[0] if images[0].ndim else 0, images[0].device
        for i, image in enumerate(images):
            if image.dtype != torch.uint8 or image.ndim != 3 or 0 in image.shape:
                raise ValueError(
                    f"images are (C, H, W) of uint8, one pixel or more; image {i} is {tuple(image.shape)} of {image.dtype}"
                )
            if image.shape[0] != channels or image.device != device:
                raise ValueError(
                    f"a batch has one device and number of channels: image 0 has {channels} on {device}, image {i} "
                    f"{image.shape[0]} on {image.device}"
                )
        return cls(
            torch.tensor([image.data_ptr() for image in images]),
            torch.tensor([image.shape[1:] for image in images], dtype=torch.int32),
            torch.tensor([image.stride() for image in images]),
            channels,
            device,
            tuple(images),
        )

    @classmethod
    def rows(cls, images: Tensor, places: Tensor) -> "RaggedImages":
        """Those of a set (M, C, H, W) at the places (N,), whole numbers on the CPU: nothing is copied."""
        if images.dtype != torch.uint8 or images.ndim != 4 or 0 in images.shape[1:]:
            raise ValueError(
                f"a set of images is (M, C, H, W) of uint8, one pixel or more; got {tuple(images.shape)} of {images.dtype}"
            )
        if places.ndim != 1 or places.is_floating_point() or places.dtype == torch.bool or places.device.type != "cpu":
            raise ValueError(
                f"places are (N,) whole numbers on the CPU, got {tuple(places.shape)} of {places.dtype} on {places.device}"
            )
        if len(places) and not 0 <= int(places.min()) <= int(places.max()) < len(images):
            raise ValueError(f"places in a set of {len(images):,} images, got {places.min()} to {places.max()}")
        stride, *strides = images.stride()
        return cls(
            images.data_ptr() + places.long() * stride,
            torch.tensor(images.shape[2:], dtype=torch.int32).expand(len(places), 2),
            torch.tensor(strides).expand(len(places), 3),
            images.shape[1],
            images.device,
            (images,),
        )


def crop_resize(
    images: RaggedImages,
    boxes: Tensor,
    flips: Tensor,
    size: tuple[int, int],
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
) -> Tensor:
    """What is in the boxes as images (N, C, *size): uint8, or with mean and deviation float32 normalised.

    Nothing outside a box goes into its image, and the host does not wait for the device.

    Args:
        images: those to crop, N in all.
        boxes: (N, 4) whole numbers on the CPU: top, left, height and width of each crop in its image.
        flips: (N,) bool on the CPU, which crops are mirrored left to right.
        size: height and width of the result.
        mean: of each channel's values from 0 to 1, subtracted as `recipes.data.transforms.Normalisation` does.
        std: of each channel, what is then divided by.
    """
    _check_crops(images, boxes, flips)
    if min(size) < 1:
        raise ValueError(f"images are resized to one pixel or more, got {size[0]} x {size[1]}")
    if {len(values) for values in (mean, std) if values is not None} - {images.channels} or (mean is None) != (
        std is None
    ):
        raise ValueError(f"mean and std are {images.channels} numbers each, or both None; got {mean} and {std}")
    dtype = torch.uint8 if mean is None else torch.float32
    out = torch.empty(len(boxes), images.channels, *size, dtype=dtype, device=images.device)
    if len(boxes):
        _launch(images, boxes, flips, out, mean, std)
    return out


def _check_crops(images: RaggedImages, boxes: Tensor, flips: Tensor) -> None:
    number = len(images.addresses)
    for name, tensor, shape in (("boxes", boxes, (number, 4)), ("flips", flips, (number,))):
        kind = tensor.dtype == torch.bool if name == "flips" else tensor.dtype in (torch.int32, torch.int64)
        if not kind or tensor.shape != shape or tensor.device.type != "cpu":
            raise ValueError(
                f"{name} of {number} images are {shape} of {'bool' if name == 'flips' else 'int32'} on the CPU, got "
                f"{tuple(tensor.shape)} of {tensor.dtype} on {tensor.device}"
            )
    corner, extent = boxes[:, :2], boxes[:, 2:]
    outside = ((corner < 0) | (extent < 1) | (corner + extent > images.sizes)).any(dim=1)
    if outside.any():
        i = int(outside.nonzero()[0])
        raise ValueError(
            f"box {i}, {boxes[i].tolist()} (top, left, height, width), is empty or not within its image of "
            f"{images.sizes[i, 0]} x {images.sizes[i, 1]} pixels (height x width)"
        )


def _launch(
    images: RaggedImages,
    boxes: Tensor,
    flips: Tensor,
    out: Tensor,
    mean: Sequence[float] | None,
    std: Sequence[float] | None,
) -> None:
    import triton  # not every build of torch brings it

    from recipes.data.resample_kernels import resample_kernel, weights_kernel

    if not out.is_cuda and isinstance(resample_kernel, triton.JITFunction):
        raise ValueError(f"images are cropped and resized on a GPU, got some on {out.device}; move them there")
    number, channels, height, width = out.shape
    corners = images.addresses + (images.strides[:, 1:] * boxes[:, :2]).sum(dim=1)
    crops = torch.column_stack([corners, images.strides, boxes[:, 2:], flips])
    if out.is_cuda:
        crops = crops.pin_memory().to(out.device, non_blocking=True)
    taps = 2 * math.ceil(2 * max(1, (boxes[:, 2:].amax(dim=0) / torch.tensor([height, width])).max().item())) + 1
    length = triton.next_power_of_2(max(height, width))
    weights = torch.empty(number, 2, length * taps, dtype=torch.int16, device=out.device)
    precisions = torch.empty(number, 2, dtype=torch.int32, device=out.device)
    columns = min(COLUMNS, max(16, triton.next_power_of_2(width)))
    programs = number * channels * triton.cdiv(height, ROWS) * triton.cdiv(width, columns)
    with torch.cuda.device_of(out):
        weights_kernel[number, 2](crops, weights, precisions, height, width, taps, SIZE=length)
        resample_kernel[(programs,)](
            crops, weights, precisions, out, channels, height, width, taps,
            None if mean is None else tuple(mean), None if std is None else tuple(std),
            SIZE=length, ROWS=ROWS, COLUMNS=columns, CHUNK=CHUNK,
        )  # fmt: skip
