"""Detecting in batches elsewhere: units go to workers as JSON, and what comes back is what this process finds."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Generator
from contextlib import closing
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gfldeploy.accuracy import accuracy_of, batch_shapes, measure_accuracy
from gfldeploy.batch_detection import Batch, DetectionJob, DetectionWork, detect_images, task_of, units_of
from gfldeploy.batching.buckets import ORDERS, Order, Size, group
from gfldeploy.bundle import Bundle, Graph, complete_bundle
from gfldeploy.cluster.worker import Todo
from gfldeploy.detections import Detections, from_text, to_text
from gfldeploy.engines.base import EngineOptions
from gfldeploy.engines.registry import open_engine
from gfldeploy.errors import BundleError, DataError
from gfldeploy.images.coco import CocoDataset
from gfldeploy.quant.measurement import PlainOnnxRuntime
from gfldeploy.serialization import plain

pytest.importorskip("onnxruntime")


def through_json(value: Any) -> Any:
    return json.loads(json.dumps(value))


def answers(work: DetectionWork, *todos: Todo) -> list[tuple[int, list[Any]]]:
    sent = [Todo.of_list(through_json(todo.as_list())) for todo in todos]
    with closing(work.run(sent)) as found:
        return [(number, through_json(value)) for number, value in found]


def detect_last_first(
    job: DetectionJob, bundle: Path, paths: list[Path], batches: list[Batch]
) -> Generator[tuple[int, Detections]]:
    """As workers do that finish the last unit first."""
    units = units_of(batches)
    with DetectionWork(through_json(plain(job)), bundle) as work:
        for number in reversed(range(len(units))):
            *values, end = answers(work, Todo(number, task_of(units[number], paths)))
            assert end == (number, [])
            for batch, (_, value) in zip(units[number], values, strict=True):
                for index, (text, may_lack_below) in zip(batch, value, strict=True):
                    found = from_text(text, may_lack_below)
                    assert found is not None
                    yield index, found


def same(one: Detections, other: Detections) -> bool:
    names = ("boxes", "scores", "classes")
    return all(getattr(one, name).tobytes() == getattr(other, name).tobytes() for name in names) and (
        one.may_lack_below == other.may_lack_below
    )


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize(("batch_size", "size"), [(1, (64, 96)), (2, (96, 128)), (4, (64, 96))])
def test_what_workers_find_is_what_this_process_finds(
    tiny_bundle: Path, tiny_coco: Path, order: Order, batch_size: int, size: Size
) -> None:
    dataset = CocoDataset.load(tiny_coco)
    bundle = Bundle.open(tiny_bundle).at_size(size)
    manifest, paths = bundle.manifest, [image.path for image in dataset.images]
    options = EngineOptions().expecting(batch_shapes(dataset, manifest.preprocess, batch_size, order))
    job = DetectionJob("onnxruntime", options.to_plain(), size)
    sizes = [manifest.preprocess.input_size(*image.size()) for image in dataset.images]
    batches: list[Batch] = [one.indices for one in group(sizes, batch_size, order)]
    with open_engine("onnxruntime", bundle, options) as engine:
        here = dict(detect_images(engine, paths, manifest.preprocess, manifest.nms, batches))
        how = batch_size, order
        accuracy = measure_accuracy(engine, dataset, manifest.preprocess, manifest.nms, manifest.classes, *how)
    there = dict(detect_last_first(job, tiny_bundle, paths, batches))
    assert list(there) != list(here) and all(same(here[index], there[index]) for index in range(len(paths)))
    detect = partial(detect_last_first, job, tiny_bundle, paths)
    assert accuracy_of(detect, dataset, manifest.preprocess, manifest.classes, *how) == accuracy


@pytest.mark.parametrize(("images", "batch_size", "count"), [(1, 1, 1), (6, 4, 2), (5000, 1, 157), (5000, 64, 79)])
def test_units_are_consecutive_whole_batches(images: int, batch_size: int, count: int) -> None:
    """5,000 images are 157 units of up to 32, and those of batches that are larger one batch each."""
    batches = [range(images)[start : start + batch_size] for start in range(0, images, batch_size)]
    units = units_of(batches)
    assert [batch for unit in units for batch in unit] == batches
    assert len(units) == count


def test_batches_that_are_done_or_end_their_worker_are_left_out(tiny_bundle: Path, tiny_coco: Path) -> None:
    paths = [image.path for image in CocoDataset.load(tiny_coco).images]
    task = task_of([[0, 1], [2], [3], [4, 5]], paths)
    job = DetectionJob("onnxruntime", EngineOptions().to_plain(), (64, 96))
    with DetectionWork(plain(job), tiny_bundle) as work:
        whole = [value for _, value in answers(work, Todo(3, task))]
        assert [len(value) for value in whole] == [2, 1, 1, 2, 0]
        some = answers(work, Todo(3, task, 1, {0: "not searched", 2: "it ends its worker"}), Todo(4, task, 4))
    assert some == [(3, whole[1]), (3, ["it ends its worker"]), (3, whole[3]), (3, []), (4, [])]


def lost(path: Path) -> None:
    path.unlink()


def other(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"\0")


@pytest.mark.parametrize(("change", "told"), [(lost, "is not there"), (other, "another file")])
def test_a_worker_that_has_other_images_says_so(
    tiny_bundle: Path, tiny_coco: Path, tmp_path: Path, change: Callable[[Path], None], told: str
) -> None:
    """One of the same name would be detected in without a word."""
    path = Path(shutil.copy(tiny_coco.parent / "images" / "1.jpg", tmp_path))
    task = task_of([[0]], [path])
    change(path)
    job = DetectionJob("onnxruntime", EngineOptions().to_plain(), (64, 96))
    with DetectionWork(plain(job), tiny_bundle) as work, pytest.raises(DataError, match=told) as caught:
        answers(work, Todo(0, task))
    assert caught.value.remedy is not None and "at the same path" in caught.value.remedy


def test_an_engine_that_is_not_in_the_table_is_the_same_one_elsewhere(tiny_bundle: Path) -> None:
    bundle = Bundle.open(tiny_bundle).at_size((96, 128))
    with PlainOnnxRuntime(bundle, EngineOptions(threads=1), "onnx") as engine:
        job = DetectionJob.of(engine, bundle)
    assert (job.engine, job.input_size) == ("onnxruntime", (96, 128))
    with DetectionWork(through_json(plain(job)), tiny_bundle) as work:
        assert type(work._engine) is PlainOnnxRuntime and work._engine.options == EngineOptions(threads=1)


def test_options_of_an_engine_as_plain_data(tmp_path: Path) -> None:
    options = EngineOptions("int8", "cpu", 2, tmp_path).expecting([(1, 64, 96), (2, 96, 64), (2, 96, 64)])
    assert EngineOptions.from_plain(through_json(options.to_plain())) == options
    with pytest.raises(DataError, match="threads are more than"):
        EngineOptions.from_plain({"threads": 10**6})


def test_a_bundle_that_is_being_made_can_be_opened_elsewhere(tiny_bundle: Path, tmp_path: Path) -> None:
    bundle = Bundle.open(tiny_bundle)
    with complete_bundle(bundle) as whole:
        assert whole is bundle
    shutil.copytree(tiny_bundle / "onnx", tmp_path / "made" / "onnx")
    manifest = replace(bundle.manifest, graphs={"onnx": Graph("onnx/model.onnx")}, files={}, notes=("made",))
    made = Bundle(tmp_path / "made", manifest)
    with pytest.raises(BundleError):
        Bundle.open(made)
    with complete_bundle(made) as whole:
        Bundle.open(whole).verify_files()
        assert whole.manifest.notes == ("made",)
    assert [path.name for path in tmp_path.rglob("*")] == ["made", "onnx", "model.onnx"]


def test_numbers_travel_exactly() -> None:
    values = np.array([[1 / 3, 2**-149, 3.4e38, -0.0]], np.float32)
    found = Detections(values, values[0, :1], np.array([79]), 0.1)
    back = from_text(to_text(found), 0.1)
    assert back is not None and same(back, found) and back.classes.dtype == np.int64
