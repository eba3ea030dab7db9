"""One benchmark from request to results: what `gfldeploy bench` and `gfldeploy demo` both run."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psutil

from gfldeploy.accuracy import check_measurable
from gfldeploy.bench.cell import POLICIES, STREAMS, Scenario, ServerPolicy
from gfldeploy.bench.journal import Journal
from gfldeploy.bench.matrix import Plan, plan
from gfldeploy.bench.results import BenchResults, DataDescription, Settings
from gfldeploy.bench.runner import Data, run_plan
from gfldeploy.bundle import Bundle
from gfldeploy.child_process import Limits
from gfldeploy.engines.base import PRECISIONS, Device, Precision
from gfldeploy.engines.cache import DEFAULT_ENGINE_CACHE
from gfldeploy.engines.registry import DEFAULT_ENGINES
from gfldeploy.errors import DataError
from gfldeploy.files import sha256
from gfldeploy.images.coco import CocoDataset
from gfldeploy.machine import Machine, describe_machine
from gfldeploy.serialization import plain

__all__ = ["BenchRequest", "PreparedBench", "about", "describe_data", "limits", "prepare", "run"]

Progress = Callable[[int, int, str], None]

# Of the memory that is free before the benchmark: what is left keeps the machine usable.
_MEMORY_SHARE = 0.9
# Seconds that a process takes at least besides what it measures: to start, import an engine and decode the images.
_STARTUP_S = 4.0
# A worker also times whole batches, stage by stage, for `min_seconds`.
_TIMED_PARTS = 2


@dataclass(frozen=True)
class BenchRequest:
    """What to measure on what.

    `timed_images`: how many of the first images are used for timing. `accuracy_images`: how many for mAP; None is all.
    `settings`: how long and how often. `rates`: images a second, and
    `policies`: what the server does with them, in the server scenario. `cell_timeout_s`: seconds
    after which a cell has failed; for mAP, seconds without an image done. `memory_limit_mb`: 10^6 bytes of resident
    memory after which a cell has failed; None is 90% of what is free. `peaks`: measure what each engine reaches at best
    too. `engine_cache`: where TensorRT and OpenVINO keep what they
    built.
    """

    bundles: Sequence[Path]
    annotations: Path
    settings: Settings
    image_dir: Path | None = None
    engines: Sequence[str] = DEFAULT_ENGINES
    precisions: Sequence[Precision] = PRECISIONS
    batch_sizes: Sequence[int] = (1, 2, 4, 8)
    scenarios: Sequence[Scenario] = STREAMS
    rates: Sequence[float] = ()
    policies: Sequence[ServerPolicy] = POLICIES
    device: Device = "cpu"
    threads: int = 1
    timed_images: int = 32
    accuracy: bool = True
    accuracy_images: int | None = None
    peaks: bool = True
    cell_timeout_s: float = 600.0
    memory_limit_mb: float | None = None
    engine_cache: Path = DEFAULT_ENGINE_CACHE


@dataclass(frozen=True)
class PreparedBench:
    """A request whose bundles and data were found sound, and the `plan` of cells that follows from it.

    `evaluated`: number of images for mAP, None where it is not measured. `least_s`: seconds that it takes at least,
    without mAP. `notes`: sentences about the data, for the user.
    """

    request: BenchRequest
    plan: Plan
    images: tuple[Path, ...]
    evaluated: int | None
    notes: tuple[str, ...] = ()

    @property
    def least_s(self) -> float:
        settings = self.request.settings
        return len(self.plan.cells) * settings.rounds * (_STARTUP_S + _TIMED_PARTS * settings.min_seconds)


def prepare(request: BenchRequest) -> PreparedBench:
    """Open the bundles, check the data, plan the cells. Raises `BundleError` and `DataError` before anything runs, and
    `ValueError` for a server without a latency bound."""
    if "server" in request.scenarios and request.settings.latency_bound_ms is None:
        raise ValueError("the server scenario needs a latency bound")
    bundles = _open(request.bundles)
    timed = CocoDataset.load(request.annotations, request.image_dir, request.timed_images)
    evaluated, notes = _check_accuracy_data(request, bundles) if request.accuracy else (None, ())
    cells = plan(
        bundles,
        request.engines,
        request.precisions,
        request.batch_sizes,
        request.device,
        request.threads,
        request.scenarios,
        request.rates,
        request.policies,
    )
    return PreparedBench(request, cells, tuple(image.path for image in timed.images), evaluated, notes)


def run(prepared: PreparedBench, journal: Journal, progress: Progress = lambda done, total, text: None) -> BenchResults:
    """Measure every cell of the plan that is not in the `journal` yet; failed ones are results with their reason."""
    request = prepared.request
    machine = describe_machine()
    data, description = describe_data(prepared)
    cells = run_plan(
        prepared.plan,
        data,
        request.settings,
        journal,
        limits=limits(request),
        engine_cache=request.engine_cache,
        peaks=request.peaks,
        about=about(request, machine),
        progress=progress,
    )
    return BenchResults(
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        machine=machine,
        data=description,
        settings=request.settings,
        cells=cells,
    )


def describe_data(prepared: PreparedBench) -> tuple[Data, DataDescription]:
    """What is measured on, for the runner and for the results: hashes the files."""
    request = prepared.request
    annotations_sha256, timed_sha256 = sha256(request.annotations), _contents(prepared.images)
    data = Data(
        images=prepared.images,
        digest=f"{annotations_sha256} {timed_sha256}",
        annotations=request.annotations if request.accuracy else None,
        image_dir=request.image_dir,
        accuracy_limit=request.accuracy_images,
    )
    return data, DataDescription(annotations_sha256, timed_sha256, len(prepared.images), prepared.evaluated)


def limits(request: BenchRequest) -> Limits:
    """What a process may take, by what memory is free now."""
    return Limits(request.cell_timeout_s, request.memory_limit_mb or _free_mb() * _MEMORY_SHARE)


def about(request: BenchRequest, machine: Machine) -> dict[str, Any]:
    """What answers depend on besides cell, settings and data: part of the journal's questions."""
    return {"machine": plain(machine), "accuracy_images": request.accuracy_images}


