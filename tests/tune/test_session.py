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
from gfldeploy.tune.deploy_file import SizeChoice
from gfldeploy.tune.measured import Measured, Tail
from gfldeploy.tune.search import Bounds, Model, Search, model_of
from gfldeploy.tune.session import _accuracy_of, _input_shapes, _Session, _shared, tune_bundles


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


def test_what_an_input_size_costs_in_the_same_engine_and_precision(tiny_bundle: Path, tmp_path: Path) -> None:
    bundle, results = Bundle.open(tiny_bundle), sample_results()
    identity = BundleIdentity.of(bundle)
    own = replace(OK.cell, bundle=identity)
    small, other = replace(own, input_size=(32, 48)), replace(own, input_size=(32, 48), engine="openvino")
    fast, slow = (Measured(((speed,) * 6,) * 3, 20.0, Tail(30, 30, 400, True), 100) for speed in (80.0, 40.0))
    search = Search((own, small, other), Bounds(max_drop=0.3), finished={small: fast}, own_size=(own, slow))
    search.drops = {model_of(own): 0.01, model_of(small): 0.21, model_of(other): 0.25}
    runner = Runner({identity: tiny_bundle}, Data((), results.data, Path("data.json")), Journal(tmp_path))
    settings = results.settings
    session = _Session(search, {identity: bundle}, ("onnxruntime",), runner, settings, settings, True, SILENT)
    search.pixels = {(identity, None): 64.0 * 96, (identity, (32, 48)): 32.0 * 64}
    accuracy = Accuracy(0.5, 0.7, 0.6, -1.0, 0.4, 0.5, 6, 9)
    session.accuracies |= {model_of(own): accuracy, model_of(small): replace(accuracy, ap=0.3)}
    found = session.sizes(small)
    assert found is not None and found.speed is not None and found.ap_less is not None
    assert (found.own_size, found.speed.value) == ((64, 96), 2.0) and found.ap_less == pytest.approx(0.2)
    assert found.drops == (((64, 96), 0.01), ((32, 48), 0.21)), "of the choice's own engine where there are two"
    assert session.sizes(own) == SizeChoice((64, 96), None, None, found.drops)


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


def test_threads_come_with_as_many_streams_as_there_are_cpus_for() -> None:
    one, several = OK.cell, altered(OK, scenario="offline", order="bucketed").cell
    assert _shared(one, 2, 1) == replace(one, threads=2), "as asked for"
    shared = _shared(one, 2, 8)
    assert (shared.threads, shared.streams, shared.scenario, shared.order) == (2, 4, "offline", "listed")
    assert _shared(several, 8, 8) == replace(several, threads=8)
    assert _shared(one, 1, 64).streams == 16
    gpu = altered(OK, precision="fp16", device="gpu").cell
    assert _shared(gpu, 1, 8) == replace(gpu, threads=1)
