"""Tells from its bytes, without decoding it, whether a JPEG file looks alike in every decoder."""

import re
import struct
from collections.abc import Iterator
from itertools import chain
from typing import NamedTuple

_START, _END = b"\xff\xd8", b"\xff\xd9"
_BASELINE = 0xC0
_FRAMES = (_BASELINE, 0xC1, 0xC2)  # and extended and progressive; the others are lossless or coded arithmetically
_HUFFMAN, _SCAN, _QUANTISATION, _RESTARTS, _COMMENT = 0xC4, 0xDA, 0xDB, 0xDD, 0xFE
_APPLICATIONS = range(0xE0, 0xF0)  # what programs add: JFIF, EXIF, XMP, colour profiles
_EXIF_OR_XMP, _ADOBE = 0xE1, 0xEE
_MARKERS = {*_FRAMES, _HUFFMAN, _SCAN, _QUANTISATION, _RESTARTS, _COMMENT, *_APPLICATIONS}
_SHORTEST = ((b"JFIF\0", 14), (b"Adobe", 12), (b"ICC_PROFILE\0", 14))  # in bytes, of what decoders read
_ORIENTATION, _UPRIGHT = 0x0112, (3, 1, 1)  # a tag of EXIF, and (type, count, value) of images that are not turned
# Sampling factors of all components: grey, 4:4:4, 4:4:0, 4:2:2, 4:2:0 and 4:1:1.
_SAMPLINGS = (b"\x11", *(bytes([luma, 0x11, 0x11]) for luma in (0x11, 0x12, 0x21, 0x22, 0x41)))
_DC_SYMBOLS = bytes(range(12))  # numbers of bits of a difference
_AC_SYMBOLS = bytes([0x00, 0xF0, *(zeros << 4 | bits for zeros in range(16) for bits in range(1, 11))])
_AC = 0x10  # added to the numbers of Huffman tables for AC
_SYMBOLS = {0: _DC_SYMBOLS, 1: _DC_SYMBOLS, _AC: _AC_SYMBOLS, _AC + 1: _AC_SYMBOLS}  # of baseline's Huffman tables
_LONGEST_SIDE = 65500  # that libjpeg allows
_MARKER_IN_SCAN = re.compile(rb"\xff([^\0])", re.DOTALL)
_TURNED_BY_XMP = re.compile(rb'tiff:Orientation(="|>)[^1]')


class JpegHeader(NamedTuple):
    """What the frame header of a JPEG file says."""

    height: int
    width: int
    components: int  # 1: grey, 3: YCbCr


def read_header(encoded: bytes) -> JpegHeader | None:
    """The header of a plain JPEG file; None for any other bytes, which are left to Pillow.

    Plain means 8-bit, grey or YCbCr, upright, baseline or progressive, not cut off, and not damaged before its first
    scan.
    """
    if not (encoded.startswith(_START) and encoded.endswith(_END)):
        return None
    try:
        segments = list(_segments(encoded))
        (frame,) = (content for marker, content in segments if marker in _FRAMES)
        bits, height, width, components = struct.unpack_from(">BHHB", frame)
        upright = _is_upright(_contents(segments, _EXIF_OR_XMP))
    except (ValueError, struct.error):  # damaged, or not one frame
        return None
    known = bits == 8 and (components == 1 or (components == 3 and _is_ycbcr(frame, segments)))
    return JpegHeader(height, width, components) if known and upright and height and width else None


def read_baseline_header(encoded: bytes) -> JpegHeader | None:
    """The header of a plain JPEG file that is fit for decoders that check little themselves; None for any other bytes.

    Such a file is baseline, in one scan, with one of the usual subsamplings, with tables as encoders write them, and
    without any marker in its scan that does not belong there. Wrong bits in the scan are not found: libjpeg raises
    nothing for them either.
    """
    header = read_header(encoded)
    if header is None or max(header.height, header.width) > _LONGEST_SIDE:
        return None
    segments = list(_segments(encoded))
    try:
        sampling = _baseline_sampling(segments)
        markers = _restart_markers(header, sampling, _contents(segments, _RESTARTS)) + _END[1:]
    except (ValueError, struct.error):
        return None
    data = len(_START) + sum(4 + len(content) for _, content in segments)
    return header if b"".join(_MARKER_IN_SCAN.findall(encoded, data)) == markers else None


