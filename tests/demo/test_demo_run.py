"""The demo, in small: every step ran, INT8 kept its accuracy, we find what ppdet finds."""

from __future__ import annotations

import importlib.util
import os
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gfldeploy import demo
from gfldeploy.accuracy import coco_accuracy, coco_results
from gfldeploy.bench.results import BenchResults
from gfldeploy.bundle import Bundle
from gfldeploy.demo.pipeline import DemoSize, explain, run_demo
from gfldeploy.detections import Detections
from gfldeploy.images.coco import CocoDataset
from gfldeploy.images.decode import read_image
from gfldeploy.inspection import verify

pytestmark = pytest.mark.slow

THREADS = min(2, len(os.sched_getaffinity(0)))
ENGINES = ("paddle", "onnxruntime", *(("openvino",) if importlib.util.find_spec("openvino") else ()))
VAL_IMAGES = 32
# mAP differences of FP32 graphs and of INT8 that the project promises.
FP32_TOLERANCE, INT8_TOLERANCE = 0.001, 0.01


@pytest.fixture(scope="module")
def demo_run(needs_ppdet: None, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, BenchResults]:
    """The demo as users run it, but for how long it times each cell, and on fewer images."""
    output = tmp_path_factory.mktemp("demo") / "out"
    size = replace(DemoSize(), val_images=VAL_IMAGES, timed_images=2, calib_images=8, min_seconds=0.0, batch_sizes=(1,))
    return output, run_demo(output, threads=THREADS, size=size)


def accuracies(results: BenchResults) -> dict[tuple[str, str], float]:
    return {
        (cell.cell.engine, cell.cell.precision): cell.accuracy.ap
        for cell in results.cells
        if cell.accuracy and cell.cell.batch_size == 1
    }


def test_the_demo_measures_every_combination_that_works_here(demo_run: tuple[Path, BenchResults]) -> None:
    _, results = demo_run
    outcome = {(cell.cell.engine, cell.cell.precision, cell.cell.batch_size): cell.status for cell in results.cells}
    assert {what for what, status in outcome.items() if status == "ok"} == set(product(ENGINES, ("fp32", "int8"), (1,)))
    assert {precision for _, precision, _ in outcome} == {"fp32", "int8"}


def test_int8_keeps_its_accuracy_and_every_convolution_ran_in_it(demo_run: tuple[Path, BenchResults]) -> None:
    _, results = demo_run
    found = accuracies(results)
    for engine in ENGINES:
        assert abs(found[engine, "int8"] - found[engine, "fp32"]) <= INT8_TOLERANCE, engine
    for cell in results.cells:
        if cell.status == "ok" and cell.cell.precision == "int8":
            assert set(cell.runs[0].convolutions or {}) == {"int8"}, cell.cell.engine


def test_the_demo_leaves_bundles_that_verify_and_says_what_it_saw(demo_run: tuple[Path, BenchResults]) -> None:
    output, results = demo_run
    for name in ("fp32", "int8"):
        assert verify(output / name, threads=THREADS)
    assert BenchResults.read(output / "results.json") == results
    summary = (output / "summary.md").read_text()
    assert all(line in summary for line in explain(results))
    written = [path for path in output.rglob("*.json") if path.is_file()]
    assert not [path for path in written if str(output.parent) in path.read_text(errors="replace")]


def eager_accuracy(model: Any, bundle: Bundle, dataset: CocoDataset) -> float:
    """mAP of ppdet's `GFL.forward`, which resizes nothing but decodes, scales back and suppresses by itself."""
    import paddle

    manifest = bundle.manifest
    categories = dataset.class_to_category(manifest.classes)
    results = []
    for image in dataset.images:
        prepared = manifest.preprocess(read_image(image.path))
        inputs = {
            "image": paddle.to_tensor(manifest.preprocess.batch([prepared])),
            "im_shape": paddle.to_tensor([list(prepared.tensor.shape[1:])], dtype="float32"),
            "scale_factor": paddle.to_tensor([list(prepared.scale)], dtype="float32"),
        }
        with paddle.no_grad():
            found = model(inputs)["bbox"].numpy().reshape(-1, 6)
        detections = Detections(found[:, 2:], found[:, 1], found[:, 0].astype(np.int64))
        results += coco_results(image.id, detections, categories)
    return coco_accuracy(dataset, results).ap


def test_every_engine_and_our_nms_match_ppdets_forward_pass(demo_run: tuple[Path, BenchResults]) -> None:
    from gfldeploy.export.checkpoint import load_checkpoint
    from gfldeploy.export.config import load_detector_config
    from gfldeploy.export.model_builder import build_model
    from gfldeploy.export.weights import fit_weights

    output, results = demo_run
    model = build_model(load_detector_config(demo.config_path()))
    fit_weights(model, load_checkpoint(demo.weights_path()))
    dataset = CocoDataset.load(output / "data" / "val" / "annotations.json")
    assert len(dataset.images) == VAL_IMAGES
    expected = eager_accuracy(model, Bundle.open(output / "fp32"), dataset)
    assert expected >= 0.6
    for engine in ENGINES:
        assert abs(accuracies(results)[engine, "fp32"] - expected) <= FP32_TOLERANCE, engine
