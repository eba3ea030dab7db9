"""Reading images: every kind of file that PaddleDetection reads, and none that is damaged."""

from __future__ import annotations

import importlib
import io
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import cv2
import numpy as np
import pytest
from numpy.typing import NDArray

from gfldeploy.errors import DataError
from gfldeploy.images.decode import read_image
from gfldeploy.images.native_stderr import hears

PIL_Image = pytest.importorskip("PIL.Image")

# Four flat quarters: red, green / blue, white. Large enough for JPEG's 8 x 8 blocks to keep them apart.
QUARTERS = np.zeros((32, 48, 3), dtype=np.uint8)
QUARTERS[:16, :24] = (255, 0, 0)
QUARTERS[:16, 24:] = (0, 255, 0)
QUARTERS[16:, :24] = (0, 0, 255)
QUARTERS[16:, 24:] = (255, 255, 255)


def noise(height: int = 40, width: int = 56) -> np.ndarray:
    image = np.random.default_rng(7).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return np.asarray(cv2.GaussianBlur(image, (5, 5), 1.5))


def encode(image: np.ndarray, kind: str, **options: object) -> bytes:
    stream = io.BytesIO()
    PIL_Image.fromarray(image).save(stream, kind, **options)
    return stream.getvalue()


def oriented(orientation: int, thumbnail: bool = False) -> bytes:
    """A JPEG with this EXIF orientation and, if wanted, a thumbnail: a whole JPEG inside the metadata."""
    exif = PIL_Image.Exif()
    exif[0x0112] = orientation
    data = encode(QUARTERS, "JPEG", quality=100, subsampling=0, exif=exif)
    if thumbnail:
        inner = b"Exif\x00\x00" + b"thumbnail" + encode(QUARTERS[::4, ::4], "JPEG")
        data = data[:2] + b"\xff\xe1" + (len(inner) + 2).to_bytes(2, "big") + inner + data[2:]
    return data


def grey16() -> bytes:
    ok, data = cv2.imencode(".png", np.linspace(0, 65535, 20 * 30).reshape(20, 30).astype(np.uint16))
    assert ok
    return data.tobytes()


def files() -> dict[str, bytes]:
    rgba = np.dstack([QUARTERS, np.full(QUARTERS.shape[:2], 99, np.uint8)])
    palette = io.BytesIO()
    PIL_Image.fromarray(QUARTERS).quantize(8).save(palette, "PNG")
    cmyk = io.BytesIO()
    PIL_Image.fromarray(noise()).convert("CMYK").save(cmyk, "JPEG", quality=95)
    return {
        "plain.jpg": encode(noise(), "JPEG"),
        "progressive.jpg": encode(noise(), "JPEG", progressive=True),
        "restarts.jpg": cv2.imencode(".jpg", noise(), [cv2.IMWRITE_JPEG_RST_INTERVAL, 2])[1].tobytes(),
        "thumbnail.jpg": oriented(1, thumbnail=True),
        "cmyk.jpg": cmyk.getvalue(),
        "grey.jpg": encode(noise()[..., 0], "JPEG"),
        "grey.png": encode(noise()[..., 0], "PNG"),
        "grey16.png": grey16(),
        "rgba.png": encode(rgba, "PNG"),
        "palette.png": palette.getvalue(),
        "plain.bmp": encode(noise(), "BMP"),
        "plain.webp": encode(noise(), "WEBP"),
        **{f"turned{turn}.jpg": oriented(turn) for turn in range(1, 9)},
    }


def cuts(data: bytes) -> list[int]:
    """Where to cut a file off: everywhere near its two ends, and here and there between."""
    return sorted({*range(1, 40), *range(40, len(data), 37), *range(len(data) - 40, len(data))})


def write(directory: Path, name: str, data: bytes) -> Path:
    path = directory / name
    path.write_bytes(data)
    return path


def test_lossless_files_come_back_as_rgb(tmp_path: Path) -> None:
    for kind in ("PNG", "BMP"):
        image = read_image(write(tmp_path, f"quarters.{kind.lower()}", encode(QUARTERS, kind)))
        assert image.dtype == np.uint8
        np.testing.assert_array_equal(image, QUARTERS)


