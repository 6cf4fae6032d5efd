"""Which JPEG files are plain, and what their headers say."""

import random
import struct

import pytest
from PIL import Image

from arm_zoo.images.jpeg import JpegHeader, read_header
from tests.helpers.images import encode, pixels

RGB = Image.fromarray(pixels())
GREY = RGB.convert("L")


def exif(orientation: int = 1, maker: str = "M") -> Image.Exif:
    tags = Image.Exif()
    tags[0x010F], tags[0x0112] = maker, orientation
    return tags


def with_segment(encoded: bytes, marker: int, content: bytes) -> bytes:
    """The file with a segment right after its start."""
    return encoded[:2] + struct.pack(">BBH", 0xFF, marker, len(content) + 2) + content + encoded[2:]


def tiff(order: str, kind: int = 3, count: int = 1, value: int = 1) -> bytes:
    """EXIF data whose directory has the orientation only."""
    start = b"Exif\0\0" + {"<": b"II*\0", ">": b"MM\0*"}[order]
    return start + struct.pack(f"{order}IHHHIHxxI", 8, 1, 0x0112, kind, count, value, 0)


def xmp(orientation: str) -> bytes:
    return b"http://ns.adobe.com/xap/1.0/\0<rdf:Description tiff:Orientation" + orientation.encode() + b"/>"


JPEG = encode(RGB, "JPEG")
FRAME = JPEG.index(b"\xff\xc0")
PLAIN = {
    "colour": JPEG,
    "colour in full": encode(RGB, "JPEG", subsampling="4:4:4"),
    "progressive": encode(RGB, "JPEG", progressive=True),
    "with restart markers": encode(RGB, "JPEG", restart_marker_blocks=1),
    "with a comment, a profile and EXIF data": encode(RGB, "JPEG", comment=b"x", icc_profile=b"x" * 9, exif=exif()),
    "upright, low byte first": with_segment(JPEG, 0xE1, tiff("<")),
    "upright, high byte first": with_segment(JPEG, 0xE1, tiff(">")),
    "upright as XMP says": with_segment(JPEG, 0xE1, xmp('="1"')),
    "Adobe's YCbCr": with_segment(JPEG, 0xEE, b"Adobe\0d\0\0\0\0\1"),
    "two images in one file": encode(RGB, "MPO", save_all=True, append_images=[GREY]),
}
NOT_PLAIN = {
    "PNG": encode(RGB, "PNG"),
    "text": b"<html>404</html>",
    "empty": b"",
    "start and end only": b"\xff\xd8\xff\xd9",
    "cut off": JPEG[:-20],
    "cut off in the header": JPEG[:100] + b"\xff\xd9",
    "with bytes after the end": JPEG + b"\0",
    "CMYK": encode(RGB.convert("CMYK"), "JPEG"),
    "RGB": encode(RGB, "JPEG", keep_rgb=True),
    "Adobe's RGB": with_segment(JPEG, 0xEE, b"Adobe\0d\0\0\0\0\0"),
    "Adobe's cut short": with_segment(JPEG, 0xEE, b"Adobe\0d"),
    "turned": encode(RGB, "JPEG", exif=exif(6)),
    "turned, low byte first": with_segment(JPEG, 0xE1, tiff("<", value=3)),
    "turned as XMP says": with_segment(JPEG, 0xE1, xmp('="6"')),
    "turned as XMP says in another way": with_segment(JPEG, 0xE1, xmp(">8<")),
    "an orientation of four bytes": with_segment(JPEG, 0xE1, tiff(">", kind=4)),
    "EXIF data twice": with_segment(encode(RGB, "JPEG", exif=exif()), 0xE1, tiff("<")),
    "EXIF data that lead nowhere": with_segment(JPEG, 0xE1, b"Exif\0\0II*\0\xff\xff\xff\xff"),
    "EXIF data that are none": with_segment(JPEG, 0xE1, b"Exif\0\0garbage!"),
    "12 bits": JPEG[: FRAME + 4] + b"\x0c" + JPEG[FRAME + 5 :],
    "coded arithmetically": JPEG[: FRAME + 1] + b"\xc9" + JPEG[FRAME + 2 :],
    "without height": JPEG[: FRAME + 5] + b"\0\0" + JPEG[FRAME + 7 :],
    "two frames": JPEG[:FRAME] + JPEG[FRAME : FRAME + 19] + JPEG[FRAME:],
    "garbage between segments": JPEG[:FRAME] + b"??" + JPEG[FRAME:],
}


@pytest.mark.parametrize("kind", PLAIN)
def test_plain_files_tell_their_size(kind: str) -> None:
    assert read_header(PLAIN[kind]) == JpegHeader(height=16, width=24, components=3)


def test_grey_files_have_one_component() -> None:
    assert read_header(encode(GREY.resize((33, 17)), "JPEG")) == JpegHeader(height=17, width=33, components=1)


@pytest.mark.parametrize("kind", NOT_PLAIN)
def test_everything_else_is_not_plain(kind: str) -> None:
    assert read_header(NOT_PLAIN[kind]) is None


def test_garbage_raises_nothing() -> None:
    draw = random.Random(0)
    whole = encode(RGB, "JPEG", exif=exif())
    found = set()
    for _ in range(2000):
        damaged = bytearray(whole)
        for _ in range(draw.choice((1, 2, 8))):
            damaged[draw.randrange(2, len(damaged) - 2)] = draw.randrange(256)
        found.add(read_header(bytes(damaged)) is None)
    assert found == {True, False}  # damage of the header is told, that of the pixels is not
