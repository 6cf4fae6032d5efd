"""Tensors of images: pixel by pixel, and error by error, what Pillow shows or raises."""

import random

import numpy as np
import pytest
from PIL import Image
from torchvision.transforms.functional import pil_to_tensor

from arm_zoo.images import decode
from arm_zoo.images.decode import MAX_PIXELS, UndecodableImage, decode_image, decode_tensor
from tests.arm_zoo.images.test_jpeg import NOT_PLAIN, PLAIN
from tests.helpers.images import encode, needs_torchcodec

SIZES = (1, 1), (7, 5), (8, 8), (17, 33), (33, 17), (1, 50), (64, 48)
WRITING = (
    *({"subsampling": subsampling} for subsampling in ("4:4:4", "4:2:2", "4:2:0")),
    {"progressive": True},
    {"optimize": True, "quality": 30},
    {"restart_marker_blocks": 1},
    {"progressive": True, "restart_marker_rows": 1},
    {"keep_rgb": True},
)


def photograph(width: int, height: int) -> Image.Image:
    """Smooth colours with noise on them."""
    random_values = np.random.default_rng(width * height)
    colours = Image.fromarray(random_values.integers(0, 256, (4, 4, 3), dtype=np.uint8)).resize((width, height))
    noisy = np.asarray(colours) + random_values.normal(0, 12, (height, width, 3))
    return Image.fromarray(noisy.clip(0, 255).astype(np.uint8))


def check(encoded: bytes, mode: str = "RGB", max_pixels: int = MAX_PIXELS) -> str | None:
    """Compare; returns the message of the error if there is one."""
    try:
        expected = pil_to_tensor(decode_image(encoded, "it", mode, max_pixels))
    except UndecodableImage as error:
        with pytest.raises(UndecodableImage) as raised:
            decode_tensor(encoded, "it", mode, max_pixels)
        assert str(raised.value) == str(error)
        return str(error)
    tensor = decode_tensor(encoded, "it", mode, max_pixels)
    assert tensor.dtype == expected.dtype and tensor.shape == expected.shape and bool((tensor == expected).all())
    return None


@pytest.mark.parametrize("mode", ["RGB", "L"])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_pixels_are_those_of_pillow(size: tuple[int, int], mode: str) -> None:
    colour = photograph(*size)
    for options in WRITING:
        assert check(encode(colour, "JPEG", **options), mode) is None
    assert check(encode(colour.convert("L"), "JPEG"), mode) is None


@pytest.mark.parametrize("kind", [*PLAIN, *NOT_PLAIN])
def test_odd_files_are_as_pillow_takes_them(kind: str) -> None:
    check({**PLAIN, **NOT_PLAIN}[kind])


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"restart_marker_blocks": 2}], ids=str)
def test_damaged_files_are_as_pillow_takes_them(options: dict[str, int]) -> None:
    """Some are shown with grey parts, others are refused, and both decoders are of one mind."""
    draw = random.Random(0)
    whole = encode(photograph(40, 30), "JPEG", **options)
    errors = {check(whole[: draw.randrange(len(whole))] + draw.choice((b"", b"\xff\xd9"))) for _ in range(100)}
    for _ in range(300):
        damaged = bytearray(whole)
        for _ in range(draw.choice((1, 2, 20))):
            damaged[draw.randrange(2, len(whole))] = draw.randrange(256)
        errors.add(check(bytes(damaged), max_pixels=100_000))
    assert None in errors and len(errors) > 3


def test_large_images_are_refused_before_they_are_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode, "jpeg_decoder", lambda: pytest.fail)
    encoded = encode(photograph(20, 10), "JPEG")
    assert (
        check(encoded, max_pixels=199)
        == "it cannot be decoded: it has more than the 199 pixels that are allowed (max_pixels)"
    )


@needs_torchcodec
def test_plain_files_are_decoded_by_torchcodec(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode, "decode_image", pytest.fail)
    for kind in PLAIN:
        assert decode_tensor(PLAIN[kind], "it").shape == (3, 16, 24)


def test_pillow_decodes_without_torchcodec(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode, "jpeg_decoder", lambda: None)
    for kind in PLAIN:
        check(PLAIN[kind])
