"""The image formats that are read, the limits on an image's size, and the headers of image files."""

from __future__ import annotations

import io
import re
import struct
import warnings
from contextlib import suppress
from dataclasses import dataclass
from typing import BinaryIO

from gfldeploy.errors import DataError, reading

# What OpenCV reads as ordinary pixels. Its formats of scene light (.hdr, .exr, .pfm) would lose all above white.
IMAGE_SUFFIXES = frozenset(
    {
        *(".avif", ".bmp", ".dib", ".gif", ".j2k", ".jfif", ".jp2", ".jpe", ".jpeg", ".jpg", ".pbm", ".pgm", ".png"),
        *(".pnm", ".ppm", ".ras", ".sr", ".tif", ".tiff", ".webp"),
    }
)
# Of one image or video frame, by its header, before memory is taken for it: 400 MB as RGB, more than cameras make.
MAX_PIXELS = 1 << 27
# Of one image file.
MAX_FILE_BYTES = 1 << 30
_MOST_PROGRESSIVE_PIXELS = MAX_PIXELS * 2 // 3
# Pixels times scans of one JPEG: each scan goes over all pixels, and a few bytes make one.
_MOST_SCANNED = 1 << 32
_ORDINARY_SCANS = 16
# Segments of a JPEG, chunks of a PNG or WebP: millions of empty ones keep whoever reads them busy for a minute.
_MOST_SEGMENTS, _SEGMENT_BYTES = 10_000, 1 << 10
# A TIFF's tile may be larger than the image.
_MOST_TILE_PIXELS = 1 << 24
_MOST_TIFF_ENTRIES = 1000
_MOST_EXIF = 1 << 20
_JPEG_HEADERS = (1 << 15, 1 << 18)  # nearly all JPEGs have all but the pixels in so many bytes
_PILLOW = ("AVIF", "BMP", "DIB", "GIF", "JPEG2000", "PPM", "SUN")
_TURNED = range(5, 9)  # EXIF orientations that exchange height and width
_ORIENTATION = 0x0112
_REMEDY = "Convert it to JPEG or PNG, or remove it from the data."

JPEG_START = b"\xff\xd8\xff"
PNG_START = b"\x89PNG\r\n\x1a\n"
# Inside entropy-coded JPEG data, 0xFF is followed by 0x00 (a stuffed byte), a restart marker or another 0xFF (fill);
# anything else is the next marker segment (ITU-T T.81, B.1.1).
_JPEG_MARKER = re.compile(rb"\xff[^\x00\xd0-\xd7\xff]")
_JPEG_BARE = {0x01, *range(0xD0, 0xD9)}  # markers without a length: TEM, RST0-7, SOI
_JPEG_FRAMES = {*range(0xC0, 0xD0)} - {0xC4, 0xC8, 0xCC}  # SOF0-15; the others are DHT, JPG, DAC
_JPEG_PROGRESSIVE = (0xC2, 0xC6, 0xCA, 0xCE)  # the decoder keeps all coefficients until the end
_JPEG_SCAN, _JPEG_END, _JPEG_APP1 = 0xDA, 0xD9, 0xE1


@dataclass(frozen=True)
class Header:
    """What a file says of its image: the `kind`, such as "JPEG", and height and width in pixels as stored.

    `turned`: whether EXIF exchanges the two; None if only decoding tells. `complete`: whether the file reaches the end
    of the image, as far as its structure shows.
    """

    kind: str
    height: int
    width: int
    turned: bool | None = False
    complete: bool = True


def read_header(file: BinaryIO, what: object, whole: bool = True) -> Header:
    """The header of an image file, which `what` names. `whole`: look for the end of a JPEG's data too.

    Raises `DataError` for other files, and for an image that is too large: more than `MAX_PIXELS`, or a JPEG of so many
    scans or a TIFF of such tiles that decoding would take minutes or gigabytes.
    """
    with reading(what, DataError, _REMEDY):
        header = _header(file, whole)
    if header is None:
        raise DataError(f"{what} is damaged or not an image that OpenCV reads", _REMEDY)
    if min(header.height, header.width) < 1:
        raise DataError(f"{what} is damaged: its header says {header.width} x {header.height} px", _REMEDY)
    if header.height * header.width > MAX_PIXELS:
        raise DataError(
            f"{what} is too large: its header says {header.width} x {header.height} px, and at most "
            f"{MAX_PIXELS / 1e6:.0f} million pixels are read",
            "Scale it down, or cut it into tiles.",
        )
    return header


