"""What runs on a GPU, or in an engine of another package, is compared with the CPU before it is timed."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import demo_bundles
import numpy as np
import pytest
from numpy.typing import NDArray
from sample_results import OK, RUN, altered, cell_of, plan_of, sample_results

from gfldeploy import Detector, benchmark, predict_images, tune_bundles
from gfldeploy.bench import cpu_parity
from gfldeploy.bench.cpu_parity import (
    Outputs,
    compare_with_cpu,
    measure_parity,
    open_reference,
    write_reference,
)
from gfldeploy.bench.inputs import make_batches, prepare_images
from gfldeploy.bench.journal import Journal
from gfldeploy.bench.matrix import Plan
from gfldeploy.bench.results import BenchResults, DataDescription, Parity
from gfldeploy.bench.runner import Data, Runner
from gfldeploy.bench.table import COLUMNS, rows
from gfldeploy.bench.timing import Settings
from gfldeploy.bundle import Bundle
from gfldeploy.engines import registry
from gfldeploy.engines.base import Engine, EngineOptions, Precision
from gfldeploy.engines.registry import is_compared, load_graph, open_engine
from gfldeploy.errors import EngineError

# ONNX Runtime with an error of each kind, and one without: a class for each.
ENGINES = """
from gfldeploy.engines.ort_engine import OnnxRuntimeEngine

class Right(OnnxRuntimeEngine):
    name = "planted-right"

    def infer_timed(self, inputs):
        outputs, times = super().infer_timed(inputs)
        self.plant(outputs)
        return outputs, times

    def plant(self, outputs):
        pass

class Moved(Right):
    name = "planted-moved"

    def plant(self, outputs):
        outputs["boxes"] += 3
"""
SPECS = """
from gfldeploy.engines.base import Build, EngineSpec, Library

LIBRARY = Library("onnxruntime", {"cpu": Build("onnxruntime", "pip install onnxruntime")})
right, moved = (
    EngineSpec(f"planted-{one}", one, f"planted_engines:{one.title()}", LIBRARY, {"cpu": {"fp32": "onnx"}})
    for one in ("right", "moved")
)
"""
PLANTED = ("right", "moved")
BRIEF: dict[str, Any] = {
    "precisions": ["fp32"], "rounds": 1, "min_seconds": 0, "min_count": 1, "limit": 4, "accuracy": False, "peak": False,
}  # fmt: skip


@pytest.fixture
def planted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The engines of a package that is installed for the processes that measure."""
    pytest.importorskip("onnxruntime")
    installed = tmp_path / "site-packages"
    metadata = installed / "planted_engines-1.0.dist-info"
    metadata.mkdir(parents=True)
    (installed / "planted_engines.py").write_text(ENGINES)
    (installed / "planted_specs.py").write_text(SPECS)
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: planted-engines\nVersion: 1.0\n")
    lines = "".join(f"planted-{one} = planted_specs:{one}\n" for one in PLANTED)
    (metadata / "entry_points.txt").write_text(f"[gfldeploy.engines]\n{lines}")
    monkeypatch.setenv("PYTHONPATH", f"{installed}:{Path(registry.__file__).parents[2]}")
    monkeypatch.syspath_prepend(str(installed))
    found = registry._all_engines()
    for one in PLANTED:
        monkeypatch.setitem(registry.ENGINES, f"planted-{one}", found[f"planted-{one}"])
    return [f"planted-{one}" for one in PLANTED]


@pytest.mark.slow
def test_a_row_that_differs_says_so_instead_of_a_speed(
    planted: list[str], tiny_bundle: Path, tiny_coco: Path, tmp_path: Path
) -> None:
    results = benchmark(
        tiny_bundle, data=tiny_coco, engines=planted, batch_sizes=[2], output=tmp_path / "r.json", **BRIEF
    )
    right, moved = results.cells
    assert right.status == "ok", right.reason
    assert right.runs[0].not_compared is None
    parity = right.runs[0].parity
    assert (
        parity is not None and parity.reference.startswith("onnxruntime 1.") and "fp32 on the CPU" in parity.reference
    )
    # Two landscapes; a portrait and a landscape, which begin with an image that was not among them.
    assert (parity.images, parity.unmatched) == (3, 0) and parity.detections >= 3
    assert parity.score_difference_max < 1e-6 and parity.box_difference_max_px < 1e-3
    assert (moved.status, moved.runs) == ("failed", ()) and moved.reason is not None
    assert moved.reason.startswith("differs from the CPU: boxes by up to 3 px (allowed 0.1)")
    assert "fp32 on the CPU: scores off by " in moved.reason and "boxes by 3 px at most, 0 of " in moved.reason
    assert moved.remedy is not None and "gfldeploy doctor" in moved.remedy
    assert BenchResults.read(tmp_path / "r.json") == results
    assert {path.name for path in tmp_path.iterdir()} == {"r.json", "r.csv", "r.html", "site-packages"}
    assert "differs from the CPU: boxes by up to 3 px" in (tmp_path / "r.html").read_text()


