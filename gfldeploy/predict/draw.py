"""Pictures and videos with boxes."""

from __future__ import annotations

import colorsys
import functools
import os
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from itertools import groupby, pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gfldeploy.detection_options import Shown
from gfldeploy.engines.base import ClosesOnExit
from gfldeploy.errors import OutputError, UsageError
from gfldeploy.files import check_native_write, writing
from gfldeploy.images.decode import load_cv2, read_image
from gfldeploy.images.native_stderr import heard
from gfldeploy.predict.fonts import missing_glyphs, runs
from gfldeploy.predict.outputs import Record, read_records
from gfldeploy.predict.sources import video_frames, video_rate
from gfldeploy.storage import Source, source_of
from gfldeploy.system import folder_path, name_for_file, rename
from gfldeploy.text import first_of

_QUALITY = 92
_DEFAULT_RATE = 25.0  # frames a second of a video that does not say
_PLAYED = ("avc1", "vp09")  # by browsers too: H.264, VP9
_LIVE_CODECS = ("avc1", "mp4v")  # OpenCV's VP9 takes longer for a frame than there is
_MOST_LIVE_RATE = 30.0
_FRAMES_OF_RATE = 6
_LONGEST_LIVE_S, _LONGEST_PAUSE_S = 300.0, 2.0
_MOST_STEM_BYTES = 200
_MOST_SHOWN = 5  # characters that a note names
_GOLDEN = 0.618034  # steps around the circle of hues that stay apart from one another


def draw_all(records: Path, directory: Path, threshold: float) -> Iterator[int]:
    """Draw every image of a `detections.jsonl` into `directory`, which exists, and yield how many are done.

    Detections that score at least `threshold` are drawn. Images become `NUMBER-NAME.jpg`, a video `NUMBER-NAME.mp4`, by
    the number of their (first) line, from 1. Files that exist are left. Raises `OutputError` and `DataError`.
    """
    numbered = enumerate(read_records(records), start=1)
    for (name, moving), lines in groupby(numbered, lambda line: (line[1]["file"], "frame" in line[1])):
        draw = _draw_video if moving else _draw_image
        yield from draw(source_of(name), lines, directory, threshold)


def draw_boxes(image: NDArray[np.uint8], detections: Sequence[Record], threshold: float = 0.0) -> NDArray[np.uint8]:
    """A copy of the image, RGB uint8 [h, w, 3], with boxes and labels, the best on top; `detections`: `records()`."""
    from PIL import Image, ImageDraw

    picture = Image.fromarray(image)
    draw = ImageDraw.Draw(picture)
    line = max(2, round(min(image.shape[:2]) / 300))
    size = max(11, round(min(image.shape[:2]) / 40))
    for one in sorted((one for one in detections if one["score"] >= threshold), key=lambda one: one["score"]):
        x, y, width, height = one["bbox"]
        fill = colour(one["class_id"])
        draw.rectangle((x, y, x + max(width, 1), y + max(height, 1)), outline=fill, width=line)
        pieces = list(runs(f"{one['class']} {one['score']:.2f}", size))
        widths = [draw.textlength(text, font=font) for text, font in pieces]
        # Fonts differ in height: all stand on one baseline.
        extents = [draw.textbbox((0, 0), text, font=font, anchor="ls") for text, font in pieces]
        top, bottom = min(one[1] for one in extents), max(one[3] for one in extents)
        width, height = sum(widths), bottom - top
        # Above the box, or inside it at the upper edge of the image; never beyond the right one.
        label_x = max(0.0, min(x, image.shape[1] - width - 4))
        label_y = y - height - 4 if y >= height + 4 else max(y, 0.0)
        draw.rectangle((label_x, label_y, label_x + width + 4, label_y + height + 4), fill=fill)
        ink = "black" if np.dot((0.3, 0.6, 0.1), fill) > 128 else "white"
        pen = label_x + 2
        for (text, font), advance in zip(pieces, widths, strict=True):
            draw.text((pen, label_y + 2 - top), text, fill=ink, font=font, anchor="ls")
            pen += advance
    return np.asarray(picture)


