"""Sizes from the headers of files: those that reading gives, whatever the file, and no others."""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path

import cv2
import numpy as np
import pytest

from gfldeploy.errors import DataError
from gfldeploy.images.decode import image_size, read_image
from gfldeploy.images.formats import read_header

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


def png_with_text(count: int) -> bytes:
    """A PNG with more compressed text than Pillow takes."""
    plain, data = encode("PNG"), b"zTXt" + b"parameters\0\0" + zlib.compress(bytes(count))
    return plain[:33] + struct.pack(">I", len(data) - 4) + data + struct.pack(">I", zlib.crc32(data)) + plain[33:]


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
    "plain.gif": encode("GIF"),
    "animated.gif": encode("GIF", save_all=True, append_images=[PIL_Image.fromarray(PICTURE[::-1])]),
    "plain.jp2": encode("JPEG2000"),
    "plain.avif": encode("AVIF"),
    "turned.avif": encode("AVIF", exif=exif(6)),
    "plain.ppm": encode("PPM"),
    "grey.pgm": encode("PPM", "L"),
    "bits.pbm": encode("PPM", "1"),
    "plain.ras": cv2.imencode(".ras", PICTURE)[1].tobytes(),
    "plain.tiff": encode("TIFF"),
    "motorola.tiff": encode("TIFF", "I;16B"),
    "big.tiff": encode("TIFF", big_tiff=True),
    "tiles.tiff": encode("TIFF", tiffinfo={322: 16, 323: 16}),
    "16-bits.tiff": cv2.imencode(".tiff", PICTURE.astype(np.uint16))[1].tobytes(),
    **{f"turned-{turn}.tiff": encode("TIFF", tiffinfo={0x0112: turn}) for turn in range(1, 9)},
    "16-bits.png": cv2.imencode(".png", PICTURE.astype(np.uint16))[1].tobytes(),
    "much-text.png": png_with_text(1 << 21),
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


def large(kind: str, width: int, height: int) -> bytes:
    """A small file whose header says that it is large."""
    data = bytearray(encode(kind, lossless=True) if kind == "WEBP" else encode(kind))
    if kind == "PNG":
        struct.pack_into(">II", data, 16, width, height)
        struct.pack_into(">I", data, 29, zlib.crc32(data[12:29]))
    elif kind == "JPEG":
        struct.pack_into(">HH", data, data.index(b"\xff\xc0") + 5, height, width)
    elif kind == "GIF":
        struct.pack_into("<HH", data, 6, width, height)
    elif kind == "BMP":
        struct.pack_into("<ii", data, 18, width, height)
    elif kind == "TIFF":
        for tag, value in ((256, width), (257, height)):
            place = data.index(struct.pack("<HH", tag, 4 if struct.pack("<HHI", tag, 4, 1) in data else 3))
            struct.pack_into("<HII", data, place + 2, 4, 1, value)
    elif kind == "WEBP":
        struct.pack_into("<I", data, 21, width - 1 | (height - 1) << 14)
    elif kind == "PPM":
        data = bytearray(f"P6 {width} {height} 255\n".encode())
    elif kind == "JPEG2000":
        place = data.index(b"\xff\x51")
        struct.pack_into(">II", data, place + 6, width, height)
        struct.pack_into(">II", data, data.index(b"ihdr") + 4, height, width)
    elif kind == "AVIF":
        struct.pack_into(">II", data, data.index(b"ispe") + 8, width, height)
    return bytes(data)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP", "PPM", "JPEG2000", "AVIF"])
def test_what_claims_to_be_too_large_is_refused_by_its_header(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "bomb"
    path.write_bytes(large(kind, 16_000, 16_000))
    for read in (image_size, read_image):
        with pytest.raises(DataError, match=r"bomb.*(too large: its header says 16000 x 16000 px|exceeds limit)"):
            read(path)


def test_hostile_jpegs_and_tiffs_are_refused_before_decoding(tmp_path: Path) -> None:
    path = tmp_path / "bomb"
    plain = encode("JPEG", progressive=True)
    scan = plain[plain.rindex(b"\xff\xda") : -2]
    sized = bytearray(plain[:-2] + scan * 5000 + plain[-2:])
    struct.pack_into(">HH", sized, sized.index(b"\xff\xc2") + 5, 9000, 9000)
    path.write_bytes(sized)
    with pytest.raises(DataError, match=r"50\d\d scans, each over 9000 x 9000 px"):
        read_image(path)
    struct.pack_into(">HH", sized, sized.index(b"\xff\xc2") + 5, 11_000, 11_000)
    path.write_bytes(sized)
    with pytest.raises(DataError, match="progressive JPEG of 11000 x 11000 px"):
        read_image(path)
    path.write_bytes(encode("TIFF", tiffinfo={322: 30_000, 323: 30_000}))
    tags = bytearray(path.read_bytes())
    if b"\x42\x01" not in tags:  # Pillow wrote strips: make two of its tags those of a tile
        for before, after in ((278, 322), (279, 323)):
            place = tags.index(struct.pack("<H", before), 8)
            struct.pack_into("<HHII", tags, place, after, 4, 1, 30_000)
    path.write_bytes(tags)
    with pytest.raises(DataError, match="its tiles are of 30000 x 30000 px"):
        image_size(path)


@pytest.mark.parametrize(
    ("kind", "place", "empty"),
    [("JPEG", 2, b"\xff\xfe\0\2"), ("PNG", 33, bytes(4) + b"tEXt" + bytes(4)), ("WEBP", 30, b"XXXX" + bytes(4))],
)
def test_millions_of_empty_segments_are_not_read(kind: str, place: int, empty: bytes) -> None:
    plain = encode(kind, exif=exif(1)) if kind == "WEBP" else encode(kind)
    assert read_header(io.BytesIO(plain[:place] + empty * 9_000 + plain[place:]), "it").kind == kind
    with pytest.raises(DataError, match=r"there are 10,\d\d\d segments in its first"):
        read_header(io.BytesIO(plain[:place] + empty * 1_000_000 + plain[place:]), "it")


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
