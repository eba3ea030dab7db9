"""Files, folders, videos and arrays as one stream of pictures."""

from __future__ import annotations

import io
import os
import struct
import tracemalloc
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image

from gfldeploy import storage
from gfldeploy.errors import DataError
from gfldeploy.predict.sources import (
    ColorOrder,
    _ends_early,
    _Video,
    list_inputs,
    picture_of,
    picture_sizes,
    pictures,
    video_rate,
)
from gfldeploy.storage import Inputs, Source, Url

FRAMES, RATE = 7, 12.5


def write_video(path: Path, fourcc: str) -> Path:
    """Frames of 48x80, each of one grey that grows by 20."""
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*fourcc), RATE, (80, 48))
    assert writer.isOpened()
    for number in range(FRAMES):
        writer.write(np.full((48, 80, 3), 20 * number, np.uint8))
    writer.release()
    return path


@pytest.mark.parametrize(("name", "fourcc"), [("a.mp4", "mp4v"), ("b.AVI", "MJPG")])
def test_the_frames_of_a_video(name: str, fourcc: str, tmp_path: Path) -> None:
    path = write_video(tmp_path / name, fourcc)
    found = list(pictures([path]))
    assert len(found) == FRAMES
    assert video_rate(path) == RATE
    for number, picture in enumerate(found):
        assert (picture.name, picture.frame, picture.size) == (str(path), number, (48, 80))
        assert picture.time_s == pytest.approx(number / RATE)
        np.testing.assert_allclose(picture.read(), 20 * number, atol=8)


def test_sizes_are_known_before_anything_is_read(tiny_coco: Path, tmp_path: Path) -> None:
    video = write_video(tmp_path / "a.mp4", "mp4v")
    (tmp_path / "empty.jpg").touch()
    (tmp_path / "empty.mp4").touch()
    images = sorted((tiny_coco.parent / "images").iterdir())
    inputs = [*images, tmp_path / "empty.jpg", video, tmp_path / "empty.mp4"]
    sizes = list(picture_sizes(inputs))
    assert sizes == [one.size for one in pictures(inputs)]
    assert sizes[len(images) :] == [None, *[(48, 80)] * FRAMES, None]


def test_headers_that_were_read_are_not_read_again(tiny_coco: Path, tmp_path: Path) -> None:
    path = tmp_path / "a.jpg"
    path.write_bytes(next((tiny_coco.parent / "images").iterdir()).read_bytes())
    late = tmp_path / "late.jpg"
    known: dict[Source, tuple[int, int] | None] = {}
    sizes = list(picture_sizes([path, late], known))
    late.write_bytes(path.read_bytes())
    path.write_bytes(cv2.imencode(".jpg", np.zeros((5, 7, 3), np.uint8))[1].tobytes())
    found, came = pictures([path, late], known)
    assert found.size == sizes[0] != (5, 7)
    with pytest.raises(DataError, match="has changed while it was read"):
        found.read()
    assert sizes[1] is None and came.size == sizes[0], "what could not be read is tried again"


def test_a_damaged_video_is_one_picture_with_an_error(tmp_path: Path) -> None:
    path = tmp_path / "cut.mp4"
    path.write_bytes(write_video(tmp_path / "whole.mp4", "mp4v").read_bytes()[:600])
    (found,) = pictures([path])
    assert found.error is not None and "cut.mp4 is damaged or not a video" in str(found.error)
    assert list(picture_sizes([path])) == [None]
    with pytest.raises(DataError):
        found.read()


def test_colours_of_a_video_are_rgb(tmp_path: Path) -> None:
    writer = cv2.VideoWriter(str(tmp_path / "red.avi"), cv2.VideoWriter.fourcc(*"MJPG"), RATE, (64, 64))
    writer.write(np.full((64, 64, 3), (0, 0, 255), np.uint8))  # BGR
    writer.release()
    (found,) = pictures([tmp_path / "red.avi"])
    np.testing.assert_allclose(found.read()[32, 32], (255, 0, 0), atol=8)


