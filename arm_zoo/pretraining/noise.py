"""Random numbers that depend on seeds alone, so that they are the same on every device."""

import torch
from torch import Tensor


def noise(seeds: Tensor, count: int) -> Tensor:
    """Random numbers (B, count), int64, for seeds (B,), int64: number i is the hash of i plus the seed's own hash."""
    return mixed_bits(mixed_bits(seeds)[:, None] + torch.arange(count, device=seeds.device))


def mixed_bits(x: Tensor) -> Tensor:
    """The output function of the generator SplitMix64 (Steele, Lea and Flood, 2014), for numbers in int64."""
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB), (31, 1)):
        shifted = x >> shift & 2 ** (64 - shift) - 1  # a logical shift, which fills up with zeros
        x = (x ^ shifted) * (factor - 2**64 if factor >= 2**63 else factor)
    return x


def drawn_seeds(images: Tensor) -> Tensor:
    """A seed (B,), int64, for each image, drawn from PyTorch's generator."""
    return torch.randint(2**63 - 1, (len(images),), device=images.device)
