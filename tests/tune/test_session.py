"""A tuning: what it refuses at once, and mAP that is missing."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
from recorded_progress import RecordedProgress
from sample_results import FAILED, OK, altered, sample_results

from gfldeploy.accuracy import Accuracy
from gfldeploy.bench.cell import BundleIdentity
from gfldeploy.bench.journal import Journal
from gfldeploy.bench.runner import Data, Runner
from gfldeploy.bundle import Bundle
from gfldeploy.errors import EngineError, UsageError
from gfldeploy.images.coco import CocoDataset
from gfldeploy.progress import SILENT
from gfldeploy.tune import session as tuning
from gfldeploy.tune.search import Bounds, Model, Search, model_of
from gfldeploy.tune.session import _accuracy_of, _input_shapes, _Session, tune_bundles


def test_a_drop_cannot_be_bounded_without_measuring_it() -> None:
    with pytest.raises(UsageError, match="max-drop needs mAP"):
        tune_bundles([], data="data.json", max_drop=0.01, accuracy=False)


def test_an_undefined_map_is_never_compared(tiny_bundle: Path, tmp_path: Path) -> None:
    bundle = Bundle.open(tiny_bundle)
    fp32, int8 = Model(BundleIdentity.of(bundle), "onnxruntime", "fp32"), model_of(OK.cell)
    results = sample_results()
    search, settings = Search((OK.cell,), Bounds()), results.settings
    runner = Runner({fp32.bundle: tiny_bundle}, Data((), results.data, Path("data.json")), Journal(tmp_path))
    session = _Session(search, {fp32.bundle: bundle}, ("onnxruntime",), runner, settings, settings, True, SILENT)
    defined = Accuracy(0.5, 0.7, 0.6, -1.0, 0.4, 0.5, 6, 9)
    undefined = _accuracy_of(altered(OK, accuracy=replace(defined, ap=-1.0)))
    session.accuracies |= {fp32: defined, int8: undefined}
    assert session.drop(int8) == 0.5, "all of it is lost, as far as anybody knows"
    session.accuracies[fp32] = undefined
    with pytest.raises(EngineError, match="could not be measured: it is undefined"):
        session.drop(int8)


def test_what_fails_is_told_once(tiny_bundle: Path, tmp_path: Path) -> None:
    results, told = sample_results(), RecordedProgress()
    runner = Runner({}, Data((), results.data, Path("data.json")), Journal(tmp_path))
    search, settings = Search((OK.cell,), Bounds()), results.settings
    session = _Session(search, {}, (), runner, settings, settings, True, told)
    failed = altered(FAILED, runs=(), reason="differs from the CPU: boxes by up to 3 px")
    for _ in range(2):
        assert session.add(failed.cell, failed, True) is None
    assert told.notes == ["tiny_dir: onnxruntime int8, batch 2: differs from the CPU: boxes by up to 3 px"]
    assert session.failed() == [failed]


def test_the_shapes_that_a_deploy_file_expects(
    tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = [*[(64, 64)] * 2, *[(48, 80)] * 3, (20, 90), (90, 20)]
    for number, size in enumerate(sizes):
        assert cv2.imwrite(str(tmp_path / f"{number}.png"), np.zeros((*size, 3), np.uint8))
    images = [{"id": number, "file_name": f"{number}.png"} for number in range(len(sizes))]
    (tmp_path / "data.json").write_text(json.dumps({"images": images, "annotations": [], "categories": []}))
    dataset, bundle = CocoDataset.load(tmp_path / "data.json"), Bundle.open(tiny_bundle)
    one, two = (replace(OK.cell, batch_size=size, scenario="offline", order="bucketed") for size in (1, 2))
    assert _input_shapes(dataset, bundle, one) == ((1, 64, 96), (1, 64, 64), (1, 32, 96), (1, 96, 32))
    assert _input_shapes(dataset, bundle, two) == ((2, 64, 96), (2, 64, 64), (2, 32, 96), (2, 96, 32))
    (tmp_path / "6.png").write_bytes(b"no image")
    assert _input_shapes(dataset, bundle, one) == ((1, 64, 96), (1, 64, 64), (1, 32, 96)), "mAP needs it, they do not"
    assert cv2.imwrite(str(tmp_path / "6.png"), np.zeros((90, 20, 3), np.uint8))
    monkeypatch.setattr(tuning, "MOST_SHAPES", 3)
    assert _input_shapes(dataset, bundle, one) == ((1, 64, 96), (1, 32, 32), (1, 96, 96)), "and what bounds the rest"


def test_the_first_cell_of_another_precision_has_tf32_where_it_can(tiny_bundle: Path, tmp_path: Path) -> None:
    bundle = Bundle.open(tiny_bundle)
    fast = altered(OK, precision="fp32", device="gpu", tf32=True, bundle=BundleIdentity.of(bundle)).cell
    results = sample_results()
    runner = Runner({fast.bundle: tiny_bundle}, Data((), results.data, Path("data.json")), Journal(tmp_path))
    search, settings = Search((fast,), Bounds()), results.settings
    session = _Session(search, {fast.bundle: bundle}, (), runner, settings, settings, True, SILENT)
    for engine, precision, tf32 in (("paddle", "fp32", True), ("onnxruntime", "fp16", False)):
        cell = session._first(Model(fast.bundle, engine, precision))  # type: ignore[arg-type]
        assert (cell.engine, cell.precision, cell.tf32) == (engine, precision, tf32)
