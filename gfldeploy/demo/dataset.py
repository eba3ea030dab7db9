"""The demo's data: a seeded, generated COCO-format detection dataset, shaped like the data users bring.

Landscape, portrait and square JPEGs of many sizes; cluttered, textured backgrounds; six classes of shapes from a dozen
pixels to most of the image, rotated, textured, blurred, occluded, now and then of low contrast; some images crowded,
some empty. Nothing is downloaded, and image `i` of a split is the same bytes of drawing whatever the number of images,
so a short split is a prefix of a long one.
"""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import tempfile
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from gfldeploy.errors import DataError, OutputError
from gfldeploy.files import writing
from gfldeploy.progress import SILENT, Progress

CLASSES: tuple[str, ...] = ("disc", "ring", "square", "triangle", "star", "cross")
"""Class names; the COCO category id of `CLASSES[i]` is `i + 1`."""

SPLITS: tuple[str, ...] = ("train", "calib", "val", "scenes")
"""Split names. Their position seeds them, so the splits share no image. "scenes" are large pictures of many objects,
most of them small, for detecting in tiles."""

GENERATOR_VERSION = 1
"""Raised whenever the pictures change: a split written by another version is generated again."""

SEED = 20_260_511

# Width x height in pixels: the 4:3 and 3:2 of cameras and the 16:9 of phones, in both orientations, and squares.
_SIZES: tuple[tuple[int, int], ...] = (
    *((640, 480), (480, 640), (512, 384), (384, 512), (600, 400), (400, 600), (448, 448), (512, 512)),
    *((640, 360), (360, 640), (560, 420), (450, 600), (576, 432), (500, 375)),
)

# Of scenes: width x height, and of their objects the part that is small, and of medium size, with the sizes in pixels.
_SCENE_SIZES: tuple[tuple[int, int], ...] = ((2400, 1600), (1600, 2400), (2560, 1440), (1920, 1920))
_SCENE_OBJECTS: tuple[tuple[float, float, float], ...] = ((0.6, 14.0, 36.0), (0.3, 36.0, 140.0), (0.1, 140.0, 800.0))

# An object keeps at least this part of its area visible, after occlusion and clipping by the image's border. Later
# objects that would hide more are not drawn: hiding an object and dropping its box would leave unlabelled shapes.
_MIN_VISIBLE = 0.5

# Part of the images that are crowded. Training pays by the pixel and learns by the object: crowded images teach more.
_CROWDED = {"train": 0.6, "calib": 0.12, "val": 0.12}

Image = npt.NDArray[np.uint8]
_Found = tuple[int, tuple[int, int, int, int], int]  # class, box (x, y, width, height) in px, visible area in px²


@dataclass
class _Placed:
    """One drawn object: `area` is the full mask area in px², also outside the image; `visible` what is left of it."""

    category: int
    area: int
    visible: int


def generate(directory: Path, split: str, count: int, progress: Progress = SILENT) -> Path:
    """Write `count` images of `split` under `directory` and return the path of their COCO annotations.

    The result is `<directory>/<split>/images/*.jpg` and `<directory>/<split>/annotations.json`, with boxes as
    [x, y, width, height] in pixels of the image, tight around what is visible. A complete split of the same generator
    version and the same count is reused; anything else at that place that this function wrote is replaced. The new
    split is written beside its place and renamed, so an interruption leaves no half-written split.
    """
    if split not in SPLITS:
        raise DataError(f"unknown demo split {split!r}", f"Use one of: {', '.join(SPLITS)}.")
    if count < 1:
        raise DataError(f"a demo split of {count} images", "Ask for at least one image.")

    target = directory / split
    annotations = target / "annotations.json"
    if _is_complete(target, split, count):
        progress.step("images", count, count)
        return annotations
    if target.exists() and not _is_ours(target):
        problem = f"{target} exists and is no generated demo split"
        raise OutputError(problem, "Move it away, or choose another directory.")

    with writing(target):
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{split}-", dir=directory) as temporary:
            new = Path(temporary) / split
            _write_split(new, split, count, progress)
            if target.exists():
                shutil.rmtree(target)
            new.rename(target)
    return annotations


def _is_complete(target: Path, split: str, count: int) -> bool:
    """Whether `target` holds this very split: same generator, same count, every image there and of the size written."""
    with suppress(OSError, ValueError, KeyError, TypeError):
        coco = json.loads((target / "annotations.json").read_text(encoding="utf-8"))
        info, images = coco["info"], coco["images"]
        return (
            (info["generator_version"], info["split"], info["count"]) == (GENERATOR_VERSION, split, count)
            and len(images) == count
            and all((target / "images" / image["file_name"]).stat().st_size == image["bytes"] for image in images)
        )
    return False


