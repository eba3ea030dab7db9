"""COCO annotation files: what is read, and what is refused."""

from __future__ import annotations

import importlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
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
        (lambda content: content.update(annotations={}), "no list of annotations"),
        (lambda content: content.update(categories={}), "no list of categories"),
        (lambda content: content.update(images=[]), "has no images"),
        (lambda content: content["images"].append(3), r"images\[3\] is not an object"),
        (drop("images", 0, "file_name"), r"images\[0\] has no file_name"),
        (drop("annotations", 1, "image_id"), r"annotations\[1\] has no image_id"),
        (drop("categories", 0, "name"), r"categories\[0\] has no name"),
        (change("images", 0, id=2), "1 image ids occur twice: 2"),
        (change("categories", 0, id=3), "1 category ids occur twice: 3"),
        (change("images", 0, id=2.0), "1 image ids occur twice: 2"),
        (change("images", 0, id=None), "the id is None"),
        (change("images", 0, id=True), "the id is True"),
        (change("images", 0, id=[9]), r"the id is \[9\]"),
        (change("images", 0, id=float("nan")), "the id is nan"),
        (
            lambda content: [one.update(image_id=str(one["image_id"])) for one in content["annotations"]],
            "2 annotations have a dangling image id.*'2', '9'",
        ),
        (change("annotations", 1, category_id=88), "1 annotations have a dangling category id.*88"),
        (change("annotations", 0, bbox=[1, 2, 3]), r"annotations\[0\]: bbox is \[1, 2, 3\]"),
        (change("annotations", 0, bbox=[1, 2, -3, 4]), "bbox is"),
        (change("annotations", 0, bbox=[1, float("nan"), 3, 4]), "bbox is"),
        (change("annotations", 0, bbox=[1, float("inf"), 3, 4]), "bbox is"),
        (change("annotations", 0, bbox=["1", 2, 3, 4]), "bbox is"),
        (change("annotations", 0, bbox="1 2 3 4"), "bbox is '1 2 3 4'"),
        (change("annotations", 0, bbox=[10**400, 2, 3, 4]), "too large to convert"),
        (change("annotations", 0, area=-1), "area is -1"),
        (change("annotations", 0, iscrowd=4), "iscrowd is 4"),
        (change("images", 0, file_name="../secret.jpg"), "leads outside"),
        (change("images", 0, file_name="sub/../../secret.jpg"), "leads outside"),
        (change("images", 0, file_name="/etc/passwd"), "leads outside"),
        (change("images", 0, file_name="..\\secret.jpg"), "leads outside"),
        (change("images", 0, file_name="C:\\secret.jpg"), "leads outside"),
        (change("images", 0, file_name=""), "file_name is ''"),
        (change("images", 0, file_name="absent.jpg"), "1 of 3 images of .* are missing: .*absent.jpg"),
        (change("images", 0, file_name="图" * 90 + ".jpg"), "1 of 3 images of .* are missing"),
        (change("images", 0, file_name="a\0.jpg"), "1 of 3 images of .* are missing"),
        (change("images", 0, file_name="\ud800.jpg"), "1 of 3 images of .* are missing"),
    ],
)
def test_damaged_annotations(tmp_path: Path, damage: Callable[[dict[str, Any]], Any], message: str) -> None:
    content = source()
    damage(content)
    with pytest.raises(DataError, match=message) as raised:
        CocoDataset.load(write(tmp_path, content))
    assert "\n" not in str(raised.value)
    assert raised.value.remedy


def test_names_that_lead_outside_are_refused_where_the_file_is_there(tmp_path: Path) -> None:
    content = source()
    (tmp_path / "secret.jpg").write_bytes(b"picture")
    content["images"][0]["file_name"] = "../secret.jpg"
    with pytest.raises(DataError, match=r"file_name '../secret.jpg' leads outside the image directory"):
        CocoDataset.load(write(tmp_path, content), tmp_path / "images")


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
    with pytest.raises(DataError, match=r"cannot be read: Exceeds the limit .* for integer string conversion"):
        CocoDataset.load(write(tmp_path, "9" * 5000))
    with pytest.raises(DataError, match="no list of images"):
        CocoDataset.load(write(tmp_path, [1]))
    with pytest.raises(DataError, match="cannot be read: No such file"):
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
    assert dataset.class_to_category(["cat", "bird", "dog"]) == [3, None, 7]
    with pytest.raises(DataError, match=r"3 classes, the annotations 2 categories.*: cow, gato, pig"):
        dataset.class_to_category(["cow", "gato", "pig"])
    with pytest.raises(DataError, match="0 classes"):
        dataset.class_to_category([])


