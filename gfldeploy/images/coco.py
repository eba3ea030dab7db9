"""COCO annotation files and plain folders of images."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from gfldeploy.errors import DataError

__all__ = ["IMAGE_SUFFIXES", "CocoAnnotation", "CocoCategory", "CocoDataset", "CocoImage", "list_images"]

IMAGE_SUFFIXES = frozenset({".bmp", ".jpeg", ".jpg", ".png", ".webp"})
_SHOWN = 3  # how many offenders an error names


@dataclass(frozen=True)
class CocoImage:
    """One image: its COCO id, its file, and its size in pixels as the annotation file gives it."""

    id: int
    path: Path
    height: int
    width: int


@dataclass(frozen=True)
class CocoCategory:
    """One category of object: its COCO id and name."""

    id: int
    name: str


@dataclass(frozen=True)
class CocoAnnotation:
    """One labelled object: `bbox` is x, y, width, height and `area` is in square pixels, both of the original image.

    `crowd` marks a region of many objects, which counts neither for nor against a detector.
    """

    image_id: int
    category_id: int
    bbox: tuple[float, float, float, float]
    area: float
    crowd: bool = False


@dataclass(frozen=True)
class CocoDataset:
    """Labelled images.

    `images` are sorted by id. `categories` are in the order of the annotation file: PaddleDetection numbers its classes
    by that order. `annotations` are those of `images`.
    """

    images: tuple[CocoImage, ...]
    categories: tuple[CocoCategory, ...]
    annotations: tuple[CocoAnnotation, ...]

    @classmethod
    def load(cls, annotations: Path, image_dir: Path | None = None, limit: int | None = None) -> CocoDataset:
        """Read and check a COCO annotation file.

        `image_dir` is where its file names start: by default the folder `images` beside the annotation file if there is
        one, else the annotation file's own folder. `limit` keeps the first so many images by id, with their annotations
        only; only their files need to be there.

        An annotation without `area` gets width x height.

        Raises `DataError` when the file is not a COCO annotation file, contradicts itself, or names images that are not
        there or lie outside `image_dir`.
        """
        annotations = Path(annotations)
        if limit is not None and limit < 1:
            raise DataError(f"cannot keep {limit} images", "Give a limit of at least 1.")
        source = _read_json(annotations)
        image_dir = _image_dir(annotations, image_dir)
        images = _parse_images(source["images"], image_dir, annotations)
        categories = _parse_categories(source["categories"], annotations)
        boxes = _parse_annotations(source["annotations"], annotations)
        _check_references(boxes, images, categories, annotations)
        kept = sorted(images, key=lambda image: image.id)[:limit]
        if absent := [str(image.path) for image in kept if not image.path.is_file()]:
            raise DataError(
                f"{len(absent)} of {len(kept)} images of {annotations} are missing: {_first(absent)}",
                "Give the directory in which the annotations' file names start as the image directory.",
            )
        ids = {image.id for image in kept}
        return cls(tuple(kept), tuple(categories), tuple(box for box in boxes if box.image_id in ids))

    def class_to_category(self, classes: Sequence[str]) -> list[int]:
        """The category id of each class of a model.

        By name when every class is a category; otherwise, when there are as many classes as categories, by position in
        the annotation file, as PaddleDetection does. Raises `DataError` when neither is possible.
        """
        by_name = {category.name: category.id for category in self.categories}
        unique = len(by_name) == len(self.categories) and len(set(classes)) == len(classes)
        if classes and unique and all(name in by_name for name in classes):
            return [by_name[name] for name in classes]
        if len(classes) == len(self.categories):
            return [category.id for category in self.categories]
        unknown = [name for name in classes if name not in by_name] or list(classes)
        raise DataError(
            f"the model has {len(classes)} classes, the annotations {len(self.categories)} categories, "
            f"and these classes are not among them: {_first(unknown)}",
            "Use annotations with the categories that the model was trained on.",
        )


def list_images(directory: Path) -> list[Path]:
    """The images (.jpg, .jpeg, .png, .bmp, .webp, in any case) directly in a directory, sorted by name.

    Raises `DataError` when it is not a directory or has none.
    """
    directory = Path(directory)
    try:
        paths = sorted(path for path in directory.iterdir() if path.suffix.lower() in IMAGE_SUFFIXES and path.is_file())
    except OSError as error:
        raise DataError(
            f"cannot list the images of {directory}: {error.strerror or error}", "Give a directory of images."
        ) from error
    if not paths:
        raise DataError(
            f"there are no images in {directory}", f"Give a directory with {', '.join(sorted(IMAGE_SUFFIXES))} files."
        )
    return paths


def _read_json(path: Path) -> dict[str, list[Any]]:
    try:
        source = json.loads(path.read_bytes())
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror or error}", "Give a COCO annotation file.") from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path} is not JSON: {error}", "Give a COCO annotation file.") from error
    keys = ("images", "annotations", "categories")
    missing = [key for key in keys if not isinstance(source, dict) or not isinstance(source.get(key), list)]
    if missing:
        raise DataError(
            f"{path} has no list of {', no list of '.join(missing)}", "Give a COCO annotation file with object boxes."
        )
    for key in ("images", "categories"):
        if not source[key]:
            raise DataError(f"{path} has no {key}", "Give an annotation file with at least one.")
    return {key: source[key] for key in keys}


def _image_dir(annotations: Path, image_dir: Path | None) -> Path:
    if image_dir is None:
        beside = annotations.parent / "images"
        return beside if beside.is_dir() else annotations.parent
    image_dir = Path(image_dir)
    if not image_dir.is_dir():
        raise DataError(f"{image_dir} is not a directory", "Give the directory of the annotations' images.")
    return image_dir


def _parse_images(entries: list[Any], image_dir: Path, path: Path) -> list[CocoImage]:
    images = []
    for position, entry in enumerate(entries):
        where = f"{path}: images[{position}]"
        values = _take(entry, ("id", "file_name", "height", "width"), where)
        name = values["file_name"]
        if not isinstance(name, str) or not name:
            raise DataError(f"{where}: file_name is {name!r}", "It must be a relative path.")
        if _escapes(name):
            raise DataError(
                f"{where}: file_name {name!r} leads outside the image directory",
                "It must be a relative path without '..'.",
            )
        for key in ("height", "width"):
            if not _is_int(values[key]) or values[key] < 1:
                raise DataError(f"{where}: {key} is {values[key]!r}", "It must be a positive whole number of pixels.")
        images.append(CocoImage(_id(values["id"], where), image_dir / name, values["height"], values["width"]))
    _check_unique((image.id for image in images), "image", path)
    return images


def _parse_categories(entries: list[Any], path: Path) -> list[CocoCategory]:
    categories = []
    for position, entry in enumerate(entries):
        where = f"{path}: categories[{position}]"
        values = _take(entry, ("id", "name"), where)
        if not isinstance(values["name"], str):
            raise DataError(f"{where}: name is {values['name']!r}", "It must be text.")
        categories.append(CocoCategory(_id(values["id"], where), values["name"]))
    _check_unique((category.id for category in categories), "category", path)
    return categories


def _parse_annotations(entries: list[Any], path: Path) -> list[CocoAnnotation]:
    annotations = []
    for position, entry in enumerate(entries):
        where = f"{path}: annotations[{position}]"
        values = _take(entry, ("image_id", "category_id", "bbox"), where)
        box = values["bbox"]
        if not (isinstance(box, list) and len(box) == 4 and all(map(_is_finite, box)) and min(box[2:]) >= 0):
            raise DataError(
                f"{where}: bbox is {box!r}",
                "It must be [x, y, width, height], finite, with no negative width or height.",
            )
        x, y, width, height = map(float, box)
        area = entry.get("area", width * height)
        if not _is_finite(area) or area < 0:
            raise DataError(f"{where}: area is {area!r}", "It must be a number of square pixels.")
        crowd = entry.get("iscrowd", 0)
        if crowd not in (0, 1):
            raise DataError(f"{where}: iscrowd is {crowd!r}", "It must be 0 or 1.")
        annotations.append(
            CocoAnnotation(
                image_id=_id(values["image_id"], f"{where}: image_id"),
                category_id=_id(values["category_id"], f"{where}: category_id"),
                bbox=(x, y, width, height),
                area=float(area),
                crowd=bool(crowd),
            )
        )
    return annotations


def _check_references(
    annotations: list[CocoAnnotation], images: list[CocoImage], categories: list[CocoCategory], path: Path
) -> None:
    """Raise `DataError` for annotations of images or categories that the file does not have."""
    image_ids = {image.id for image in images}
    category_ids = {category.id for category in categories}
    for kind, dangling in (
        ("image", [item.image_id for item in annotations if item.image_id not in image_ids]),
        ("category", [item.category_id for item in annotations if item.category_id not in category_ids]),
    ):
        if dangling:
            raise DataError(
                f"{path}: {len(dangling)} annotations have a dangling {kind} id, one that the file does not define: "
                f"{_first(dict.fromkeys(dangling))}",
                "Remove them, or add what they refer to.",
            )


def _take(entry: object, keys: Sequence[str], where: str) -> dict[str, Any]:
    if not isinstance(entry, dict):
        raise DataError(f"{where} is not an object", "Give a COCO annotation file.")
    if missing := [key for key in keys if key not in entry]:
        raise DataError(f"{where} has no {', '.join(missing)}", "Give a COCO annotation file with object boxes.")
    return {key: entry[key] for key in keys}


def _check_unique(ids: Iterable[int], kind: str, path: Path) -> None:
    if repeated := [item for item, count in Counter(ids).items() if count > 1]:
        raise DataError(f"{path}: {len(repeated)} {kind} ids occur twice: {_first(repeated)}", "Make the ids unique.")


def _escapes(name: str) -> bool:
    """Whether a file name leads out of its directory, by the rules of POSIX or of Windows."""
    return any(
        path.is_absolute() or path.anchor or ".." in path.parts for path in (PurePosixPath(name), PureWindowsPath(name))
    )


def _id(value: object, where: str) -> int:
    if not isinstance(value, int) or isinstance(value, bool):
        raise DataError(f"{where}: the id is {value!r}", "It must be a whole number.")
    return value


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_finite(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _first(items: Iterable[object]) -> str:
    shown = [str(item) for item in items]
    more = len(shown) - _SHOWN
    return ", ".join(shown[:_SHOWN]) + (f" and {more} more" if more > 0 else "")