def test_folders_are_listed_sorted_with_what_is_below(tmp_path: Path) -> None:
    for name in ("b/2.JPG", "b/1.png", "a.webp", "c.mp4", "b/.hidden.jpg", ".git/x.jpg", "out/pictures/1.jpg", "n.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "b" / "loop").symlink_to(tmp_path)
    found = list_inputs([tmp_path, tmp_path / "n.txt", tmp_path / "a.webp"], exclude=[tmp_path / "out"])
    names = [Path(str(path)).relative_to(tmp_path).as_posix() for path in found]
    assert names == ["a.webp", "c.mp4", "b/1.png", "b/2.JPG", "n.txt"]


def test_links_are_followed_and_loops_end(tmp_path: Path) -> None:
    for name in ("elsewhere/a.jpg", "elsewhere/deep/b.jpg", "top/c.jpg", "top/x/d.jpg"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "top/link").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "top/again").symlink_to(tmp_path / "elsewhere/deep")
    (tmp_path / "top/own").symlink_to(tmp_path / "top/x")
    (tmp_path / "top/dangling.jpg").symlink_to(tmp_path / "nowhere.jpg")
    (tmp_path / "elsewhere/deep/loop").symlink_to(tmp_path / "top")
    (tmp_path / "elsewhere/self").symlink_to(".")
    found = list_inputs([tmp_path / "top"])
    names = [Path(str(path)).relative_to(tmp_path / "top").as_posix() for path in found]
    # Each once: `own` under its own name, and a link that leads nowhere is there to have an error.
    assert names == ["c.jpg", "dangling.jpg", "again/b.jpg", "link/a.jpg", "x/d.jpg"]
    assert list_inputs([tmp_path / "top", tmp_path / "elsewhere"])[0] == tmp_path / "top/c.jpg"
    assert len(list_inputs([tmp_path / "top", tmp_path / "elsewhere"])) == 5


@pytest.mark.posix
def test_what_is_left_out_is_named_once(tmp_path: Path) -> None:
    for name in ("a.JFIF", "b.tif", "c.avif", "d.m2ts", "e.heic", "f.heic", "g.txt", "readme"):
        (tmp_path / name).touch()
    os.mkfifo(tmp_path / "pipe.jpg")
    notes: list[str] = []
    found = list_inputs([tmp_path], note=notes.append)
    assert [path.name for path in found] == ["a.JFIF", "b.tif", "c.avif", "d.m2ts"]
    assert notes == [
        "skipped 4 files that are no images or videos by name: 2 .heic, 1 .txt, 1 no suffix",
        f"skipped {tmp_path / 'pipe.jpg'}: no regular file",
    ]
    given = list_inputs([tmp_path / "e.heic", tmp_path / "pipe.jpg"])
    errors = [str(one.error) for one in pictures(given)]
    assert "e.heic is empty" in errors[0] and "it is no regular file" in errors[1]
    with pytest.raises(DataError, match="File name too long"):
        list_inputs([tmp_path / ("x" * 5000)])


def test_files_given_by_name_are_tried_whatever_their_suffix(tmp_path: Path) -> None:
    video = write_video(tmp_path / "a.mp4", "mp4v").rename(tmp_path / "clip.dat")
    cv2.imwrite(str(tmp_path / "b.png"), np.zeros((20, 30, 3), np.uint8))
    image = (tmp_path / "b.png").rename(tmp_path / "picture")
    assert [one.frame for one in pictures([video, image])] == [*range(FRAMES), None]
    assert [one.size for one in pictures([image])] == [(20, 30)]