def matched(tmp_path: Path, names: list[str], classes: list[str], boxes: list[int] | None = None) -> Any:
    """The positions of the matched categories, and the notes; `boxes`: positions of categories that have some."""
    content = source()
    content["categories"] = [{"id": number, "name": name} for number, name in enumerate(names)]
    content["annotations"] = [
        {"image_id": 2, "category_id": number, "bbox": [0, 0, 1, 1]}
        for number in (range(len(names)) if boxes is None else boxes)
    ]
    found = CocoDataset.load(write(tmp_path, content)).match(classes)
    return list(found.category_ids), " ".join(found.notes)


def test_what_is_not_matched_by_its_name_is_said(tmp_path: Path) -> None:
    assert matched(tmp_path, ["b", "a"], ["a", "b"]) == ([1, 0], "")
    ids, note = matched(tmp_path, ["b", "a", "more"], ["a", "b"])
    assert ids == [1, 0] and "no class for 1 categories of the annotations (more)" in note
    ids, note = matched(tmp_path, ["b"], ["a", "b", "c"])
    assert ids == [None, 0, None] and "no category for 2 of 3 classes (a, c): accuracy is over the other 1" in note
    ids, note = matched(tmp_path, ["Big Dog", "ＣＡＴ"], ["cat", "big_dog"])
    assert ids == [1, 0] and "without regard to case" in note
    # One name differs, the other is at the same place; all differ.
    ids, note = matched(tmp_path, ["a", "perro"], ["a", "dog"])
    assert ids == [0, 1] and "by their position" in note and "'dog' is 'perro'" in note
    ids, note = matched(tmp_path, ["gato", "perro"], ["cat", "dog"])
    assert ids == [0, 1] and "'cat' is 'gato', 'dog' is 'perro'" in note


def test_names_at_other_positions_are_not_matched_by_position(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"not among them: disc; nor are these categories classes: disk.*different pos"):
        matched(tmp_path, ["ring", "disk"], ["disc", "ring"])


def test_placeholders_and_repeated_names(tmp_path: Path) -> None:
    # What Roboflow writes: a category 0 for all of them, which may have the name of one of them.
    assert matched(tmp_path, ["dog", "cat", "dog"], ["cat", "dog"], boxes=[1, 2]) == ([1, 2], "")
    ids, note = matched(tmp_path, ["things", "gato", "perro"], ["cat", "dog"], boxes=[1, 2])
    assert ids == [1, 2] and "by their position" in note
    with pytest.raises(DataError, match="2 categories of the annotations are called 'dog', and all have boxes"):
        matched(tmp_path, ["dog", "cat", "dog"], ["cat", "dog"])
    assert matched(tmp_path, [], ["cat", "dog"])[0] == [1, 2]


def test_ids_of_any_kind_are_kept(tmp_path: Path) -> None:
    content = source()
    names = [-5, 2.5, 10**30, "9", "a/b"]
    content["images"] = [
        {"id": name, "file_name": "a.jpg", "height": 10, "width": width}
        for name, width in zip(names, (None, 0, "480", 20.0, -1.5), strict=True)
    ]
    content["categories"] = [{"id": "x", "name": "dog"}, {"id": 2**70, "name": 7}]
    content["annotations"] = [{"image_id": 10**30, "category_id": "x", "bbox": [0, 0, 1, 1], "iscrowd": None}]
    dataset = CocoDataset.load(write(tmp_path, content))
    assert [repr(image.id) for image in dataset.images] == [repr(name) for name in names]
    assert dataset.match(["7", "dog"]).category_ids == (2**70, "x")
    assert [image.width for image in dataset.images] == [None, None, None, 20, None]