def _header(file: BinaryIO, whole: bool) -> Header | None:
    start = _at(file, 0, 30)
    if start.startswith(JPEG_START):
        for count in () if whole else _JPEG_HEADERS:
            if found := _jpeg(_at(file, 0, count), False):
                return found
        return _jpeg(_at(file, 0, -1), True)
    if start.startswith(PNG_START):
        return _png(file, start)
    if start.startswith(b"RIFF") and start[8:12] == b"WEBP":
        return _webp(file, start)
    if start[:4] in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"):
        return _tiff(file, start)
    return _by_pillow(file)


def _at(file: BinaryIO, place: int, count: int) -> bytes:
    """So many bytes from this place, fewer at the end of the file; -1: all."""
    file.seek(place)
    return file.read(count)


def _jpeg(data: bytes, whole: bool) -> Header | None:
    """Marker syntax: ITU-T T.81, annex B. An embedded thumbnail has markers too: segments are skipped whole."""
    position, scans, segments, size, turned, ended, progressive = 2, 0, 0, None, None, False, False
    while (found := _JPEG_MARKER.search(data, position)) is not None:
        _check_segments(segments := segments + 1, position)
        marker = data[found.end() - 1]
        if ended := marker == _JPEG_END:
            break
        position = found.end()
        if marker in _JPEG_BARE:
            continue
        if marker in _JPEG_FRAMES and size is None:
            size = struct.unpack_from(">HH", data, position + 3) if position + 7 <= len(data) else None
            progressive = marker in _JPEG_PROGRESSIVE
        elif marker == _JPEG_APP1 and turned is None and data.startswith(b"Exif\0\0", position + 2):
            turned = _turns(data[position + 2 : position + 2 + (1 << 16)])
        elif marker == _JPEG_SCAN:
            scans += 1
            if not whole:
                break
        # The length counts its own two bytes. After a scan header the search goes through the entropy-coded data.
        position += max(2, int.from_bytes(data[position : position + 2], "big"))
    if size is None or not (scans or whole):
        # A start alone, or the file ends here: with what it says it is a JPEG, cut short.
        return Header("JPEG", 1, 1, complete=False) if whole else None
    height, width = size
    if progressive and height * width > _MOST_PROGRESSIVE_PIXELS:
        raise ValueError(f"it is a progressive JPEG of {width} x {height} px, which takes too much memory")
    if scans > _ORDINARY_SCANS and scans * height * width > _MOST_SCANNED:
        raise ValueError(f"it is a JPEG of {scans} scans, each over {width} x {height} px")
    return Header("JPEG", height, width, bool(turned), ended or not whole)


def _check_segments(count: int, place: int) -> None:
    """Raise `ValueError` where there are more of them up to this place than in any ordinary file."""
    if count > _MOST_SEGMENTS + place // _SEGMENT_BYTES:
        raise ValueError(f"there are {count:,} segments in its first {place:,} bytes")


def _png(file: BinaryIO, start: bytes) -> Header | None:
    """Chunk syntax: PNG specification, section 5.3; every chunk up to and with IEND must be complete."""
    if len(start) < 24 or start[12:16] != b"IHDR":
        return None
    width, height = struct.unpack_from(">II", start, 16)
    position, chunks, turned, complete = len(PNG_START), 0, False, False
    length = file.seek(0, io.SEEK_END)
    while len(chunk := _at(file, position, 8)) == 8:
        _check_segments(chunks := chunks + 1, position)
        size, kind = int.from_bytes(chunk[:4], "big"), chunk[4:]
        turned |= kind == b"eXIf" and _turns(_at(file, position + 8, min(size, _MOST_EXIF)))
        position += 12 + size
        if kind == b"IEND":
            complete = position <= length
            break
    # OpenCV's releases differ in what EXIF they heed outside JPEG.
    return Header("PNG", height, width, None if turned else False, complete)


