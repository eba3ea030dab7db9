"""One benchmark from its options to results: what `gfldeploy bench` and `gfldeploy demo` both run."""

from __future__ import annotations

import os
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

import psutil

from gfldeploy.batching.buckets import Size
from gfldeploy.batching.tiles import Tiling
from gfldeploy.bench.cell import POLICIES, STREAMS, BundleIdentity, Scenario, ServerPolicy
from gfldeploy.bench.journal import journal_beside
from gfldeploy.bench.matrix import Plan, plan
from gfldeploy.bench.report.page import write_report
from gfldeploy.bench.results import BenchResults
from gfldeploy.bench.runner import Data, Runner, duration
from gfldeploy.bench.table import write_csv
from gfldeploy.bench.timing import Settings
from gfldeploy.bundle import Bundle
from gfldeploy.child_process import Limits
from gfldeploy.engines.base import PRECISIONS, Device, Precision, installed_version, remedy_sentence
from gfldeploy.engines.cache import DEFAULT_ENGINE_CACHE
from gfldeploy.engines.registry import (
    DEFAULT_ENGINES,
    ENGINES,
    REFERENCE_ENGINE,
    TENSORRT_ENGINES,
    Capability,
    capability,
)
from gfldeploy.errors import EngineError, OutputError, UnsupportedError, UsageError
from gfldeploy.files import StrPath, check_file, is_unfinished
from gfldeploy.machine import describe_machine
from gfldeploy.progress import SILENT, Progress
from gfldeploy.serialization import plain
from gfldeploy.signals import hold_interrupts

# Of the memory that is free before the benchmark: what is left keeps the machine usable.
_MEMORY_SHARE = 0.9
# Seconds that a process takes at least besides what it measures: to start, import an engine and decode the images.
_STARTUP_S = 4.0
# A worker also times whole batches, stage by stage, for `min_seconds`.
_TIMED_PARTS = 2
# Said where a scenario or a policy has no cell.
_TAKEN = "single-stream and no-batching take batches of 1, multi-stream and the other policies larger ones"


