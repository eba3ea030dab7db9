"""One benchmark from request to results: what `gfldeploy bench` and `gfldeploy demo` both run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from gfldeploy.bench.matrix import Plan, plan
from gfldeploy.bench.results import BenchResults, DataDescription, Settings
from gfldeploy.bench.runner import AccuracyData, run_plan
from gfldeploy.bundle import Bundle
from gfldeploy.engines.base import PRECISIONS, Device, Precision
from gfldeploy.engines.registry import ENGINES
from gfldeploy.errors import DataError
from gfldeploy.files import sha256
from gfldeploy.images.coco import CocoDataset
from gfldeploy.machine import describe_machine

__all__ = ["BenchRequest", "PreparedBench", "prepare", "run"]

Progress = Callable[[int, int, str], None]


@dataclass(frozen=True)
class BenchRequest:
    """What to measure on what.

    `timed_images`: how many of the first images are used for timing. `accuracy_images`: how many for mAP; None is all.
    `min_seconds` and `min_count`: least time and number of inferences of one cell in each of the `rounds`.
    `cell_timeout_s`: seconds after which a cell has failed; for mAP, seconds without an image done.
    """

    bundles: Sequence[Path]
    annotations: Path
    image_dir: Path | None = None
    engines: Sequence[str] = tuple(ENGINES)
    precisions: Sequence[Precision] = PRECISIONS
    batch_sizes: Sequence[int] = (1, 2, 4, 8)
    device: Device = "cpu"
    threads: int = 1
    min_seconds: float = 2.0
    min_count: int = 10
    rounds: int = 1
    timed_images: int = 32
    accuracy: bool = True
    accuracy_images: int | None = None
    cell_timeout_s: float = 600.0


@dataclass(frozen=True)
class PreparedBench:
    """A request whose bundles and data were found sound, and the `plan` of cells that follows from it."""

    request: BenchRequest
    plan: Plan
    images: tuple[Path, ...]
    evaluated: int | None


def prepare(request: BenchRequest) -> PreparedBench:
    """Open the bundles, check the data, plan the cells. Raises `BundleError` and `DataError` before anything runs."""
    bundles = _open(request.bundles)
    timed = CocoDataset.load(request.annotations, request.image_dir, request.timed_images)
    evaluated = _check_accuracy_data(request, bundles) if request.accuracy else None
    cells = plan(bundles, request.engines, request.precisions, request.batch_sizes, request.device, request.threads)
    return PreparedBench(request, cells, tuple(image.path for image in timed.images), evaluated)


def run(prepared: PreparedBench, progress: Progress | None = None) -> BenchResults:
    """Measure every cell of the plan; failed ones are results with their reason."""
    request = prepared.request
    settings = Settings(request.min_seconds, request.min_count, rounds=request.rounds)
    accuracy = AccuracyData(request.annotations, request.image_dir, request.accuracy_images)
    cells = run_plan(
        prepared.plan,
        prepared.images,
        settings,
        accuracy if request.accuracy else None,
        request.cell_timeout_s,
        progress,
    )
    return BenchResults(
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        machine=describe_machine(),
        data=DataDescription(sha256(request.annotations), len(prepared.images), prepared.evaluated),
        settings=settings,
        cells=cells,
    )


def _open(paths: Sequence[Path]) -> list[Bundle]:
    """Each bundle once, whatever ways its path is written in."""
    unique: dict[Path, Path] = {}
    for path in paths:
        unique.setdefault(path.resolve(), path)
    # A path such as "." has no last part to name the bundle by.
    return [Bundle.open(path if path.name not in ("", "..") else resolved) for resolved, path in unique.items()]


def _check_accuracy_data(request: BenchRequest, bundles: Sequence[Bundle]) -> int:
    """The number of images for mAP; raises `DataError` now for what would fail in every cell later."""
    dataset = CocoDataset.load(request.annotations, request.image_dir, request.accuracy_images)
    if not dataset.annotations:
        raise DataError(
            f"{request.annotations} has no boxes to measure mAP against", "Add --no-accuracy to measure speed alone."
        )
    for bundle in bundles:
        try:
            dataset.class_to_category(bundle.manifest.classes)
        except DataError as error:
            raise DataError(
                f"{bundle.directory}: {error.problem}", f"{error.remedy} Or add --no-accuracy to measure speed alone."
            ) from error
    return len(dataset.images)
