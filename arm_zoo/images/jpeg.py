"""JPEG files that every decoder shows alike, told from their first bytes, without decoding them."""

import re
import struct
from collections.abc import Iterator
from typing import NamedTuple

_START, _END = b"\xff\xd8", b"\xff\xd9"
_FRAMES = (0xC0, 0xC1, 0xC2)  # baseline, extended and progressive; the others are lossless or coded arithmetically
_TABLES, _SCAN, _COMMENT = (0xC4, 0xDB, 0xDD), 0xDA, 0xFE
_APPLICATIONS = range(0xE0, 0xF0)  # what programs add: JFIF, EXIF, XMP, colour profiles
_EXIF_OR_XMP, _ADOBE = 0xE1, 0xEE
_MARKERS = {*_FRAMES, *_TABLES, _SCAN, _COMMENT, *_APPLICATIONS}
_SHORTEST = ((b"JFIF\0", 14), (b"Adobe", 12), (b"ICC_PROFILE\0", 14))  # in bytes, of what decoders read
_ORIENTATION, _UPRIGHT = 0x0112, (3, 1, 1)  # a tag of EXIF, and (type, count, value) of images that are not turned
_TURNED_BY_XMP = re.compile(rb'tiff:Orientation(="|>)[^1]')


class JpegHeader(NamedTuple):
    """What the frame header of a JPEG file says."""

    height: int
    width: int
    components: int  # 1: grey, 3: YCbCr


def read_header(encoded: bytes) -> JpegHeader | None:
    """The header of a plain JPEG file; None for any other bytes, which are left to Pillow.

    Plain is what is 8-bit, grey or YCbCr, upright, baseline or progressive, and neither damaged up to its first scan
    nor cut off.
    """
    if not (encoded.startswith(_START) and encoded.endswith(_END)):
        return None
    try:
        segments = list(_segments(encoded))
        (frame,) = (content for marker, content in segments if marker in _FRAMES)
        bits, height, width, components = struct.unpack_from(">BHHB", frame)
        upright = _is_upright([content for marker, content in segments if marker == _EXIF_OR_XMP])
    except (ValueError, struct.error):  # damaged, or not one frame
        return None
    known = bits == 8 and (components == 1 or (components == 3 and _is_ycbcr(frame, segments)))
    return JpegHeader(height, width, components) if known and upright and height and width else None


def _segments(encoded: bytes) -> Iterator[tuple[int, bytes]]:
    """The marker and the content of all segments before the first scan; raises ValueError or struct.error."""
    place = len(_START)
    while True:
        prefix, marker, length = struct.unpack_from(">BBH", encoded, place)
        if prefix != 0xFF or marker not in _MARKERS or length < 2:
            raise ValueError("no marker that is allowed here")
        if marker == _SCAN:
            return
        content = encoded[place + 4 : place + 2 + length]
        if marker in _APPLICATIONS and any(content.startswith(name) and len(content) < n for name, n in _SHORTEST):
            raise ValueError("a segment that is cut short")
        yield marker, content
        place += 2 + length


def _is_ycbcr(frame: bytes, segments: list[tuple[int, bytes]]) -> bool:
    """Whether three components are YCbCr: so they are if neither Adobe's segment nor their names say RGB."""
    transforms = {content[11] for marker, content in segments if marker == _ADOBE and content.startswith(b"Adobe")}
    return transforms <= {1} and frame[6::3] != b"RGB"


def _is_upright(contents: list[bytes]) -> bool:
    """Whether neither EXIF nor XMP data turn an image; raises ValueError or struct.error."""
    exif = [content for content in contents if content.startswith(b"Exif\0\0")]
    xmp = [content for content in contents if content.startswith(b"http://ns.adobe.com/")]
    if len(exif) > 1 or len(exif) + len(xmp) < len(contents) or any(map(_TURNED_BY_XMP.search, xmp)):
        return False
    return not exif or _orientations(exif[0][6:]) <= {_UPRIGHT}


def _orientations(tiff: bytes) -> set[tuple[int, ...]]:
    """(type, count, value) of the orientations in EXIF data's first directory; raises ValueError or struct.error."""
    order = {b"II*\0": "<", b"MM\0*": ">"}.get(tiff[:4])
    if order is None:
        raise ValueError("no EXIF data")
    (place,) = struct.unpack_from(f"{order}I", tiff, 4)
    (count,) = struct.unpack_from(f"{order}H", tiff, place)
    entries = (struct.unpack_from(f"{order}HHIH", tiff, place + 2 + 12 * number) for number in range(count))
    return {(kind, length, value) for tag, kind, length, value in entries if tag == _ORIENTATION}
