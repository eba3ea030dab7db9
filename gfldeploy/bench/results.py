"""`results.json`: raw samples with everything needed to judge them. The schema is described in benchmarks/README.md."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self

from gfldeploy.accuracy import Accuracy
from gfldeploy.bench.records import build, plain
from gfldeploy.bench.timing import Samples
from gfldeploy.bundle import Bundle
from gfldeploy.engines.base import Device, Precision
from gfldeploy.errors import DataError
from gfldeploy.files import read_json, write_json
from gfldeploy.machine import Machine

__all__ = ["SCHEMA", "BenchResults", "BundleIdentity", "CellResult", "DataDescription", "Run", "Settings", "Status"]

SCHEMA = 1
Status = Literal["ok", "failed", "skipped"]


@dataclass(frozen=True)
class Settings:
    """How it was measured: every cell in each of `rounds` rounds, `min_seconds` and `min_count` inferences at least.

    `warmup` is the number of untimed inferences of each input shape.
    """

    min_seconds: float
    min_count: int
    warmup: int = 2
    rounds: int = 1

    def __post_init__(self) -> None:
        if self.min_seconds < 0 or self.min_count < 1 or self.warmup < 0 or self.rounds < 1:
            raise ValueError("min_count and rounds must be at least 1, min_seconds and warmup not negative")


@dataclass(frozen=True)
class DataDescription:
    """What was measured on: the SHA-256 of the annotation file, and how many of its images.

    `timed_images` went through the timing; `accuracy_images` is None where accuracy was not measured.
    """

    annotations_sha256: str
    timed_images: int
    accuracy_images: int | None


@dataclass(frozen=True)
class BundleIdentity:
    """A bundle's `name` in its manifest, the last part of its `directory`, and the SHA-256 of its manifest."""

    name: str
    directory: str
    digest: str

    @classmethod
    def of(cls, bundle: Bundle) -> Self:
        """The identity of an opened bundle."""
        return cls(bundle.name, bundle.directory.resolve().name, bundle.digest)


@dataclass(frozen=True)
class Run:
    """One process that measured one cell.

    `load_s`: seconds to open the engine, the import of its library included; `first_inference_ms`: the very first one,
    before the warm-up; `peak_rss_mb`: the process's largest resident memory, 10^6 bytes, up to the end of the timing;
    `inputs_mb`: how much of that were the prepared batches.

    `decode_ms`, `preprocess_ms` and `postprocess_ms` are per image, raw; no latency includes them. `convolutions`:
    those of one inference, by the precision that they ran in; None where the engine cannot tell. `not_low_precision`:
    why some did not run in the INT8, BF16 or FP16 asked for, a line for each reason (`engines.base.reasons`); empty
    where FP32 was asked for, None where it was not recorded or the engine cannot tell. `padding_ratio`: pixels of the
    batches by pixels of the images in them, 1.0 without padding.
    """

    samples: Samples
    engine_version: str
    load_s: float
    first_inference_ms: float
    peak_rss_mb: float
    inputs_mb: float
    decode_ms: tuple[float, ...]
    preprocess_ms: tuple[float, ...]
    postprocess_ms: tuple[float, ...]
    convolutions: Mapping[str, int] | None
    not_low_precision: tuple[str, ...] | None
    padding_ratio: float


@dataclass(frozen=True)
class CellResult:
    """What became of one cell.

    `status` ok: it was measured, once in each round (`runs`); failed: the process of a round failed for the `reason`,
    `runs` are the earlier rounds; skipped: it cannot run here (`bundle` and `batch_size` are None where that holds for
    all of them). `accuracy` is None where it was not measured; had it been asked for, `accuracy_reason` says why.
    """

    bundle: BundleIdentity | None
    engine: str
    precision: Precision
    device: Device
    batch_size: int | None
    threads: int
    status: Status
    reason: str | None
    remedy: str | None
    runs: tuple[Run, ...]
    accuracy: Accuracy | None
    accuracy_reason: str | None

    def __post_init__(self) -> None:
        if (self.status == "ok") != (self.reason is None):
            raise ValueError("a cell has a reason unless its status is ok")
        if self.status == "ok" and not (self.runs and self.bundle and self.batch_size):
            raise ValueError("a cell with the status ok needs runs, a bundle and a batch size")
        if self.status == "skipped" and self.runs:
            raise ValueError("a skipped cell has no runs")

    @property
    def latency_ms(self) -> tuple[float, ...]:
        """The latencies of all rounds, in the order they were measured."""
        return tuple(value for run in self.runs for value in run.samples.latency_ms)


@dataclass(frozen=True)
class BenchResults:
    """The content of `results.json`. `created` is the UTC time of the end, in ISO 8601."""

    created: str
    machine: Machine
    data: DataDescription
    settings: Settings
    cells: tuple[CellResult, ...]
    schema: int = SCHEMA

    def to_dict(self) -> dict[str, Any]:
        """As JSON-ready data; `from_dict` is the inverse."""
        data: dict[str, Any] = plain(self)
        return {"schema": data.pop("schema"), **data}

    @classmethod
    def from_dict(cls, data: object) -> Self:
        """Check and build. Raises `DataError` for a newer schema, unknown or missing keys and wrong types."""
        schema = data.get("schema") if isinstance(data, dict) else None
        if type(schema) is not int:
            raise DataError("the results have no schema number", "Give a file that `gfldeploy bench` wrote.")
        if schema != SCHEMA:
            raise DataError(
                f"the results have schema {schema}, this gfldeploy reads schema {SCHEMA}",
                "Update gfldeploy, or measure again with this version.",
            )
        return build(cls, data, "results")

    def write(self, path: Path) -> None:
        """Write the file in one step, replacing any other. Raises `OutputError`."""
        write_json(path, self.to_dict())

    @classmethod
    def read(cls, path: Path) -> Self:
        """Read a file that `write` wrote. Raises `DataError`."""
        try:
            data = read_json(path)
        except OSError as error:
            raise DataError(
                f"cannot read {path}: {error.strerror or error}", "Give a file that `gfldeploy bench` wrote."
            ) from error
        except ValueError as error:
            raise DataError(f"{path} is not JSON: {error}", "Give a file that `gfldeploy bench` wrote.") from error
        try:
            return cls.from_dict(data)
        except DataError as error:
            raise DataError(f"{path}: {error.problem}", error.remedy) from error
