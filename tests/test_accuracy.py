"""COCO accuracy: values that can be worked out by hand, pycocotools' own, and a whole evaluation."""

from __future__ import annotations

import contextlib
import io
import json
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from recorded_progress import RecordedProgress

from gfldeploy.accuracy import Accuracy, ap_difference, coco_accuracy, coco_results, measure_accuracy
from gfldeploy.detections import Detections
from gfldeploy.engines import base
from gfldeploy.engines.base import Engine, EngineOptions
from gfldeploy.errors import DataError, EngineError
from gfldeploy.images.coco import CocoDataset
from gfldeploy.images.preprocess import Preprocess
from gfldeploy.nms import NmsParams
from gfldeploy.serialization import plain

NMS = NmsParams(score_threshold=0.05, nms_threshold=0.6, nms_top_k=100, keep_top_k=100)
COLOURS = {3: (255, 0, 0), 7: (0, 0, 255)}  # category id -> RGB


def make_data(directory: Path, count: int = 3) -> Path:
    """Black images of different sizes, each with one red rectangle (category 3, "red") or blue one (7, "blue")."""
    (directory / "images").mkdir(parents=True)
    images, annotations = [], []
    for number in range(count):
        height, width = 96 + 16 * number, 160 - 16 * number
        category = (3, 7)[number % 2]
        x, y, w, h = 8 + 8 * number, 16, 40, 48
        picture = np.zeros((height, width, 3), np.uint8)
        picture[y : y + h, x : x + w] = COLOURS[category]
        assert cv2.imwrite(str(directory / "images" / f"{number}.png"), picture[..., ::-1])
        images.append({"id": 10 + number, "file_name": f"{number}.png", "height": height, "width": width})
        annotations.append(
            {"id": number, "image_id": 10 + number, "category_id": category, "bbox": [x, y, w, h], "area": w * h}
        )
    path = directory / "labels.json"
    categories = [{"id": 3, "name": "red"}, {"id": 7, "name": "blue"}]
    path.write_text(json.dumps({"images": images, "annotations": annotations, "categories": categories}))
    return path


