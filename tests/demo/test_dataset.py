"""The generated dataset: deterministic, well-formed COCO, and hard to leave half-written."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from pycocotools.coco import COCO
from recorded_progress import RecordedProgress

from gfldeploy.demo import dataset
from gfldeploy.errors import DataError, OutputError
from gfldeploy.progress import Silent

COUNT = 80


@pytest.fixture(scope="module")
def split(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A generated `val` split of COUNT images; the path of its annotations. Tests must not change it."""
    return dataset.generate(tmp_path_factory.mktemp("demo"), "val", COUNT)


def read(annotations: Path) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads(annotations.read_text(encoding="utf-8"))
    return loaded


def digests(annotations: Path) -> list[str]:
    files = sorted((annotations.parent / "images").iterdir())
    return [hashlib.sha256(file.read_bytes()).hexdigest() for file in files]


def test_same_split_and_count_give_the_same_bytes(split: Path, tmp_path: Path) -> None:
    again = dataset.generate(tmp_path, "val", COUNT)
    assert digests(again) == digests(split)
    assert again.read_bytes() == split.read_bytes()


def test_an_image_does_not_depend_on_the_count(split: Path, tmp_path: Path) -> None:
    short = dataset.generate(tmp_path, "val", 7)
    assert digests(short) == digests(split)[:7]
    few = read(short)["annotations"]
    assert few == read(split)["annotations"][: len(few)]


def test_splits_share_no_image(tmp_path: Path) -> None:
    counts = {"train": 6, "calib": 6, "val": 6, "scenes": 1}
    found = [set(digests(dataset.generate(tmp_path, name, count))) for name, count in counts.items()]
    assert sum(len(part) for part in found) == len(set().union(*found)) == 19


def test_pycocotools_reads_it(split: Path, capsys: pytest.CaptureFixture[str]) -> None:
    coco = COCO(str(split))
    assert [category["name"] for category in coco.loadCats(coco.getCatIds())] == list(dataset.CLASSES)
    assert coco.getCatIds() == list(range(1, len(dataset.CLASSES) + 1))
    assert len(coco.getImgIds()) == COUNT
    for image in coco.loadImgs(coco.getImgIds()):
        decoded = cv2.imread(str(split.parent / "images" / image["file_name"]))
        assert decoded is not None
        assert decoded.shape == (image["height"], image["width"], 3)


def test_boxes_lie_inside_their_images(split: Path) -> None:
    coco = read(split)
    sizes = {image["id"]: (image["width"], image["height"]) for image in coco["images"]}
    for item in coco["annotations"]:
        x, y, w, h = item["bbox"]
        width, height = sizes[item["image_id"]]
        assert x >= 0 and y >= 0 and w >= 1 and h >= 1
        assert x + w <= width and y + h <= height
        assert 0 < item["area"] <= w * h
        assert item["iscrowd"] == 0


def test_data_is_as_varied_as_what_users_bring(split: Path) -> None:
    coco = read(split)
    assert {item["category_id"] for item in coco["annotations"]} == set(range(1, len(dataset.CLASSES) + 1))
    shapes = [(image["width"], image["height"]) for image in coco["images"]]
    assert max(max(shape) for shape in shapes) <= 640
    for orientation in (1, 0, -1):
        assert any(np.sign(width - height) == orientation for width, height in shapes)
    per_image = np.bincount([item["image_id"] for item in coco["annotations"]], minlength=COUNT + 1)[1:]
    assert per_image.min() == 0, "no empty image"
    assert per_image.max() >= 12, "no crowded image"
    sides = [max(item["bbox"][2:]) for item in coco["annotations"]]
    assert min(sides) < 20 and max(sides) > 150


def plain_canvas(size: int = 200) -> tuple[np.ndarray, np.ndarray, list[Any]]:
    return np.full((size, size, 3), 90, np.uint8), np.zeros((size, size), np.int16), []


@pytest.mark.parametrize("seed", range(12))
def test_boxes_are_tight_around_what_was_drawn(seed: int) -> None:
    """On a plain background, the box is where the picture changed, to within a pixel of anti-aliasing and softness."""
    picture, owner, placed = plain_canvas()
    before = picture.astype(int)
    rng = np.random.default_rng(seed)
    while not dataset._place_shape(rng, picture, owner, placed, 60.0):
        pass
    [(_, (x, y, w, h), area)] = dataset._boxes(owner, placed)
    changed = np.abs(picture - before).max(axis=2)
    strong = changed > 0.5 * changed.max()  # half covered or more
    rows, columns = np.flatnonzero(strong.any(axis=1)), np.flatnonzero(strong.any(axis=0))
    measured = np.array([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1])
    # the tip of a star can be half a pixel wide: blurred, it falls under half strength a few pixels early
    assert np.abs(measured - [x, y, x + w, y + h]).max() <= 4
    assert area == placed[0].visible == (owner == 1).sum()


def test_a_hidden_object_keeps_a_box_around_its_visible_part() -> None:
    _, owner, placed = plain_canvas(100)
    assert dataset._stamp(owner[10:50, 10:50], np.ones((40, 40), bool), placed, 1)
    placed.append(dataset._Placed(category=2, area=1600, visible=1600))
    assert dataset._stamp(owner[10:50, 30:90], np.ones((40, 60), bool), placed, 2)  # hides the right half
    placed.append(dataset._Placed(category=0, area=2400, visible=2400))
    assert dataset._boxes(owner, placed) == [(2, (10, 10, 20, 40), 800), (0, (30, 10, 60, 40), 2400)]