def _baseline_sampling(segments: list[tuple[int, bytes]]) -> bytes:
    """The components' sampling factors; raises ValueError if the frame, scan or tables are not those of baseline."""
    frame, (_, scan) = b"".join(_contents(segments, _BASELINE)), segments[-1]
    names, sampling, quantisation = (frame[first::3] for first in (6, 7, 8))
    if sampling not in _SAMPLINGS or len(frame) != 6 + 3 * frame[5] or len(set(names)) < len(names):
        raise ValueError("not a baseline frame")
    selectors = scan[2:-3:2]
    if scan != bytes([len(names), *chain(*zip(names, selectors, strict=False)), 0, 63, 0]):
        raise ValueError("not a scan of all components")
    huffman = {table for content in _contents(segments, _HUFFMAN) for table in _huffman_tables(content)}
    used = {selector >> 4 for selector in selectors} | {_AC | selector & 15 for selector in selectors}
    if not used <= huffman or not set(quantisation) <= _quantisation_tables(_contents(segments, _QUANTISATION)):
        raise ValueError("a table is missing")
    return sampling


def _huffman_tables(content: bytes) -> Iterator[int]:
    """The number of each Huffman table of a segment, from 16 on for AC; raises ValueError if one is damaged.

    Encoders leave no code free but the longest one, of ones only (ITU-T T.81, K.2).
    """
    while content:
        table, lengths = content[0], content[1:17].rstrip(b"\0")
        end, next_code = 17 + sum(lengths), 0
        symbols = content[17:end]
        for codes in lengths:
            next_code = 2 * next_code + codes
        complete = lengths and next_code == (1 << len(lengths)) - 1
        if not complete or len(content) < end or symbols.translate(None, _SYMBOLS.get(table, b"")):
            raise ValueError("a damaged Huffman table")
        yield table
        content = content[end:]


def _quantisation_tables(contents: list[bytes]) -> set[int]:
    """The numbers of the tables, of 64 steps in 8 bits each; raises ValueError if one is damaged."""
    tables = {content[first] for content in contents for first in range(0, len(content), 65)}
    if any(len(content) % 65 for content in contents) or not tables <= {0, 1, 2, 3}:
        raise ValueError("a damaged quantisation table")
    return tables


def _restart_markers(header: JpegHeader, sampling: bytes, intervals: list[bytes]) -> bytes:
    """The second bytes of the restart markers that an image of this size has; raises struct.error."""
    (interval,) = struct.unpack(">H", b"".join(intervals) or bytes(2))
    width, height = 8 * (sampling[0] >> 4), 8 * (sampling[0] & 15)  # in pixels, of a minimum coded unit
    units = -(-header.width // width) * -(-header.height // height)
    return bytes(0xD0 + number % 8 for number in range((units - 1) // interval)) if interval else b""


def _contents(segments: list[tuple[int, bytes]], kind: int) -> list[bytes]:
    return [content for marker, content in segments if marker == kind]


def _segments(encoded: bytes) -> Iterator[tuple[int, bytes]]:
    """Marker and content of all segments up to the first scan's header; raises ValueError or struct.error."""
    place = len(_START)
    while True:
        prefix, marker, length = struct.unpack_from(">BBH", encoded, place)
        if prefix != 0xFF or marker not in _MARKERS or length < 2:
            raise ValueError("no marker that is allowed here")
        content = encoded[place + 4 : place + 2 + length]
        if marker in _APPLICATIONS and any(content.startswith(name) and len(content) < n for name, n in _SHORTEST):
            raise ValueError("a segment that is cut short")
        yield marker, content
        if marker == _SCAN:
            return
        place += 2 + length


def _is_ycbcr(frame: bytes, segments: list[tuple[int, bytes]]) -> bool:
    """Whether three components are YCbCr: so they are if neither Adobe's segment nor their names say RGB."""
    transforms = {content[11] for content in _contents(segments, _ADOBE) if content.startswith(b"Adobe")}
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