def test_a_video_that_ends_early_says_so(tmp_path: Path) -> None:
    data = write_video(tmp_path / "a.avi", "MJPG").read_bytes()
    path = tmp_path / "cut.avi"
    path.write_bytes(data[: (data.index(b"movi") + data.index(b"idx1")) // 2])
    *frames, last = pictures([path])
    assert 0 < len(frames) < FRAMES and all(one.error is None for one in frames)
    assert last.frame is None and last.size is None
    assert f"cut.avi ends early: its header says {FRAMES} frames, and {len(frames)} could be read" in str(last.error)


@pytest.mark.parametrize(
    ("claimed", "rate", "number", "time_s", "early"),
    [
        (100, 25, 100, 3.96, False),
        (100, 25, 99, 3.92, False),  # an edit list
        (100, 25, 97, 3.84, True),
        (200, 50, 100, 3.96, False),  # a count made from a nominal rate of twice the frames
        (0, 25, 10, 0.4, False),
        (100, 0, 10, 0.4, False),
        (10**9, 25, 10, 0.4, True),
    ],
)
def test_when_a_video_ends_early(claimed: int, rate: float, number: int, time_s: float, early: bool) -> None:
    assert _ends_early(_Video(None, (48, 80), claimed, rate), number, time_s) is early


def test_a_video_is_not_believed_to_have_billions_of_frames(tmp_path: Path) -> None:
    path = write_video(tmp_path / "a.avi", "MJPG")
    data = bytearray(path.read_bytes())
    for header in (b"avih", b"strh"):  # dwTotalFrames, dwLength
        struct.pack_into("<I", data, data.index(header) + 8 + (16 if header == b"avih" else 32), 2_000_000_000)
    path.write_bytes(data)
    assert sum(1 for _ in picture_sizes([path])) <= len(data)
    *frames, last = pictures([path])
    assert len(frames) == FRAMES and "2000000000 frames" in str(last.error)


@pytest.mark.parametrize(
    "text",
    ["#EXTM3U\n#EXTINF:1,\n{file}\n", "ffconcat version 1.0\nfile '{file}'\n", "v=0\nm=video 5004 RTP/AVP 96\n"],
)
def test_lists_of_other_files_are_no_videos(text: str, tmp_path: Path) -> None:
    other = write_video(tmp_path / "a.mp4", "mp4v")
    path = tmp_path / "list.mp4"
    path.write_text(text.format(file=other))
    (found,) = pictures([path])
    assert found.error is not None and "not a video" in str(found.error)


def test_content_and_pil_images_are_those_of_the_file(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (20, 30, 3), np.uint8)
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(pixels).save(tmp_path / "turned.png", exif=exif)
    expected = picture_of(tmp_path / "turned.png").read()
    data = (tmp_path / "turned.png").read_bytes()
    opened = Image.open(tmp_path / "turned.png")
    for given in (data, opened):
        found = picture_of(given)
        assert found.size == (30, 20)
        np.testing.assert_array_equal(found.read(), expected)
    np.testing.assert_array_equal(picture_of(pixels[..., ::-1], "bgr").read(), pixels)
    deep = Image.fromarray(pixels[..., 0].astype(np.uint16) * 257)
    deep.getexif()[0x0112] = 6
    assert picture_of(deep).size == (30, 20)
    for mode in ("L", "LA", "RGBA", "P", "1", "I;16"):
        deep = Image.fromarray(pixels[..., 0].astype(np.uint16) * 257)
        picture = deep if mode == "I;16" else Image.fromarray(pixels).convert(mode)
        stream = io.BytesIO()
        picture.save(stream, "PNG")
        np.testing.assert_array_equal(picture_of(picture).read(), picture_of(stream.getvalue()).read(), mode)
    assert "the image is damaged" in str(picture_of(b"no image").error)
    assert "empty" in str(picture_of(b"").error)
    with pytest.raises(TypeError, match="not int"):
        picture_of(3)  # type: ignore[arg-type]


def test_what_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"there is no .*typo\.jpg\. Give"):
        list_inputs([tmp_path / "typo.jpg"])
    with pytest.raises(DataError, match="there are no images in"):
        list_inputs([tmp_path])


def test_a_file_that_is_no_image_has_an_error(tmp_path: Path) -> None:
    (tmp_path / "text.jpg").write_text("this is no picture")
    found = picture_of(tmp_path / "text.jpg")
    assert found.size is None and "text.jpg is damaged" in str(found.error)


def test_a_file_that_changes_meanwhile(tmp_path: Path) -> None:
    path = tmp_path / "image.png"
    cv2.imwrite(str(path), np.zeros((20, 30, 3), np.uint8))
    found = picture_of(str(path))
    assert found.size == (20, 30) and found.read().shape == (20, 30, 3)
    cv2.imwrite(str(path), np.zeros((30, 20, 3), np.uint8))
    with pytest.raises(DataError, match="has changed while it was read"):
        found.read()


@pytest.mark.parametrize("shape", [(4, 4), (4, 4, 4), (0, 4, 3), (1, 4, 4, 3)])
def test_arrays_must_be_rgb(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="an image must be RGB"):
        picture_of(np.zeros(shape, np.uint8))
    with pytest.raises(ValueError, match="float32"):
        picture_of(np.zeros((4, 4, 3), np.float32))


@pytest.mark.parametrize("color", ["rgb", "bgr"])
def test_the_memory_of_an_array_may_be_used_for_the_next(color: ColorOrder) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (4, 8, 3), np.uint8)
    for given in (pixels, pixels[::-1, ::2], np.asfortranarray(pixels)):
        picture, expected = picture_of(given, color), given[..., :: -1 if color == "bgr" else 1].copy()
        given[:] = 0
        np.testing.assert_array_equal(picture.read(), expected)


def test_many_inputs_take_little_memory() -> None:
    names = [f"folder/zwölf \udcff {number:06d}.jpg" for number in range(10_000)]
    tracemalloc.start()
    inputs = Inputs(
        Url(f"s3://b/{name[15:]}", 7, '"tag"') if place % 2 else Path(name) for place, name in enumerate(names)
    )
    # Of this module alone: threads that other tests left allocate, too.
    traces = tracemalloc.take_snapshot().filter_traces([tracemalloc.Filter(True, storage.__file__)])
    tracemalloc.stop()
    used = sum(one.size for one in traces.statistics("filename"))
    assert used < 60 * len(names)
    assert len(inputs) == len(names) and inputs[4:7] == [inputs[4], inputs[5], inputs[6]] == list(inputs)[4:7]
    assert inputs[-2] == Path(names[-2])
    last = inputs[9_999]
    assert isinstance(last, Url) and (str(last), last.size, last.version) == ("s3://b/009999.jpg", 7, '"tag"')
    with pytest.raises(IndexError):
        inputs[10_000]
    assert list(Inputs([*inputs[:3], inputs[1], Url("s3://b/x", 1), Url("s3://b/x", 2)], once=True))[3:] == [
        Url("s3://b/x")
    ]