def colour(category: int) -> tuple[int, int, int]:
    """RGB, 0 to 255, of a class id: always the same, and far from those of the next ids."""
    red, green, blue = colorsys.hsv_to_rgb(category * _GOLDEN % 1, 0.85, (1.0, 0.8)[category % 2])
    return round(red * 255), round(green * 255), round(blue * 255)


def drawn_from(draw: bool, threshold: float | None, shown: Shown) -> float | None:
    """The lowest score that is drawn, None for no pictures; `threshold`: as somebody asks for it.

    Raises `UsageError` for one below what is `shown`: nothing else is drawn.
    """
    if threshold is None:
        return shown.least if draw else None
    if not draw:
        raise UsageError("--draw-threshold is of pictures, and there are none", "Add --draw, or leave it out.")
    if not shown.least <= threshold <= 1:
        raise UsageError(
            f"draw_threshold is {threshold:g}, and what is shown scores from {shown.least:g} to 1",
            "Give one of these scores, or a lower threshold, too.",
        )
    return threshold


def drawing_notes(classes: Sequence[str], videos: bool) -> list[str]:
    """Sentences about what pictures, and videos if there are any, cannot show."""
    notes = []
    if missing := missing_glyphs(classes):
        codes = (char.encode("unicode_escape").decode() for char in missing)
        notes.append(
            f"no font here has {first_of(codes, _MOST_SHOWN)}: pictures show such codes; install a font that has these "
            "characters, such as the package fonts-noto-cjk"
        )
    if videos:
        with tempfile.TemporaryDirectory() as folder:
            writer, codec = _video_writer(Path(folder) / "probe.mp4", _DEFAULT_RATE, (64, 64))
            writer.release()
        if codec not in _PLAYED:
            notes.append("this OpenCV writes neither H.264 nor VP9: players show the videos, browsers do not")
    return notes


class LiveVideo(ClosesOnExit):
    """The drawn frames of a live source as videos, `NUMBER-STEM.mp4` by the line of their first frame, from 1.

    They play in real time: a frame is shown until the next one. The rate is about that of the first frames, so that few
    are written twice. A video that is not closed cannot be played: a new one begins every five minutes, and after a
    pause.
    """

    def __init__(self, directory: Path, stem: str) -> None:
        """`stem`: ASCII."""
        self._directory, self._stem = directory, stem[:_MOST_STEM_BYTES]
        self._writer: Any = None
        self._partial = self._target = directory
        self._number, self._began, self._rate = 0, 0.0, _DEFAULT_RATE
        self._waiting: list[tuple[float, NDArray[np.uint8]]] = []  # when they were read, and BGR

    def add(self, number: int, time_s: float, pixels: NDArray[np.uint8], detections: Sequence[Record]) -> None:
        """A frame, RGB uint8 [h, w, 3], read at a time, and what to draw. Raises `OutputError` and `OSError`."""
        import cv2

        drawn = np.asarray(cv2.cvtColor(draw_boxes(pixels, detections), cv2.COLOR_RGB2BGR), np.uint8)
        if self._waiting:
            before, last = self._waiting[-1]
            paused = time_s - before > _LONGEST_PAUSE_S or time_s - self._began > _LONGEST_LIVE_S
            if paused or drawn.shape != last.shape:
                self.close()
        if not self._waiting:
            self._number, self._began = number, time_s
        self._waiting.append((time_s, drawn))
        if self._writer is not None or len(self._waiting) == _FRAMES_OF_RATE:
            self._write()

    def close(self) -> None:
        """End the video. Raises as `add`."""
        if self._waiting:
            self._write()
            self._writer.write(self._waiting[-1][1])
            self._writer.release()
            check_native_write(self._partial)
            rename(self._partial, self._target)
        self._writer = None
        self._waiting = []

    def _write(self) -> None:
        """Those whose next one is known."""
        if self._writer is None:
            self._open()
        for (time_s, drawn), (following_s, _) in pairwise(self._waiting):
            for _ in range(self._place(time_s), self._place(following_s)):
                self._writer.write(drawn)
        del self._waiting[:-1]

    def _place(self, time_s: float) -> int:
        return round((time_s - self._began) * self._rate)

    def _open(self) -> None:
        (first_s, drawn), (last_s, _) = self._waiting[0], self._waiting[-1]
        if last_s > first_s:
            self._rate = min(max((len(self._waiting) - 1) / (last_s - first_s), 1.0), _MOST_LIVE_RATE)
        self._target = self._directory / f"{self._number:06d}-{self._stem}.mp4"
        self._partial = self._directory / f".{self._number:06d}.mp4"
        size = (drawn.shape[1], drawn.shape[0])
        self._writer, codec = _video_writer(self._partial, self._rate, size, _LIVE_CODECS)
        if codec is None:
            raise OutputError(f"OpenCV cannot write {self._target}", "Leave --draw out, or free some space.")