def _contents(paths: Sequence[Path]) -> str:
    """SHA-256 of the digests of files, in their order."""
    return hashlib.sha256("".join(sha256(path) for path in paths).encode()).hexdigest()


def _free_mb() -> float:
    return psutil.virtual_memory().available / 1e6


def _open(paths: Sequence[Path]) -> list[Bundle]:
    """Each bundle once, whatever ways its path is written in."""
    unique: dict[Path, Path] = {}
    for path in paths:
        unique.setdefault(path.resolve(), path)
    # A path such as "." has no last part to name the bundle by.
    return [Bundle.open(path if path.name not in ("", "..") else resolved) for resolved, path in unique.items()]


def _check_accuracy_data(request: BenchRequest, bundles: Sequence[Bundle]) -> tuple[int, tuple[str, ...]]:
    """The number of images for mAP, and what is to be said of them; raises `DataError` now for what would fail in every
    cell later."""
    dataset = CocoDataset.load(request.annotations, request.image_dir, request.accuracy_images)
    if not dataset.annotations:
        raise DataError(
            f"{request.annotations} has no boxes to measure mAP against", "Add --no-accuracy to measure speed alone."
        )
    notes = list(dataset.notes)
    for bundle in bundles:
        try:
            match = dataset.match(bundle.manifest.classes)
            check_measurable(dataset, match.category_ids)
        except DataError as error:
            raise DataError(
                f"{bundle.directory}: {error.problem}", f"{error.remedy} Or add --no-accuracy to measure speed alone."
            ) from error
        notes += [f"{bundle.name}: {note}" for note in match.notes]
    return len(dataset.images), tuple(notes)
