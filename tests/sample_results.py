"""Results as `gfldeploy bench` writes them, for tests of what is made of them."""

from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from gfldeploy.accuracy import Accuracy
from gfldeploy.bench.cell import STREAMS, BundleIdentity, Cell
from gfldeploy.bench.matrix import Plan
from gfldeploy.bench.results import BenchResults, CellResult, Cost, DataDescription, Idle, Monitored, Peak, Run
from gfldeploy.bench.timing import Samples, Settings, Stages
from gfldeploy.bundle import Bundle
from gfldeploy.machine import describe_machine

STAGES = [field.name for field in fields(Stages)]
RUN = Run(
    started="2026-01-01T00:00:00+00:00",
    samples=Samples((10.0, 12.0, 20.0), (50.0,), batch_size=2, images=6, wall_s=0.05, stable=True),
    stages=Stages(**dict.fromkeys(STAGES, (2.0, 4.0)) | {"end_to_end_ms": (12.0, 24.0)}),
    engine_version="1.2.3",
    load_s=0.5,
    build_s=None,
    first_inference_ms=60.0,
    peak_rss_mb=300.0,
    inputs_mb=20.0,
    shapes={"2x3x64x96": 3},
    padding_ratio=1.25,
    mixed_batches=0,
    convolutions={"fp32": 1, "int8": 52},
    not_low_precision=("kept in float in the ONNX file (1): stem",),
    delegated=None,
    idle=Idle(3.0, None, 0.0),
    monitored=Monitored((0.2, 0.4), ((90.0, 80.0), (95.0, 85.0)), rss_mb=(280.0, 290.0), overhead_percent=0.1),
    serving=None,
)
OK = CellResult(
    Cell(
        bundle=BundleIdentity("tiny", "tiny_dir", "ab" * 32),
        engine="onnxruntime",
        precision="int8",
        device="cpu",
        threads=1,
        batch_size=2,
        scenario="multi-stream",
    ),
    status="ok",
    runs=(
        RUN,
        replace(RUN, samples=Samples((14.0,), (), batch_size=2, images=2, wall_s=0.03, stable=True), peak_rss_mb=310.0),
    ),
    accuracy=Accuracy(0.5, 0.7, 0.6, -1.0, 0.4, 0.5, 6, 9),
    cost=Cost(macs=0.8e9, padded_macs=1e9, traffic_mb=20.0),
    peak=Peak(200.0, 10.0, None),
)
FAILED = replace(OK, status="failed", reason="it crashed", runs=(RUN,), accuracy=None)
SKIPPED = CellResult(replace(OK.cell, precision="bf16"), "skipped", "it cannot", "Try x.")


def cell_of(bundle: Path, **axes: Any) -> Cell:
    """A cell of the bundle in this directory, of one image in ONNX Runtime unless `axes` say otherwise."""
    identity = BundleIdentity.of(Bundle.open(bundle))
    given = {"engine": "onnxruntime", "precision": "fp32", "device": "cpu", "threads": 1, "batch_size": 1, **axes}
    return Cell(**{"bundle": identity, "scenario": STREAMS[given["batch_size"] > 1], **given})


def plan_of(bundle: Path, *cells: Cell, skipped: tuple[CellResult, ...] = ()) -> Plan:
    """These cells of the bundle in this directory."""
    return Plan(cells, skipped, {BundleIdentity.of(Bundle.open(bundle)): bundle})


def altered(result: CellResult, **values: Any) -> CellResult:
    """With other values of the result, or of its cell; the scenario goes with the batch size unless it is given."""
    axes = {key: values.pop(key) for key in [*values] if key in {field.name for field in fields(Cell)}}
    if "batch_size" in axes and result.cell.scenario in STREAMS:
        axes = {"scenario": STREAMS[axes["batch_size"] > 1], **axes}
    return replace(result, cell=replace(result.cell, **axes), **values)


def sample_results() -> BenchResults:
    """One cell of each status."""
    return BenchResults(
        created="2026-01-01T00:00:00+00:00",
        machine=describe_machine(),
        data=DataDescription("cd" * 32, "ef" * 32, 6, None),
        settings=Settings(2.0, 10, 10.0, rounds=3),
        cells=(OK, FAILED, SKIPPED),
    )
