"""What a plan runs and what it skips."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import pytest
from sample_results import OK

from gfldeploy.bench import matrix
from gfldeploy.bench.cell import Scenario
from gfldeploy.bench.matrix import Plan, plan
from gfldeploy.bundle import MANIFEST, Bundle, Graph, GraphName, TensorSpec
from gfldeploy.engines import base, registry
from gfldeploy.engines.base import Device, Obstacle, Precision
from gfldeploy.engines.registry import Capability
from gfldeploy.errors import UnsupportedError


@pytest.fixture(autouse=True)
def everything_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The table of what never works stays as it is; what depends on this machine always works."""

    def capability(engine: str, precision: Precision, device: Device) -> Capability:
        spec = registry.ENGINES.get(engine)
        if spec is None or isinstance(spec.graph(precision, device), Obstacle):
            return registry.capability(engine, precision, device)
        return Capability(engine, precision, device)

    monkeypatch.setattr(matrix, "capability", capability)


def variant(
    tiny: Path,
    name: str,
    precision: Literal["fp32", "int8"] = "fp32",
    batch: int | None = None,
    graphs: Sequence[GraphName] = ("onnx",),
) -> Bundle:
    bundle = Bundle.open(tiny)
    manifest = replace(
        bundle.manifest,
        precision=precision,
        inputs=(TensorSpec("image", "float32", (batch, 3, None, None)),),
        graphs={graph: Graph("model", "parameters" if graph.startswith("paddle") else None) for graph in graphs},
    )
    directory = tiny.parent / name
    directory.mkdir(exist_ok=True)
    shutil.copy(tiny / MANIFEST, directory)
    return Bundle(directory, manifest)


def labels(result: Plan) -> list[tuple[str, str, str, int]]:
    return [(cell.bundle.directory, cell.engine, cell.precision, cell.batch_size) for cell in result.cells]


def test_fp32_and_int8_bundles_run_in_their_own_precisions(tiny_bundle: Path) -> None:
    fp32 = variant(tiny_bundle, "fp32", graphs=("onnx", "paddle"))
    int8 = variant(tiny_bundle, "int8", "int8", graphs=("onnx", "paddle_program"))
    result = plan([fp32, int8], ["paddle", "onnxruntime"], ["fp32", "fp16", "bf16", "int8"], [1, 2], "cpu", 3)
    assert labels(result) == [
        ("fp32", "paddle", "fp32", 1),
        ("fp32", "paddle", "fp32", 2),
        ("fp32", "paddle", "bf16", 1),
        ("fp32", "paddle", "bf16", 2),
        ("int8", "paddle", "int8", 1),
        ("int8", "paddle", "int8", 2),
        ("fp32", "onnxruntime", "fp32", 1),
        ("fp32", "onnxruntime", "fp32", 2),
        ("int8", "onnxruntime", "int8", 1),
        ("int8", "onnxruntime", "int8", 2),
    ]
    assert {cell.threads for cell in result.cells} == {3}
    cells = [one.cell for one in result.skipped]
    assert [(cell.engine, cell.precision, cell.bundle.directory, cell.batch_size) for cell in cells] == [
        ("paddle", "fp16", "fp32", 1),
        ("paddle", "fp16", "fp32", 2),
        ("onnxruntime", "fp16", "fp32", 1),
        ("onnxruntime", "fp16", "fp32", 2),
        ("onnxruntime", "bf16", "fp32", 1),
        ("onnxruntime", "bf16", "fp32", 2),
    ]
    assert "no FP16 convolution" in (result.skipped[0].reason or "") and result.skipped[0].remedy


def test_a_precision_without_a_bundle_is_skipped_once(tiny_bundle: Path) -> None:
    bundles = [variant(tiny_bundle, "a"), variant(tiny_bundle, "b")]
    result = plan(bundles, ["onnxruntime"], ["int8"], [1, 2], "cpu", 1)
    assert result.cells == () and {(one.reason, one.remedy) for one in result.skipped[1:]} == {
        (result.skipped[0].reason, result.skipped[0].remedy)
    }
    skipped, *_ = result.skipped
    assert skipped.reason == "no INT8 bundle was given" and "gfldeploy quantize" in (skipped.remedy or "")
    (skipped,) = plan([variant(tiny_bundle, "q", "int8")], ["onnxruntime"], ["fp32"], [1], "cpu", 1).skipped
    assert skipped.reason == "no FP32 bundle was given" and "gfldeploy export" in (skipped.remedy or "")