def test_alpha_is_dropped_not_blended(tmp_path: Path) -> None:
    rgba = np.dstack([QUARTERS, np.zeros(QUARTERS.shape[:2], np.uint8)])
    np.testing.assert_array_equal(read_image(write(tmp_path, "a.png", encode(rgba, "PNG"))), QUARTERS)


def test_grey_gets_three_equal_channels(tmp_path: Path) -> None:
    grey = noise()[..., 0]
    image = read_image(write(tmp_path, "grey.png", encode(grey, "PNG")))
    np.testing.assert_array_equal(image, np.dstack([grey, grey, grey]))


def test_sixteen_bits_become_eight(tmp_path: Path) -> None:
    image = read_image(write(tmp_path, "grey16.png", grey16()))
    assert image.dtype == np.uint8
    assert image.shape == (20, 30, 3)
    assert (image[0, 0, 0], image[-1, -1, 0]) == (0, 255)


def test_cmyk_looks_like_its_rgb(tmp_path: Path) -> None:
    image = read_image(write(tmp_path, "cmyk.jpg", files()["cmyk.jpg"]))
    assert np.abs(image.astype(int) - noise()).mean() < 6


# What each EXIF orientation means: how the stored rows and columns become the upright image (EXIF 2.3, tag 274).
UPRIGHT: dict[int, Callable[[NDArray[np.uint8]], NDArray[np.uint8]]] = {
    1: lambda image: image,
    2: lambda image: image[:, ::-1],
    3: lambda image: image[::-1, ::-1],
    4: lambda image: image[::-1],
    5: lambda image: image.transpose(1, 0, 2),
    6: lambda image: np.rot90(image, -1),
    7: lambda image: image[::-1, ::-1].transpose(1, 0, 2),
    8: lambda image: np.rot90(image),
}


@pytest.mark.parametrize("orientation", UPRIGHT)
def test_exif_orientation_is_applied(tmp_path: Path, orientation: int) -> None:
    image = read_image(write(tmp_path, "turned.jpg", oriented(orientation)))
    expected = UPRIGHT[orientation](QUARTERS)
    assert image.shape == expected.shape
    assert np.abs(image.astype(int) - expected).max() < 12


@pytest.mark.parametrize("name", ["plain.jpg", "progressive.jpg", "restarts.jpg", "thumbnail.jpg", "cmyk.jpg"])
def test_every_truncated_jpeg_is_refused(tmp_path: Path, name: str, capfd: pytest.CaptureFixture[str]) -> None:
    data = files()[name]
    read_image(write(tmp_path, name, data))
    for length in cuts(data):
        with pytest.raises(DataError, match=f"{name} is truncated" if length > 2 else name):
            read_image(write(tmp_path, name, data[:length]))
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("name", ["grey.png", "palette.png", "plain.webp", "plain.bmp"])
def test_every_other_truncated_file_is_refused(tmp_path: Path, name: str, capfd: pytest.CaptureFixture[str]) -> None:
    data = files()[name]
    read_image(write(tmp_path, name, data))
    for length in cuts(data):
        with pytest.raises(DataError, match=name):
            read_image(write(tmp_path, name, data[:length]))
    assert capfd.readouterr() == ("", "")


def test_a_truncated_jpeg_filled_up_with_zeros_is_refused(tmp_path: Path) -> None:
    data = files()["plain.jpg"]
    half = len(data) // 2
    with pytest.raises(DataError, match="truncated"):
        read_image(write(tmp_path, "hole.jpg", data[:half] + bytes(len(data) - half)))


@pytest.mark.parametrize("name", ["plain.jpg", "progressive.jpg", "grey.png", "plain.webp"])
@pytest.mark.parametrize("tail", [b"\n", b"\x00" * 100, b"camera notes \xff\xd8\xff"])
def test_bytes_after_the_end_are_ignored(tmp_path: Path, name: str, tail: bytes) -> None:
    data = files()[name]
    clean = read_image(write(tmp_path, f"clean-{name}", data))
    np.testing.assert_array_equal(read_image(write(tmp_path, name, data + tail)), clean)


