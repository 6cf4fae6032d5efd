"""Crops of images of many sizes, resized, mirrored and normalised on the GPU in one go.

The resize is that of `recipes.data.transforms.cropped` on the CPU, bicubic or bilinear and antialiased, computed in
the same whole numbers: it gives the same values to the bit, but for weights within rounding of a half, which may come
to one grey level.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torchvision.transforms import InterpolationMode

REACHES = {InterpolationMode.BILINEAR: 1, InterpolationMode.BICUBIC: 2}  # of a filter to either side, in pixels
WHOLE = (torch.int32, torch.int64)
# Pixels that a program of the kernel makes, rows of the crop that it reads at a time (powers of two), and its warps.
BLOCK = {"ROWS": 32, "COLUMNS": 64, "CHUNK": 16, "num_warps": 4}


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
        for i, image in enumerate(images):
            if image.dtype != torch.uint8 or image.ndim != 3 or 0 in image.shape:
                raise ValueError(
                    f"images are (C, H, W) of uint8, one pixel or more; image {i} is {tuple(image.shape)} of "
                    f"{image.dtype}"
                )
        (channels, device), *others = {(image.shape[0], image.device) for image in images}
        if others:
            raise ValueError(
                f"the images of a batch have one number of channels and one device, got {channels} on {device} and "
                f"{others[0][0]} on {others[0][1]}"
            )
        return cls(
            torch.tensor([image.data_ptr() for image in images]),
            torch.tensor([image.shape[1:] for image in images], dtype=torch.int32),
            torch.tensor([image.stride() for image in images]),
            channels,
            device,
            tuple(images),
        )

    def select(self, places: Tensor) -> "RaggedImages":
        """Those at the places (M,), whole numbers on the CPU, in this order: nothing is copied."""
        numbers = {name: getattr(self, name)[places] for name in ("addresses", "sizes", "strides")}
        return replace(self, **numbers)


def crop_resize(
    images: RaggedImages,
    boxes: Tensor,
    flips: Tensor,
    size: tuple[int, int],
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    interpolation: InterpolationMode = InterpolationMode.BICUBIC,
    windows: Tensor | None = None,
) -> Tensor:
    """What is in the boxes as images (N, C, *size): uint8, or with mean and deviation float32 normalised.

    With windows, each image is a part of its resized box, of which no more is made. Nothing outside a box goes into
    its image, and the host does not wait for the device.

    Args:
        images: those to crop, N in all.
        boxes: (N, 4) whole numbers on the CPU: top, left, height and width of each crop in its image.
        flips: (N,) bool on the CPU, which crops are mirrored left to right.
        size: height and width of the result.
        mean: of each channel's values from 0 to 1, subtracted as `recipes.data.transforms.Normalisation` does.
        std: of each channel, what is then divided by.
        interpolation: BICUBIC or BILINEAR.
        windows: (N, 4) whole numbers on the CPU: height and width to which each box is resized, then top and left of
            the part of it that is its image. None: each box is resized to `size`, and all of it is.
    """
    _check_crops(images, boxes, flips)
    if min(size) < 1:
        raise ValueError(f"images are resized to one pixel or more, got {size[0]} x {size[1]}")
    if windows is None:
        windows = torch.tensor([[*size, 0, 0]]).expand(len(boxes), 4)
    else:
        _check_windows(windows, len(boxes), size)
    if interpolation not in REACHES:
        raise ValueError(f"interpolation is {interpolation}; allowed: {', '.join(map(str, REACHES))}")
    factors = summands = None
    if mean is not None and std is not None and len(mean) == len(std) == images.channels:
        factors = tuple(1 / (255 * deviation) for deviation in std)
        summands = tuple(-middle / deviation for middle, deviation in zip(mean, std, strict=True))
    elif mean is not None or std is not None:
        raise ValueError(f"mean and std are {images.channels} numbers each, or both None; got {mean} and {std}")
    dtype = torch.uint8 if factors is None else torch.float32
    out = torch.empty(len(boxes), images.channels, *size, dtype=dtype, device=images.device)
    if len(boxes):
        corners = images.addresses + (images.strides[:, 1:] * boxes[:, :2]).sum(dim=1)
        crops = torch.column_stack([corners, images.strides, boxes[:, 2:], windows, flips])
        most = float((boxes[:, 2:].double() / windows[:, :2]).max())
        _launch(crops, most, REACHES[interpolation], out, factors, summands)
    return out


def _check_crops(images: RaggedImages, boxes: Tensor, flips: Tensor) -> None:
    number = len(images.addresses)
    if boxes.dtype not in WHOLE or boxes.shape != (number, 4) or boxes.device.type != "cpu":
        raise ValueError(
            f"boxes of {number} images are ({number}, 4) of int32 or int64 on the CPU, got {tuple(boxes.shape)} of "
            f"{boxes.dtype} on {boxes.device}"
        )
    if flips.dtype != torch.bool or flips.shape != (number,) or flips.device.type != "cpu":
        raise ValueError(
            f"flips of {number} images are ({number},) of bool on the CPU, got {tuple(flips.shape)} of {flips.dtype} "
            f"on {flips.device}"
        )
    corners, extents = boxes[:, :2], boxes[:, 2:]
    outside = ((corners < 0) | (extents < 1) | (extents > images.sizes - corners)).any(dim=1)
    if outside.any():
        i = int(outside.nonzero()[0])
        raise ValueError(
            f"box {i} is not within its image: top, left, height and width {boxes[i].tolist()} of "
            f"{images.sizes[i, 0]} x {images.sizes[i, 1]} pixels (height x width)"
        )


def _check_windows(windows: Tensor, number: int, size: tuple[int, int]) -> None:
    if windows.dtype not in WHOLE or windows.shape != (number, 4) or windows.device.type != "cpu":
        raise ValueError(
            f"windows of {number} images are ({number}, 4) of int32 or int64 on the CPU, got {tuple(windows.shape)} "
            f"of {windows.dtype} on {windows.device}"
        )
    resized, corners = windows[:, :2], windows[:, 2:]
    outside = ((corners < 0) | (resized - torch.tensor(size) < corners)).any(dim=1)
    if outside.any():
        i = int(outside.nonzero()[0])
        raise ValueError(
            f"window {i} is not within its image: {size[0]} x {size[1]} pixels from top and left "
            f"{windows[i, 2:].tolist()} on, of {windows[i, 0]} x {windows[i, 1]} (height x width)"
        )


def _launch(
    crops: Tensor,
    most: float,
    reach: int,
    out: Tensor,
    factors: tuple[float, ...] | None,
    summands: tuple[float, ...] | None,
) -> None:
    """Run the kernels over the table of crops; along no axis, a crop is more than `most` times its resized size."""
    import triton  # not every build of torch brings it

    from recipes.data.resample_kernels import resample_kernel, weights_kernel

    if out.is_cuda:
        crops = crops.pin_memory().to(out.device, non_blocking=True)
    elif isinstance(resample_kernel, triton.JITFunction):  # it is none in Triton's interpreter
        raise ValueError(f"images are cropped and resized on a GPU, got some on {out.device}; move them there")
    number, channels, height, width = out.shape
    taps = 2 * math.ceil(reach * max(1, most)) + 1
    length = triton.next_power_of_2(max(height, width, BLOCK["ROWS"], BLOCK["COLUMNS"]))
    weights = torch.empty(number, 2, length * taps, dtype=torch.int16, device=out.device)
    reaches = torch.empty(number, 2, 2, length, dtype=torch.int32, device=out.device)
    precisions = torch.empty(number, 2, dtype=torch.int32, device=out.device)
    programs = number * channels * triton.cdiv(height, BLOCK["ROWS"]) * triton.cdiv(width, BLOCK["COLUMNS"])
    with torch.cuda.device_of(out):
        weights_kernel[number, 2](crops, weights, reaches, precisions, height, width, taps, SIZE=length, REACH=reach)
        resample_kernel[(programs,)](
            crops, weights, reaches, precisions, out, channels, height, width, taps, factors, summands,
            SIZE=length, **BLOCK,
        )  # fmt: skip
