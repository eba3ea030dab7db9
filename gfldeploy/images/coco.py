"""COCO annotation files and plain folders of images."""

from __future__ import annotations

import json
import math
import os
import re
import stat
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any, TypeAlias
from urllib.parse import unquote

from gfldeploy.errors import DataError, reading
from gfldeploy.files import StrPath
from gfldeploy.images.decode import image_size
from gfldeploy.images.formats import IMAGE_SUFFIXES
from gfldeploy.text import first_of

# As JSON has it: written back as it was read. Of numbers, 1 and 1.0 are the same id.
CocoId: TypeAlias = int | float | str
_MOST_BYTES = 1 << 31  # of an annotation file; that of COCO's 118,287 training images has 450 MB
_few = partial(first_of, shown=3)  # of the wrong entries that an error names
_GIVE_COCO = "Give a COCO annotation file."
_GIVE_BOXES = "Give a COCO annotation file with object boxes."


@dataclass(frozen=True)
class CocoImage:
    """One image: its COCO id, its file, and its size in pixels by the annotation file, None if it has none.

    The size that counts is that of the file with EXIF orientation applied, as in PaddleDetection: `size`.
    """

    id: CocoId
    path: Path
    height: int | None = None
    width: int | None = None

    def size(self) -> tuple[int, int]:
        """(h, w) in pixels, of the file. Raises `DataError` if it cannot be read."""
        return image_size(self.path)


@dataclass(frozen=True)
class CocoCategory:
    """One category of object: its COCO id and name."""

    id: CocoId
    name: str


@dataclass(frozen=True)
class CocoAnnotation:
    """One labelled object: `bbox` is x, y, width, height and `area` is in square pixels, both of the original image.

    `crowd` marks a region of many objects, which counts neither for nor against a detector.
    """

    image_id: CocoId
    category_id: CocoId
    bbox: tuple[float, float, float, float]
    area: float
    crowd: bool = False