@pytest.mark.slow
def test_tune_never_chooses_what_differs(
    planted: list[str], tiny_bundle: Path, tiny_coco: Path, tmp_path: Path
) -> None:
    how: dict[str, Any] = {**BRIEF, "look_seconds": 0, "threads": [1], "batch_sizes": [1], "orders": ["listed"]}
    del how["peak"]
    engines = ["onnxruntime", planted[1]]
    deploy = tune_bundles(tiny_bundle, data=tiny_coco, engines=engines, output=tmp_path / "deploy.yml", **how)
    assert deploy.choice.cell.engine == "onnxruntime" and deploy.runner_up is None
    assert "Left out: planted-moved fp32, batch 1: differs from the CPU: boxes by up to 3 px" in deploy.summary


CLASSES, CANDIDATES = 2, 60


def reference(seed: int, bits: int = 24) -> Outputs:
    """What a detector might give for an image: ten objects of five candidates each, and noise."""
    random = np.random.default_rng(seed)
    scores = random.uniform(0.01, 0.05, (1, CANDIDATES, CLASSES))
    corners = random.uniform(0, 1200, (CANDIDATES, 2))
    objects = np.repeat(np.arange(10), 5)
    scores[0, np.arange(50), objects % CLASSES] = random.uniform(0.45, 0.9, 50)
    corners[:50] = np.repeat(np.linspace(10, 1100, 10), 5)[:, np.newaxis] + random.uniform(0, 2, (50, 2))
    boxes = np.concatenate([corners, corners + random.uniform(70, 72, (CANDIDATES, 2))], axis=1)[np.newaxis]
    anchors = np.arange(0, 2 * CANDIDATES, 2, dtype=np.int32)[np.newaxis]
    return {"scores": scores.astype(np.float32), "boxes": boxes.astype(np.float32), "anchors": anchors}


THEIRS = [reference(0), reference(1)]
Change = Callable[[dict[str, NDArray[Any]]], object]


def noise(scores: float, relative: float) -> Change:
    """Of a uniform distribution: absolute of scores, of boxes by their longer side of 71 px."""

    def change(one: dict[str, NDArray[Any]]) -> None:
        random = np.random.default_rng(5)
        for name, most in (("scores", scores), ("boxes", 71 * relative)):
            one[name] += random.uniform(-most, most, one[name].shape).astype(np.float32)

    return change


def nothing(one: dict[str, NDArray[Any]]) -> None:
    pass


def lowered(one: dict[str, NDArray[Any]]) -> None:
    """As a decode in FP16 gives them."""
    one["boxes"] = one["boxes"].astype(np.float16).astype(np.float32)


def one_swapped(one: dict[str, NDArray[Any]]) -> None:
    """The classes of one object."""
    one["scores"][0, :5] = one["scores"][0, :5, ::-1]


def swapped(one: dict[str, NDArray[Any]]) -> None:
    one["scores"] = one["scores"][:, :, ::-1]


def other_anchors(one: dict[str, NDArray[Any]]) -> None:
    one["anchors"] = one["anchors"][:, ::-1]


def problems(bundle: Path, precision: Precision, change: Change, tf32: bool = False) -> str:
    ours: list[dict[str, NDArray[Any]]] = [{name: values.copy() for name, values in one.items()} for one in THEIRS]
    change(ours[-1])
    options = EngineOptions(precision, "gpu", tf32=tf32)
    measured, found = measure_parity(ours, THEIRS, "the CPU", Bundle.open(bundle), options)
    assert measured.images == 2
    return "; ".join(found)