class ColourEngine(Engine):
    """A detector without weights: it boxes what is red or blue, and has a spare score channel, as GFLv2 does."""

    name = "colour"
    version = "1"
    options = EngineOptions()

    def __init__(self) -> None:
        self.shapes: list[tuple[int, ...]] = []

    def infer(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        batch = inputs["image"]
        self.shapes.append(batch.shape)
        scores, boxes = np.zeros((len(batch), 2, 3), np.float32), np.zeros((len(batch), 2, 4), np.float32)
        for number, image in enumerate(batch):
            for label, channel in ((0, 2), (1, 0)):  # class 0 is blue, class 1 red
                rows, columns = np.nonzero(image[channel] > 127)
                if len(rows):
                    boxes[number, label] = columns.min(), rows.min(), columns.max() + 1, rows.max() + 1
                    scores[number, label, label] = 0.9
        scores[:, 0, 2] = 0.99  # the spare channel, which must not count
        return {"scores": scores, "boxes": boxes}


PREPROCESS = Preprocess(target_size=(192, 320), is_scale=False, norm_type="none", interp=0, pad_stride=32)


def test_results_in_cocos_format() -> None:
    boxes = np.array([[1, 2, 11, 22], [0, 0, 5, 5], [3, 3, 4, 4]], np.float32)
    found = Detections(boxes, np.array([0.75, 0.5, 0.25], np.float32), np.array([1, 2, 0]))
    # Class 2 has no category: the extra score channel of GFLv2.
    assert coco_results(42, found, [3, 7]) == [
        {"image_id": 42, "category_id": 7, "bbox": [1, 2, 10, 20], "score": 0.75},
        {"image_id": 42, "category_id": 3, "bbox": [3, 3, 1, 1], "score": 0.25},
    ]


def perfect(dataset: CocoDataset) -> list[dict[str, Any]]:
    return [
        {"image_id": item.image_id, "category_id": item.category_id, "bbox": list(item.bbox), "score": 0.9}
        for item in dataset.annotations
    ]


def test_perfect_results_score_one(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    dataset = CocoDataset.load(make_data(tmp_path))
    accuracy = coco_accuracy(dataset, perfect(dataset))
    # 40 x 48 px is medium, 32² to 96²: there are no small and no large objects, which pycocotools reports as -1.
    assert plain(accuracy) == pytest.approx(plain(Accuracy(1, 1, 1, -1, 1, -1, images=3, detections=3)))
    assert accuracy.to_dict()["images"] == 3
    assert capfd.readouterr() == ("", "")


def test_a_shifted_box_counts_up_to_its_iou(tmp_path: Path) -> None:
    dataset = CocoDataset.load(make_data(tmp_path, count=1))
    [result] = perfect(dataset)
    result["bbox"][0] += 8  # 32 of 40 columns overlap: IoU 32 / 48 = 0.667, right at 0.50, 0.55, 0.60 and 0.65 of ten
    accuracy = coco_accuracy(dataset, [result])
    assert (accuracy.ap, accuracy.ap50, accuracy.ap75) == pytest.approx((0.4, 1, 0))


def test_no_results_score_zero(tmp_path: Path) -> None:
    accuracy = coco_accuracy(CocoDataset.load(make_data(tmp_path)), [])
    assert (accuracy.ap, accuracy.ap50, accuracy.ap75, accuracy.ap_medium) == (0, 0, 0, 0)
    assert (accuracy.images, accuracy.detections) == (3, 0)


def test_only_the_datasets_images_count(tmp_path: Path) -> None:
    path = make_data(tmp_path)
    whole, part = CocoDataset.load(path), CocoDataset.load(path, limit=1)
    assert coco_accuracy(part, perfect(part)).ap == pytest.approx(1)
    with pytest.raises(DataError, match="2 images outside the data, such as 11"):
        coco_accuracy(part, perfect(whole))


def test_data_without_annotations_have_no_accuracy(tmp_path: Path) -> None:
    path = make_data(tmp_path)
    path.write_text(json.dumps(json.loads(path.read_text()) | {"annotations": []}))
    with pytest.raises(DataError, match="no annotations"):
        coco_accuracy(CocoDataset.load(path), [])


def random_data(path: Path, images: int) -> None:
    """Replace the annotations of `make_data` by random ones, crowds among them."""
    rng = np.random.default_rng(5)
    content = json.loads(path.read_text())
    content["annotations"] = [
        {
            "id": number + 1,
            "image_id": int(rng.integers(10, 10 + images)),
            "category_id": int(rng.choice([3, 7])),
            "bbox": [float(value) for value in (*rng.uniform(0, 60, 2), *rng.uniform(5, 120, 2))],
            "area": float(rng.uniform(100, 12000)),
            "iscrowd": int(rng.random() < 0.15),
        }
        for number in range(20 * images)
    ]
    path.write_text(json.dumps(content))


def random_results(path: Path, seed: int, spread: float = 2.0) -> list[dict[str, Any]]:
    """Boxes near the annotated ones, with misses and false alarms."""
    rng = np.random.default_rng(seed)
    return [
        {
            "image_id": item["image_id"],
            "category_id": item["category_id"],
            "bbox": [value + float(rng.normal(0, spread)) for value in item["bbox"]],
            "score": float(rng.random()),
        }
        for item in json.loads(path.read_text())["annotations"] * 2
        if rng.random() < 0.8
    ]


def test_equals_pycocotools_on_files(tmp_path: Path) -> None:
    """Against COCO(file).loadRes(results), the way PaddleDetection takes, with crowds, misses and false alarms."""
    path = make_data(tmp_path, count=3)
    random_data(path, 3)
    results = random_results(path, seed=6)
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO(str(path))
        reference = COCOeval(truth, truth.loadRes([dict(result) for result in results]), "bbox")
        reference.evaluate()
        reference.accumulate()
        reference.summarize()
    ours = coco_accuracy(CocoDataset.load(path), results)
    assert (ours.ap, ours.ap50, ours.ap75, ours.ap_small, ours.ap_medium, ours.ap_large) == tuple(reference.stats[:6])
    assert 0 < ours.ap < 1


def test_an_interval_over_images(tmp_path: Path) -> None:
    """One resample is what COCO makes of a dataset that has the drawn images, some of them more than once."""
    path = make_data(tmp_path, count=4)
    random_data(path, 4)
    near, far = random_results(path, seed=6), random_results(path, seed=7, spread=6.0)
    dataset = CocoDataset.load(path)
    value, low, high = ap_difference(dataset, near, far, resamples=1, seed=3)
    assert value == coco_accuracy(dataset, near).ap - coco_accuracy(dataset, far).ap
    assert low == high

    content = json.loads(path.read_text())
    drawn = np.random.default_rng(3).integers(4, size=4)
    assert len(set(drawn.tolist())) < 4

    def copies(items: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return [
            item | {"image_id": 100 + place}
            for place, image in enumerate(drawn)
            for item in items
            if item["image_id"] == 10 + image
        ]

    annotations = [item | {"id": number} for number, item in enumerate(copies(content["annotations"]))]
    images = [content["images"][image] | {"id": 100 + place} for place, image in enumerate(drawn)]
    path.write_text(json.dumps(content | {"images": images, "annotations": annotations}))
    resampled = CocoDataset.load(path)
    expected = coco_accuracy(resampled, copies(near)).ap - coco_accuracy(resampled, copies(far)).ap
    assert low == pytest.approx(expected, abs=1e-12)


def test_what_is_better_on_every_image_is_better_for_certain(tmp_path: Path) -> None:
    dataset = CocoDataset.load(make_data(tmp_path))
    shifted = perfect(dataset)
    for result in shifted:
        result["bbox"] = [result["bbox"][0] + 8, *result["bbox"][1:]]  # IoU 0.667, see above
    assert ap_difference(dataset, perfect(dataset), shifted) == pytest.approx((0.6, 0.6, 0.6))
    assert ap_difference(dataset, shifted, shifted) == (0, 0, 0)


@pytest.mark.parametrize("batch_size", [1, 2, 8])
def test_a_whole_evaluation(tmp_path: Path, batch_size: int) -> None:
    dataset = CocoDataset.load(make_data(tmp_path))
    progress = RecordedProgress()
    with ColourEngine() as engine:
        assert isinstance(engine, Engine)
        accuracy = measure_accuracy(
            engine,
            dataset,
            PREPROCESS,
            NMS,
            ["blue", "red"],
            batch_size,
            progress=progress,
        )
    assert accuracy.ap == pytest.approx(1)
    assert (accuracy.images, accuracy.detections) == (3, 3)
    steps = range(batch_size, 3 + batch_size, batch_size)
    assert progress.steps == [("evaluating", min(done, 3), 3) for done in steps]
    assert all(shape[2] % 32 == 0 and shape[3] % 32 == 0 for shape in engine.shapes)
    assert sum(shape[0] for shape in engine.shapes) == 3


def test_a_network_of_a_fixed_batch_size(tmp_path: Path) -> None:
    arguments = CocoDataset.load(make_data(tmp_path)), PREPROCESS, NMS, ["blue", "red"]
    engine, progress = ColourEngine(), RecordedProgress()
    filled = measure_accuracy(engine, *arguments, 2, "bucketed", progress, fill=True)
    assert filled == measure_accuracy(ColourEngine(), *arguments)
    assert {shape[0] for shape in engine.shapes} == {2} and progress.steps[-1] == ("evaluating", 3, 3)


def test_an_engine_with_streams_is_given_several_batches_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(base, "usable_threads", lambda: 2)

    class Streamed(ColourEngine):
        options = EngineOptions(streams=2)
        together = threading.Barrier(2, timeout=10)  # which breaks unless two come

        def infer(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
            self.together.wait()
            return super().infer(inputs)

    dataset = CocoDataset.load(make_data(tmp_path, 4))
    arguments = dataset, PREPROCESS, NMS, ["blue", "red"]
    assert measure_accuracy(Streamed(), *arguments) == measure_accuracy(ColourEngine(), *arguments)


def test_classes_that_cannot_be_matched_stop_the_evaluation(tmp_path: Path) -> None:
    dataset = CocoDataset.load(make_data(tmp_path))
    with pytest.raises(DataError, match="4 classes, the annotations 2 categories"):
        measure_accuracy(ColourEngine(), dataset, PREPROCESS, NMS, ["azul", "rojo", "green", "black"])


def test_what_cannot_be_measured_is_an_error_before_anything_runs(tmp_path: Path) -> None:
    path = make_data(tmp_path)
    content = json.loads(path.read_text())
    engine = ColourEngine()
    for change in ({"iscrowd": 1}, {"category_id": 9}):  # the latter of a class that the detector does not have
        damaged = json.loads(json.dumps(content))
        damaged["categories"].append({"id": 9, "name": "green"})
        for annotation in damaged["annotations"]:
            annotation.update(change)
        path.write_text(json.dumps(damaged))
        with pytest.raises(DataError, match="so mAP is undefined"):
            measure_accuracy(engine, CocoDataset.load(path), PREPROCESS, NMS, ["blue", "red"])
    path.write_text(json.dumps({**content, "annotations": [dict(content["annotations"][0], area=1e11)]}))
    with pytest.raises(DataError, match="no box of the annotations counts"):
        coco_accuracy(CocoDataset.load(path), [])
    assert engine.shapes == []


def test_ids_and_sizes_of_the_annotations_do_not_matter(tmp_path: Path) -> None:
    """Text, numbers beyond 64 bits, and sizes that are not those of the files give the same mAP."""
    path = make_data(tmp_path)
    content = json.loads(path.read_text())
    for image in content["images"]:
        image.update(id=f"image {image['id']}", width=image["height"], height=image["width"])
    for category in content["categories"]:
        category["id"] += 2**80
    for item in content["annotations"]:
        item.update(image_id=f"image {item['image_id']}", category_id=item["category_id"] + 2**80)
    path.write_text(json.dumps(content))
    engine = ColourEngine()
    arguments = engine, CocoDataset.load(path), PREPROCESS, NMS, ["blue", "red"]
    assert measure_accuracy(*arguments, batch_size=3, order="bucketed").ap == pytest.approx(1)
    shapes = {(1, 3, 192, 320), (1, 3, 192, 256), (1, 3, 192, 192)}
    assert set(engine.shapes) == shapes, "of each file by itself, as all have other sizes"


def test_map_is_over_the_classes_that_both_have(tmp_path: Path) -> None:
    path = make_data(tmp_path)
    content = json.loads(path.read_text())
    content["categories"].append({"id": 9, "name": "green"})
    content["annotations"].append({"id": 9, "image_id": 10, "category_id": 9, "bbox": [0, 0, 5, 5]})
    path.write_text(json.dumps(content))
    dataset = CocoDataset.load(path)
    assert measure_accuracy(ColourEngine(), dataset, PREPROCESS, NMS, ["blue", "red"]).ap == pytest.approx(1)
    assert coco_accuracy(dataset, perfect(dataset)[:3]).ap == pytest.approx(2 / 3), "all categories, where asked for"
    fewer = CocoDataset.load(make_data(tmp_path / "fewer"))
    assert measure_accuracy(ColourEngine(), fewer, PREPROCESS, NMS, ["blue", "red", "green"]).ap == pytest.approx(1)


def test_an_unreadable_image_stops_the_evaluation(tmp_path: Path) -> None:
    dataset = CocoDataset.load(make_data(tmp_path))
    damaged = dataset.images[1].path
    damaged.write_bytes(damaged.read_bytes()[:-20])
    with pytest.raises(DataError, match=damaged.name):
        measure_accuracy(ColourEngine(), dataset, PREPROCESS, NMS, ["blue", "red"])


def test_a_broken_engine_is_named(tmp_path: Path) -> None:
    class Broken(ColourEngine):
        def infer(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
            return {"scores": super().infer(inputs)["scores"]}

    class NotANumber(ColourEngine):
        def infer(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
            outputs = super().infer(inputs)
            outputs["scores"][:] = np.nan
            return outputs

    dataset = CocoDataset.load(make_data(tmp_path))
    with pytest.raises(EngineError, match="colour returned no boxes"):
        measure_accuracy(Broken(), dataset, PREPROCESS, NMS, ["blue", "red"])
    with pytest.raises(EngineError, match="NaN"):
        measure_accuracy(NotANumber(), dataset, PREPROCESS, NMS, ["blue", "red"])
