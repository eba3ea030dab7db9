"""Image files of every format: sizes from headers, and decoding."""

from __future__ import annotations

import contextlib
import io
import random
import struct
import zlib
from collections.abc import Iterable
from pathlib import Path

import cv2
import mutations
import numpy as np
from PIL import Image

from gfldeploy.errors import DataError
from gfldeploy.images.decode import image_size
from gfldeploy.predict.sources import picture_of

_PIXELS = cv2.GaussianBlur(np.random.default_rng(0).integers(0, 256, (40, 60, 3), np.uint8), (0, 0), 3)
_SIZES = (0, 1, 0x7FFF, 0x8000, 0xFFFF, 60_000, 1 << 20, 1 << 27, (1 << 31) - 1, 1 << 31, (1 << 32) - 1)


def seeds() -> Iterable[bytes]:
    for suffix in ("avif", "bmp", "gif", "jp2", "jpg", "png", "ppm", "ras", "tiff", "webp"):
        yield cv2.imencode(f".{suffix}", _PIXELS)[1].tobytes()
    for suffix in ("pgm", "pbm"):
        yield cv2.imencode(f".{suffix}", _PIXELS[..., 0] if suffix == "pgm" else _PIXELS[..., 0] // 128)[1].tobytes()
    yield cv2.imencode(".png", _PIXELS.astype(np.uint16) * 256)[1].tobytes()
    picture = Image.fromarray(_PIXELS)
    exif = Image.Exif()
    exif[0x0112] = 6
    for mode, kind, options in (
        ("RGB", "JPEG", {"progressive": True, "exif": exif}),
        ("CMYK", "JPEG", {}),
        ("P", "PNG", {"exif": exif}),
        ("RGBA", "WEBP", {"lossless": True, "exif": exif}),
        ("RGB", "TIFF", {"compression": "tiff_lzw", "exif": exif}),
        ("RGB", "GIF", {"save_all": True, "append_images": [picture] * 3}),
        ("RGB", "PNG", {"save_all": True, "append_images": [picture] * 3}),
        ("RGB", "WEBP", {"save_all": True, "append_images": [picture] * 3}),
        ("RGB", "AVIF", {"save_all": True, "append_images": [picture] * 3}),
    ):
        stream = io.BytesIO()
        picture.convert(mode).save(stream, kind, **options)
        yield stream.getvalue()


def mutate(data: bytes, rng: random.Random) -> bytes:
    """Bytes, or a number of the header; the checksums of a PNG are made right again."""
    if rng.random() < 0.5:
        out = bytearray(data)
        for _ in range(rng.randrange(1, 3)):
            place = rng.randrange(max(1, min(len(out) - 4, 300)))
            form = rng.choice(("<H", ">H", "<I", ">I"))
            value = rng.choice(_SIZES) & ((1 << 8 * struct.calcsize(form)) - 1)
            if place + 4 <= len(out):
                struct.pack_into(form, out, place, value)
        data = bytes(out)
    else:
        data = mutations.mutate_bytes(data, rng)
    return _sealed(data) if data.startswith(b"\x89PNG") and rng.random() < 0.8 else data


def _sealed(data: bytes) -> bytes:
    out, place = bytearray(data), 8
    while place + 12 <= len(out):
        length = int.from_bytes(out[place : place + 4], "big")
        if place + 12 + length > len(out):
            break
        struct.pack_into(">I", out, place + 8 + length, zlib.crc32(out[place + 4 : place + 8 + length]))
        place += 12 + length
    return bytes(out)


def one(data: bytes, folder: Path) -> None:
    path = folder / "image"
    path.write_bytes(data)
    picture = picture_of(path)
    if picture.size is not None:
        assert picture.size == image_size(path) == picture_of(data).size
        with contextlib.suppress(DataError):
            assert max(picture.read(8).shape) > 0
    picture.read()