def test_several_bundles_of_one_precision_are_compared(tiny_bundle: Path) -> None:
    bundles = [variant(tiny_bundle, "a"), variant(tiny_bundle, "b")]
    result = plan(bundles, ["onnxruntime"], ["fp32"], [1], "cpu", 1)
    assert labels(result) == [("a", "onnxruntime", "fp32", 1), ("b", "onnxruntime", "fp32", 1)]


def test_a_missing_graph_and_a_fixed_batch_are_reasons(tiny_bundle: Path) -> None:
    bundle = variant(tiny_bundle, "fixed", batch=2)
    result = plan([bundle], ["paddle", "onnxruntime"], ["fp32"], [1, 2], "cpu", 1)
    assert labels(result) == [("fixed", "onnxruntime", "fp32", 2)]
    no_graph, other, wrong_batch = result.skipped
    assert (other.cell.batch_size, other.reason) == (2, no_graph.reason)
    assert (no_graph.cell.engine, no_graph.reason) == ("paddle", "the bundle fixed has no paddle graph")
    assert (wrong_batch.cell.batch_size, wrong_batch.reason) == (1, "the bundle fixed is made for batches of 2")


def test_a_size_is_of_the_bundles_that_take_it(tiny_bundle: Path) -> None:
    own, other = variant(tiny_bundle, "own"), variant(tiny_bundle, "other")
    smaller = replace(other.manifest.preprocess, target_size=(32, 48))
    fixed = TensorSpec("image", "float32", (None, 3, 32, 48))
    other = replace(other, manifest=replace(other.manifest, preprocess=smaller, inputs=(fixed,)))
    result = plan([own, other], ["onnxruntime"], ["fp32"], [1, 2], "cpu", 1, input_sizes=[(64, 96), (32, 48), None])
    sizes = {
        directory: [cell.input_size for cell in result.cells if cell.bundle.directory == directory]
        for directory in ("own", "other")
    }
    assert sizes == {"own": [None, None, (32, 48), (32, 48)], "other": [None, None]}
    assert {(one.cell.bundle.directory, one.cell.input_size) for one in result.skipped} == {("other", (64, 96))}
    assert all("takes inputs of 32x48 alone" in (one.reason or "") for one in result.skipped)
    lines = list(result.lines())
    assert "  run   onnxruntime fp32 at 32x48 of own, batch 1, 2" in lines
    assert any(line.startswith("  skip  onnxruntime fp32 at 64x96 of other: ") for line in lines)


def test_files_that_deploy_by_themselves_stand_beside_their_networks(tiny_bundle: Path) -> None:
    graphs: tuple[GraphName, ...] = ("paddle", "onnx", "end_to_end")
    bundles = [variant(tiny_bundle, "with", graphs=graphs), variant(tiny_bundle, "without", graphs=graphs[:2])]
    loads: dict[str, Any] = {"scenarios": ["single-stream", "server"], "rates": [5.0], "policies": ["no-batching"]}
    result = plan(bundles, ["paddle", "onnxruntime"], ["fp32", "bf16"], [1], "cpu", 1, end_to_end=True, **loads)
    found = [(one.bundle.directory, one.engine, one.precision, one.scenario) for one in result.cells if one.end_to_end]
    assert found == [("with", "onnxruntime", "fp32", "single-stream")]
    reasons = {
        (one.cell.bundle.directory, one.cell.engine): one.reason for one in result.skipped if one.cell.end_to_end
    }
    assert reasons[("without", "onnxruntime")] == "the bundle without has no end_to_end graph"
    assert all("gfldeploy does not run" in str(reasons[name, "paddle"]) for name in ("with", "without"))
    assert "  run   onnxruntime fp32 by itself, batch 1" in [line.replace(" of with", "") for line in result.lines()]


def test_tf32_is_of_fp32_alone(tiny_bundle: Path) -> None:
    bundle = variant(tiny_bundle, "a")
    result = plan([bundle], ["onnxruntime"], ["fp32", "fp16"], [1], "gpu", 1, tf32=True)
    cells = [*result.cells, *(one.cell for one in result.skipped)]
    assert {cell.precision: cell.tf32 for cell in cells} == {"fp32": True, "fp16": False}
    for precisions, device in ((["fp32"], "cpu"), (["fp16", "int8"], "gpu")):
        with pytest.raises(UnsupportedError, match=r"TF32 is .*Leave --tf32 out"):
            plan([bundle], ["onnxruntime"], precisions, [1], device, 1, tf32=True)  # type: ignore[arg-type]


