"""Results as `gfldeploy bench` writes them, for tests of what is made of them."""

from __future__ import annotations

from dataclasses import fields, replace

from gfldeploy.accuracy import Accuracy
from gfldeploy.bench.results import (
    BenchResults,
    BundleIdentity,
    CellResult,
    DataDescription,
    Idle,
    Monitored,
    Peak,
    Run,
    Settings,
    Stages,
    Work,
)
from gfldeploy.bench.timing import Samples
from gfldeploy.machine import describe_machine

RUN = Run(
    started="2026-01-01T00:00:00+00:00",
    samples=Samples((10.0, 12.0, 20.0), (50.0,), batch_size=2, images=6, wall_s=0.05, stable=True),
    stages=Stages(*(((2.0, 4.0),) * (len(fields(Stages)) - 1)), end_to_end_ms=(12.0, 24.0)),
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
    monitored=Monitored((0.2, 0.4), ((90.0, 80.0), (95.0, 85.0)), (), (280.0, 290.0), (), (), (), (), (), 0.1),
    serving=None,
)
OK = CellResult(
    bundle=BundleIdentity("tiny", "tiny_dir", "ab" * 32),
    engine="onnxruntime",
    precision="int8",
    device="cpu",
    batch_size=2,
    threads=1,
    scenario="multi-stream",
    rate=None,
    policy=None,
    status="ok",
    reason=None,
    remedy=None,
    runs=(
        RUN,
        replace(RUN, samples=Samples((14.0,), (), batch_size=2, images=2, wall_s=0.03, stable=True), peak_rss_mb=310.0),
    ),
    accuracy=Accuracy(0.5, 0.7, 0.6, -1.0, 0.4, 0.5, 6, 9),
    accuracy_reason=None,
    work=Work(macs=0.8e9, padded_macs=1e9, traffic_mb=20.0),
)
FAILED = replace(OK, status="failed", reason="it crashed", runs=(RUN,), accuracy=None)
SKIPPED = replace(
    OK,
    bundle=None,
    batch_size=None,
    scenario=None,
    status="skipped",
    reason="it cannot",
    remedy="Try x.",
    runs=(),
    accuracy=None,
    work=None,
)


def sample_results() -> BenchResults:
    """One cell of each status, and the peak of the engine that was measured."""
    return BenchResults(
        created="2026-01-01T00:00:00+00:00",
        machine=describe_machine(),
        data=DataDescription("cd" * 32, "ef" * 32, 6, None),
        settings=Settings(2.0, 10, 10.0),
        peaks=(Peak("onnxruntime", "int8", "cpu", 1, 200.0, 10.0, None),),
        cells=(OK, FAILED, SKIPPED),
    )