def _is_ours(target: Path) -> bool:
    """Whether `target` may be replaced: nothing is in it but what a generated split has."""
    if not target.is_dir() or target.is_symlink():
        return False
    names = (path.relative_to(target).as_posix() for path in target.rglob("*"))
    return all(re.fullmatch(r"annotations\.json|images(/\d{6}\.jpg)?", name) for name in names)


def _write_split(directory: Path, split: str, count: int, progress: Progress) -> None:
    """Draw the images into `directory/images`, then write the annotations, last, so their presence means complete."""
    import cv2

    folder = directory / "images"
    folder.mkdir(parents=True)
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for index in range(count):
        rng = np.random.default_rng([SEED, SPLITS.index(split), index])
        picture, boxes = _draw_scene(rng) if split == "scenes" else _draw_image(rng, _CROWDED[split])
        quality = int(rng.integers(75, 96))
        _, encoded = cv2.imencode(".jpg", picture, [cv2.IMWRITE_JPEG_QUALITY, quality])
        name = f"{index:06d}.jpg"
        (folder / name).write_bytes(encoded.tobytes())
        height, width = picture.shape[:2]
        # the size in bytes is no COCO field: it tells a damaged image when the split is to be reused
        image = {"id": index + 1, "file_name": name, "width": width, "height": height}
        images.append({**image, "bytes": int(encoded.size)})
        for number, (category, box, area) in enumerate(boxes, start=len(annotations) + 1):
            annotation = {"id": number, "image_id": index + 1, "category_id": category + 1}
            annotations.append({**annotation, "bbox": box, "area": area, "iscrowd": 0})
        progress.step("images", index + 1, count)
    coco = {
        "info": {
            "description": "Generated shapes for the gfldeploy demo",
            "generator_version": GENERATOR_VERSION,
            "seed": SEED,
            "split": split,
            "count": count,
        },
        "images": images,
        "annotations": annotations,
        "categories": [{"id": i + 1, "name": name} for i, name in enumerate(CLASSES)],
    }
    with (directory / "annotations.json").open("w", encoding="utf-8", newline="") as file:
        json.dump(coco, file)
        file.flush()
        os.fsync(file.fileno())


def _draw_image(rng: np.random.Generator, crowded: float) -> tuple[Image, list[_Found]]:
    """One picture [H, W, 3] (BGR) and its objects; `crowded` is the probability of 15 or more objects."""
    width, height = _SIZES[int(rng.integers(len(_SIZES)))]
    short = min(width, height)
    picture = _background(rng, width, height)
    _clutter(rng, picture)

    kind = rng.random()
    if kind < 0.04:
        objects, smallest, largest = 0, 0.0, 0.0
    elif kind < 0.04 + crowded:
        objects, smallest, largest = int(rng.integers(15, 31)), 20.0, 0.3 * short
    else:
        objects, smallest, largest = int(rng.integers(1, 9)), 26.0, 0.6 * short

    owner = np.zeros((height, width), np.int16)  # 0: background; k: the k-th object; -1: something in front of it
    placed: list[_Placed] = []
    for _ in range(objects):
        small = objects < 15 and rng.random() < 0.08
        low, high = (12.0, 26.0) if small else (smallest, largest)
        size = math.exp(rng.uniform(math.log(low), math.log(high)))
        for _attempt in range(4):
            if _place_shape(rng, picture, owner, placed, size):
                break
    if placed and rng.random() < 0.3:
        _occlude(rng, picture, owner, placed)
    return _photographed(rng, picture), _boxes(owner, placed)


def _draw_scene(rng: np.random.Generator) -> tuple[Image, list[_Found]]:
    """One large picture [H, W, 3] (BGR) and its objects."""
    width, height = _SCENE_SIZES[int(rng.integers(len(_SCENE_SIZES)))]
    picture = _background(rng, width, height)
    for _ in range(8):
        _clutter(rng, picture)
    owner = np.zeros((height, width), np.int16)
    placed: list[_Placed] = []
    parts = [part for part, _, _ in _SCENE_OBJECTS]
    for _ in range(int(rng.integers(60, 101))):
        _, low, high = _SCENE_OBJECTS[int(rng.choice(len(parts), p=parts))]
        size = math.exp(rng.uniform(math.log(low), math.log(high)))
        for _attempt in range(4):
            if _place_shape(rng, picture, owner, placed, size):
                break
    return _photographed(rng, picture), _boxes(owner, placed)