def _webp(file: BinaryIO, start: bytes) -> Header | None:
    """WebP container specification and RFC 6386, section 9.1."""
    end = 8 + int.from_bytes(start[4:8], "little")
    kind, body = start[12:16], start[20:30]
    if kind == b"VP8L" and len(body) >= 5 and body[0] == 0x2F:
        bits = int.from_bytes(body[1:5], "little")
        width, height = 1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF)
    elif kind == b"VP8X" and len(body) == 10:
        width, height = (1 + int.from_bytes(body[place : place + 3], "little") for place in (4, 7))
    elif kind == b"VP8 " and len(body) == 10 and body[3:6] == b"\x9d\x01\x2a":
        width, height = (value & 0x3FFF for value in struct.unpack_from("<HH", body, 6))
    else:
        return None
    position, chunks, turned = 12, 0, False
    while kind == b"VP8X" and len(chunk := _at(file, position, 8)) == 8:
        _check_segments(chunks := chunks + 1, position)
        size = int.from_bytes(chunk[4:], "little")
        turned |= chunk[:4] == b"EXIF" and _turns(_at(file, position + 8, min(size, _MOST_EXIF)))
        position += 8 + size + size % 2
    return Header("WEBP", height, width, None if turned else False, file.seek(0, io.SEEK_END) >= end)


def _tiff(file: BinaryIO, start: bytes) -> Header | None:
    """The tags of the first image, whatever its kind of pixels: TIFF 6.0, section 2; BigTIFF has 64-bit places."""
    order = "<" if start[:2] == b"II" else ">"
    big = start[2:4] in (b"+\0", b"\0+")
    form, step, place, first = ("Q", 20, 12, 8) if big else ("I", 12, 8, 2)
    try:
        (begin,) = struct.unpack_from(f"{order}{form}", start, 8 if big else 4)
        (entries,) = struct.unpack(f"{order}{'Q' if big else 'H'}", _at(file, begin, first))
        directory = _at(file, begin + first, step * min(entries, _MOST_TIFF_ENTRIES))
        tags: dict[int, int] = {}
        for position in range(0, len(directory) - step + 1, step):
            tag, kind = struct.unpack_from(f"{order}HH", directory, position)
            if value := {1: "B", 3: "H", 4: "I", **({16: "Q"} if big else {})}.get(kind):
                tags.setdefault(tag, *struct.unpack_from(f"{order}{value}", directory, position + place))
    except (struct.error, OverflowError):  # cut off
        return None
    width, height = tags.get(256, 0), tags.get(257, 0)
    if tags.get(322, 0) * tags.get(323, 0) > max(width * height, _MOST_TILE_PIXELS):
        raise ValueError(f"its tiles are of {tags[322]} x {tags[323]} px")
    return Header("TIFF", height, width, None if tags.get(_ORIENTATION, 1) in _TURNED else False)


def _by_pillow(file: BinaryIO) -> Header | None:
    from PIL import Image

    file.seek(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of sizes and metadata, neither of which is Pillow's to judge here
        try:
            image = Image.open(file, formats=_PILLOW)
        except (OSError, SyntaxError, ValueError, struct.error):
            return None
    (width, height), kind = image.size, str(image.format)
    # AVIF and JPEG 2000 can turn the image in ways of their own.
    return Header(kind, height, width, None if kind in ("AVIF", "JPEG2000") else False)


def _turns(exif: bytes) -> bool:
    """Whether the EXIF orientation exchanges height and width.

    By the first directory alone, as OpenCV reads it: a value's first two bytes, whatever its type and count (TIFF 6.0,
    section 2).
    """
    data = exif.removeprefix(b"Exif\0\0")
    order = {b"II": "<", b"MM": ">"}.get(data[:2])
    with suppress(struct.error):  # cut off
        if order is None:
            return False
        (start,) = struct.unpack_from(f"{order}I", data, 4)
        (entries,) = struct.unpack_from(f"{order}H", data, start)
        for position in range(start + 2, start + 2 + 12 * entries, 12):
            tag, _, _, value = struct.unpack_from(f"{order}HHIH", data, position)
            if tag == _ORIENTATION:
                return value in _TURNED
    return False
