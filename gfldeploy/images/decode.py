"""Image files to RGB arrays, exactly as PaddleDetection's `Decode` reads them."""

from __future__ import annotations

import functools
import io
import os
import re
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from gfldeploy.errors import DataError
from gfldeploy.images.formats import MAX_FILE_BYTES, read_header
from gfldeploy.images.native_stderr import heard

__all__ = ["decode_image", "load_cv2", "open_file", "read_file", "read_image"]

# What libjpeg says of data that it could not follow. It goes on, with grey or with anything.
_DAMAGED_JPEG = re.compile(rb"Corrupt JPEG data: .*|Premature end of JPEG.*|Inconsistent progression.*")
# A few bytes that nothing reads, before the end or before metadata, harm no pixel, and cameras write them. More than
# this share of the file are pixels that were not found.
_SPARE_BYTES = re.compile(rb"(\d+) extraneous bytes before marker 0x(?:d9|e.|fe)")
_MOST_SPARE = 0.1
_LARGE_BYTES, _BAND = 1 << 26, 512  # rows
_FETCH = "Fetch or copy it again, or remove it from the data."
_CONVERT = "Convert it to JPEG or PNG, or remove it from the data."


def read_image(path: Path, reduction: int = 1) -> NDArray[np.uint8]:
    """Read an image file as RGB uint8, shape [height, width, 3]: `decode_image` of its content.

    Raises `DataError`, naming the file, also when it is missing, unreadable or no regular file.
    """
    return decode_image(read_file(path), path, reduction)


def decode_image(data: bytes, what: object = "the image", reduction: int = 1) -> NDArray[np.uint8]:
    """Decode the content of an image file, which `what` names, to RGB uint8, shape [height, width, 3].

    The same as PaddleDetection's `Decode`: `cv2.imdecode(..., IMREAD_COLOR)`, then BGR to RGB. Hence EXIF orientation
    is applied, grey images get three equal channels, an alpha channel is dropped, 16-bit images become 8-bit, CMYK is
    converted, and of several images or frames the first is taken.

    Unlike OpenCV, which fills the missing or damaged part of a JPEG with anything, this refuses every file that stops
    before its end and every JPEG whose data cannot be followed. Bytes after the end of a complete image are ignored.
    The size that the header gives is checked first, see `images.formats`.

    `reduction`: 2, 4 or 8 decodes a JPEG at that fraction of its sides, rounded up, without the pixels between; they
    differ from those that resizing the whole image gives. Other formats, which know no such thing, are read whole.

    Raises `DataError` when it is empty, truncated, damaged, too large or not an image.
    """
    if not data:
        raise DataError(f"the image file {what} is empty", _FETCH)
    header = read_header(io.BytesIO(data), what)
    if not header.complete:
        raise DataError(f"the image file {what} is truncated", _FETCH)
    cv2 = load_cv2()
    flag = cv2.IMREAD_COLOR
    if reduction > 1 and header.kind == "JPEG":
        flag = getattr(cv2, f"IMREAD_REDUCED_COLOR_{reduction}")
    try:
        image, said = heard(lambda: cv2.imdecode(np.frombuffer(data, dtype=np.uint8), flag))
    except cv2.error as error:
        raise DataError(f"OpenCV cannot decode {what}: {getattr(error, 'err', error)}", _CONVERT) from error
    if image is None:
        raise DataError(f"{what} is damaged or not an image that OpenCV reads", _CONVERT)
    if header.kind == "JPEG" and (damage := _DAMAGED_JPEG.search(said)):
        spare = _SPARE_BYTES.search(damage[0])
        if spare is None or int(spare[1]) > _MOST_SPARE * len(data):
            raise DataError(f"the image file {what} is damaged ({damage[0].decode('ascii', 'replace')})", _FETCH)
    return _to_rgb(image)


def _to_rgb(image: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """From BGR; a large image in place, band by band, so that it is not there twice."""
    import cv2

    if image.size <= _LARGE_BYTES:
        return np.asarray(cv2.cvtColor(image, cv2.COLOR_BGR2RGB), np.uint8)
    for top in range(0, image.shape[0], _BAND):
        band = image[top : top + _BAND]
        band[:] = cv2.cvtColor(band, cv2.COLOR_BGR2RGB)
    return image


def read_file(path: Path) -> bytes:
    """The content of an image file. Raises `DataError`."""
    with open_file(path) as file:
        return file.read()


@contextmanager
def open_file(path: Path, most_bytes: int | None = MAX_FILE_BYTES) -> Iterator[BinaryIO]:
    """An image file, open for reading. Raises `DataError` for what is no regular file, too large or not readable."""
    path = Path(path)
    try:
        # Without waiting for somebody to write into a pipe.
        with open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK)) as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                kind = "a folder" if stat.S_ISDIR(status.st_mode) else "no regular file"
                raise DataError(f"cannot read {path}: it is {kind}", "Give image files.")
            if most_bytes is not None and status.st_size > most_bytes:
                raise DataError(f"the image file {path} has {status.st_size / 1e9:.1f} GB", "Scale it down, or cut it.")
            yield file
    except FileNotFoundError:
        raise DataError(f"there is no image file {path}", "Check the path.") from None
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise DataError(f"cannot read {path}: {reason}", "Check the path and its permissions.") from error


@functools.cache
def load_cv2() -> Any:
    """OpenCV, told once not to log to stderr, as failures are raised here. OPENCV_LOG_LEVEL still has the last word."""
    import cv2

    if "OPENCV_LOG_LEVEL" not in os.environ:
        cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)
    return cv2