@pytest.mark.parametrize(
    ("precision", "change", "problem"),
    [
        ("fp32", nothing, None),
        ("fp32", noise(9e-5, 0.001), None),
        ("fp32", noise(1e-3, 0), "scores by up to 0.0.* (allowed 0.0001); as of FP16 or TF32, which was not asked for"),
        ("fp32", noise(0, 0.01), "boxes by up to 0.7.* px (allowed 0.1)"),
        ("fp32", lowered, "boxes are rounded to FP16, so that their decode"),
        ("fp32", one_swapped, "scores by up to"),
        ("fp32", other_anchors, "does not choose as many different anchors"),
        ("tf32", noise(0.01, 0.01), None),
        ("fp16", noise(0.01, 0.01), None),
        ("fp16", noise(0.05, 0), "scores by up to 0.0.* (allowed 0.02)"),
        ("fp16", noise(0, 0.05), "boxes by up to .* % of their longer side (allowed 2)"),
        ("tf32", lambda one: np.add(one["boxes"], 3, out=one["boxes"]), "boxes by up to 4.* % of their longer side"),
        ("fp16", lowered, "boxes are rounded to FP16, so that their decode"),
        ("fp16", one_swapped, "scores by up to .* detections unmatched"),
        ("int8", noise(0.03, 0.04), None),
        ("int8", noise(0.2, 0), "scores by a mean of"),
        ("int8", noise(0, 0.4), "boxes by a median of"),
        ("int8", lowered, "boxes are rounded to FP16"),
        ("int8", swapped, "detections unmatched"),
    ],
)
def test_what_differs_by_more_than_the_precision_explains(
    precision: str, change: Change, problem: str | None, tiny_bundle: Path
) -> None:
    tf32 = precision == "tf32"
    asked: Any = "fp32" if tf32 else precision
    found = problems(tiny_bundle, asked, change, tf32)
    if problem is None:
        assert not found
    else:
        pattern = ".*".join(re.escape(part) for part in problem.split(".*"))
        assert re.search(pattern, found), found


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda one: one["scores"].put(3, np.nan), "scores are NaN or infinite"),
        (lambda one: one["boxes"].put(3, np.inf), "boxes are NaN or infinite"),
        (
            lambda one: one.update(scores=one["scores"][:, :, :1]),
            r"scores have the shape \[1, 60, 1\], not \[1, 60, 2\]",
        ),
    ],
)
@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8"])
def test_what_cannot_be_compared_differs(precision: Precision, change: Change, problem: str, tiny_bundle: Path) -> None:
    assert re.fullmatch(problem, problems(tiny_bundle, precision, change))


def test_each_image_runs_alone_in_the_reference_padded_as_in_its_batch(
    tiny_bundle: Path, tiny_coco: Path, tmp_path: Path
) -> None:
    pytest.importorskip("onnxruntime")
    bundle = Bundle.open(tiny_bundle)
    preprocess = bundle.manifest.preprocess
    images = prepare_images(sorted((tiny_coco.parent / "images").iterdir()), preprocess)
    with open_engine("onnxruntime", bundle, EngineOptions()) as engine:
        for size, order, compared in ((1, "listed", 2), (4, "listed", 3), (2, "bucketed", 3)):
            batches = make_batches(images, preprocess, size, order)  # type: ignore[arg-type]
            write_reference(tmp_path / "one.npz", engine, batches, fixed=False)
            found = compare_with_cpu(engine, batches, tmp_path / "one.npz", "itself", bundle)
            assert found.images == compared and found.score_difference_max < 1e-6 and found.unmatched == 0
            write_reference(tmp_path / "whole.npz", engine, batches, fixed=True)
            assert compare_with_cpu(engine, batches, tmp_path / "whole.npz", "itself", bundle).score_difference_max == 0
        # A server is compared in the first batch of the other scenarios.
        served = make_batches(images[:4], preprocess, 4)
        write_reference(tmp_path / "listed.npz", engine, make_batches(images, preprocess, 4), fixed=False)
        assert compare_with_cpu(engine, served, tmp_path / "listed.npz", "itself", bundle).images == 2


