"""JPEG files decoded in batches on the GPU, by NVIDIA's decoder in torchcodec."""

import re
from collections.abc import Sequence
from io import BytesIO

import torch
from PIL import Image
from torch import Tensor

_OUT_OF_MEMORY = re.compile(r"memory|nvjpeg.*: 5\b", re.IGNORECASE)  # PyTorch's words, NVJPEG_STATUS_ALLOCATOR_FAILURE


def decode(encoded: Sequence[Tensor], device: torch.device) -> list[Tensor | None]:
    """RGB images (3, H, W) of 8 bits; None for each file that the decoder refuses, which does the others no harm.

    The files are bytes in the CPU's memory. The decoder works on the current stream, and the host waits for it. It
    checks little: only files that `arm_zoo.images.jpeg.read_baseline_header` knows are for it, as others may be shown
    wrong, take fifty times as long (progressive ones), or not come back (damaged ones). Raises RuntimeError if the
    GPU's memory does not suffice.
    """
    from torchcodec.decoders import decode_jpeg  # optional

    if not encoded:
        return []
    try:
        return list(decode_jpeg(list(encoded), device=device))
    except RuntimeError as error:  # one refused file makes the whole call fail
        if _OUT_OF_MEMORY.search(str(error)):
            raise
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
