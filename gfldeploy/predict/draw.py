"""Pictures and videos with the boxes drawn in."""

from __future__ import annotations

import colorsys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from functools import cache
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from gfldeploy.errors import OutputError
from gfldeploy.images.decode import load_cv2, read_image
from gfldeploy.predict.outputs import read_records
from gfldeploy.predict.sources import video_frames, video_rate
from gfldeploy.predict.working import Record

if TYPE_CHECKING:
    from PIL.ImageFont import FreeTypeFont, ImageFont

__all__ = ["colour", "draw_all", "draw_boxes"]

_QUALITY = 92
_DEFAULT_RATE = 25.0  # frames a second of a video that does not say
_GOLDEN = 0.618034  # steps around the circle of hues that never come close to one another


def draw_all(records: Path, directory: Path, threshold: float) -> Iterator[int]:
    """Draw every image of a `detections.jsonl` into `directory`, which exists, and yield how many are done.

    Detections that score at least `threshold` are drawn. Images become `NUMBER-NAME.jpg`, a video `NUMBER-NAME.mp4`,
    by the number of their (first) line, from 1. What is there already is left. Raises `OutputError` and `DataError`.
    """
    numbered = enumerate(read_records(records), start=1)
    for (name, moving), lines in groupby(numbered, lambda line: (line[1]["file"], "frame" in line[1])):
        draw = _draw_video if moving else _draw_image
        yield from draw(Path(name), lines, directory, threshold)


def draw_boxes(image: NDArray[np.uint8], detections: Sequence[Record], threshold: float = 0.0) -> NDArray[np.uint8]:
    """A copy of the image, RGB uint8 [h, w, 3], with boxes and labels; the best lie on top.

    `detections` are those of a line of `detections.jsonl`.
    """
    from PIL import Image, ImageDraw

    picture = Image.fromarray(image)
    draw = ImageDraw.Draw(picture)
    line = max(2, round(min(image.shape[:2]) / 300))
    size = max(11, round(min(image.shape[:2]) / 40))
    font = _font(size)
    for one in sorted((one for one in detections if one["score"] >= threshold), key=lambda one: one["score"]):
        x, y, width, height = one["bbox"]
        fill = colour(one["class_id"])
        draw.rectangle((x, y, x + max(width, 1), y + max(height, 1)), outline=fill, width=line)
        text = f"{one['class']} {one['score']:.2f}"
        left, top, right, bottom = draw.textbbox((0, 0), text, font=font)
        # Above the box, or inside it at the upper edge of the image; never beyond the right one.
        label_x = max(0.0, min(x, image.shape[1] - (right - left) - 4))
        label_y = y - (bottom - top) - 4 if y >= bottom - top + 4 else max(y, 0.0)
        draw.rectangle((label_x, label_y, label_x + right - left + 4, label_y + bottom - top + 4), fill=fill)
        ink = (
            "black" if sum(weight * part for weight, part in zip((0.3, 0.6, 0.1), fill, strict=True)) > 128 else "white"
        )
        draw.text((label_x + 2 - left, label_y + 2 - top), text, fill=ink, font=font)
    return np.asarray(picture)


def colour(category: int) -> tuple[int, int, int]:
    """RGB, 0 to 255: the same for a class everywhere, and far from those of its neighbours."""
    red, green, blue = colorsys.hsv_to_rgb(category * _GOLDEN % 1, 0.85, (1.0, 0.8)[category % 2])
    return round(red * 255), round(green * 255), round(blue * 255)


@cache
def _font(size: int) -> FreeTypeFont | ImageFont:
    from PIL import ImageFont

    return ImageFont.load_default(size)


def _write_jpeg(target: Path, image: NDArray[np.uint8]) -> None:
    cv2 = load_cv2()
    partial = target.with_name(f".{target.name}")
    encoded, data = cv2.imencode(".jpg", cv2.cvtColor(image, cv2.COLOR_RGB2BGR), [cv2.IMWRITE_JPEG_QUALITY, _QUALITY])
    if not encoded:
        raise OutputError(f"OpenCV cannot encode {target}", "Leave --draw out.")
    try:
        partial.write_bytes(data.tobytes())
        partial.replace(target)
    except OSError as error:
        raise OutputError(f"cannot write {target}: {error.strerror or error}", "Free some space.") from error


def _draw_image(path: Path, lines: Iterable[tuple[int, Record]], directory: Path, threshold: float) -> Iterator[int]:
    for number, record in lines:
        target = directory / f"{number:06d}-{path.stem}.jpg"
        if "error" not in record and not target.exists():
            _write_jpeg(target, draw_boxes(read_image(path), record["detections"], threshold))
        yield number


def _draw_video(path: Path, lines: Iterable[tuple[int, Record]], directory: Path, threshold: float) -> Iterator[int]:
    cv2 = load_cv2()
    with ExitStack() as stack:
        for frame, (number, record) in zip(video_frames(path), lines, strict=False):
            if frame.frame == 0:
                target = directory / f"{number:06d}-{path.stem}.mp4"
                if target.exists():
                    return
                partial = target.with_name(f".{target.name}")
                size, rate = (record["width"], record["height"]), video_rate(path) or _DEFAULT_RATE
                writer = cv2.VideoWriter(str(partial), cv2.VideoWriter_fourcc(*"mp4v"), rate, size)
                stack.callback(writer.release)
                if not writer.isOpened():
                    raise OutputError(f"OpenCV cannot write {target}", "Leave --draw out, or free some space.")
            drawn = draw_boxes(frame.read(), record["detections"], threshold)
            writer.write(cv2.cvtColor(drawn, cv2.COLOR_RGB2BGR))
            yield number
    partial.replace(target)
