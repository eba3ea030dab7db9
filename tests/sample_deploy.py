"""What `gfldeploy tune` writes, for tests of what is made of it."""

from __future__ import annotations

from dataclasses import replace

from gfldeploy.bench.cell import BundleIdentity, Cell
from gfldeploy.bench.estimates import Estimate
from gfldeploy.bench.results import DataDescription
from gfldeploy.machine import describe_machine
from gfldeploy.tune.deploy_file import Configuration, Deploy, Evidence, SearchRecord
from gfldeploy.tune.knee import Knee
from gfldeploy.tune.search import Bounds

EVIDENCE = Evidence(
    images_per_s=Estimate(80.0, 79.0, 81.5, 12),
    latency_p50_ms=Estimate(25.0, 24.9, 25.2, 400),
    latency_p99_ms=Estimate(31.0, 30.0, 33.0, 400),
    latency_max_ms=40.5,
    network_images_per_s=Estimate(95.0, None, None, 3),
    network_p50_ms=Estimate(21.0, 20.9, 21.2, 400),
    quick=False,
    padded=False,
    memory_mb=310.5,
    ap=0.701,
    ap_drop=0.004,
    ap_images=200,
    runs=3,
    started="2026-01-01T00:00:00+00:00",
)
CELL = Cell(
    bundle=BundleIdentity("gfl_int8", "int8", "ab" * 32),
    engine="onnxruntime",
    precision="int8",
    device="cpu",
    threads=2,
    batch_size=2,
    order="bucketed",
    scenario="offline",
)
SECOND = replace(
    CELL,
    bundle=BundleIdentity("gfl", "fp32", "ba" * 32),
    precision="fp32",
    batch_size=1,
    order="listed",
    scenario="single-stream",
)
CHOICE = Configuration("models/int8", CELL, EVIDENCE)
UNMEASURED = replace(EVIDENCE, ap=None, ap_drop=None, ap_images=None)
DEPLOY = Deploy(
    created="2026-01-01T00:10:00+00:00",
    summary="Deploy it: it is fast, zwölf times — and " + "long " * 60 + "enough.",
    choice=CHOICE,
    runner_up=Configuration("../fp32", SECOND, UNMEASURED),
    bounds=Bounds(max_latency_ms=50, max_drop=0.01),
    knee=Knee(2, ((1, 60.0), (2, 80.0), (4, 80.5))),
    search=SearchRecord(55, 12, 2, 61.5, False, True),
    machine=describe_machine(),
    data=DataDescription("cd" * 32, "ef" * 32, 32, 200),
    shapes=((2, 64, 96), (2, 96, 64)),
)
