"""Segmentation heads on the feature maps of a backbone, and the segmentation of a whole image by windows."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

FPN_WIDTH = 128  # channels of the pyramid


class LinearHead(nn.Module):
    """The last map (B, C, h, w) -> logits (B, num_classes, h, w): batch norm and a linear layer, as DINOv2's."""

    def __init__(self, channels: Sequence[int], reductions: Sequence[int], num_classes: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(channels[-1])
        self.head = nn.Conv2d(channels[-1], num_classes, 1)

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        return self.head(self.norm(maps[-1]))


class FPNHead(nn.Module):
    """Maps (B, C_i, h_i, w_i) -> logits (B, num_classes, h, w) at the size of the finest: a feature pyramid network.

    Each map goes to one width, coarser ones are added to finer ones (arXiv:1612.03144), and the finest gives the
    logits. Of a plain backbone, whose maps have one size, the first become finer and the last coarser, as in BEiT
    (arXiv:2106.08254): four maps have 4, 2, 1 and 1/2 times the size.
    """

    def __init__(self, channels: Sequence[int], reductions: Sequence[int], num_classes: int) -> None:
        super().__init__()
        plain = len(set(reductions)) == 1
        doublings = [len(channels) - 2 - place if plain else 0 for place in range(len(channels))]
        self.rescale = nn.ModuleList(map(_rescaling, channels, doublings))
        self.lateral = nn.ModuleList(nn.Conv2d(width, FPN_WIDTH, 1) for width in channels)
        self.smooth = nn.Sequential(
            nn.Conv2d(FPN_WIDTH, FPN_WIDTH, 3, padding=1, bias=False), nn.BatchNorm2d(FPN_WIDTH), nn.ReLU()
        )
        self.head = nn.Conv2d(FPN_WIDTH, num_classes, 1)

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        levels = [lateral(rescale(x)) for lateral, rescale, x in zip(self.lateral, self.rescale, maps, strict=True)]
        x = levels[-1]
        for level in reversed(levels[:-1]):
            x = level + F.interpolate(x, level.shape[2:], mode="bilinear")
        return self.head(self.smooth(x))


def _rescaling(channels: int, doublings: int) -> nn.Module:
    """A layer that makes a map 2 ** doublings times as high and as wide."""
    if doublings <= 0:
        return nn.MaxPool2d(2**-doublings, ceil_mode=True) if doublings else nn.Identity()
    doubling: list[nn.Module] = [nn.ConvTranspose2d(channels, channels, 2, stride=2) for _ in range(doublings)]
    return nn.Sequential(*[layer for upsample in doubling for layer in (upsample, nn.GELU())][:-1])


HEADS = {"linear": LinearHead, "fpn": FPNHead}


def starts(length: int, window: int) -> list[int]:
    """Where windows begin that cover a length, each at most two thirds of a window after the one before it."""
    step = max(1, window * 2 // 3)
    return sorted({min(start, max(0, length - window)) for start in range(0, length, step)})


@torch.no_grad()
def segment(
    model: nn.Module, image: Tensor, window: tuple[int, int], mean: Sequence[float], std: Sequence[float]
) -> Tensor:
    """Classes (H, W) of the pixels of an image (3, H, W), uint8, on the model's device.

    The image is resized so that it just covers a window, the logits of overlapping windows are averaged, and brought
    to the image's size before the most probable class is taken.
    """
    device = next(model.parameters()).device
    height, width = image.shape[1:]
    scale = max(window[0] / height, window[1] / width)
    size = max(window[0], round(height * scale)), max(window[1], round(width * scale))
    values = image.to(device)[None].float() / 255
    if size != (height, width):
        values = F.interpolate(values, size, mode="bilinear", antialias=True)
    means, stds = (torch.tensor(numbers, device=device)[:, None, None] for numbers in (mean, std))
    values = (values - means) / stds
    windows = [(top, left) for top in starts(size[0], window[0]) for left in starts(size[1], window[1])]
    sums, counts = torch.zeros(1, 1, *size, device=device), torch.zeros(size, device=device)
    for top, left in windows:
        place = (..., slice(top, top + window[0]), slice(left, left + window[1]))
        logits = model(values[place]).float()
        if sums.shape[1] != logits.shape[1]:  # the first
            sums = sums.repeat(1, logits.shape[1], 1, 1)
        sums[place] += logits
        counts[place] += 1
    return F.interpolate(sums / counts, (height, width), mode="bilinear")[0].argmax(dim=0)
