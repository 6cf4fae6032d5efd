"""Which JPEG files are plain, which are baseline and whole, too, and what their headers say."""

import io
import random
import struct
from typing import Any

import pytest
from PIL import Image

from arm_zoo.images.jpeg import JpegHeader, read_baseline_header, read_header
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


def put(encoded: bytes, place: int, content: bytes) -> bytes:
    """The file with other bytes at a place, as long as before."""
    return encoded[:place] + content + encoded[place + len(content) :]


def with_frame(encoded: bytes, height: int, width: int, luma: int) -> bytes:
    """The file with another size and other sampling factors of its first component."""
    frame = encoded.index(b"\xff\xc0")
    return put(put(encoded, frame + 5, struct.pack(">HH", height, width)), frame + 11, bytes([luma]))


def rgb(width: int, height: int, **options: Any) -> bytes:
    return encode(RGB.resize((width, height)), "JPEG", **options)


TABLE, STEPS, SCAN = (JPEG.index(marker) for marker in (b"\xff\xc4", b"\xff\xdb", b"\xff\xda"))
AC_TABLE = JPEG.index(b"\xff\xc4", TABLE + 1)
RESTARTED = rgb(90, 70, restart_marker_blocks=1)
FIRST, SECOND = RESTARTED.index(b"\xff\xd0"), RESTARTED.index(b"\xff\xd1")
BASELINE = {
    "4:4:4": rgb(33, 17, subsampling="4:4:4"),
    "4:2:2": rgb(33, 17, subsampling="4:2:2"),
    "4:2:0": rgb(33, 17, subsampling="4:2:0"),
    "4:4:0": with_frame(rgb(17, 33, subsampling="4:2:2", restart_marker_blocks=2), 17, 33, 0x12),  # as many units
    "4:1:1": with_frame(rgb(17, 33, subsampling="4:2:0", restart_marker_blocks=1), 17, 33, 0x41),
    "grey": encode(GREY.resize((33, 17)), "JPEG"),
    "tables of its own": rgb(33, 17, optimize=True),
    "one colour": encode(Image.new("RGB", (33, 17)), "JPEG", optimize=True),
    "restarts in each row": rgb(33, 17, restart_marker_rows=1),
    "more restarts than names": encode(GREY.resize((33, 17)), "JPEG", restart_marker_blocks=1),
    "restarts that never come": rgb(33, 17, restart_marker_blocks=99),
}
NOT_BASELINE = {
    "progressive": PLAIN["progressive"],
    "two images": PLAIN["two images in one file"],
    "extended": put(JPEG, FRAME + 1, b"\xc1"),
    "too wide": with_frame(JPEG, 16, 65501, 0x22),
    "grey in blocks of four": with_frame(encode(GREY, "JPEG"), 16, 24, 0x22),
    "an unusual subsampling": with_frame(JPEG, 16, 24, 0x42),
    "a frame that is too long": JPEG[: FRAME + 3]
    + b"\x12"
    + JPEG[FRAME + 4 : FRAME + 19]
    + b"\0"
    + JPEG[FRAME + 19 :],
    "two components of one name": put(JPEG, FRAME + 13, b"\1"),
    "steps that are missing": put(JPEG, FRAME + 12, b"\3"),
    "steps in 16 bits": put(JPEG, STEPS + 4, b"\x10"),
    "steps that are too few": JPEG[: STEPS + 2] + b"\0\x42" + JPEG[STEPS + 4 : STEPS + 68] + JPEG[STEPS + 69 :],
    "too many short codes": put(JPEG, TABLE + 5, b"\0\5\1"),
    "too few short codes": put(JPEG, TABLE + 5, b"\0\0\6"),
    "no codes": put(JPEG, TABLE + 5, bytes(16)),
    "fewer symbols than codes": put(JPEG, TABLE + 2, b"\0\x1e")[: TABLE + 32] + JPEG[TABLE + 33 :],
    "a segment of half a table": with_segment(JPEG, 0xC4, b"\0\0\1"),
    "too long differences": put(JPEG, TABLE + 21, b"\x0c"),
    "too long coefficients": put(JPEG, AC_TABLE + 21, b"\x0b"),
    "runs of no coefficients": put(JPEG, AC_TABLE + 21, b"\x10"),
    "a table of no kind": put(JPEG, TABLE + 4, b"\2"),
    "a table that is missing": put(JPEG, SCAN + 6, b"\2"),
    "a scan of one component": put(JPEG, SCAN + 4, b"\1"),
    "a scan of another component": put(JPEG, SCAN + 5, b"\7"),
    "a scan of some coefficients": put(JPEG, SCAN + 12, b"\5"),
    "a marker in the scan": put(JPEG, SCAN + 20, b"\xff\xc4"),
    "bytes of ones only": put(JPEG, SCAN + 20, b"\xff\xff\0"),
    "two ends": JPEG + b"\xff\xd9",
    "a restart without need": put(JPEG, SCAN + 20, b"\xff\xd0"),
    "a restart too few": RESTARTED[:FIRST] + RESTARTED[FIRST + 2 :],
    "a restart too many": RESTARTED[:-2] + b"\xff\xd5\xff\xd9",
    "restarts in another order": put(put(RESTARTED, FIRST, b"\xff\xd1"), SECOND, b"\xff\xd0"),
    "two intervals": with_segment(RESTARTED, 0xDD, b"\0\1"),
    "an interval of one byte": with_segment(JPEG, 0xDD, b"\0"),
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


@pytest.mark.parametrize("kind", BASELINE)
def test_whole_baseline_files_are_known(kind: str) -> None:
    header = JpegHeader(height=17, width=33, components=1 if kind in ("grey", "more restarts than names") else 3)
    assert read_baseline_header(BASELINE[kind]) == header


@pytest.mark.parametrize("kind", NOT_BASELINE)
def test_all_other_plain_files_are_not_baseline(kind: str) -> None:
    assert read_header(NOT_BASELINE[kind]) is not None and read_baseline_header(NOT_BASELINE[kind]) is None


@pytest.mark.parametrize("kind", NOT_PLAIN)
def test_files_that_are_not_plain_are_not_baseline(kind: str) -> None:
    assert read_baseline_header(NOT_PLAIN[kind]) is None


@pytest.mark.parametrize("kind", BASELINE)
def test_what_is_baseline_in_spite_of_damage_is_shown_by_pillow(kind: str) -> None:
    draw = random.Random(kind)
    found = set()
    for _ in range(400):
        damaged = bytearray(BASELINE[kind])
        for _ in range(draw.choice((1, 2, 20))):
            place = draw.randrange(2, len(damaged) - 2)
            damaged[place : place + draw.randrange(3)] = draw.randbytes(draw.randrange(3))
        header = read_baseline_header(bytes(damaged))
        found.add(header is None)
        if header is not None:
            with Image.open(io.BytesIO(damaged)) as image:
                image.load()
                assert (image.height, image.width, len(image.getbands())) == header
    assert found == {True, False}