def benchmark(
    bundles: StrPath | Sequence[StrPath],
    *,
    data: StrPath,
    images: StrPath | None = None,
    engines: Sequence[str] = DEFAULT_ENGINES,
    precisions: Sequence[Precision] = PRECISIONS,
    batch_sizes: Sequence[int] = (1, 2, 4, 8),
    input_sizes: Sequence[Size] = (),
    tile: Size | None = None,
    overlap: float | None = None,
    end_to_end: bool = False,
    scenarios: Sequence[Scenario] = STREAMS,
    rates: Sequence[float] = (),
    policies: Sequence[ServerPolicy] = POLICIES,
    latency_bound_ms: float | None = None,
    trt: bool = False,
    device: Device = "cpu",
    tf32: bool = False,
    threads: int | None = None,
    streams: Sequence[int] = (1,),
    rounds: int = 3,
    min_seconds: float = 2.0,
    min_count: int = 10,
    max_seconds: float | None = None,
    limit: int | None = 32,
    accuracy: bool = True,
    accuracy_limit: int | None = None,
    peak: bool = True,
    monitor_hz: float = 5.0,
    cell_timeout: float = 600.0,
    memory_limit: float | None = None,
    seed: int = 0,
    engine_cache: StrPath = DEFAULT_ENGINE_CACHE,
    output: StrPath | None = None,
    force: bool = False,
    progress: Progress = SILENT,
) -> BenchResults:
    """Measure engines, precisions and batch sizes side by side, each cell in a process of its own.

    Args:
        bundles: The directories of the bundles, or that of one; each runs in every engine and precision it is made for.
        data: COCO annotations (.json).
        images: The folder in which their file names start; by default `images/` beside them, else their folder.
        engines: The engines to measure.
        precisions: The precisions to measure.
        batch_sizes: The batch sizes to measure.
        input_sizes: The sizes, (height, width) in pixels, to which images are resized, as `target_size` in
            PaddleDetection; by default that of each bundle.
        tile: Measure with images cut into tiles too, in all scenarios but server: the size of tiles, (height, width) in
            pixels of the image. Latencies and speeds are then of whole images, with all their tiles.
        overlap: Of two neighbouring tiles, by the side of a tile; by default 0.2.
        end_to_end: Measure the files that deploy by themselves too, each beside the network that it is made around, in
            all scenarios but server.
        scenarios: After MLPerf Inference: single-stream, multi-stream, offline, server.
        rates: Arrival rates of the server scenario, in images per second.
        policies: What the server does with images that wait: no-batching, fixed-timeout, adaptive.
        latency_bound_ms: Deadline of the server scenario, from arrival to answer.
        trt: Add the engines of TensorRT, and run on the GPU.
        device: "cpu" or "gpu".
        tf32: Let FP32 on the GPU multiply in TF32.
        threads: CPU threads of one inference; by default all, shared by the streams.
        streams: The numbers of inferences at once to measure, from one engine, in the offline and server scenarios.
        rounds: Every cell runs once in each round.
        min_seconds: Time each cell for at least this long in each round.
        min_count: Time at least this number of inferences in each round.
        max_seconds: Stop timing a cell after this long in a round, even if its median still changes; by default 5 times
            `min_seconds`.
        limit: The number of images used for timing, the first of the annotations; None for all.
        accuracy: Measure mAP too.
        accuracy_limit: The number of images used for mAP; None for all.
        peak: Measure what the engines reach at best too.
        monitor_hz: Hardware samples per second; 0 for none.
        cell_timeout: Seconds after which a cell has failed; for mAP, seconds without an image done.
        memory_limit: Resident memory, 10^6 bytes, beyond which a cell has failed; by default 90% of what is free.
        seed: Seed of the server's arrival times.
        engine_cache: Where engines keep what they compiled.
        output: The file to write (.json), with a table (.csv) and a report (.html) beside it; None for none. With a
            file, an interrupted benchmark resumes where it stopped.
        force: Replace these files if they exist and gfldeploy made them.
        progress: Told of the plan, and of each process as it starts.

    Returns:
        A result for each cell; one that failed or was skipped has its reason.

    Raises:
        UsageError: The options contradict each other, or results could not tell two bundles apart.
        BundleError: A bundle is damaged.
        DataError: Annotations or an image cannot be read, or mAP cannot be measured against them.
        UnsupportedError: There is no such engine, or nothing that TF32 is for.
        EngineError: None of the cells can run here.
        OutputError: The output exists already, or cannot be written.
    """
    if trt:
        _check_tensorrt()
        engines, device = tuple(dict.fromkeys((*engines, *TENSORRT_ENGINES))), "gpu"
    if ("server" in scenarios) != bool(rates):
        raise UsageError("the server scenario needs --rates, and --rates needs the server scenario")
    if max(streams, default=1) > 1 and not {"offline", "server"} & set(scenarios):
        raise UsageError("several --streams are of the offline and server scenarios", "Add offline to --scenarios.")
    if rates and latency_bound_ms is None:
        raise UsageError("the server scenario needs --latency-bound-ms")
    if min_count < 1:
        raise ValueError(f"min_count must be at least 1, not {min_count}")
    if max_seconds is not None and max_seconds < min_seconds:
        raise UsageError("--max-seconds is less than --min-seconds")
    tiling = Tiling.of(tile, overlap)
    path = None if output is None else Path(output)
    resumed = path is not None and is_unfinished(path, "bench") and not path.exists()
    _check_output(path, force, resumed)
    settings = Settings(
        min_seconds=min_seconds,
        min_count=min_count,
        max_seconds=5 * min_seconds if max_seconds is None else max_seconds,
        rounds=rounds,
        seed=seed,
        latency_bound_ms=latency_bound_ms,
        monitor_hz=monitor_hz,
    )
    opened = open_bundles(bundles)
    _check_told_apart(opened)
    measured_on = Data.load(
        Path(data),
        None if images is None else Path(images),
        limit,
        accuracy=accuracy,
        accuracy_limit=accuracy_limit,
        bundles=opened,
    )
    planned = plan(
        opened,
        engines,
        precisions,
        batch_sizes,
        device,
        threads,
        scenarios,
        rates,
        policies,
        tf32,
        streams,
        input_sizes or (None,),
        end_to_end,
        tiling,
    )
    _tell(planned, settings, measured_on, progress)
    every = [*planned.cells, *(one.cell for one in planned.skipped)]
    asked = (*(scenarios if tuple(scenarios) != STREAMS else ()), *(policies if "server" in scenarios else ()))
    if every and (without := {*asked} - {one.scenario for one in every} - {one.policy for one in every}):
        progress.note(f"nothing is measured of {', '.join(one for one in asked if one in without)}: {_TAKEN}")
    if not planned.cells:
        raise nothing_to_run(planned)
    machine = describe_machine()
    with journal_beside(path, "bench") as journal:
        runner = Runner(
            planned.bundles,
            measured_on,
            journal,
            limits(cell_timeout, memory_limit),
            Path(engine_cache),
            {"machine": plain(machine)},
        )
        cells = runner.measure(planned.cells, settings, accuracy=accuracy, peak=peak, progress=progress)
        results = BenchResults(
            created=datetime.now(UTC).isoformat(timespec="seconds"),
            machine=machine,
            data=measured_on.description,
            settings=settings,
            cells=(*cells, *planned.skipped),
        )
        if path is not None:
            with hold_interrupts():
                _check_output(path, force, resumed)  # another process may have written it meanwhile
                write_report(results, path.with_suffix(".html"))
                write_csv(results, path.with_suffix(".csv"))
                results.write(path)
    return results


