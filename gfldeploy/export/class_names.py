"""The names of a detector's classes: from its datasets, or those that PaddleDetection goes by."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gfldeploy._quiet import quiet
from gfldeploy.engines.dependencies import require
from gfldeploy.errors import ConfigError, reading
from gfldeploy.export.bounded_text import cut, shown
from gfldeploy.export.config_checks import ConfigChecker
from gfldeploy.export.config_files import Tagged

_MOST_NAME_BYTES = 16 * 2**20  # of a label list
_LABEL_LISTS = (".txt", ".names", ".label", ".labels", ".list")


def class_names(
    checker: ConfigChecker, settings: Mapping[str, Any], num_classes: int
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The names of the classes, and what to say where they are not the config's own."""
    missing: list[str] = []
    for section in ("TestDataset", "EvalDataset"):
        found = _class_source(checker, section, settings.get(section), missing)
        if found is None:
            continue
        if isinstance(found, Path):
            names = _names_from_json(found) if found.suffix.lower() == ".json" else _names_from_text(found)
        else:
            names = found
        source = f"{found} ({section})" if isinstance(found, Path) else f"{section}'s label_list"
        for name in names:
            if len(name) > 1000 or any("\ud800" <= character <= "\udfff" for character in name):
                raise checker.error(f"{source} names a class {shown(name)}", "Give it a name that can be shown.")
        if len(names) != num_classes:
            raise checker.error(
                f"num_classes is {num_classes}, but {source} names {len(names)} classes",
                "Set num_classes to that, or point the dataset at the right file.",
                "num_classes",
            )
        return names, ()
    metric = str(settings.get("metric", "COCO")).upper()
    used = _default_names(metric)
    if len(used) == num_classes:
        if metric == "COCO" and (not missing or _COCO_FILE.search(missing[0])):  # the file has these very names
            return used, ()
        used_names = f"{metric}'s {num_classes} class names are" if num_classes > 1 else f"{metric}'s class name is"
    else:
        used = tuple(f"class_{index}" for index in range(num_classes))
        used_names = f"the names class_0 to class_{num_classes - 1} are" if num_classes > 1 else "the name class_0 is"
    why = missing[0] if missing else "no dataset of the config says where its classes are named"
    note = (
        f"{why}, so {used_names} used; to have your own, set TestDataset's anno_path to COCO annotations or a list of "
        "names, and export again"
    )
    return used, (note,)


def _default_names(metric: str) -> tuple[str, ...]:
    """The class names that PaddleDetection goes by where no file names them."""
    category = require("ppdet.data.source.category", "export")
    if metric not in ("COCO", "SNIPERCOCO", "RBOX", "VOC", "OID", "WIDERFACE", "MOT"):
        return ()
    with quiet():
        by_class, names = category.get_categories(metric)
    return tuple(str(names[by_class[index]]) for index in sorted(by_class))


# COCO's own annotation files.
_COCO_FILE = re.compile(r"(?:instances_(?:train|val)20\d\d|image_info_test(?:-dev)?20\d\d)\.json ")


def _class_source(
    checker: ConfigChecker, section: str, values: Any, missing: list[str]
) -> Path | tuple[str, ...] | None:
    """The existing file that names the classes, or the names themselves, if the dataset section `values` has one.

    What it points at and cannot be read as names is added to `missing`, in words.
    """
    if not isinstance(values, dict):
        return None
    kind = values.tag if isinstance(values, Tagged) else values.get("name")
    root = Path(str(values.get("dataset_dir") or ""))
    for key in ("label_list", "anno_path"):
        given: Any = values.get(key)
        if key == "label_list" and isinstance(given, list) and all(isinstance(name, str) for name in given):
            return tuple(given)
        if given is None or given == "":
            continue
        if not isinstance(given, str):
            remedy = "Give the path of COCO annotations (.json) or of a list of names (.txt)."
            raise checker.error(f"{section}.{key} is {shown(given)}", remedy, section, key)
        # A .txt `anno_path` lists classes for ImageFolder, but images for VOCDataSet.
        lists_classes = key == "label_list" or kind == "ImageFolder" or (kind is None and section == "TestDataset")
        suffix = Path(given).suffix.lower()
        if suffix != ".json" and not (suffix in _LABEL_LISTS and lists_classes):
            if lists_classes:
                missing.append(f"{section}'s {key} {cut(given)} is neither .json nor .txt")
            continue
        beside: list[Path] = [path for folder in checker.folders for path in (folder / root / given, folder / given)]
        for candidate in (root / given, *beside):
            if _is_file(candidate):
                return candidate
        missing.append(f"{section}'s {key} {cut(given)} does not exist")
    return None


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # a name that is too long, or a folder that may not be entered
        return False


def _names_from_json(file: Path) -> tuple[str, ...]:
    remedy = "Point anno_path at COCO annotations, or at a .txt file with one name a line."
    with reading(f"annotation file {file}", ConfigError, remedy):
        try:
            categories = json.loads(file.read_bytes())["categories"]
            names = [category["name"] for category in categories]
        except (ValueError, KeyError, TypeError) as error:
            raise ConfigError(f"annotation file {file} has no list of COCO categories", remedy) from error
    for name in names:
        if not isinstance(name, str | int | float):
            raise ConfigError(f"annotation file {file} names a class {shown(name)}", "Give it as text.")
    return tuple(map(str, names))


def _names_from_text(file: Path) -> tuple[str, ...]:
    with reading(f"label list {file}", ConfigError, "Save it as a UTF-8 text file with one name a line."):
        with file.open("rb") as opened:
            data = opened.read(_MOST_NAME_BYTES + 1)
        if len(data) > _MOST_NAME_BYTES:
            raise ConfigError(f"label list {file} is too large", "Point label_list at a list of class names.")
        try:
            text = data.decode("utf-8-sig").replace("\r\n", "\n").replace("\r", "\n")
        except UnicodeDecodeError as error:
            raise ConfigError(f"label list {file} is not UTF-8 text", "Save it as UTF-8 text.") from error
    names = [line.strip() for line in text.split("\n")]  # as ppdet's lines end: other separators belong to a name
    names = [name for name in names if name]
    return tuple(names[1:] if names[:1] == ["background"] else names)