@dataclass(frozen=True)
class ClassMatch:
    """The category id of each class of a detector, None if the annotations have no such category.

    `notes`: for the user, sentences about classes that were not matched by the same name.
    """

    category_ids: tuple[CocoId | None, ...]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class CocoDataset:
    """Labelled images.

    `images` are sorted by id, numbers before text. `categories` are in the order of the annotation file:
    PaddleDetection numbers its classes by that order. `annotations` are those of `images`; there may be none.
    `labelled`: the categories that have boxes in the file, in any image. `notes`: sentences about what was left out,
    and about boxes that cannot be found.
    """

    images: tuple[CocoImage, ...]
    categories: tuple[CocoCategory, ...]
    annotations: tuple[CocoAnnotation, ...]
    labelled: frozenset[CocoId] = field(default=frozenset())
    notes: tuple[str, ...] = ()

    @classmethod
    def load(cls, annotations: StrPath, image_dir: StrPath | None = None, limit: int | None = None) -> CocoDataset:
        """Read and check a COCO annotation file.

        `image_dir` is where its file names start; by default the folder `images` beside the annotation file if there is
        one, and the annotation file's own folder. Where there is no file by a name as it is written, `\\` may stand for
        `/` and %20 for a space. A name may be absolute. `limit` keeps the first so many images by id with their
        annotations; only their files need to be there.

        Without `annotations`, as in COCO's test files, there are images alone. An annotation without `area` gets
        width x height; one without a box is left out, and so is one of an image that the file does not list.

        Raises `DataError` when the file is not a COCO annotation file, contradicts itself, or names images that are not
        there or lie outside `image_dir`.
        """
        annotations = Path(annotations)
        if limit is not None and limit < 1:
            raise DataError(f"cannot keep {limit} images", "Give a limit of at least 1.")
        source = _read_json(annotations)
        folders = _image_folders(annotations, image_dir)
        with reading(annotations, DataError, _GIVE_COCO):
            listed = _parse_images(source["images"], annotations)
            categories = _parse_categories(source["categories"], annotations)
            ids = {image.id for image, _, _ in listed}, {category.id for category in categories}
            boxes, notes = _parse_annotations(source["annotations"], annotations, *ids)
        listed.sort(key=lambda item: (isinstance(item[0].id, str), item[0].id))
        kept = [_located(image, name, folders, where) for image, name, where in listed[:limit]]
        if absent := [str(image.path) for image in kept if not _is_file(image.path)]:
            raise DataError(
                f"{len(absent)} of {len(kept)} images of {annotations} are missing: {_few(absent)}",
                "Give the directory in which the annotations' file names start as the image directory.",
            )
        kept_ids = {image.id for image in kept}
        some = tuple(box for box in boxes if box.image_id in kept_ids)
        labelled = frozenset(box.category_id for box in boxes)
        return cls(tuple(kept), tuple(categories), some, labelled, tuple(notes))

    def class_to_category(self, classes: Sequence[str]) -> list[CocoId | None]:
        """The category id of each class of a detector: `match` without its notes."""
        return list(self.match(classes).category_ids)

    def match(self, classes: Sequence[str]) -> ClassMatch:
        """Find the category of each class of a detector.

        By name, if need be without regard to case, spaces, `-` and `_`; of two categories of one name, the one that has
        boxes. Classes without a category, and categories without a class, are left out if the others match. If there
        are as many of both, and no name matches or only names at the same positions, then by position in the annotation
        file, as PaddleDetection does. The `notes` tell all but a match of the same names.

        Raises `DataError` when none of this is possible.
        """
        names = list(classes)
        if not self.categories:
            told = "the annotations have no categories: classes are numbered from 1, in their order"
            return ClassMatch(tuple(range(1, len(names) + 1)), (told,))
        found = self._by_name(names) if len(set(names)) == len(names) else {}
        missing = [name for name in names if name not in found]
        taken = {category.id for category in found.values()}
        counted = self._with_boxes(self.categories) if self.labelled else self.categories
        spare = [one for one in counted if one.id not in taken]
        notes = []
        if loose := [f"{name!r} is {one.name!r}" for name, one in found.items() if name != one.name]:
            notes.append(f"classes were matched without regard to case, spaces, '-' and '_': {_few(loose)}")
        if found and not (missing and spare):
            if missing:
                notes.append(
                    f"the annotations have no category for {len(missing)} of {len(names)} classes "
                    f"({_few(missing)}): accuracy is over the other {len(found)}"
                )
            elif spare and self.labelled:
                notes.append(
                    f"the detector has no class for {len(spare)} categories of the annotations "
                    f"({_few(one.name for one in spare)}): accuracy is over the {len(names)} that it has"
                )
            ids = (found[name].id if name in found else None for name in names)
            return ClassMatch(tuple(ids), tuple(notes))
        lined = self.categories if len(self.categories) == len(names) else self._with_boxes(self.categories)
        lined = lined if len(lined) == len(names) else ()
        if lined and all(found.get(name, one) is one for name, one in zip(names, lined, strict=True)):
            pairs = [f"{name!r} is {one.name!r}" for name, one in zip(names, lined, strict=True) if name != one.name]
            told = f"categories were matched by their position in the annotations, not by name: {_few(pairs)}"
            return ClassMatch(tuple(one.id for one in lined), (told,))
        problem = (
            f"the model has {len(names)} classes, the annotations {len(self.categories)} categories, and these classes "
            f"are not among them: {_few(missing or names)}"
        )
        if lined:
            problem += (
                f"; nor are these categories classes: {_few(one.name for one in spare)}, and the names that are in "
                "both are at different positions"
            )
        raise DataError(problem, "Use annotations with the categories that the model was trained on, by these names.")

    def size_note(self) -> str | None:
        """A sentence about images whose files have another size than the annotations say, None if there are none.

        Files that cannot be read are passed over.
        """
        other = []
        for image in self.images:
            if image.height is None or image.width is None:
                continue
            with suppress(DataError):
                height, width = image.size()
                if (height, width) != (image.height, image.width):
                    turned = " turned," if (height, width) == (image.width, image.height) else ""
                    other.append(
                        f"{image.path.name} is {width} x {height} px,{turned} not {image.width} x {image.height}"
                    )
        if not other:
            return None
        return (
            f"{len(other)} images have another size than their annotations say ({other[0]}); the size of the file "
            "counts, and boxes are taken as they are written"
        )

    def _by_name(self, classes: Sequence[str]) -> dict[str, CocoCategory]:
        """The category of each class that has one, in the order of the classes."""
        exact: dict[str, list[CocoCategory]] = defaultdict(list)
        loose: dict[str, list[CocoCategory]] = defaultdict(list)
        for category in self.categories:
            exact[category.name].append(category)
            if category.name not in classes:
                loose[_loosely(category.name)].append(category)
        once = Counter(map(_loosely, classes))
        found = {}
        for name in classes:
            same = exact[name] or (loose[_loosely(name)] if once[_loosely(name)] == 1 else [])
            if len(with_boxes := self._with_boxes(same)) > 1:
                raise DataError(
                    f"{len(with_boxes)} categories of the annotations are called {same[0].name!r}, and all have boxes",
                    "Give each category a name of its own.",
                )
            if same:
                found[name] = with_boxes[0] if with_boxes else same[-1]
        return found

    def _with_boxes(self, categories: Sequence[CocoCategory]) -> Sequence[CocoCategory]:
        return [one for one in categories if one.id in self.labelled]


