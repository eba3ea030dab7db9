"""`deploy.yml`: what to deploy on this machine, what came second, and the figures behind it.

    schema: 2
    created: UTC, ISO 8601
    summary: one paragraph in plain words
    choice: Configuration, evidence included
    runner_up: the same of the second best, or null
    bounds: what was asked for (`search.Bounds`), of the latency from file to boxes; null where nothing was
    knee: of the choice's engine, precision, threads and policy (`knee.Knee`), from file to boxes; null where there is a
        single batch size
    search: how it was found (`SearchRecord`)
    machine: `machine.Machine`
    data: `bench.results.DataDescription`

Reading is strict: unknown keys, missing keys and a newer schema number are errors. Schema 1 had nothing from file to
boxes: its speeds and latencies become those of the network alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gfldeploy.bench.compare import hardware_differences, software_differences
from gfldeploy.bench.estimates import Estimate
from gfldeploy.bench.results import DataDescription
from gfldeploy.bundle import Bundle
from gfldeploy.engines.base import Device, Precision
from gfldeploy.errors import BundleError, DataError
from gfldeploy.machine import Machine
from gfldeploy.serialization import FileFormat, Versioned, part
from gfldeploy.tune.knee import Knee
from gfldeploy.tune.search import Bounds, Policy

__all__ = ["Configuration", "Deploy", "Evidence", "SearchRecord"]


def _from_schema_1(data: dict[str, Any]) -> dict[str, Any]:
    """Nothing was measured from file to boxes: speeds and latencies were of the network alone."""

    def upgraded(key: str) -> dict[str, Any]:
        evidence = part(data, key, "evidence")
        unknown = ("images_per_s", "latency_p50_ms", "latency_p99_ms", "latency_max_ms", "padded")
        kept = {name: value for name, value in evidence.items() if name not in ("latency_ms", "latency_percent")}
        network = {
            "network_images_per_s": evidence.get("images_per_s"),
            "network_p50_ms": evidence.get("latency_p50_ms"),
        }
        return {**data[key], "evidence": {**kept, **dict.fromkeys(unknown), **network, "quick": False}}

    second = None if data.get("runner_up") is None else upgraded("runner_up")
    return {**data, "choice": upgraded("choice"), "runner_up": second, "knee": None}


@dataclass(frozen=True)
class Evidence:
    """What was measured of a configuration, with 95% intervals; their bounds are null where the samples support none.

    From file to boxes (decode, preprocess, network, NMS), one batch after the other, nothing overlapping:
    `images_per_s`, the median over whole passes through the timed images, `n` of them; of a batch `latency_p50_ms`, the
    median, `latency_p99_ms`, null where its samples are too few to know it (`measured.TAIL_COUNT`), and
    `latency_max_ms`, the largest of them. All null in files of schema 1. `network_images_per_s`, `network_p50_ms`: of
    the network alone on prepared batches. `quick`: measured too briefly for figures to be quoted. `padded`: whether
    batches held images of several sizes, which changes boxes and scores; null where that is not known. `memory_mb`:
    peak resident memory less the prepared inputs, 10^6 bytes. `ap`: COCO mAP, 0 to 1, of `ap_images` images; `ap_drop`:
    the FP32 bundle's less that; null where it was not measured. `runs`: processes that measured it, the first `started`
    then (UTC, ISO 8601).
    """

    images_per_s: Estimate | None
    latency_p50_ms: Estimate | None
    latency_p99_ms: Estimate | None
    latency_max_ms: float | None
    network_images_per_s: Estimate
    network_p50_ms: Estimate
    quick: bool
    padded: bool | None
    memory_mb: float
    ap: float | None
    ap_drop: float | None
    ap_images: int | None
    runs: int
    started: str


@dataclass(frozen=True)
class Configuration:
    """One way to deploy.

    `bundle`: its directory, relative to the file; `digest`: SHA-256 of its manifest. `threads`: CPU threads of one
    inference. `policy`: how batches are formed (`search.Policy`).
    """

    bundle: str
    digest: str
    engine: str
    precision: Precision
    device: Device
    threads: int
    batch_size: int
    policy: Policy
    evidence: Evidence

    def __post_init__(self) -> None:
        if self.threads < 1 or self.batch_size < 1:
            raise ValueError("threads and batch_size must be at least 1")
        if Path(self.bundle).is_absolute():
            raise ValueError("bundle must be a path relative to the file")


@dataclass(frozen=True)
class SearchRecord:
    """How the choice was found: of `cells` possible ones `measured` were, in `seconds` of the run that wrote the file.

    `reused`: of those measured, taken from results of `gfldeploy bench`. `complete`: not cut short by the time allowed.
    """

    cells: int
    measured: int
    reused: int
    seconds: float
    exhaustive: bool
    complete: bool


@dataclass(frozen=True)
class Deploy(Versioned):
    """The content of `deploy.yml`; see the module."""

    FORMAT = FileFormat("a deploy file", "gfldeploy tune", 2, {1: _from_schema_1}, yaml=True)

    created: str
    summary: str
    choice: Configuration
    runner_up: Configuration | None
    bounds: Bounds
    knee: Knee | None
    search: SearchRecord
    machine: Machine
    data: DataDescription

    def check(self, bundle: Bundle, machine: Machine) -> None:
        """Raise where the choice does not hold: `BundleError` for another bundle, `DataError` for other hardware."""
        if bundle.digest != self.choice.digest:
            raise BundleError(
                f"{bundle.directory} is not the bundle that was tuned, {Path(self.choice.bundle).name}: its manifest "
                f"has the SHA-256 {bundle.digest[:12]}, not {self.choice.digest[:12]}",
                "Give the bundle that was tuned, or run `gfldeploy tune` on this one.",
            )
        if differences := list(hardware_differences(self.machine, machine)):
            raise DataError(
                f"the choice was made on another machine: {'; '.join(map(str, differences))}",
                "Run `gfldeploy tune` on this one.",
            )

    def software_changes(self, machine: Machine) -> tuple[str, ...]:
        """What is installed in other versions than where it was tuned: the choice may hold, its figures need not."""
        return tuple(map(str, software_differences(self.machine, machine)))

    def bundle_path(self, path: Path) -> Path:
        """Where the choice's bundle is, `path` being that of the file."""
        return path.parent / self.choice.bundle
