"""The discrete VAE (dVAE) of DALL-E, which turns an image into token indices, one for every 8x8 pixels.

`read_dvae` reads OpenAI's encoder (github.com/openai/DALL-E, modified MIT licence); `DVAE` trains a smaller encoder
together with its decoder.
"""

import re
from collections import OrderedDict
from itertools import pairwise
from pathlib import Path
from typing import Any
from urllib.parse import quote

import torch
from timm.models import checkpoint_seq
from torch import Tensor, nn
from torch.nn import functional as F

from arm_zoo.base import ZooModel
from arm_zoo.files import CheckpointError, DownloadError, StateDict
from arm_zoo.layers.init import zero_bias
from arm_zoo.layers.sizes import Device, Pair, check_positive
from arm_zoo.weights.reading import read_checkpoint

STRIDE = 8  # pixels of a token
_GROUPS = 4


def map_pixels(pixels: Tensor) -> Tensor:
    """Pixels in 0..1 as the encoder takes them, in 0.1..0.9."""
    return 0.8 * pixels + 0.1


def _conv(inputs: int, outputs: int, kernel: int) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2)


class _Block(nn.Module):
    """Four convolutions, each after a ReLU, added to a skip path that changes the width only."""

    def __init__(self, inputs: int, outputs: int, kernels: tuple[int, ...], gain: float) -> None:
        super().__init__()
        steps = pairwise([inputs, *[outputs // 4] * 3, outputs])
        parts: dict[str, nn.Module] = {}
        for number, ((before, after), kernel) in enumerate(zip(steps, kernels, strict=True), start=1):
            parts |= {f"relu_{number}": nn.ReLU(), f"conv_{number}": _conv(before, after, kernel)}
        self.id_path = nn.Identity() if inputs == outputs else _conv(inputs, outputs, 1)
        self.res_path, self.gain = nn.Sequential(OrderedDict(parts)), gain

    def forward(self, x: Tensor) -> Tensor:
        return self.id_path(x) + self.gain * self.res_path(x)


def _groups(widths: list[int], blocks: int, kernels: tuple[int, ...], resize: nn.Module) -> dict[str, nn.Module]:
    """The four groups of blocks by name, each from one width to the next; all but the last end with `resize`."""
    gain, groups = 1 / (_GROUPS * blocks) ** 2, dict[str, nn.Module]()
    for group, (inputs, outputs) in enumerate(pairwise(widths), start=1):
        parts: dict[str, nn.Module] = {
            f"block_{number}": _Block(inputs if number == 1 else outputs, outputs, kernels, gain)
            for number in range(1, blocks + 1)
        }
        groups[f"group_{group}"] = nn.Sequential(OrderedDict(parts | ({"resize": resize} if group < _GROUPS else {})))
    return groups


def _output(inputs: int, outputs: int) -> nn.Module:
    return nn.Sequential(OrderedDict(relu=nn.ReLU(), conv=_conv(inputs, outputs, 1)))


class DVAEEncoder(nn.Module):
    """Pixels (B, C, H, W), mapped by `map_pixels`, to logits over the vocabulary (B, vocab_size, H/8, W/8).

    The defaults are OpenAI's. Unlike theirs, it computes in the type of its input on GPUs too, not in float16.
    """

    def __init__(self, n_hid: int = 256, vocab_size: int = 8192, in_chans: int = 3, blocks: int = 2) -> None:
        super().__init__()
        self.vocab_size, self.in_chans = vocab_size, in_chans
        widths = [n_hid, *(n_hid * 2**group for group in range(_GROUPS))]
        parts = {"input": _conv(in_chans, n_hid, 7), **_groups(widths, blocks, (3, 3, 3, 1), nn.MaxPool2d(2))}
        self.blocks = nn.Sequential(OrderedDict(parts, output=_output(widths[-1], vocab_size)))

    def forward(self, x: Tensor) -> Tensor:
        return self.blocks(x)

    @torch.no_grad()
    def tokens(self, pixels: Tensor, grid: Pair) -> Tensor:
        """Token indices (B, rows * columns), row by row, for pixels (B, C, H, W) in 0..1.

        Images of another size than the grid's, 8 pixels for each token, are resized first: bicubic, antialiased.
        """
        size = [STRIDE * side for side in grid]
        with torch.autocast(pixels.device.type, enabled=False):  # whose rounding would choose other tokens
            pixels = pixels.float()
            if list(pixels.shape[2:]) != size:
                pixels = F.interpolate(pixels, size, mode="bicubic", antialias=True).clamp(0, 1)
            return self(map_pixels(pixels)).argmax(dim=1).flatten(1)


class DVAE(ZooModel):
    """The encoder with a decoder, to train a smaller tokenizer for small images.

    Every 8x8 pixels become one token, drawn by the Gumbel-softmax trick: the decoder gets it one-hot, and its gradient
    goes straight through to the logits. The loss is the mean squared error of the mapped pixels, plus `prior` times
    the divergence of the batch's distribution of tokens from the uniform one, which keeps the vocabulary in use.
    """

    parts_to_shard = ()

    def __init__(
        self,
        img_size: int = 64,
        in_chans: int = 3,
        n_hid: int = 32,
        vocab_size: int = 512,
        n_blocks: int = 1,
        prior: float = 1e-2,
        device: Device = None,
    ) -> None:
        """
        Args:
            img_size: pixels of a side, a multiple of 8.
            n_hid: channels of the first group, a multiple of 4; the last has eight times as many.
            vocab_size: how many tokens there are.
            n_blocks: number of blocks in each of the four groups.
            prior: weight of the divergence in the loss.
        """
        super().__init__()
        self.config = {"img_size": img_size, "in_chans": in_chans, "n_hid": n_hid, "vocab_size": vocab_size}
        self.config |= {"n_blocks": n_blocks}
        check_positive("DVAE", self.config)
        for name, unit in (("img_size", STRIDE), ("n_hid", 4)):
            if self.config[name] % unit:
                raise ValueError(f"DVAE: {name} must be a multiple of {unit}, got {self.config[name]}")
        self.in_chans, self.prior = in_chans, prior
        with torch.device(device or "cpu"):
            self.encoder = DVAEEncoder(n_hid, vocab_size, in_chans, n_blocks)
            widths = [n_hid // 2, *(n_hid * 2**group for group in reversed(range(_GROUPS)))]
            groups = _groups(widths, n_blocks, (1, 3, 3, 3), nn.Upsample(scale_factor=2))
            parts = {"input": _conv(vocab_size, widths[0], 1), **groups}
            self.decoder = nn.Sequential(OrderedDict(parts, output=_output(widths[-1], in_chans)))
        self.init_weights(needs_reset=False)

    def _init_own_weights(self) -> None:
        for part in self.modules():
            if isinstance(part, nn.Conv2d):
                nn.init.normal_(part.weight, std=part.weight[0].numel() ** -0.5)
                zero_bias(part)

    def hub_config(self) -> dict[str, Any]:
        """The content of config.json."""
        return {"dvae": self.config}

    def input_size(self) -> tuple[int, int, int]:
        """Channels, height and width of the images that it is trained on."""
        return self.in_chans, self.config["img_size"], self.config["img_size"]

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Pixels (B, C, H, W) in 0..1 -> (loss, decoded images, mean probability of each token (vocab_size,))."""
        target = map_pixels(pixels)
        logits = self._run(self.encoder.blocks, target).float()
        decoded = self._run(self.decoder, F.gumbel_softmax(logits, tau=1.0, hard=True, dim=1)).float()
        use = logits.softmax(dim=1).mean(dim=(0, 2, 3))
        divergence = (use * (use.clamp_min(1e-10) * len(use)).log()).sum()
        return F.mse_loss(decoded, target) + self.prior * divergence, decoded, use

    def _run(self, parts: nn.Sequential, x: Tensor) -> Tensor:
        return checkpoint_seq(parts, x) if self.grad_checkpointing else parts(x)


def fetched(where: str) -> Path:
    """The file at `where`, a path or an http(s) address; a file from an address is fetched once and kept."""
    if not where.startswith(("https://", "http://")):
        return Path(where)
    from huggingface_hub import cached_assets_path
    from huggingface_hub.utils import WeakFileLock

    folder = cached_assets_path("arm-zoo", "dvae")
    file = folder / quote(where, safe="")
    with WeakFileLock(folder / ".lock"):
        try:
            if not file.is_file():
                torch.hub.download_url_to_file(where, str(file))  # which appears once it is whole
        except OSError as error:  # as urllib's are
            raise DownloadError(f"cannot fetch {where}: {error}; fetch it yourself and name the file") from error
    return file


def read_dvae(file: str | Path) -> DVAEEncoder:
    """The encoder in a file: OpenAI's pickled module, a state dict under its names, or a `DVAE` of ours.

    No code in the file is run. Sizes are told by the tensors; CheckpointError if these are not an encoder's.
    """
    tensors = _named(read_checkpoint(file))
    try:
        first, last = tensors["blocks.input.weight"], tensors["blocks.output.conv.weight"]
        blocks = len({name.split(".")[2] for name in tensors if name.startswith("blocks.group_1.block")})
        with torch.device("meta"):
            encoder = DVAEEncoder(len(first), len(last), first.shape[1], blocks)
        encoder.load_state_dict(tensors, assign=True)
    except (KeyError, RuntimeError, ValueError, ZeroDivisionError) as error:
        reason = " ".join(str(error).split())[:300]
        raise CheckpointError(f"{file} is no encoder of a dVAE: {type(error).__name__}: {reason}") from error
    return encoder.requires_grad_(False).eval()


def _named(tensors: StateDict) -> StateDict:
    """The encoder's tensors under our names; OpenAI calls them w and b, and a `DVAE` also has its decoder's."""
    own = {name.removeprefix("encoder."): value for name, value in tensors.items() if not name.startswith("decoder.")}
    return {re.sub(r"\.w$", ".weight", re.sub(r"\.b$", ".bias", name)): value.float() for name, value in own.items()}
