"""COCO annotation files, and what is made of them: matched classes, sizes, mAP."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterable
from pathlib import Path

import cv2
import numpy as np

from gfldeploy.accuracy import coco_accuracy
from gfldeploy.images.coco import CocoDataset

_HOME = tempfile.TemporaryDirectory()
_IMAGES = Path(_HOME.name)
_CLASSES = ("cat", "dog", "bird")
for _name in ("a.jpg", "b.jpg"):
    cv2.imwrite(str(_IMAGES / _name), np.zeros((20, 30, 3), np.uint8))


def seeds() -> Iterable[bytes]:
    source = {
        "info": {},
        "images": [
            {"id": 9, "file_name": "a.jpg", "height": 20, "width": 30},
            {"id": "two", "file_name": "sub\\..\\b.jpg"},
        ],
        "categories": [{"id": 7, "name": "dog"}, {"id": -3, "name": "Cat"}, {"id": 1.5, "name": "bird"}],
        "annotations": [
            {"id": 1, "image_id": "two", "category_id": -3, "bbox": [1, 2, 3, 4], "area": 11, "iscrowd": 0},
            {"id": 2, "image_id": 9, "category_id": 7, "bbox": [0, 0, 5.5, 2], "iscrowd": 1},
            {"id": 3, "image_id": 9, "category_id": 1.5, "bbox": [0, 0, 5.5, 2]},
        ],
    }
    yield json.dumps(source).encode()
    yield b"\xef\xbb\xbf" + json.dumps({**source, "annotations": None}).encode()
    yield json.dumps(source).encode("utf-16")


def one(data: bytes, folder: Path) -> None:
    path = folder / "labels.json"
    path.write_bytes(data)
    dataset = CocoDataset.load(path, _IMAGES)
    dataset.size_note()
    match = dataset.match(_CLASSES)
    box = {"image_id": dataset.images[0].id, "bbox": [0.0, 0.0, 5.0, 2.0], "score": 0.5}
    results = [{**box, "category_id": one} for one in match.category_ids if one is not None]
    assert 0 <= coco_accuracy(dataset, results, match.category_ids).ap <= 1
