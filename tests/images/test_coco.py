"""COCO annotation files: what is read, and what is refused."""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from gfldeploy.errors import DataError
from gfldeploy.images.coco import CocoAnnotation, CocoCategory, CocoDataset, list_images


def source() -> dict[str, Any]:
    return {
        "images": [
            {"id": 9, "file_name": "c.jpg", "height": 30, "width": 40},
            {"id": 2, "file_name": "a.jpg", "height": 10, "width": 20},
            {"id": 5, "file_name": "sub/b.jpg", "height": 50, "width": 60},
        ],
        "categories": [{"id": 7, "name": "dog"}, {"id": 3, "name": "cat"}],
        "annotations": [
            {"id": 1, "image_id": 2, "category_id": 3, "bbox": [1, 2, 3, 4], "area": 11, "iscrowd": 0},
            {"id": 2, "image_id": 9, "category_id": 7, "bbox": [0, 0, 5.5, 2], "iscrowd": 1},
        ],
    }


def write(directory: Path, content: Any, images: str = "images") -> Path:
    (directory / images / "sub").mkdir(parents=True, exist_ok=True)
    for name in ("a.jpg", "sub/b.jpg", "c.jpg"):
        (directory / images / name).write_bytes(b"picture")
    path = directory / "labels.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def test_images_are_sorted_by_id_and_categories_keep_the_files_order(tmp_path: Path) -> None:
    dataset = CocoDataset.load(write(tmp_path, source()))
    assert [(image.id, image.height, image.width) for image in dataset.images] == [
        (2, 10, 20),
        (5, 50, 60),
        (9, 30, 40),
    ]
    assert [image.path for image in dataset.images] == [
        tmp_path / "images" / name for name in ("a.jpg", "sub/b.jpg", "c.jpg")
    ]
    assert dataset.categories == (CocoCategory(7, "dog"), CocoCategory(3, "cat"))
    assert dataset.annotations == (
        CocoAnnotation(2, 3, (1, 2, 3, 4), area=11, crowd=False),
        CocoAnnotation(9, 7, (0, 0, 5.5, 2), area=11, crowd=True),
    )


def test_where_images_are_looked_for(tmp_path: Path) -> None:
    beside = CocoDataset.load(write(tmp_path / "one", source(), images="."))
    assert beside.images[0].path == tmp_path / "one" / "a.jpg"
    elsewhere = write(tmp_path / "two", source(), images="val2017")
    given = CocoDataset.load(elsewhere, image_dir=tmp_path / "two" / "val2017")
    assert given.images[0].path == tmp_path / "two" / "val2017" / "a.jpg"
    with pytest.raises(DataError, match="nowhere is not a directory"):
        CocoDataset.load(elsewhere, image_dir=tmp_path / "nowhere")


def test_limit_keeps_the_first_by_id_and_only_their_annotations(tmp_path: Path) -> None:
    path = write(tmp_path, source())
    (tmp_path / "images" / "c.jpg").unlink()
    dataset = CocoDataset.load(path, limit=2)
    assert [image.id for image in dataset.images] == [2, 5]
    assert [item.image_id for item in dataset.annotations] == [2]
    with pytest.raises(DataError, match="limit of at least 1"):
        CocoDataset.load(path, limit=0)


def change(key: str, position: int, **values: Any) -> Callable[[dict[str, Any]], None]:
    return lambda content: content[key][position].update(values)