def list_images(directory: Path) -> list[Path]:
    """The images (`IMAGE_SUFFIXES`, in any case) directly in a directory, sorted by name.

    Raises `DataError` when it is not a directory or has none.
    """
    with reading(directory, DataError, "Give a directory of images."):
        paths = [path for path in Path(directory).iterdir() if path.suffix.lower() in IMAGE_SUFFIXES and path.is_file()]
    if not paths:
        raise DataError(
            f"there are no images in {directory}", f"Give a directory with {', '.join(sorted(IMAGE_SUFFIXES))} files."
        )
    return sorted(paths)


def _read_json(path: Path) -> dict[str, list[Any]]:
    """The lists of images, annotations and categories. Raises `DataError`."""
    with reading(path, DataError, _GIVE_COCO):
        with path.open("rb") as file:
            kind = os.fstat(file.fileno()).st_mode
            if not (stat.S_ISREG(kind) or stat.S_ISFIFO(kind)):
                raise ValueError("it is no file")
            data = file.read(_MOST_BYTES + 1)
        if len(data) > _MOST_BYTES:
            raise DataError(f"{path} has more than {_MOST_BYTES / 1e9:.1f} GB", "Split the annotations.")
        if data.startswith((b"\xff\xfe", b"\xfe\xff")):
            raise DataError(f"{path} is UTF-16 text, and JSON is UTF-8", "Save it as UTF-8.")
        try:
            source = json.loads(data.decode("utf-8-sig"))
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise DataError(f"{path} is not JSON: {error}", _GIVE_COCO) from error
        except ValueError as error:  # a number of too many digits; the rest of Python's message is for programmers
            raise ValueError(str(error).partition(";")[0]) from error
    lists: dict[str, Any] = {"images": None, "annotations": [], "categories": []}
    if isinstance(source, dict):
        lists |= {key: source[key] for key in lists if source.get(key) is not None}
    if missing := [key for key, value in lists.items() if not isinstance(value, list)]:
        raise DataError(f"{path} has no list of {', no list of '.join(missing)}", _GIVE_BOXES)
    if not lists["images"]:
        raise DataError(f"{path} has no images", "Give an annotation file with at least one.")
    return lists


