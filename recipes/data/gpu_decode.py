"""JPEG files decoded in batches on the GPU, by NVIDIA's decoder in torchcodec."""

import re
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO
from math import ceil

import torch
from PIL import Image
from torch import Tensor

_OUT_OF_MEMORY = re.compile(r"memory|nvjpeg.*: 5\b", re.IGNORECASE)  # PyTorch's words, NVJPEG_STATUS_ALLOCATOR_FAILURE
# Parts of a batch that are decoded at a time, each by a thread: the decoder waits for its small kernels one by one,
# which beside training takes several times as long as the decoding. A thread uses some 14 streams of nvJPEG's. With
# more than two threads, streams outnumber the GPU's 32 queues, and a call of the host for a stream that shares the
# queue of the training waits until the step that is running has ended.
THREADS = 2


class Decoder:
    """Decodes batches while its caller does other things.

    Each thread has a stream on which nothing else runs, and what it has made is not given anew to others before the
    caller's stream is done with it: the GPU's JPEG engine writes to memory at once, whatever is still to run on the
    stream of its caller, and torchcodec therefore waits for that stream (nvJPEG 12.3 to 13.2).
    """

    def __init__(self, device: torch.device) -> None:
        self._device, self._threads = device, ThreadPoolExecutor(THREADS, "decode")
        on_gpu = device.type == "cuda"
        self._streams = [torch.cuda.Stream(device, priority=-1) if on_gpu else None for _ in range(THREADS)]

    def begin(self, encoded: Sequence[Tensor]) -> Callable[[], list[Tensor | None]]:
        """Begin with files as `decode` takes them; what is given waits for its result, for the current stream."""
        size = ceil(len(encoded) / THREADS) or 1
        parts = [encoded[start : start + size] for start in range(0, len(encoded), size)]
        begun = [self._threads.submit(self._decode, *each) for each in zip(parts, self._streams, strict=False)]

        def result() -> list[Tensor | None]:
            images = []
            for part, made in (future.result() for future in begun):
                if made is not None:
                    stream = torch.cuda.current_stream(self._device)
                    stream.wait_event(made)
                    for image in part:
                        if image is not None:
                            image.record_stream(stream)
                images += part
            return images

        return result

    def _decode(
        self, encoded: Sequence[Tensor], stream: torch.cuda.Stream | None
    ) -> tuple[list[Tensor | None], torch.cuda.Event | None]:
        with torch.cuda.stream(stream):  # None: as everywhere
            return decode(encoded, self._device), None if stream is None else stream.record_event()


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