def test_nothing_may_hide_an_object_almost_wholly() -> None:
    _, owner, placed = plain_canvas(100)
    dataset._stamp(owner[10:50, 10:50], np.ones((40, 40), bool), placed, 1)
    placed.append(dataset._Placed(category=2, area=1600, visible=1600))
    before = owner.copy()
    assert not dataset._stamp(owner[10:50, 15:50], np.ones((40, 35), bool), placed, -1)  # would leave an eighth
    assert (owner == before).all()
    assert placed[0].visible == 1600


def test_every_object_stays_a_quarter_visible() -> None:
    for index in range(12):
        rng = np.random.default_rng([1, index])
        placed: list[Any] = []
        owner = np.zeros((200, 300), np.int16)
        picture = np.zeros((200, 300, 3), np.uint8)
        for _ in range(25):
            dataset._place_shape(rng, picture, owner, placed, 60.0)
        dataset._occlude(rng, picture, owner, placed)
        for number, item in enumerate(placed, start=1):
            assert item.visible == (owner == number).sum() >= 0.25 * item.area


def test_progress_counts_up_to_the_total(tmp_path: Path) -> None:
    progress = RecordedProgress()
    dataset.generate(tmp_path, "calib", 3, progress)
    assert progress.steps == [("images", done, 3) for done in (1, 2, 3)]
    dataset.generate(tmp_path, "calib", 3, progress)
    assert progress.steps[3:] == [("images", 3, 3)], "a complete split is not drawn again"


def test_a_complete_split_is_reused(tmp_path: Path) -> None:
    path = dataset.generate(tmp_path, "calib", 3)
    stamps = [file.stat().st_mtime_ns for file in sorted(path.parent.rglob("*"))]
    dataset.generate(tmp_path, "calib", 3)
    assert [file.stat().st_mtime_ns for file in sorted(path.parent.rglob("*"))] == stamps


def test_another_count_replaces_the_split(tmp_path: Path) -> None:
    dataset.generate(tmp_path, "calib", 5)
    path = dataset.generate(tmp_path, "calib", 3)
    assert len(read(path)["images"]) == len(digests(path)) == 3


def damage_annotations(folder: Path) -> None:
    text = (folder / "annotations.json").read_text(encoding="utf-8")
    (folder / "annotations.json").write_text(text[: len(text) // 2], encoding="utf-8")


def damage_version(folder: Path) -> None:
    coco = read(folder / "annotations.json")
    coco["info"]["generator_version"] += 1
    (folder / "annotations.json").write_text(json.dumps(coco), encoding="utf-8")


def damage_image(folder: Path) -> None:
    image = folder / "images" / "000001.jpg"
    image.write_bytes(image.read_bytes()[:-100])


def remove_image(folder: Path) -> None:
    (folder / "images" / "000002.jpg").unlink()


def remove_annotations(folder: Path) -> None:
    (folder / "annotations.json").unlink()


@pytest.mark.parametrize("damage", [damage_annotations, damage_version, damage_image, remove_image, remove_annotations])
def test_an_incomplete_split_is_generated_again(tmp_path: Path, damage: Any) -> None:
    path = dataset.generate(tmp_path, "calib", 3)
    wanted = digests(path), path.read_bytes()
    damage(path.parent)
    assert dataset.generate(tmp_path, "calib", 3) == path
    assert (digests(path), path.read_bytes()) == wanted


class Interrupted(Silent):
    """Ctrl-C after the second image."""

    def step(self, label: str, done: int, total: int) -> None:
        if done == 2:
            raise KeyboardInterrupt


def test_an_interruption_leaves_nothing_behind(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        dataset.generate(tmp_path, "calib", 3, Interrupted())
    assert list(tmp_path.iterdir()) == []


def test_an_interruption_leaves_the_old_split(tmp_path: Path) -> None:
    path = dataset.generate(tmp_path, "calib", 2)
    old = digests(path)
    with pytest.raises(KeyboardInterrupt):
        dataset.generate(tmp_path, "calib", 3, Interrupted())
    assert digests(path) == old
    assert [entry.name for entry in tmp_path.iterdir()] == ["calib"]


@pytest.fixture
def foreign(tmp_path: Path) -> Iterator[Path]:
    """A directory of the user's own, at the place of a split."""
    file = tmp_path / "val" / "thesis.txt"
    file.parent.mkdir()
    file.write_text("years of work", encoding="utf-8")
    yield file
    assert file.read_text(encoding="utf-8") == "years of work"


def test_files_of_others_are_never_removed(foreign: Path) -> None:
    with pytest.raises(OutputError, match="no generated demo split"):
        dataset.generate(foreign.parent.parent, "val", 2)


def test_an_unwritable_place_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("", encoding="utf-8")
    with pytest.raises(OutputError, match="file"):
        dataset.generate(tmp_path / "file", "val", 2)


def test_wrong_arguments_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="'test'"):
        dataset.generate(tmp_path, "test", 2)
    with pytest.raises(DataError, match="0 images"):
        dataset.generate(tmp_path, "val", 0)