def test_gpus_and_engines_that_judge_nothing_are_compared() -> None:
    assert is_compared("onnxruntime", "gpu") and is_compared("paddle-plain", "cpu")
    assert not is_compared("onnxruntime", "cpu") and not is_compared("openvino", "cpu")


class Worker:
    """A worker that answers at once, and the tasks that it was given."""

    def __init__(self, folder: Path) -> None:
        self.log = folder / "log"
        self.code = f"""
import json, sys
request = json.load(open(sys.argv[1] + "/request.json"))
print(json.dumps(request), file=open({str(self.log)!r}, "a"))
if request["kind"] == "reference":
    open(request["reference"], "w").close()
    answer = {{"reference": {{"by": "the CPU"}}}}
else:
    answer = {{"reason": "differs from the CPU: in all", "remedy": None}}
json.dump(answer, open(sys.argv[1] + "/answer.json", "w"))
"""
        (folder / "journal").mkdir()
        self.journal = Journal(folder / "journal")

    def measure(self, plan: Plan, count: int = 1) -> None:
        data = Data((Path("a.jpg"),), DataDescription("ab", "cd", 1, None), Path("none.json"))
        runner = Runner(plan.bundles, data, self.journal, worker=(sys.executable, "-c", self.code))
        results = runner.measure(plan.cells, Settings(0, count, 0))
        assert {(one.status, one.reason) for one in results} == {("failed", "differs from the CPU: in all")}

    def tasks(self) -> list[tuple[str, bool, str, str | None]]:
        tasks = [json.loads(line) for line in self.log.read_text().splitlines()]
        keys = ("kind", "reference", "reference_by", "not_compared")
        return [(one[keys[0]], one[keys[1]] is not None, one[keys[2]], one[keys[3]]) for one in tasks]