def test_what_is_left_out_is_said(tmp_path: Path) -> None:
    content = source()
    content["annotations"] += [
        {"image_id": 77, "category_id": 3, "bbox": [0, 0, 1, 1]},
        {"image_id": 2, "category_id": 3, "segmentation": []},
        {"image_id": 2, "category_id": 3, "bbox": []},
    ]
    dataset = CocoDataset.load(write(tmp_path, content))
    assert len(dataset.annotations) == 2
    assert [note.replace(str(tmp_path), "") for note in dataset.notes] == [
        "2 annotations of /labels.json have no box, and are left out",
        "1 annotations of /labels.json are of 1 images that it does not list (77), and are left out",
    ]


def test_boxes_that_cannot_be_found_are_said(tmp_path: Path) -> None:
    content = source()
    flat = {"image_id": 2, "category_id": 3, "bbox": [4, 4, 0, 9]}
    crowd = {"image_id": 2, "category_id": 3, "bbox": [1, 1, 0, 0], "iscrowd": 1}
    content["annotations"] += [flat, *[content["annotations"][0]] * 2, crowd, crowd]
    dataset = CocoDataset.load(write(tmp_path, content))
    assert len(dataset.annotations) == len(content["annotations"])
    assert [note.partition(" of ")[0] for note in dataset.notes] == ["1 annotations", "2 annotations"]
    assert "without area" in dataset.notes[0] and "repeat another" in dataset.notes[1]


def test_images_alone_are_enough_to_detect_in(tmp_path: Path) -> None:
    content = source()
    del content["annotations"], content["categories"]
    dataset = CocoDataset.load(write(tmp_path, content))
    assert len(dataset.images) == 3 and dataset.annotations == () and dataset.categories == ()


@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("images/a.jpg", "images/a.jpg"),
        ("images\\sub\\b.jpg", "images/sub/b.jpg"),
        ("sub\\..\\a.jpg", "images/a.jpg"),
        ("images/a%20b.jpg", "images/a b.jpg"),
        ("50%25.jpg", "images/50%25.jpg"),
        ("{folder}/images/a.jpg", "images/a.jpg"),
        ("caf\udce9.jpg", "images/caf\udce9.jpg"),  # bytes that are not UTF-8
        ("图.jpg", "images/图.jpg"),
    ],
)
def test_file_names_as_tools_write_them(tmp_path: Path, name: str, file: str) -> None:
    content = source()
    content["images"] = [{"id": 2, "file_name": name.format(folder=tmp_path)}]
    content["annotations"] = []
    path = write(tmp_path, content)
    (tmp_path / file).write_bytes(b"picture")
    (image,) = CocoDataset.load(path).images
    assert image.path == tmp_path / file or (image.path.samefile(tmp_path / file) and ".." in name)


def test_sizes_are_those_of_the_files(tmp_path: Path) -> None:
    path = write(tmp_path, source())
    for name, size in (("a.jpg", (10, 20)), ("sub/b.jpg", (60, 50))):
        cv2.imwrite(str(tmp_path / "images" / name), np.zeros((*size, 3), np.uint8))
    dataset = CocoDataset.load(path)  # c.jpg is no picture
    assert dataset.images[1].size() == (60, 50)
    note = dataset.size_note()
    assert note is not None and "1 images have another size" in note and "b.jpg is 50 x 60 px, turned, not 60" in note


def test_encodings(tmp_path: Path) -> None:
    path = write(tmp_path, source())
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps(source()).encode())
    assert len(CocoDataset.load(path).images) == 3
    path.write_bytes(json.dumps(source()).encode("utf-16"))
    with pytest.raises(DataError, match="is UTF-16 text"):
        CocoDataset.load(path)
    path.write_text("[" * 100_000)
    with pytest.raises(DataError, match="cannot be read: it is nested too deeply"):
        CocoDataset.load(path)
    with pytest.raises(DataError, match="it is no file"):
        CocoDataset.load(Path("/dev/zero"))


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
    for name in ("b.PNG", "a.jpg", "c.jpeg", "d.bmp", "e.webp", "f.TIF", "g.avif", "h.jfif", "notes.txt", "f.json"):
        (tmp_path / name).write_bytes(b"x")
    (tmp_path / "folder.jpg").mkdir()
    os.mkfifo(tmp_path / "pipe.jpg")
    assert "".join(path.name[0] for path in list_images(tmp_path)) == "abcdefgh"
    with pytest.raises(DataError, match="no images in"):
        list_images(tmp_path / "folder.jpg")
    with pytest.raises(DataError, match="absent cannot be read"):
        list_images(tmp_path / "absent")
