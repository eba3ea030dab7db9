"""The text of the results is that of `json.dumps`, to the byte."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gfldeploy.detection_options import DetectionOptions
from gfldeploy.detections import Detections
from gfldeploy.errors import DataError
from gfldeploy.images.coco import CocoId
from gfldeploy.predict.outputs import write_outputs
from gfldeploy.predict.pipeline import Found

CLASSES = ('a "100%" \\ {class}', "bäll\n")


def detections(random: np.random.Generator, count: int, *odd: float) -> Detections:
    """Numbers of every magnitude; the last are odd."""
    numbers = (random.normal(0, 100, (count, 5)) * 10.0 ** random.integers(-12, 12, (count, 5))).astype(np.float32)
    numbers[:: max(count // 3, 1), :3] = [0.0, -0.0, 640.0]
    for place, value in enumerate(odd):
        numbers[-1 - place, place] = value
    labels = random.integers(0, 2, count)
    return Detections(numbers[:, :4], random.random(count, np.float32), labels, 0.25).named(CLASSES)


def images() -> list[Found]:
    random = np.random.default_rng(0)
    some = [detections(random, count) for count in (0, 1, 100)]
    odd = detections(random, 9, math.inf, -math.inf, math.nan)
    odd = replace(odd, scores=np.where(np.arange(9) == 4, np.float32(math.nan), odd.scores))
    return [
        *(Found(index, f"{index}.jpg", (480, 640), one) for index, one in enumerate(some)),
        Found(3, 'ü"%s{}\n\udcff' + 250 * "n", (1, 1), replace(some[2], may_lack_below=0.9)),
        Found(4, "no.jpg", (3, 3), None, DataError("it is 50% empty", "Fill it.")),
        Found(5, "v.mp4", (240, 320), some[1], None, 7, 0.28000000000000003),
        Found(6, "v.mp4", None, None, DataError("it ends early"), 8, 1 / 3),
        Found(7, "odd.jpg", (480, 640), odd),
    ]


@pytest.mark.parametrize("threshold", [0.0, 0.5, 0.9])
@pytest.mark.parametrize("ids", [None, ["a%d", 7, "ü", 3, 4, 5, 6, 10**20]])
@pytest.mark.parametrize("categories", [None, [None, "b%s"], [17, None]])
def test_as_the_encoder_writes_it(
    threshold: float, ids: list[CocoId] | None, categories: list[CocoId | None] | None, tmp_path: Path
) -> None:
    lines, results = "", list[str]()
    for place, one in enumerate(images()):
        line: dict[str, Any] = {"file": one.name}
        line |= {} if one.frame is None else {"frame": one.frame, "time_s": round(one.time_s or 0, 3)}
        if one.detections is None:
            lines += json.dumps(line | {"error": str(one.error)}) + "\n"
            continue
        assert one.size is not None
        records = one.detections.records()
        line |= {"width": one.size[1], "height": one.size[0]}
        line |= {"detections": [each for each in records if each["score"] >= threshold]}
        lacks = one.detections.may_lack_below
        lines += json.dumps(line | ({"may_lack_below": lacks} if lacks > threshold else {})) + "\n"
        for each in records:
            category = (categories or [1, 2])[each["class_id"]]
            if category is not None:
                result: dict[str, Any] = {"image_id": ids[place] if ids else place + 1, "category_id": category}
                results.append(json.dumps({**result, "bbox": each["bbox"], "score": each["score"]}))
    summary = write_outputs(tmp_path, images(), CLASSES, ids, categories, DetectionOptions(threshold))
    assert (tmp_path / "detections.jsonl").read_text() == lines
    assert (tmp_path / "coco.json").read_text() == "[\n" + ",\n".join(results) + "\n]\n"
    assert (tmp_path / "images.json").exists() == (ids is None)
    assert (summary.images, summary.failed, summary.detections) == (8, 2, lines.count('"score"'))
    assert summary.reasons == ("it is 50% empty. Fill it.", "it ends early")


def test_nothing_at_all(tmp_path: Path) -> None:
    write_outputs(tmp_path, [], CLASSES)
    assert (tmp_path / "detections.jsonl").read_text() == ""
    assert (tmp_path / "coco.json").read_text() == "[]\n"
    assert json.loads((tmp_path / "images.json").read_text())["images"] == []
