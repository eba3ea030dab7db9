"""Image files to RGB arrays, exactly as PaddleDetection's `Decode` reads them."""

from __future__ import annotations

import functools
import os
import re
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gfldeploy.errors import DataError

__all__ = ["load_cv2", "read_image"]

_JPEG_START = b"\xff\xd8\xff"
_PNG_START = b"\x89PNG\r\n\x1a\n"
# Inside entropy-coded JPEG data, 0xFF is followed by 0x00 (a stuffed byte), a restart marker or another 0xFF (fill);
# anything else is the next marker segment (ITU-T T.81, B.1.1).
_JPEG_MARKER = re.compile(rb"\xff[^\x00\xd0-\xd7\xff]")
_JPEG_BARE = {0x01, *range(0xD0, 0xD9)}  # markers without a length: TEM, RST0-7, SOI
_JPEG_END = 0xD9


def read_image(path: Path, reduction: int = 1) -> NDArray[np.uint8]:
    """Read an image file as RGB uint8, shape [height, width, 3].

    The same as PaddleDetection's `Decode`: `cv2.imdecode(..., IMREAD_COLOR)`, then BGR to RGB. Hence EXIF orientation
    is applied, grey images get three equal channels, an alpha channel is dropped, 16-bit images become 8-bit, and CMYK
    is converted.

    Unlike OpenCV, whose older releases fill the missing part of a truncated JPEG with grey, this refuses every file
    that stops before its end. Bytes after the end of a complete image are ignored.

    `reduction`: 2, 4 or 8 decodes a JPEG at that fraction of its sides, rounded up, without the pixels between; they
    differ from those that resizing the whole image gives. Other formats, which know no such thing, are read whole.

    Raises `DataError`, naming the file, when it is missing, unreadable, empty, truncated or not an image.
    """
    path = Path(path)
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise DataError(f"there is no image file {path}", "Check the path.") from None
    except OSError as error:
        raise DataError(
            f"cannot read {path}: {error.strerror or error}", "Check the path and its permissions."
        ) from error
    if not data:
        raise DataError(f"the image file {path} is empty", "Fetch or copy it again, or remove it from the data.")
    if _is_truncated(data):
        raise DataError(f"the image file {path} is truncated", "Fetch or copy it again, or remove it from the data.")
    cv2 = load_cv2()
    flag = cv2.IMREAD_COLOR
    if reduction > 1 and data.startswith(_JPEG_START):
        flag = getattr(cv2, f"IMREAD_REDUCED_COLOR_{reduction}")
    try:
        image = cv2.imdecode(np.frombuffer(data, dtype=np.uint8), flag)
    except cv2.error as error:
        raise DataError(
            f"OpenCV cannot decode {path}: {getattr(error, 'err', error)}",
            "Convert it to JPEG or PNG, or remove it from the data.",
        ) from error
    if image is None:
        raise DataError(
            f"{path} is damaged or not an image that OpenCV reads",
            "Convert it to JPEG or PNG, or remove it from the data.",
        )
    rgb: NDArray[np.uint8] = cv2.cvtColor(image, cv2.COLOR_BGR2RGB)
    return rgb


@functools.cache
def load_cv2() -> Any:
    """OpenCV, told once not to log to stderr, as failures are raised here. OPENCV_LOG_LEVEL still has the last word."""
    import cv2

    if "OPENCV_LOG_LEVEL" not in os.environ:
        cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)
    return cv2


def _is_truncated(data: bytes) -> bool:
    """Whether a JPEG, PNG or WebP stops before its end. Other formats: OpenCV itself refuses an incomplete file."""
    if data.startswith(_JPEG_START):
        return not _jpeg_reaches_end(data)
    if data.startswith(_PNG_START):
        return not _png_reaches_end(data)
    if data.startswith(b"RIFF") and data[8:12] == b"WEBP":
        return len(data) < 8 + int.from_bytes(data[4:8], "little")
    return False


def _jpeg_reaches_end(data: bytes) -> bool:
    """Whether the JPEG's own end-of-image marker is there (an embedded thumbnail has one too: segments are skipped
    whole).

    Marker syntax: ITU-T T.81, annex B.
    """
    position = 2
    while (found := _JPEG_MARKER.search(data, position)) is not None:
        marker = data[found.end() - 1]
        if marker == _JPEG_END:
            return True
        position = found.end()
        if marker not in _JPEG_BARE:
            # The length counts its own two bytes. After a scan header the search goes through the entropy-coded data.
            position += max(2, int.from_bytes(data[position : position + 2], "big"))
    return False


def _png_reaches_end(data: bytes) -> bool:
    """Whether every chunk up to and with IEND is complete (PNG specification, section 5.3)."""
    position = len(_PNG_START)
    while position + 12 <= len(data):
        length = int.from_bytes(data[position : position + 4], "big")
        kind = data[position + 4 : position + 8]
        position += 12 + length
        if kind == b"IEND":
            return position <= len(data)
    return False