def _image_folders(annotations: Path, image_dir: StrPath | None) -> tuple[Path, ...]:
    """Where file names may start, the first choice first."""
    if image_dir is None:
        beside = annotations.parent / "images"
        return (beside, annotations.parent) if beside.is_dir() else (annotations.parent,)
    if not Path(image_dir).is_dir():
        raise DataError(f"{image_dir} is not a directory", "Give the directory of the annotations' images.")
    return (Path(image_dir),)


def _located(image: CocoImage, name: str, folders: Sequence[Path], where: str) -> CocoImage:
    """The image with its file. Raises `DataError` if the name leads out of the folders."""
    as_url = unquote(name, errors="surrogateescape")
    spellings = dict.fromkeys([name, name.replace("\\", "/"), as_url, as_url.replace("\\", "/")])
    places = [folder / one for one in spellings for folder in folders if _may_be(folder / one, folder)]
    found = next((place for place in places if _is_file(place)), None)
    if found is None and (not places or _escapes(name)):
        raise DataError(
            f"{where}: file_name {_short(name)} leads outside the image directory {folders[0]}",
            "Give --images, the folder that holds all of them, or relative paths without '..'.",
        )
    return replace(image, path=found or places[0])


def _may_be(path: Path, folder: Path) -> bool:
    """Whether a file name may mean this path: it is in the folder, by its name alone, since a link there may lead
    anywhere; or it is an image with an absolute name, as `predict` writes them."""
    if Path(os.path.abspath(path)).is_relative_to(os.path.abspath(folder)):  # noqa: PTH100 - resolve follows links
        return True
    # A relative name is joined to the folder; an absolute one replaces it.
    outright = not path.is_relative_to(folder) and ".." not in path.parts
    return outright and path.suffix.lower() in IMAGE_SUFFIXES and _is_file(path)


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except (OSError, ValueError):  # a name that no file can have
        return False


_Listed: TypeAlias = tuple[CocoImage, str, str]


def _entries(entries: list[Any], kind: str, keys: Sequence[str], path: Path) -> Iterator[tuple[dict[str, Any], str]]:
    """The entries of a list, which must be objects with these keys, and the place of each in the annotation file."""
    for position, entry in enumerate(entries):
        where = f"{path}: {kind}[{position}]"
        if not isinstance(entry, dict):
            raise DataError(f"{where} is not an object", _GIVE_COCO)
        if missing := [key for key in keys if key not in entry]:
            raise DataError(f"{where} has no {', '.join(missing)}", _GIVE_BOXES)
        yield entry, where


def _parse_images(entries: list[Any], path: Path) -> list[_Listed]:
    """The images, each with its file name and its place in the annotation file."""
    images: list[_Listed] = []
    for entry, where in _entries(entries, "images", ("id", "file_name"), path):
        name = entry["file_name"]
        if not isinstance(name, str) or not name:
            raise DataError(f"{where}: file_name is {_short(name)}", "It must be a relative path.")
        sides = [_pixels(entry.get(key)) for key in ("height", "width")]
        images.append((CocoImage(_id(entry["id"], where), Path(), *sides), name, where))
    _check_unique((image.id for image, _, _ in images), "image", path)
    return images


def _parse_categories(entries: list[Any], path: Path) -> list[CocoCategory]:
    categories = []
    for entry, where in _entries(entries, "categories", ("id", "name"), path):
        name = str(entry["name"]) if _is_int(entry["name"]) else entry["name"]
        if not isinstance(name, str):
            raise DataError(f"{where}: name is {_short(name)}", "It must be text.")
        categories.append(CocoCategory(_id(entry["id"], where), name))
    _check_unique((category.id for category in categories), "category", path)
    return categories