def _video_writer(
    path: Path, rate: float, size: tuple[int, int], codecs: Sequence[str] = (*_PLAYED, "mp4v")
) -> tuple[Any, str | None]:
    """A `cv2.VideoWriter`, and the first codec that this OpenCV has, or None. The name of `path` is ASCII."""
    cv2 = load_cv2()
    with folder_path(path.parent) as folder:
        if folder is None:
            return cv2.VideoWriter(), None
        name = f"{folder}/{path.name}"
        for codec in codecs:
            fourcc = cv2.VideoWriter_fourcc(*codec)
            writer, _ = heard(functools.partial(cv2.VideoWriter, name, cv2.CAP_FFMPEG, fourcc, rate, size))
            if writer.isOpened():
                return writer, codec
        return writer, None


def _fitted(image: NDArray[np.uint8], size: tuple[int, int]) -> NDArray[np.uint8]:
    """The image in a frame of (width, height): as large as fits, black right and below."""
    import cv2

    width, height = size
    if image.shape[:2] == (height, width):
        return image
    scale = min(height / image.shape[0], width / image.shape[1])
    inner = (max(1, int(image.shape[1] * scale)), max(1, int(image.shape[0] * scale)))
    frame = np.zeros((height, width, 3), np.uint8)
    frame[: inner[1], : inner[0]] = cv2.resize(image, inner, interpolation=cv2.INTER_AREA)
    return frame


def _write_jpeg(target: Path, image: NDArray[np.uint8]) -> None:
    cv2 = load_cv2()
    partial = target.with_name(f".{target.name}")
    encoded, data = cv2.imencode(".jpg", cv2.cvtColor(image, cv2.COLOR_RGB2BGR), [cv2.IMWRITE_JPEG_QUALITY, _QUALITY])
    if not encoded:
        raise OutputError(f"OpenCV cannot encode {target}", "Leave --draw out.")
    with writing(target):
        partial.write_bytes(data.tobytes())
        rename(partial, target)


def _name(number: int, path: Source, suffix: str) -> str:
    """The name of a picture, short enough for any file system."""
    stem = os.fsencode(name_for_file(path.stem))
    if len(stem) > _MOST_STEM_BYTES:
        stem = stem[:_MOST_STEM_BYTES].decode("utf-8", "ignore").encode()
    return f"{number:06d}-{os.fsdecode(stem)}{suffix}"


def _draw_image(path: Source, lines: Iterable[tuple[int, Record]], directory: Path, threshold: float) -> Iterator[int]:
    for number, record in lines:
        target = directory / _name(number, path, ".jpg")
        if "error" not in record and not target.exists():
            _write_jpeg(target, draw_boxes(read_image(path), record["detections"], threshold))
        yield number


def _draw_video(path: Source, lines: Iterable[tuple[int, Record]], directory: Path, threshold: float) -> Iterator[int]:
    cv2 = load_cv2()
    with ExitStack() as stack:
        for frame, (number, record) in zip(video_frames(path), lines, strict=False):
            if frame.frame == 0:
                target = directory / _name(number, path, ".mp4")
                if target.exists():
                    return
                partial = directory / f".{number:06d}.mp4"
                size, rate = (record["width"], record["height"]), video_rate(path) or _DEFAULT_RATE
                writer, codec = _video_writer(partial, rate, size)
                stack.callback(writer.release)
                if codec is None:
                    raise OutputError(f"OpenCV cannot write {target}", "Leave --draw out, or free some space.")
            drawn = draw_boxes(frame.read(), record["detections"], threshold)
            writer.write(cv2.cvtColor(_fitted(drawn, size), cv2.COLOR_RGB2BGR))
            yield number
    check_native_write(partial)
    rename(partial, target)