def test_the_reference_is_run_once_for_what_has_the_same_batches(tiny_bundle: Path, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    server = {"scenario": "server", "batch_size": 4, "rate": 5.0, "policy": "adaptive"}
    axes: tuple[dict[str, Any], ...] = ({}, {"threads": 2}, {"batch_size": 4}, server, {"input_size": (32, 48)})
    cells = [cell_of(tiny_bundle, device="gpu", **one) for one in axes]
    worker = Worker(tmp_path)
    worker.measure(plan_of(tiny_bundle, *cells))
    worker.measure(plan_of(tiny_bundle, cells[0]), count=2)
    reference, timing = ("reference", True, "", None), ("timing", True, "the CPU", None)
    assert worker.tasks() == [reference, timing, timing, reference, timing, timing, reference, timing, timing]


def test_without_an_engine_on_the_cpu_it_is_said_why_nothing_is_compared(
    tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cpu_parity, "JUDGES", ())
    monkeypatch.setattr(cpu_parity, "REFERENCE_ENGINE", "paddle")  # for which the bundle has no graph
    worker = Worker(tmp_path)
    worker.measure(plan_of(tiny_bundle, cell_of(tiny_bundle, device="gpu")))
    ((_, compared, _, why),) = worker.tasks()
    assert (
        not compared
        and why is not None
        and why.startswith("no engine that judges bundles can run it on the CPU here (paddle: ")
    )
    (row, *_) = rows(replace(sample_results(), cells=(altered(OK, runs=(replace(RUN, not_compared=why),)),)))
    assert row.note is not None and f"not compared with the CPU: {why}" in row.note


def test_a_table_shows_how_far_it_is_from_the_cpu() -> None:
    near, far = (Parity("the CPU", 2, 9, 0, 1e-7, value, 0.001, 0.01) for value in (1e-6, 2e-6))
    compared = altered(OK, runs=(replace(RUN, parity=far), replace(RUN, parity=near)))
    shown = rows(replace(sample_results(), cells=(compared, OK)))
    column = next(one for one in COLUMNS if one.key == "cpu_score_difference")
    assert [column.value(row) for row in shown] == [2e-6, None] and column.shown(shown) and not column.shown(shown[1:])


def test_what_runs_images_is_compared_once(
    planted: list[str], tiny_bundle: Path, tiny_coco: Path, tmp_path: Path
) -> None:
    right, moved = planted
    images = sorted((tiny_coco.parent / "images").iterdir())
    cache = tmp_path / "cache"
    with Detector(tiny_bundle, engine=moved, batch_size=2, engine_cache=cache) as detector:
        for _ in range(2):
            with pytest.raises(
                EngineError, match=r"^planted-moved fp32 on cpu differs from the CPU: boxes by .*[12] image"
            ):
                detector.detect(images)
    with pytest.raises(EngineError, match=r"differs from the CPU"):
        predict_images(tiny_bundle, images, engine=moved, output=tmp_path / "found", engine_cache=cache)
    assert not (tmp_path / "found").exists() and not list(cache.rglob("parity.json"))
    for _ in range(2):
        assert len(Detector(tiny_bundle, engine=right, engine_cache=cache).detect(images)) == 6
    (passed,) = cache.rglob("parity.json")
    before = passed.stat().st_mtime_ns
    predict_images(tiny_bundle, images, engine=right, output=tmp_path / "found", engine_cache=cache)
    assert passed.stat().st_mtime_ns == before, "not compared again"
    assert json.loads(passed.read_text())["images"] == 1
    Detector(tiny_bundle, engine=right, engine_cache=cache, input_size=(32, 48)).detect(images)
    assert len(list(cache.rglob("parity.json"))) == 2, "another input size is compared by itself"


def test_a_detector_that_cannot_be_compared_says_so(
    planted: list[str], tiny_bundle: Path, tiny_coco: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cpu_parity, "JUDGES", ())
    monkeypatch.setattr(cpu_parity, "REFERENCE_ENGINE", "paddle")
    with Detector(tiny_bundle, engine=planted[0]) as detector, pytest.warns(UserWarning, match="was not compared with"):
        assert len(detector.detect(tiny_coco.parent / "images/1.jpg")) == 1


@pytest.mark.slow
@demo_bundles.needs_export
@demo_bundles.needs_quant
def test_a_trained_detector(trained: Path, calibrated: Path, labelled: Path) -> None:
    """What is sound passes by far; what runs in less than it should does not, nor a decode in FP16."""
    fp32, int8 = Bundle.open(trained), Bundle.open(calibrated)
    preprocess, cpu = fp32.manifest.preprocess, EngineOptions("fp32", "cpu", 2)
    images = prepare_images(sorted((labelled / "val/images").iterdir())[:3], preprocess)
    tensors = [preprocess.batch([image]) for image in images]

    def run(engine: Engine) -> list[dict[str, NDArray[Any]]]:
        with engine:
            return [engine.infer({"image": tensor}) for tensor in tensors]

    def found(ours: list[dict[str, NDArray[Any]]], theirs: list[dict[str, NDArray[Any]]], *how: Any) -> str:
        bundle = int8 if how[0] == "int8" else fp32
        measured, problems = measure_parity(ours, theirs, "the CPU", bundle, EngineOptions(how[0], "gpu", tf32=how[-1]))
        assert measured.detections > 10
        return "; ".join(problems)

    import onnx
    import onnxruntime
    from onnxruntime.transformers.float16 import convert_float_to_float16

    expected = run(open_engine("onnxruntime", fp32, cpu))
    half = run(load_graph("onnxruntime", fp32, cpu, "onnx_fp16"))
    assert found(half, expected, "fp16", False) == found(half, expected, "fp32", True) == ""
    assert "as of FP16 or TF32, which was not asked for" in found(half, expected, "fp32", False)
    model = onnx.load(str(fp32.graph("onnx")[0]))
    lowered = convert_float_to_float16(model, keep_io_types=True, disable_shape_infer=True, op_block_list=[])
    session = onnxruntime.InferenceSession(lowered.SerializeToString(), providers=["CPUExecutionProvider"])
    names = [spec.name for spec in fp32.manifest.outputs]
    whole = [dict(zip(names, session.run(names, {"image": tensor}), strict=True)) for tensor in tensors]
    assert "boxes are rounded to FP16" in found(whole, expected, "fp16", False)
    reference, by = open_reference("onnxruntime", int8, 2)
    assert by.startswith("INT8 as TensorRT reads it, simulated by onnxruntime 1.")
    expected = run(reference)
    for engine in ("onnxruntime", "openvino"):
        assert found(run(open_engine(engine, int8, EngineOptions("int8", "cpu", 2))), expected, "int8", False) == ""