def test_an_unknown_engine(tiny_bundle: Path) -> None:
    with pytest.raises(UnsupportedError, match="no engine 'tensorflow'"):
        plan([variant(tiny_bundle, "a")], ["tensorflow"], ["fp32"], [1], "cpu", 1)


@pytest.mark.parametrize(
    "change",
    [
        {"precision": "int4"},
        {"device": "tpu"},
        {"batch_size": 0},
        {"threads": 0},
        {"batch_size": 2},
        {"scenario": "x"},
        {"scenario": "server"},
        {"rate": 5.0},
        {"scenario": "server", "rate": -1.0, "policy": "no-batching"},
        {"scenario": "server", "rate": 5.0},
        {"scenario": "server", "rate": 5.0, "policy": "x"},
        {"scenario": "server", "rate": 5.0, "policy": "adaptive"},
        {"policy": "no-batching"},
        {"order": "shuffled"},
        {"order": "bucketed"},
        {"end_to_end": True, "device": "gpu"},
        {"end_to_end": True, "scenario": "server", "rate": 5.0, "policy": "no-batching"},
    ],
)
def test_impossible_cells(change: dict[str, Any]) -> None:
    cell = replace(OK.cell, batch_size=1, scenario="single-stream")
    with pytest.raises(ValueError):
        replace(cell, **change)


def test_scenarios_take_the_batch_sizes_that_suit_them(tiny_bundle: Path) -> None:
    bundle = variant(tiny_bundle, "fp32")
    asked = ["single-stream", "multi-stream", "offline", "server"]
    result = plan([bundle], ["onnxruntime"], ["fp32"], [1, 4], "cpu", 1, asked, [5.0, 10.0])  # type: ignore[arg-type]
    assert [(cell.batch_size, cell.scenario, cell.rate, cell.policy) for cell in result.cells] == [
        (1, "single-stream", None, None),
        (1, "offline", None, None),
        (1, "server", 5.0, "no-batching"),
        (1, "server", 10.0, "no-batching"),
        (4, "multi-stream", None, None),
        (4, "offline", None, None),
        (4, "server", 5.0, "fixed-timeout"),
        (4, "server", 5.0, "adaptive"),
        (4, "server", 10.0, "fixed-timeout"),
        (4, "server", 10.0, "adaptive"),
    ]
    assert [str(cell) for cell in result.cells[:3]] == [
        "fp32: onnxruntime fp32, batch 1",
        "fp32: onnxruntime fp32, batch 1, offline",
        "fp32: onnxruntime fp32, batch 1, server at 5 images/s, no-batching",
    ]


def test_a_fixed_batch_cannot_serve_what_comes(tiny_bundle: Path) -> None:
    bundle = variant(tiny_bundle, "fixed", batch=4)
    result = plan([bundle], ["onnxruntime"], ["fp32"], [4], "cpu", 1, ["server"], [5.0])
    assert result.cells == ()
    skipped, *_ = result.skipped
    assert "made for batches of 4" in (skipped.reason or "") and skipped.remedy


def test_streams_are_of_the_offline_scenario_and_share_the_cpus(
    tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(matrix, "usable_threads", lambda: 6)
    monkeypatch.setattr(base, "usable_threads", lambda: 6)
    bundle = variant(tiny_bundle, "plain")
    scenarios: tuple[Scenario, ...] = ("single-stream", "offline")
    planned = plan([bundle], ["onnxruntime"], ["fp32"], [1], "cpu", None, scenarios, streams=[1, 2, 4, 8])
    assert [(cell.scenario, cell.streams, cell.threads) for cell in planned.cells] == [
        ("single-stream", 1, 6), ("offline", 1, 6), ("offline", 2, 3), ("offline", 4, 1),
    ]  # fmt: skip
    (skipped,) = planned.skipped
    assert skipped.reason == "8 streams of 1 thread each are more than the 6 usable CPUs"
    planned = plan([bundle], ["onnxruntime"], ["fp32"], [1], "cpu", 4, scenarios, streams=[2])
    assert [(cell.scenario, cell.streams) for cell in planned.cells] == [("single-stream", 1)]
    assert [one.reason for one in planned.skipped] == ["2 streams of 4 threads each are more than the 6 usable CPUs"]
    planned = plan([bundle], ["onnxruntime"], ["fp32"], [1], "gpu", None, ("offline",), streams=[2])
    assert [one.reason for one in planned.skipped] == ["gfldeploy runs one inference at once on a GPU"]