def _photographed(rng: np.random.Generator, picture: Image) -> Image:
    """Now and then out of focus, or with the noise of a sensor."""
    import cv2

    if rng.random() < 0.15:
        sigma = float(rng.uniform(0.5, 1.1))
        picture = np.asarray(cv2.GaussianBlur(picture, (0, 0), sigma), np.uint8)
    if rng.random() < 0.35:  # sensor noise, over everything
        strength = int(rng.integers(3, 11))
        noise = rng.integers(0, 2 * strength + 1, picture.shape, np.uint8)
        picture = np.asarray(cv2.subtract(cv2.add(picture, noise), (strength,) * 3), np.uint8)
    return picture


def _boxes(owner: npt.NDArray[np.int16], placed: list[_Placed]) -> list[_Found]:
    """Boxes around what is visible of each object, read off the map of who owns which pixel [H, W]."""
    found = []
    for number, item in enumerate(placed, start=1):
        mask = owner == number
        rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
        x, y = int(columns[0]), int(rows[0])
        found.append((item.category, (x, y, int(columns[-1]) + 1 - x, int(rows[-1]) + 1 - y), item.visible))
    return found


def _background(rng: np.random.Generator, width: int, height: int) -> Image:
    """A textured picture [height, width, 3]: a gradient of four colours, noise at several scales, maybe stripes."""
    import cv2

    corners: npt.NDArray[Any] = rng.integers(30, 226, (2, 2, 3)).astype(np.float32)
    if rng.random() < 0.5:  # muted: corners close to each other
        corners = corners.mean(axis=(0, 1), keepdims=True) + 0.35 * (corners - corners.mean(axis=(0, 1)))
    canvas = cv2.resize(corners.astype(np.float32), (width, height), interpolation=cv2.INTER_LINEAR)
    for cell in (96, 32, 10, 3):
        if rng.random() < 0.3:
            continue
        strength = float(rng.uniform(3.0, 18.0)) * (0.5 if cell == 3 else 1.0)
        channels = 3 if rng.random() < 0.4 else 1
        coarse = rng.random((height // cell + 2, width // cell + 2, channels), np.float32)
        noise = cv2.resize((coarse - 0.5) * (2.0 * strength), (width, height), interpolation=cv2.INTER_LINEAR)
        canvas += noise if channels == 3 else noise[..., None]
    if rng.random() < 0.25:
        canvas += _stripes(rng, width, height, float(rng.uniform(6.0, 40.0)), float(rng.uniform(5.0, 20.0)))[..., None]
    return np.asarray(np.clip(canvas, 0, 255), np.uint8)


def _stripes(
    rng: np.random.Generator, width: int, height: int, period: float, strength: float
) -> npt.NDArray[np.float32]:
    """Stripes [height, width] of `period` pixels in a random direction, within ±`strength` grey levels."""
    angle, frequency = rng.uniform(0, math.pi), 2 * math.pi / period
    # sin(a + b) from two vectors: an outer sum of products is far cheaper than a sine per pixel
    x = np.arange(width, dtype=np.float32) * np.float32(frequency * math.cos(angle))
    y = np.arange(height, dtype=np.float32) * np.float32(frequency * math.sin(angle))
    wave = np.outer(np.sin(y), np.cos(x)) + np.outer(np.cos(y), np.sin(x))
    return np.asarray(wave * strength, np.float32)


def _clutter(rng: np.random.Generator, picture: Image) -> None:
    """Draw, in place, things which are no class: lines, arcs and irregular blobs."""
    import cv2

    height, width = picture.shape[:2]
    for _ in range(int(rng.integers(0, 9))):
        colour = tuple(int(c) for c in rng.integers(0, 256, 3))
        x, y = int(rng.integers(width)), int(rng.integers(height))
        thickness = int(rng.integers(1, 5))
        style = rng.random()
        if style < 0.5:
            other = (int(rng.integers(width)), int(rng.integers(height)))
            cv2.line(picture, (x, y), other, colour, thickness, cv2.LINE_AA)
        elif style < 0.7:
            axes = (int(rng.integers(15, 150)), int(rng.integers(15, 150)))
            start = rng.uniform(0, 360)
            end = start + rng.uniform(40, 140)
            cv2.ellipse(picture, (x, y), axes, rng.uniform(0, 180), start, end, colour, thickness, cv2.LINE_AA)
        else:
            _fill(picture, [np.array([x, y]) + _blob(rng, rng.uniform(10, 60))], colour)


def _fill(picture: Image, outlines: list[npt.NDArray[np.float64]], colour: tuple[int, ...]) -> None:
    """Fill, in place, outlines [P, 2] in pixels, which are rounded to sixteenths; a second outline is a hole."""
    import cv2

    cv2.fillPoly(picture, [np.round(one * 16).astype(np.int32) for one in outlines], colour, cv2.LINE_AA, 4)


def _blob(rng: np.random.Generator, radius: float) -> npt.NDArray[np.float64]:
    """An irregular, smooth, elongated outline [P, 2] around the origin: like none of the classes."""
    turn = np.linspace(0, 2 * math.pi, 36, endpoint=False)
    bumps = sum(rng.uniform(0.1, 0.35) / k * np.sin(k * turn + rng.uniform(0, 2 * math.pi)) for k in (2, 3, 5))
    reach = radius * np.maximum(0.35, 1 + bumps)
    points = np.stack([reach * np.cos(turn), 0.45 * reach * np.sin(turn)], axis=1)
    return np.asarray(points @ _rotation(rng.uniform(0, 2 * math.pi)))


def _rotation(angle: float) -> npt.NDArray[np.float64]:
    """The 2x2 matrix that turns row vectors by `angle` radians."""
    c, s = math.cos(angle), math.sin(angle)
    return np.array([[c, s], [-s, c]])


def _outlines(rng: np.random.Generator, category: int, radius: float) -> list[npt.NDArray[np.float64]]:
    """Outlines [P, 2] in pixels around the origin of one shape of `radius`; a second outline is a hole."""
    name = CLASSES[category]
    if name in ("disc", "ring"):
        turn = np.linspace(0, 2 * math.pi, 48, endpoint=False)
        circle = np.stack([np.cos(turn), rng.uniform(0.8, 1.0) * np.sin(turn)], axis=1)
        outlines = [circle, circle * rng.uniform(0.5, 0.68)] if name == "ring" else [circle]
    elif name == "square":
        h = rng.uniform(0.8, 1.0)
        outlines = [np.array([[-1, -h], [1, -h], [1, h], [-1, h]]) * 0.85]
    elif name == "triangle":
        corner = np.array([0.0, 2.0, 4.0]) * (math.pi / 3) + rng.uniform(-0.18, 0.18, 3)
        outlines = [np.stack([np.cos(corner), np.sin(corner)], axis=1)]
    elif name == "star":
        tip = np.arange(10) * (math.pi / 5)
        reach = np.where(np.arange(10) % 2 == 0, 1.0, rng.uniform(0.38, 0.5))
        outlines = [np.stack([reach * np.cos(tip), reach * np.sin(tip)], axis=1)]
    else:
        a = rng.uniform(0.2, 0.32)
        quarter = np.array([[1, -a], [1, a], [a, a]])
        outlines = [np.concatenate([quarter @ _rotation(k * math.pi / 2) for k in range(4)])]
    turned = _rotation(rng.uniform(0, 2 * math.pi))
    return [np.asarray(outline @ turned * radius) for outline in outlines]


def _place_shape(
    rng: np.random.Generator, picture: Image, owner: npt.NDArray[np.int16], placed: list[_Placed], size: float
) -> bool:
    """Draw one shape of about `size` pixels at a random place, in place; False where it would hide too much."""
    height, width = owner.shape
    category = int(rng.integers(len(CLASSES)))
    outlines = _outlines(rng, category, size / 2)
    centre = np.array([rng.uniform(0.02, 0.98) * width, rng.uniform(0.02, 0.98) * height])
    left, top = (int(v) for v in np.floor(centre - size / 2 - 3))
    side = math.ceil(size) + 8
    mask = np.zeros((side, side), np.uint8)
    _fill(mask, [outline + centre - (left, top) - 0.5 for outline in outlines], (255,))

    # the part of the patch that lies in the image
    x0, y0, x1, y1 = max(left, 0), max(top, 0), min(left + side, width), min(top + side, height)
    if x1 <= x0 or y1 <= y0:
        return False
    inside = mask[y0 - top : y1 - top, x0 - left : x1 - left]
    solid = inside >= 128
    area, visible = int((mask >= 128).sum()), int(solid.sum())
    # never less than half inside: slivers at the border cannot be told apart
    if visible < max(20, _MIN_VISIBLE * area) or not _stamp(owner[y0:y1, x0:x1], solid, placed, len(placed) + 1):
        return False
    placed.append(_Placed(category, area, visible))

    patch = picture[y0:y1, x0:x1]
    around = patch.reshape(-1, 3).mean(axis=0, dtype=np.float64)
    _paint(rng, patch, inside, _colour(rng, around), outlined=size > 24 and rng.random() < 0.3)
    return True


def _colour(rng: np.random.Generator, around: npt.NDArray[np.float64]) -> npt.NDArray[np.float32]:
    """A BGR colour that stands out from the mean colour `around` it by enough to be seen, sometimes only just."""
    distance = rng.uniform(35.0, 60.0) if rng.random() < 0.08 else rng.uniform(70.0, 200.0)
    direction = rng.normal(size=3)
    direction /= float(np.linalg.norm(direction)) + 1e-9
    # the side with more room, so that clipping does not eat the contrast
    if float(((127.5 - around) * direction).sum()) < 0:
        direction = -direction
    return np.asarray(np.clip(around + distance * direction, 0, 255), np.float32)


def _paint(
    rng: np.random.Generator, patch: Image, mask: Image, colour: npt.NDArray[np.float32], *, outlined: bool
) -> None:
    """Blend a filled, maybe textured and outlined shape into `patch` [h, w, 3] where `mask` [h, w] says (0 to 255)."""
    import cv2

    height, width = mask.shape
    fill = np.tile(colour, (height, width, 1))
    texture = rng.random()
    if texture < 0.3:  # lit from one side
        ramp = rng.uniform(-28, 28, (2, 2)).astype(np.float32)
        fill += cv2.resize(ramp, (width, height), interpolation=cv2.INTER_LINEAR)[..., None]
    elif texture < 0.5:
        fill += ((rng.random((height, width), np.float32) - 0.5) * float(rng.uniform(10, 50)))[..., None]
    elif texture < 0.65 and min(height, width) > 24:
        fill += _stripes(rng, width, height, float(rng.uniform(5, 16)), float(rng.uniform(8, 28)))[..., None]
    if outlined:
        edge = cv2.subtract(mask, cv2.erode(mask, np.ones((3, 3), np.uint8), iterations=int(rng.integers(1, 3))))
        weight = edge.astype(np.float32)[..., None] / 255.0
        fill += weight * (rng.integers(0, 256, 3).astype(np.float32) - fill)
    soft = cv2.GaussianBlur(mask, (0, 0), float(rng.uniform(0.6, 1.4))) if rng.random() < 0.25 else mask
    alpha = soft.astype(np.float32)[..., None] * (float(rng.uniform(0.9, 1.0)) / 255.0)
    base = patch.astype(np.float32)
    patch[:] = np.clip(base + alpha * (fill - base), 0, 255).astype(np.uint8)


def _stamp(owner: npt.NDArray[np.int16], solid: npt.NDArray[np.bool_], placed: list[_Placed], number: int) -> bool:
    """Give the pixels `solid` of `owner` [h, w] to `number`, unless an earlier object would be hidden too far."""
    counts = np.bincount(owner[solid].clip(min=0), minlength=len(placed) + 1)
    hidden = [(item, int(counts[k])) for k, item in enumerate(placed, start=1) if counts[k]]
    if any(item.visible - lost < max(20, _MIN_VISIBLE * item.area) for item, lost in hidden):
        return False
    for item, lost in hidden:
        item.visible -= lost
    owner[solid] = number
    return True


def _occlude(rng: np.random.Generator, picture: Image, owner: npt.NDArray[np.int16], placed: list[_Placed]) -> None:
    """Draw, in place, one to three bars or blobs in front of the objects, none of which hides an object too far."""
    import cv2

    height, width = owner.shape
    for _ in range(int(rng.integers(1, 4))):
        mask = np.zeros((height, width), np.uint8)
        x, y = rng.uniform(0, width), rng.uniform(0, height)
        if rng.random() < 0.6:
            angle, length = rng.uniform(0, math.pi), rng.uniform(0.3, 1.2) * max(width, height)
            step = np.array([math.cos(angle), math.sin(angle)]) * length / 2
            a, b = (np.round(np.array([x, y]) + away).astype(int).tolist() for away in (-step, step))
            cv2.line(mask, a, b, 255, int(rng.integers(3, 15)), cv2.LINE_AA)
        else:
            _fill(mask, [np.array([x, y]) + _blob(rng, rng.uniform(15, 55))], (255,))
        left, top, w, h = cv2.boundingRect(mask)
        if w == 0 or h == 0:
            continue
        window = (slice(top, top + h), slice(left, left + w))
        if not _stamp(owner[window], mask[window] >= 128, placed, -1):
            continue
        colour = np.asarray(rng.integers(0, 256, 3), np.float32)
        _paint(rng, picture[window], mask[window], colour, outlined=False)