def _parse_annotations(
    entries: list[Any], path: Path, images: set[CocoId], categories: set[CocoId]
) -> tuple[list[CocoAnnotation], list[str]]:
    """Those with a box and of a listed image, and notes about the others and about boxes that cannot be found.

    Raises `DataError` if all are of other images, and for an unknown category.
    """
    kept: list[CocoAnnotation] = []
    strangers: list[CocoId] = []
    unknown: list[CocoId] = []
    bare = 0
    for entry, where in _entries(entries, "annotations", ("image_id", "category_id"), path):
        box = entry.get("bbox")
        if box is None or box == []:
            bare += 1
            continue
        if not (isinstance(box, list) and len(box) == 4 and all(map(_is_finite, box)) and min(box[2:]) >= 0):
            raise DataError(
                f"{where}: bbox is {_short(box)}",
                "It must be [x, y, width, height], finite, with no negative width or height.",
            )
        x, y, width, height = map(float, box)
        area = width * height if entry.get("area") is None else entry["area"]
        if not _is_finite(area) or area < 0:
            raise DataError(f"{where}: area is {_short(area)}", "It must be a number of square pixels.")
        crowd = entry.get("iscrowd") or 0
        if isinstance(crowd, str | list | dict) or crowd not in (0, 1):
            raise DataError(f"{where}: iscrowd is {_short(crowd)}", "It must be 0 or 1.")
        image_id = _id(entry["image_id"], f"{where}: image_id")
        category_id = _id(entry["category_id"], f"{where}: category_id")
        unknown += [] if category_id in categories else [category_id]
        if image_id in images:
            kept.append(CocoAnnotation(image_id, category_id, (x, y, width, height), float(area), bool(crowd)))
        else:
            strangers.append(image_id)
    for kind, dangling in (("image", [] if kept else strangers), ("category", unknown)):
        if dangling:
            raise DataError(
                f"{path}: {len(dangling)} annotations have a dangling {kind} id, one that the file does not define: "
                f"{_few(map(_short, dict.fromkeys(dangling)))}",
                "Remove them, or add what they refer to.",
            )
    notes = [f"{bare} annotations of {path} have no box, and are left out"] if bare else []
    if lost := dict.fromkeys(strangers):
        notes.append(
            f"{len(strangers)} annotations of {path} are of {len(lost)} images that it does not list "
            f"({_few(map(_short, lost))}), and are left out"
        )
    counted = [box for box in kept if not box.crowd]
    if flat := sum(min(box.bbox[2:]) == 0 for box in counted):
        notes.append(f"{flat} annotations of {path} have boxes without area, which no detector finds: mAP is the lower")
    if again := len(counted) - len({(box.image_id, box.category_id, box.bbox) for box in counted}):
        notes.append(
            f"{again} annotations of {path} repeat another one's image, category and box, and a detector finds an "
            "object once: mAP is the lower"
        )
    return kept, notes


def _check_unique(ids: Iterable[CocoId], kind: str, path: Path) -> None:
    if repeated := [item for item, count in Counter(ids).items() if count > 1]:
        raise DataError(f"{path}: {len(repeated)} {kind} ids occur twice: {_few(repeated)}", "Make the ids unique.")


def _escapes(name: str) -> bool:
    """Whether a file name leads out of its directory, by the rules of POSIX or of Windows."""
    return any(
        path.is_absolute() or path.anchor or ".." in path.parts for path in (PurePosixPath(name), PureWindowsPath(name))
    )


def _id(value: object, where: str) -> CocoId:
    if isinstance(value, str) or (_is_finite(value) and isinstance(value, int | float)):
        return value
    raise DataError(f"{where}: the id is {_short(value)}", "It must be a number or text.")


def _pixels(value: object) -> int | None:
    """A side as the annotations give it; None if that is no size, since the file's counts."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else None


def _loosely(name: str) -> str:
    """A class name without regard to case, spaces, `-` and `_`."""
    return re.sub(r"[\s_-]+", " ", unicodedata.normalize("NFKC", name).casefold()).strip()


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_finite(value: object) -> bool:
    return _is_int(value) or (isinstance(value, float) and math.isfinite(value))


def _short(value: object) -> str:
    """A value from a file, for a message."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:60]} ... ({len(text)} characters)"
