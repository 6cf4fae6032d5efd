"""JPEG files decoded in batches on the GPU, by NVIDIA's decoder in torchcodec."""

from collections.abc import Sequence
from io import BytesIO

import torch
from PIL import Image
from torch import Tensor


def decode(encoded: Sequence[Tensor], device: torch.device) -> list[Tensor | None]:
    """RGB images (3, H, W) of 8 bits; None for each file that the decoder refuses, which does the others no harm.

    The files are bytes in the CPU's memory. The decoder works on the current stream, and the host waits for it.
    """
    from torchcodec.decoders import decode_jpeg  # optional

    if not encoded:
        return []
    try:
        return list(decode_jpeg(list(encoded), device=device))
    except RuntimeError:  # one refused file makes the whole call fail
        half = len(encoded) // 2
        return decode(encoded[:half], device) + decode(encoded[half:], device) if half else [None]


def decoder_missing(device: torch.device) -> str | None:
    """Why torchcodec decodes no JPEG files on this device, and what to type; None if it does."""
    file = BytesIO()
    Image.new("RGB", (8, 8)).save(file, "JPEG")
    try:
        from torchcodec.decoders import decode_jpeg

        decode_jpeg(file.getvalue(), device=device)
    except (ImportError, OSError, RuntimeError) as error:
        cause = str(error).partition("\n")[0]
        return f"torchcodec does not decode on {device} ({cause}); type pip install --upgrade torchcodec"
    return None