def open_bundles(paths: StrPath | Sequence[StrPath]) -> list[Bundle]:
    """Each bundle once, whatever ways its path is written in. Raises `UsageError` for none, and `BundleError`."""
    unique: dict[Path, Path] = {}
    for path in map(Path, [paths] if isinstance(paths, str | os.PathLike) else paths):
        unique.setdefault(path.resolve(), path)
    if not unique:
        raise UsageError("there is no bundle to measure", "Give at least one.")
    # A path such as "." has no last part to name the bundle by.
    return [Bundle.open(path if path.name not in ("", "..") else resolved) for resolved, path in unique.items()]


def _check_told_apart(bundles: Sequence[Bundle]) -> None:
    """Refuse now what `compare`, and who reads the results, could not tell apart."""
    known: dict[tuple[str, str], Bundle] = {}
    for one in bundles:
        name = BundleIdentity.of(one).directory
        other = known.setdefault((name, one.manifest.precision), one)
        if other is not one:
            problem = f"{other.directory} and {one.directory} would both be {name} in the results"
            raise UsageError(problem, "Give their directories different names, or measure one after the other.")


def limits(cell_timeout: float, memory_limit: float | None = None) -> Limits:
    """What a process may take; by default most of the memory that is free now."""
    return Limits(cell_timeout, memory_limit or psutil.virtual_memory().available / 1e6 * _MEMORY_SHARE)


def nothing_to_run(planned: Plan) -> EngineError:
    """Why a plan has no cells."""
    if not planned.skipped:
        return EngineError("nothing to run: the scenarios do not go with the batch sizes", f"{_TAKEN}.")
    first = planned.skipped[0]
    problem = f"nothing to run: {first.cell.setup()} on {first.cell.device}: {first.reason}"
    return EngineError(problem, _sentence(first.remedy))


def check_measured(results: BenchResults) -> None:
    """Raise `EngineError` if no cell could be measured."""
    if not any(one.status == "ok" for one in results.cells):
        failed = next(one for one in results.cells if one.status == "failed")
        problem = f"no cell could be measured; {failed.cell.setup()}: {failed.reason}"
        raise EngineError(problem, _sentence(failed.remedy))


def _tell(planned: Plan, settings: Settings, measured_on: Data, progress: Progress) -> None:
    """What will run and what will not."""
    for note in measured_on.notes:
        progress.note(note)
    count = len(planned.cells)
    least_s = count * settings.rounds * (_STARTUP_S + _TIMED_PARTS * settings.min_seconds)
    accuracy = ", and mAP" if measured_on.description.accuracy_images else ""
    progress.stage(f"Plan: {count} cell{'' if count == 1 else 's'} to measure, {duration(least_s)} at least{accuracy}.")
    for line in planned.lines():
        progress.stage(line)


def _check_tensorrt() -> None:
    """Stop before any work where no way to TensorRT is open, with what the one that is nearest to it lacks."""
    closed = [capability(engine, "fp16", "gpu") for engine in TENSORRT_ENGINES]
    if any(one.works for one in closed):
        return

    def distance(one: Capability) -> tuple[bool, bool]:
        """Installed ones first, then the library that gfldeploy needs anyway."""
        library = ENGINES[one.engine].library
        absent = installed_version(library.builds["gpu"].distribution) is None
        return absent, library is not ENGINES[REFERENCE_ENGINE].library

    nearest = min(closed, key=distance)
    raise UnsupportedError(f"--trt cannot work here: {nearest.reason}", _sentence(nearest.remedy))


def _check_output(output: Path | None, force: bool, resumed: bool) -> None:
    """Refuse now what would otherwise fail after an hour of measuring.

    `resumed`: an earlier run was killed, perhaps after it had written the first files.
    """
    if output is None:
        return
    if output.suffix != ".json" and not output.is_dir():
        raise OutputError(f"{output} does not end in .json", "A .csv and a .html are written beside it: name it so.")
    check_file(output, "json", force=force)
    check_file(output.with_suffix(".csv"), "csv", force=force or resumed)
    check_file(output.with_suffix(".html"), "html", force=force or resumed)


def _sentence(remedy: str | None) -> str | None:
    return remedy_sentence(remedy) if remedy else None
