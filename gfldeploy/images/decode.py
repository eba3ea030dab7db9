"""Image files to RGB arrays, exactly as PaddleDetection's `Decode` reads them, and their sizes without decoding."""

from __future__ import annotations

import functools
import io
import os
import re
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from gfldeploy.errors import DataError
from gfldeploy.images.formats import MAX_FILE_BYTES, read_header
from gfldeploy.images.native_stderr import heard, hears
from gfldeploy.storage import Source, Url, check_size, open_url, read_url
from gfldeploy.system import without_waiting

# What libjpeg reports of data that it could not follow. It continues, with grey or with anything.
_DAMAGED_JPEG = re.compile(rb"Corrupt JPEG data: .*|Premature end of JPEG.*|Inconsistent progression.*")
# A few bytes that nothing reads, before the end or before metadata, harm no pixel, and cameras write them. If they are
# more than this share of the file, they are pixels that were not found.
_SPARE_BYTES = re.compile(rb"(\d+) extraneous bytes before marker 0x(?:d9|e.|fe)")
_MOST_SPARE = 0.1
_LARGE_BYTES, _BAND = 1 << 26, 512  # rows
_FETCH = "Fetch or copy it again, or remove it from the data."
_CONVERT = "Convert it to JPEG or PNG, or remove it from the data."


def read_image(path: Source, reduction: int = 1) -> NDArray[np.uint8]:
    """Read an image file as RGB uint8, shape [height, width, 3]: `decode_image` of its content.

    Raises `DataError`, naming the file, also when it is missing, unreadable or no regular file; of a file at an
    address `ServerError` and `MissingDependencyError`, too.
    """
    with _readable(path):
        return decode_image(read_file(path), path, reduction)


def read_file(path: Source) -> bytes:
    """The content of an image file. Raises as `read_image` does."""
    if isinstance(path, Url):
        with _readable(path):
            return read_url(path, MAX_FILE_BYTES)
    with open_file(path) as file:
        return file.read()


def decode_image(data: bytes, what: object = "the image", reduction: int = 1) -> NDArray[np.uint8]:
    """Decode the content of an image file, which `what` names, to RGB uint8, shape [height, width, 3].

    As PaddleDetection's `Decode`: `cv2.imdecode(..., IMREAD_COLOR)`, then BGR to RGB. Hence EXIF orientation is
    applied, grey images get three equal channels, an alpha channel is dropped, 16-bit images become 8-bit, CMYK is
    converted, and of several images or frames the first is taken.

    OpenCV fills the missing or damaged part of a JPEG with anything; this rejects every file that stops before its end
    and every JPEG whose data cannot be followed. Bytes after the end of a complete image are ignored. The size in the
    header is checked first, see `images.formats`.

    `reduction`: 2, 4 or 8 decodes a JPEG at that fraction of its sides, rounded up. The pixels differ from those that
    resizing the whole image gives. Other formats are read whole.

    Raises `DataError` when it is empty, truncated, damaged, too large or not an image.
    """
    if not data:
        raise DataError(f"{what} is empty", _FETCH)
    header = read_header(io.BytesIO(data), what)
    if not header.complete:
        raise DataError(f"{what} is truncated", _FETCH)
    cv2 = load_cv2()
    way = "COLOR"
    if header.kind == "JPEG":  # whose decoder can give RGB itself, if it gives all of it
        way = f"REDUCED_COLOR_{reduction}" if reduction > 1 else "COLOR_RGB"
    try:
        image, said = heard(lambda: cv2.imdecode(np.frombuffer(data, np.uint8), getattr(cv2, f"IMREAD_{way}")))
    except cv2.error as error:
        raise DataError(f"OpenCV cannot decode {what}: {getattr(error, 'err', error)}", _CONVERT) from error
    if image is None:
        raise DataError(f"{what} is damaged or not an image that OpenCV reads", _CONVERT)
    if header.kind == "JPEG" and not hears():
        said = _complaint(data)
    if header.kind == "JPEG" and (damage := _DAMAGED_JPEG.search(said)):
        spare = _SPARE_BYTES.search(damage[0])
        if spare is None or int(spare[1]) > _MOST_SPARE * len(data):
            raise DataError(f"{what} is damaged ({damage[0].decode('ascii', 'replace')})", _FETCH)
    return np.asarray(image, np.uint8) if way == "COLOR_RGB" else _to_rgb(image)


def _complaint(data: bytes) -> bytes:
    """What libjpeg reports of a JPEG, from a decoder that raises it; it reads the whole file once more, for grey."""
    import simplejpeg

    try:
        simplejpeg.decode_jpeg(data, "GRAY", fastdct=True, fastupsample=True, min_height=1, min_width=1)
    except ValueError as error:
        return str(error).encode()
    return b""


def _to_rgb(image: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """From BGR; a large image in place, band by band, so that memory holds it once."""
    import cv2

    if image.size <= _LARGE_BYTES:
        return np.asarray(cv2.cvtColor(image, cv2.COLOR_BGR2RGB), np.uint8)
    for top in range(0, image.shape[0], _BAND):
        band = image[top : top + _BAND]
        band[:] = cv2.cvtColor(band, cv2.COLOR_BGR2RGB)
    return image


def image_size(path: Source) -> tuple[int, int]:
    """Height and width in pixels of the image that `read_image` would give, EXIF orientation applied.

    From the header of the file, so that 10,000 files take seconds: a JPEG, PNG, WebP or BMP that is damaged further on
    has a size all the same. A file whose header does not settle it (AVIF, JPEG 2000, and others than JPEG that EXIF
    turns) is decoded.

    Of a file at an address those parts are fetched, which are all of it for most PNGs.

    Raises as `read_image` does, when the file is missing, unreadable, empty, too large or not an image, or its header
    is damaged or cut off.
    """
    with open_file(path) as file:
        return size_of(file, path)


def size_of(file: BinaryIO, what: object = "the image") -> tuple[int, int]:
    """`image_size` of an open file, which `what` names."""
    if not file.read(1):
        decode_image(b"", what)
    header = read_header(file, what, whole=False)
    if header.turned is None or not header.complete:
        file.seek(0)
        height, width, _ = decode_image(file.read(), what).shape
        return height, width
    return (header.width, header.height) if header.turned else (header.height, header.width)


@contextmanager
def open_file(path: Source, most_bytes: int | None = MAX_FILE_BYTES) -> Iterator[BinaryIO]:
    """An image file, open for reading. Raises `DataError` if it is no regular file, too large or not readable.

    Of a file at an address, the parts that are read are fetched; it raises what `read_image` does.
    """
    with _readable(path):
        if isinstance(path, Url):
            if most_bytes is not None:
                check_size(path, path.size, most_bytes)
            with open_url(path, most_bytes) as remote:
                yield remote
            return
        with open(path, "rb", opener=without_waiting) as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                kind = "a folder" if stat.S_ISDIR(status.st_mode) else "no regular file"
                raise DataError(f"cannot read {path}: it is {kind}", "Give image files.")
            if most_bytes is not None:
                check_size(path, status.st_size, most_bytes)
            yield file


@contextmanager
def _readable(path: Source) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError:
        raise DataError(f"there is no image file {path}", "Check the path.") from None
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise DataError(f"cannot read {path}: {reason}", "Check the path and its permissions.") from error


@functools.cache
def load_cv2() -> Any:
    """OpenCV, told once not to log to stderr, unless OPENCV_LOG_LEVEL is set: failures are raised here."""
    import cv2

    if "OPENCV_LOG_LEVEL" not in os.environ:
        cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)
    return cv2
