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
from typing import Any, Self

from gfldeploy.bench.compare import hardware_differences, software_differences
from gfldeploy.bench.estimates import Estimate
from gfldeploy.bench.results import DataDescription
from gfldeploy.bundle import Bundle
from gfldeploy.engines.base import Device, Precision
from gfldeploy.errors import BundleError, DataError
from gfldeploy.files import write_text
from gfldeploy.machine import Machine
from gfldeploy.serialization import build, check_schema, plain
from gfldeploy.tune.knee import Knee
from gfldeploy.tune.search import Bounds, Policy

__all__ = ["SCHEMA", "Configuration", "Deploy", "Evidence", "SearchRecord"]

SCHEMA = 2
_WIDTH = 120
_WRITER = "Give a file that `gfldeploy tune` wrote."


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
class Deploy:
    """The content of `deploy.yml`; see the module."""

    created: str
    summary: str
    choice: Configuration
    runner_up: Configuration | None
    bounds: Bounds
    knee: Knee | None
    search: SearchRecord
    machine: Machine
    data: DataDescription
    schema: int = SCHEMA

    def to_dict(self) -> dict[str, Any]:
        """As YAML-ready data; `from_dict` is the inverse."""
        data: dict[str, Any] = plain(self)
        return {"schema": data.pop("schema"), **data}

    @classmethod
    def from_dict(cls, data: object) -> Self:
        """Check and build. Raises `DataError` for a newer schema, unknown or missing keys and wrong types."""
        data = _upgraded(data)
        check_schema(data, SCHEMA, "a deploy file", _WRITER, "Run `gfldeploy tune` again.")
        return build(cls, data, "it")

    def write(self, path: Path) -> None:
        """Write the file in one step, replacing any other. Raises `OutputError`."""
        import yaml

        write_text(path, yaml.safe_dump(self.to_dict(), sort_keys=False, allow_unicode=True, width=_WIDTH))

    @classmethod
    def read(cls, path: Path) -> Self:
        """Read a file that `write` wrote. Raises `DataError`."""
        from gfldeploy.yaml_file import YamlError, read_yaml

        try:
            data = read_yaml(path)
        except OSError as error:
            raise DataError(f"cannot read {path}: {error.strerror or error}", _WRITER) from error
        except YamlError as error:
            raise DataError(f"{path} is not YAML that was written here: {error}", _WRITER) from error
        try:
            return cls.from_dict(data)
        except DataError as error:
            raise DataError(f"{path}: {error.problem}", error.remedy) from error

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


def _upgraded(data: object) -> object:
    """Schema 1 as schema 2; all else as it is."""
    if not isinstance(data, dict) or data.get("schema") != 1:
        return data
    upgraded = {**data, "schema": 2, "knee": None}
    for key in ("choice", "runner_up"):
        one = data.get(key)
        if isinstance(one, dict) and isinstance(found := one.get("evidence"), dict):
            upgraded[key] = {**one, "evidence": _upgraded_evidence(found)}
    return upgraded


def _upgraded_evidence(found: dict[str, Any]) -> dict[str, Any]:
    """Speeds and latencies of schema 1 were of the network alone."""
    kept = {key: value for key, value in found.items() if key not in ("latency_ms", "latency_percent")}
    return {
        **kept,
        "images_per_s": None,
        "latency_p50_ms": None,
        "latency_p99_ms": None,
        "latency_max_ms": None,
        "network_images_per_s": found.get("images_per_s"),
        "network_p50_ms": found.get("latency_p50_ms"),
        "quick": False,
        "padded": None,
    }
