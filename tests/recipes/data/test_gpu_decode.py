"""Batches of JPEG files on a device: what is refused does no harm to the rest."""

import io
import sys
from types import SimpleNamespace
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from recipes.data.gpu_decode import THREADS, Decoder, decode, decoder_missing
from tests.helpers.images import encode, jpeg, needs_torchcodec, pixels

CPU = torch.device("cpu")
DEVICES = [
    pytest.param(CPU, id="cpu"),
    pytest.param(
        torch.device("cuda"),
        id="cuda",
        marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")],
    ),
]


def encoded(content: bytes) -> Tensor:
    return torch.tensor(list(content), dtype=torch.uint8)


@needs_torchcodec
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("damaged", [(), (0,), (6,), (1, 2, 5), range(7)], ids=str)
def test_damaged_files_are_none_and_their_neighbours_unharmed(device: torch.device, damaged: tuple[int, ...]) -> None:
    contents = [encode(Image.fromarray(pixels(number)), "JPEG", subsampling="4:4:4") for number in range(7)]
    files = [encoded(content[:300] if number in damaged else content) for number, content in enumerate(contents)]
    for number, image in enumerate(decode(files, device)):
        if number in damaged:
            assert image is None
        else:
            expected = np.asarray(Image.open(io.BytesIO(contents[number])))
            assert image is not None and image.device.type == device.type
            assert np.abs(image.permute(1, 2, 0).cpu().numpy().astype(int) - expected).max() <= 1


@needs_torchcodec
@pytest.mark.parametrize("device", DEVICES)
def test_grey_files_are_rgb_and_sizes_may_differ(device: torch.device) -> None:
    grey = encode(Image.fromarray(pixels()).convert("L").resize((33, 17)), "JPEG")
    images = decode([encoded(jpeg()), encoded(grey)], device)
    assert [tuple(image.shape) for image in images if image is not None] == [(3, 16, 24), (3, 17, 33)]
    assert decode([], device) == []


@needs_torchcodec
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("number", [0, 1, THREADS - 1, THREADS, 3 * THREADS + 1])
def test_batches_that_are_decoded_meanwhile_are_those_decoded_at_once(device: torch.device, number: int) -> None:
    """Also while the stream of the caller is busy, and their memory is wanted by the next batch."""
    decoder = Decoder(device)
    content = [[encoded(jpeg(batch * 100 + place)) for place in range(number)] for batch in range(6)]
    expected = [[image.cpu() for image in decode(files, device) if image is not None] for files in content]
    begun, shown = decoder.begin(content[0]), []
    for following in [*content[1:], []]:
        if device.type == "cuda":
            torch.cuda._sleep(20_000_000)  # clock cycles: about 10 ms
        images, begun = begun(), decoder.begin(following)
        shown.append([image.clone() for image in images if image is not None])
    for one, two in zip(expected, shown, strict=True):
        assert len(one) == len(two) == number
        assert all(torch.equal(image, copy.cpu()) for image, copy in zip(one, two, strict=True))


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        RuntimeError("CUDA error: out of memory"),
        RuntimeError("nvjpegDecode failed: 5"),
    ],
    ids=str,
)
def test_want_of_memory_is_no_damage_of_files(monkeypatch: pytest.MonkeyPatch, error: RuntimeError) -> None:
    decoders = SimpleNamespace(decode_jpeg=Mock(side_effect=error))
    monkeypatch.setitem(sys.modules, "torchcodec.decoders", decoders)
    with pytest.raises(RuntimeError) as raised:
        decode([encoded(jpeg())] * 2, CPU)
    assert raised.value is error


def test_a_missing_decoder_is_told_with_what_to_type(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchcodec.decoders", None)
    missing = decoder_missing(CPU)
    assert missing is not None and "torchcodec" in missing and "type pip install --upgrade torchcodec" in missing


@needs_torchcodec
def test_the_decoder_of_the_cpu_is_found() -> None:
    assert decoder_missing(CPU) is None


@needs_torchcodec
def test_a_device_that_is_not_there_is_told() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    assert "does not decode on cuda (" in str(decoder_missing(torch.device("cuda")))
