"""Sizes from the heads of files: those that reading gives, whatever the file, and no others."""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest

from gfldeploy.errors import DataError
from gfldeploy.images.decode import read_image
from gfldeploy.images.headers import image_size

PIL_Image = pytest.importorskip("PIL.Image")

HEIGHT, WIDTH = 20, 30
PICTURE = np.random.default_rng(0).integers(0, 256, (HEIGHT, WIDTH, 3), np.uint8)
XMP = (
    b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">'
    b'<rdf:Description xmlns:tiff="http://ns.adobe.com/tiff/1.0/" tiff:Orientation="6"/></rdf:RDF></x:xmpmeta>'
)


def encode(kind: str, mode: str = "RGB", **options: object) -> bytes:
    stream = io.BytesIO()
    PIL_Image.fromarray(PICTURE).convert(mode).save(stream, kind, **options)
    return stream.getvalue()


def exif(orientation: int, order: str = ">", kind: int = 3, count: int = 1) -> bytes:
    """A directory with the orientation alone, as a number of type `kind` (3: 16 bits, 4: 32 bits)."""
    value = struct.pack(f"{order}HH", orientation, 0) if kind == 3 else struct.pack(f"{order}I", orientation)
    start = b"MM\0*" if order == ">" else b"II*\0"
    return start + struct.pack(f"{order}IHHHI", 8, 1, 0x0112, kind, count) + value + bytes(4)


def jpeg(*metadata: bytes) -> bytes:
    """A JPEG with these EXIF blocks."""
    plain = encode("JPEG")
    blocks = [b"Exif\0\0" + one for one in metadata]
    return plain[:2] + b"".join(b"\xff\xe1" + struct.pack(">H", len(one) + 2) + one for one in blocks) + plain[2:]


def png(before: bytes, orientation: int = 6) -> bytes:
    """A PNG whose EXIF comes before this chunk."""
    plain, data = encode("PNG"), exif(orientation)
    place = plain.index(before) - 4
    chunk = struct.pack(">I", len(data)) + b"eXIf" + data + struct.pack(">I", zlib.crc32(b"eXIf" + data))
    return plain[:place] + chunk + plain[place:]


FILES = {
    **{f"turned-{turn}.jpg": jpeg(exif(turn)) for turn in range(10)},
    **{f"turned-{turn}.png": png(b"IDAT", turn) for turn in range(1, 9)},
    **{f"turned-{turn}.webp": encode("WEBP", exif=b"Exif\0\0" + exif(turn)) for turn in range(1, 9)},
    "after-the-pixels.png": png(b"IEND"),
    "intel.jpg": jpeg(exif(6, "<")),
    "intel-32-bits.jpg": jpeg(exif(6, "<", 4)),
    "motorola-32-bits.jpg": jpeg(exif(6, ">", 4)),
    "no-value.jpg": jpeg(exif(6, count=0)),
    "two-values.jpg": jpeg(exif(6, count=2)),
    "turned-then-not.jpg": jpeg(exif(6), exif(1)),
    "not-then-turned.jpg": jpeg(exif(1), exif(6)),
    "short-exif.jpg": jpeg(exif(6)[:12]),
    "no-exif.jpg": jpeg(b"junk"),
    "xmp.jpg": encode("JPEG", xmp=XMP),
    "xmp.png": encode("PNG", exif=b"Exif\0\0" + exif(8)),
    "progressive.jpg": encode("JPEG", progressive=True),
    "grey.jpg": encode("JPEG", "L"),
    "cmyk.jpg": encode("JPEG", "CMYK"),
    "several.jpg": encode("MPO", save_all=True, append_images=[PIL_Image.fromarray(PICTURE[:8])]),
    "palette.png": encode("PNG", "P"),
    "rgba.png": encode("PNG", "RGBA"),
    "animated.png": encode("PNG", save_all=True, append_images=[PIL_Image.fromarray(PICTURE[::-1])]),
    "lossless.webp": encode("WEBP", lossless=True),
    "animated.webp": encode("WEBP", save_all=True, append_images=[PIL_Image.fromarray(PICTURE[::-1])]),
    "plain.bmp": encode("BMP"),
    "palette.bmp": encode("BMP", "P"),
    "top-down.bmp": encode("BMP").replace(struct.pack("<ii", WIDTH, HEIGHT), struct.pack("<ii", WIDTH, -HEIGHT), 1),
    "misnamed-tiff.jpg": encode("TIFF"),
    "misnamed-png.jpg": encode("PNG"),
}


@pytest.mark.parametrize("name", FILES)
def test_sizes_are_those_of_reading(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_bytes(FILES[name])
    assert image_size(path) == read_image(path).shape[:2]


def test_a_jpeg_needs_no_pixels(tmp_path: Path) -> None:
    path = tmp_path / "turned.jpg"
    for turn in range(1, 9):
        data = jpeg(exif(turn))
        path.write_bytes(data[: data.index(b"\xff\xda") + 14])  # where the pixels begin
        assert image_size(path) == ((WIDTH, HEIGHT) if turn >= 5 else (HEIGHT, WIDTH))


def test_large_sizes_cause_no_warning(tmp_path: Path) -> None:
    path = tmp_path / "large.png"
    PIL_Image.new("1", (10_000, 10_000)).save(path)
    assert image_size(path) == (10_000, 10_000)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "BMP"])
def test_a_head_that_is_cut_off_is_refused(kind: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "short.jpg"
    data = encode(kind)
    for length in range(1, 24):
        path.write_bytes(data[:length])
        with pytest.raises(DataError, match=r"short\.jpg"):
            image_size(path)
    assert capfd.readouterr() == ("", "")


def test_what_is_no_image_is_refused(tmp_path: Path) -> None:
    (tmp_path / "empty.jpg").write_bytes(b"")
    (tmp_path / "text.jpg").write_text("this is no picture")
    with pytest.raises(DataError, match=r"no image file .*absent\.jpg"):
        image_size(tmp_path / "absent.jpg")
    with pytest.raises(DataError, match=r"empty\.jpg is empty"):
        image_size(tmp_path / "empty.jpg")
    with pytest.raises(DataError, match=r"text\.jpg is damaged or not an image"):
        image_size(tmp_path / "text.jpg")
    with pytest.raises(DataError, match="cannot read"):
        image_size(tmp_path)
