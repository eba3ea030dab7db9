"""Files, folders, videos and arrays as one stream of pictures."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pytest

from gfldeploy.errors import DataError
from gfldeploy.predict.sources import list_inputs, picture_of, picture_sizes, pictures, video_rate

FRAMES, RATE = 7, 12.5


def write_video(path: Path, fourcc: str) -> Path:
    """Frames of 48x80, each of one grey that grows by 20."""
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*fourcc), RATE, (80, 48))
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


def test_a_damaged_video_is_one_picture_with_an_error(tmp_path: Path) -> None:
    path = tmp_path / "cut.mp4"
    path.write_bytes(write_video(tmp_path / "whole.mp4", "mp4v").read_bytes()[:600])
    (found,) = pictures([path])
    assert found.error is not None and "cut.mp4 is damaged or not a video" in str(found.error)
    assert list(picture_sizes([path])) == [None]
    with pytest.raises(DataError):
        found.read()


def test_colours_of_a_video_are_rgb(tmp_path: Path) -> None:
    writer = cv2.VideoWriter(str(tmp_path / "red.avi"), cv2.VideoWriter_fourcc(*"MJPG"), RATE, (64, 64))
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
    names = [path.relative_to(tmp_path).as_posix() for path in found]
    assert names == ["a.webp", "c.mp4", "b/1.png", "b/2.JPG", "n.txt"]


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
        picture_of(np.zeros((4, 4, 3), np.float32))  # type: ignore[arg-type]
