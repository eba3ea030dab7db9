"""What there is to detect in: files, folders of them, videos, arrays. Each image has its size before its pixels."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gfldeploy.errors import DataError
from gfldeploy.images.coco import IMAGE_SUFFIXES
from gfldeploy.images.decode import load_cv2, read_image
from gfldeploy.images.headers import image_size

__all__ = [
    "VIDEO_SUFFIXES",
    "Picture",
    "is_video",
    "list_inputs",
    "picture_of",
    "picture_sizes",
    "pictures",
    "video_frames",
    "video_rate",
]

VIDEO_SUFFIXES = frozenset({".avi", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".webm"})


@dataclass(frozen=True)
class Picture:
    """One image to come.

    `source`: the file, or the pixels, RGB uint8 [h, w, 3]. `size`: (h, w) in pixels; None where it cannot be had, which
    `error` explains. `frame`, from 0, and `time_s`, seconds from its beginning: of a frame of the video `name`.
    """

    name: str
    source: Path | NDArray[np.uint8]
    size: tuple[int, int] | None
    error: DataError | None = None
    frame: int | None = None
    time_s: float | None = None

    def read(self, reduction: int = 1) -> NDArray[np.uint8]:
        """The pixels, RGB uint8; of a file by `read_image`. Raises `DataError`."""
        if self.error is not None:
            raise self.error
        if not isinstance(self.source, Path):
            return self.source
        image = read_image(self.source, reduction)
        if reduction == 1 and image.shape[:2] != self.size:
            raise DataError(f"{self.source} has changed while it was read", "Run it again.")
        return image


def picture_of(image: str | os.PathLike[str] | NDArray[np.uint8]) -> Picture:
    """A file, or an RGB array, uint8 [h, w, 3]. A file that cannot be used has its `error`.

    Raises `ValueError` for another kind of array.
    """
    if isinstance(image, np.ndarray):
        if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8 or 0 in image.shape:
            raise ValueError(f"an image must be RGB, uint8 [h, w, 3], not {image.dtype} {list(image.shape)}")
        return Picture("array", image, (image.shape[0], image.shape[1]))
    path = Path(image)
    try:
        return Picture(str(image), path, image_size(path))
    except DataError as error:
        return Picture(str(image), path, None, error)


def pictures(inputs: Iterable[Path]) -> Iterator[Picture]:
    """Every image of these files, in order; of a video, its frames."""
    for path in inputs:
        if is_video(path):
            yield from video_frames(path)
        else:
            yield picture_of(path)


def is_video(path: Path) -> bool:
    """By the name."""
    return path.suffix.lower() in VIDEO_SUFFIXES


def list_inputs(inputs: Sequence[Path], exclude: Sequence[Path] = ()) -> list[Path]:
    """The files named, each once, and in place of a folder the images and videos below it, sorted, folder by folder.

    `exclude`: folders that are left out. Hidden files and folders are left out too. Raises `DataError` for what is not
    there, and for a folder without images.
    """
    found: list[Path] = []
    for path in inputs:
        if not path.exists():
            raise DataError(f"there is no {path}", "Give image files, videos, or folders of them.")
        below = list(_below(path, {folder.resolve() for folder in exclude})) if path.is_dir() else [path]
        if not below:
            suffixes = ", ".join(sorted(IMAGE_SUFFIXES | VIDEO_SUFFIXES))
            raise DataError(f"there are no images in {path}", f"Give a folder with {suffixes} files.")
        found += below
    return list(dict.fromkeys(found))


def picture_sizes(inputs: Sequence[Path]) -> Iterator[tuple[int, int] | None]:
    """(h, w) in pixels of every image of these files, None where it cannot be read.

    Of a video by what its head says, which may be wrong: as many as that has frames, at least one.
    """
    for path in inputs:
        if is_video(path):
            yield from _frame_sizes(path)
        else:
            yield picture_of(path).size


def _below(folder: Path, exclude: set[Path]) -> Iterator[Path]:
    for name, folders, files in os.walk(folder):
        here = Path(name)
        # In place: `walk` goes into what is left, in this order.
        folders[:] = sorted(one for one in folders if one[0] != "." and (here / one).resolve() not in exclude)
        for file in sorted(files):
            path = here / file
            if file[0] != "." and path.suffix.lower() in IMAGE_SUFFIXES | VIDEO_SUFFIXES:
                yield path


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    """A `cv2.VideoCapture` that decodes in one thread, as the engine has the others; None for what cannot be read."""
    cv2 = load_cv2()
    capture = cv2.VideoCapture(str(path), cv2.CAP_FFMPEG, [cv2.CAP_PROP_N_THREADS, 1])
    try:
        yield capture if capture.isOpened() else None
    finally:
        capture.release()


def _frame_sizes(path: Path) -> list[tuple[int, int] | None]:
    import cv2

    with _opened(path) as capture:
        if capture is None:
            return [None]
        height, width = (int(capture.get(key)) for key in (cv2.CAP_PROP_FRAME_HEIGHT, cv2.CAP_PROP_FRAME_WIDTH))
        size = (height, width) if height > 0 and width > 0 else None
        return [size] * max(int(capture.get(cv2.CAP_PROP_FRAME_COUNT)), 1)


def video_rate(path: Path) -> float:
    """Frames a second; 0 where the file does not say."""
    import cv2

    with _opened(path) as capture:
        return float(capture.get(cv2.CAP_PROP_FPS)) if capture else 0.0


def video_frames(path: Path) -> Iterator[Picture]:
    """Its frames in order. At least one picture: a video without a frame that can be read has its `error`."""
    import cv2

    number = 0
    with _opened(path) as capture:
        while capture:
            read, frame = capture.read()
            if not read:
                break
            time_s = capture.get(cv2.CAP_PROP_POS_MSEC) / 1e3
            rgb = cv2.cvtColor(frame, cv2.COLOR_BGR2RGB)
            yield Picture(str(path), rgb, (rgb.shape[0], rgb.shape[1]), None, number, time_s)
            number += 1
    if number == 0:
        error = DataError(f"{path} is damaged or not a video that OpenCV reads", "Convert it to MP4.")
        yield Picture(str(path), path, None, error)