def test_what_is_no_image_is_refused(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(DataError, match=r"no image file .*absent\.jpg"):
        read_image(tmp_path / "absent.jpg")
    with pytest.raises(DataError, match=r"empty\.jpg is empty"):
        read_image(write(tmp_path, "empty.jpg", b""))
    with pytest.raises(DataError, match=r"text\.jpg is damaged or not an image"):
        read_image(write(tmp_path, "text.jpg", b"this is no picture"))
    with pytest.raises(DataError, match="cannot read"):
        read_image(tmp_path)
    assert capfd.readouterr() == ("", "")


def test_a_png_with_a_changed_byte_is_refused(tmp_path: Path) -> None:
    data = bytearray(files()["grey.png"])
    data[len(data) // 2] ^= 0x55
    with pytest.raises(DataError, match=r"bad\.png"):
        read_image(write(tmp_path, "bad.png", bytes(data)))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.needs_ppdet
def test_every_file_equals_paddledetections_decode(tmp_path: Path) -> None:
    operators = importlib.import_module("ppdet.data.transform.operators")
    for name, data in files().items():
        path = write(tmp_path, name, data)
        theirs = operators.Decode()({"im_file": str(path)})["image"]
        np.testing.assert_array_equal(read_image(path), theirs, err_msg=name)


@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
@pytest.mark.parametrize("reduction", [2, 4, 8])
def test_a_reduced_jpeg_is_the_whole_one_made_smaller(orientation: int, reduction: int, tmp_path: Path) -> None:
    path = tmp_path / "image.jpg"
    path.write_bytes(oriented(orientation))
    whole, small = read_image(path), read_image(path, reduction)
    assert small.shape == (*(-(-side // reduction) for side in whole.shape[:2]), 3)
    height, width = small.shape[:2]
    near = cv2.resize(whole, (width, height), interpolation=cv2.INTER_AREA)
    corners = np.ix_((0, -1), (0, -1))
    np.testing.assert_allclose(small[corners], near[corners], atol=12)


def test_other_formats_are_read_whole(tmp_path: Path) -> None:
    path = tmp_path / "image.png"
    path.write_bytes(encode(QUARTERS, "PNG"))
    np.testing.assert_array_equal(read_image(path, 4), QUARTERS)


@pytest.mark.parametrize("name", ["plain.jpg", "progressive.jpg", "restarts.jpg"])
def test_damage_inside_a_jpeg_is_an_error_of_that_image(
    tmp_path: Path, name: str, capfd: pytest.CaptureFixture[str]
) -> None:
    data = files()[name]
    middle = len(data) * 2 // 3
    changed = [data[:middle] + b"\xff\xd9", data[:middle] + bytes(2000) + data[middle:]]
    for damaged in changed:
        with pytest.raises(DataError, match=rf"{name} is damaged \(Corrupt JPEG data"):
            read_image(write(tmp_path, name, damaged))
    # Bytes that nothing reads, before the end, harm no pixel.
    extra = read_image(write(tmp_path, name, data[:-2] + bytes(range(1, 60)) + data[-2:]))
    np.testing.assert_array_equal(extra, read_image(write(tmp_path, name, data)))
    if hears():
        assert capfd.readouterr() == ("", "")


def test_damage_is_told_of_the_right_image_by_threads(tmp_path: Path) -> None:
    data = files()["plain.jpg"]
    good = write(tmp_path, "good.jpg", data)
    bad = write(tmp_path, "bad.jpg", data[: len(data) // 2] + b"\xff\xd9")

    def failed(path: Path) -> bool:
        try:
            read_image(path)
        except DataError:
            return True
        return False

    paths = [good, bad, good, good] * 20
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(failed, paths)) == [path == bad for path in paths]


@pytest.mark.posix
def test_what_is_no_regular_file_is_refused_at_once(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.jpg")
    for path in (tmp_path / "pipe.jpg", Path("/dev/zero")):
        with pytest.raises(DataError, match="no regular file"):
            read_image(path)
    with pytest.raises(DataError, match="File name too long"):
        read_image(tmp_path / ("x" * 5000))