def drop(key: str, position: int, name: str) -> Callable[[dict[str, Any]], None]:
    return lambda content: content[key][position].pop(name)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda content: content.pop("images"), "no list of images"),
        (lambda content: content.pop("annotations"), "no list of annotations"),
        (lambda content: content.update(categories={}), "no list of categories"),
        (lambda content: content.update(images=[]), "has no images"),
        (lambda content: content.update(categories=[]), "has no categories"),
        (lambda content: content["images"].append(3), r"images\[3\] is not an object"),
        (drop("images", 0, "file_name"), r"images\[0\] has no file_name"),
        (drop("images", 1, "height"), r"images\[1\] has no height"),
        (drop("annotations", 1, "bbox"), r"annotations\[1\] has no bbox"),
        (drop("categories", 0, "name"), r"categories\[0\] has no name"),
        (change("images", 0, id=2), "1 image ids occur twice: 2"),
        (change("categories", 0, id=3), "1 category ids occur twice: 3"),
        (change("images", 0, id="nine"), "the id is 'nine'"),
        (change("images", 0, height=0), "height is 0"),
        (change("images", 0, width=4.5), "width is 4.5"),
        (change("annotations", 0, image_id=77), "1 annotations have a dangling image id.*77"),
        (change("annotations", 1, category_id=88), "1 annotations have a dangling category id.*88"),
        (change("annotations", 0, bbox=[1, 2, 3]), r"annotations\[0\]: bbox is \[1, 2, 3\]"),
        (change("annotations", 0, bbox=[1, 2, -3, 4]), "bbox is"),
        (change("annotations", 0, bbox=[1, float("nan"), 3, 4]), "bbox is"),
        (change("annotations", 0, bbox=[1, float("inf"), 3, 4]), "bbox is"),
        (change("annotations", 0, bbox=["1", 2, 3, 4]), "bbox is"),
        (change("annotations", 0, bbox=None), "bbox is None"),
        (change("annotations", 0, area=-1), "area is -1"),
        (change("annotations", 0, iscrowd=4), "iscrowd is 4"),
        (change("images", 0, file_name="../secret.jpg"), "leads outside"),
        (change("images", 0, file_name="sub/../../secret.jpg"), "leads outside"),
        (change("images", 0, file_name="/etc/passwd"), "leads outside"),
        (change("images", 0, file_name="..\\secret.jpg"), "leads outside"),
        (change("images", 0, file_name="C:\\secret.jpg"), "leads outside"),
        (change("images", 0, file_name=""), "file_name is ''"),
        (change("images", 0, file_name="absent.jpg"), "1 of 3 images of .* are missing: .*absent.jpg"),
    ],
)
def test_damaged_annotations(tmp_path: Path, damage: Callable[[dict[str, Any]], Any], message: str) -> None:
    content = source()
    damage(content)
    with pytest.raises(DataError, match=message) as raised:
        CocoDataset.load(write(tmp_path, content))
    assert "\n" not in str(raised.value)
    assert raised.value.remedy


def test_many_offenders_are_counted_and_the_first_named(tmp_path: Path) -> None:
    content = source()
    content["annotations"] = [
        {"image_id": number, "category_id": 3, "bbox": [0, 0, 1, 1]} for number in range(100, 120)
    ]
    with pytest.raises(DataError, match=r"20 annotations .*: 100, 101, 102 and 17 more"):
        CocoDataset.load(write(tmp_path, content))


def test_files_that_are_not_coco(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="is not JSON"):
        CocoDataset.load(write(tmp_path, "{"))
    with pytest.raises(DataError, match="no list of images"):
        CocoDataset.load(write(tmp_path, [1]))
    with pytest.raises(DataError, match="cannot read"):
        CocoDataset.load(tmp_path / "absent.json")
    (tmp_path / "binary.json").write_bytes(b"\xff\xd8\xff\x00")
    with pytest.raises(DataError, match="is not JSON"):
        CocoDataset.load(tmp_path / "binary.json")


def test_classes_are_matched_by_name_then_by_order(tmp_path: Path) -> None:
    dataset = CocoDataset.load(write(tmp_path, source()))
    assert dataset.class_to_category(["cat", "dog"]) == [3, 7]
    assert dataset.class_to_category(["cat"]) == [3]
    # Other names, as many: by position in the file, where dog (7) comes first.
    assert dataset.class_to_category(["perro", "gato"]) == [7, 3]
    with pytest.raises(DataError, match=r"3 classes, the annotations 2 categories.*: bird"):
        dataset.class_to_category(["cat", "dog", "bird"])
    with pytest.raises(DataError, match="0 classes"):
        dataset.class_to_category([])


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.needs_ppdet
def test_order_is_paddledetections(tmp_path: Path) -> None:
    category = importlib.import_module("ppdet.data.source.category")
    path = write(tmp_path, source())
    theirs, _ = category.get_categories("COCO", str(path))
    ours = CocoDataset.load(path).class_to_category(["perro", "gato"])
    assert dict(enumerate(ours)) == theirs


def test_list_images(tmp_path: Path) -> None:
    for name in ("b.PNG", "a.jpg", "c.jpeg", "d.bmp", "e.webp", "notes.txt", "f.json"):
        (tmp_path / name).write_bytes(b"x")
    (tmp_path / "folder.jpg").mkdir()
    assert [path.name for path in list_images(tmp_path)] == ["a.jpg", "b.PNG", "c.jpeg", "d.bmp", "e.webp"]
    with pytest.raises(DataError, match="no images in"):
        list_images(tmp_path / "folder.jpg")
    with pytest.raises(DataError, match="cannot list"):
        list_images(tmp_path / "absent")
