"""One tuning, from bundles and data to `deploy.yml`: what `gfldeploy tune` runs."""

from __future__ import annotations

import math
import os
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from statistics import fmean

from gfldeploy.accuracy import Accuracy
from gfldeploy.batching.buckets import STREAM_ORDERS, Order, Size, group, size_in_words
from gfldeploy.bench.cell import BundleIdentity, Cell, Scenario
from gfldeploy.bench.estimates import median, percentile
from gfldeploy.bench.journal import journal_beside
from gfldeploy.bench.matrix import plan
from gfldeploy.bench.results import BenchResults, CellResult
from gfldeploy.bench.runner import Data, Runner
from gfldeploy.bench.session import limits, nothing_to_run, open_bundles
from gfldeploy.bench.timing import Settings
from gfldeploy.bundle import Bundle
from gfldeploy.engines.base import PRECISIONS, Device, Precision, Shape
from gfldeploy.engines.cache import DEFAULT_ENGINE_CACHE
from gfldeploy.engines.hardware import usable_threads
from gfldeploy.engines.registry import DEFAULT_ENGINES, ENGINES, obstacle_to
from gfldeploy.engines.selection import MOST_AT_ONCE
from gfldeploy.engines.tensorrt import Profile
from gfldeploy.errors import BoundsError, DataError, EngineError, UsageError
from gfldeploy.files import StrPath, check_file
from gfldeploy.images.coco import CocoDataset
from gfldeploy.images.preprocess import Preprocess
from gfldeploy.machine import describe_machine
from gfldeploy.progress import SILENT, Progress
from gfldeploy.serialization import plain
from gfldeploy.tune.deploy_file import MOST_SHAPES, Configuration, Deploy, Evidence, SearchRecord, SizeChoice
from gfldeploy.tune.knee import Knee, find_knee
from gfldeploy.tune.measured import BOUND_PERCENT, TAIL_COUNT, Measured, speed_ratio
from gfldeploy.tune.reuse import reuse
from gfldeploy.tune.search import Bounds, Model, Search, Step, model_of
from gfldeploy.tune.summary import miss_in_words, summarize

# Of batches: one image at a time, several as they are listed, several of one size.
_SCENARIOS: tuple[Scenario, ...] = ("single-stream", "multi-stream", "offline")


def tune_bundles(
    bundles: StrPath | Sequence[StrPath],
    *,
    data: StrPath,
    images: StrPath | None = None,
    max_latency_ms: float | None = None,
    max_memory_mb: float | None = None,
    max_drop: float | None = None,
    engines: Sequence[str] = DEFAULT_ENGINES,
    precisions: Sequence[Precision] = PRECISIONS,
    batch_sizes: Sequence[int] = (1, 2, 4, 8, 16),
    threads: Sequence[int] | None = None,
    orders: Sequence[Order] = STREAM_ORDERS,
    input_sizes: Sequence[Size] = (),
    device: Device = "cpu",
    tf32: bool = False,
    results: Sequence[StrPath] = (),
    rounds: int = 3,
    min_seconds: float = 2.0,
    min_count: int = 10,
    look_seconds: float = 0.5,
    limit: int | None = 32,
    accuracy: bool = True,
    accuracy_limit: int | None = None,
    budget_seconds: float | None = None,
    exhaustive: bool = False,
    cell_timeout: float = 600.0,
    engine_cache: StrPath = DEFAULT_ENGINE_CACHE,
    output: StrPath = "deploy.yml",
    force: bool = False,
    progress: Progress = SILENT,
) -> Deploy:
    """Find the fastest engine, precision, batch size, threads, order of images and input size that keep the bounds.

    The fastest has the highest throughput from file to boxes, one batch after the other. Interrupted or killed, the
    same call resumes where it stopped.

    Args:
        bundles: The directories of the bundles to choose from: the FP32 and the INT8 bundle of a detector; or that of
            one.
        data: COCO annotations (.json).
        images: The folder in which their file names start; by default `images/` beside them, else their folder.
        max_latency_ms: Bound of the 99th percentile of a batch's latency, from file to boxes.
        max_memory_mb: Bound of the peak resident memory without the images, in 10^6 bytes.
        max_drop: Bound of the mAP lost against the first FP32 bundle, 0 to 1.
        engines: The engines to choose from.
        precisions: The precisions to choose from.
        batch_sizes: The batch sizes to choose from.
        threads: The numbers of CPU threads of one inference to choose from, one inference at once. By default 1,
            doubled up to all, in as many streams as there are CPUs for, 16 at most.
        orders: How batches may be formed: of images as they are listed, or of images of one size ("bucketed").
        input_sizes: (height, width) in pixels that images may be resized to, besides each bundle's own size, which is
            always among them. They need `max_drop`: a smaller size is faster, and costs mAP.
        device: "cpu" or "gpu".
        tf32: Let FP32 on the GPU multiply in TF32.
        results: Files of `gfldeploy bench` of this machine and data: their cells are not measured again briefly.
        rounds: Each of the best cells is measured at length once in each round.
        min_seconds: Time each of the best cells for at least this long in each round, and with `max_latency_ms` for up
            to five times as long, until the 99th percentile is known.
        min_count: Time at least this number of inferences.
        look_seconds: Time each cell for at least this long when it is first looked at.
        limit: The number of images used for timing, the first of the annotations; None for all.
        accuracy: Measure the mAP of what is about to be chosen.
        accuracy_limit: The number of images used for mAP; None for all.
        budget_seconds: Look at no more cells after this long; the final measurements and mAP come on top.
        exhaustive: Measure every cell at length, and every mAP.
        cell_timeout: Seconds after which a cell has failed; for mAP, seconds without an image done.
        engine_cache: Where engines keep what they compiled.
        output: The file to write; the bundles' paths in it are relative to it.
        force: Replace the file if it exists and gfldeploy made it.
        progress: Told of the configurations, and of each process as it starts.

    Returns:
        The choice with its evidence, and the shapes of its inputs for all images used, as written to `output`.

    Raises:
        UsageError: The options contradict each other.
        BoundsError: No configuration keeps the bounds; the nearest is named.
        EngineError: Nothing can run, or nothing could be measured.
        BundleError: A bundle is damaged.
        DataError: The data cannot be used, or the results are not of this machine, software and data.
        OutputError: The output exists already, or cannot be written.
    """
    if not set(orders) <= set(STREAM_ORDERS):
        raise ValueError(f"orders must be of {', '.join(STREAM_ORDERS)}, not {orders!r}")
    if min_count < 1:
        raise ValueError(f"min_count must be at least 1, not {min_count}")
    if max_drop is not None and not accuracy:
        raise UsageError("--max-drop needs mAP", "Leave --no-accuracy out.")
    if input_sizes and max_drop is None:
        problem = "--input-sizes needs --max-drop: without it the smallest would be chosen, whatever mAP it costs"
        raise UsageError(problem, "Add --max-drop, such as --max-drop 0.01, or leave --input-sizes out.")
    data, images, output = Path(data), None if images is None else Path(images), Path(output)
    check_file(output, "yml", force=force)
    start = time.monotonic()
    most = usable_threads()
    streams = most if threads is None else 1
    threads = tuple(dict.fromkeys(threads or [*(1 << power for power in range(most.bit_length())), most]))
    settings = Settings(min_seconds=min_seconds, min_count=min_count, max_seconds=5 * min_seconds, rounds=rounds)
    opened = open_bundles(bundles)
    if max_drop is not None and all(bundle.manifest.precision != "fp32" for bundle in opened):
        problem = "there is no FP32 bundle to measure the mAP drop against"
        raise DataError(problem, "Give it too, or leave --max-drop out.")
    measured_on = Data.load(data, images, limit, accuracy=accuracy, accuracy_limit=accuracy_limit, bundles=opened)
    planned = plan(
        opened,
        engines,
        precisions,
        batch_sizes,
        device,
        max(threads),
        _SCENARIOS,
        tf32=tf32,
        input_sizes=(None, *input_sizes),
    )
    if not planned.cells:
        raise nothing_to_run(planned)
    known_bundles = {BundleIdentity.of(bundle): bundle for bundle in opened}
    counts = [limit, accuracy_limit] if accuracy else [limit]
    dataset = CocoDataset.load(data, images, None if None in counts else max(filter(None, counts)))
    sizes = [image.size() for image in dataset.images[:limit]]
    resizing = {
        (cell.bundle, cell.input_size): known_bundles[cell.bundle].at_size(cell.input_size).manifest.preprocess
        for cell in planned.cells
    }
    different = (
        cell for cell in planned.cells if _differs(cell, resizing[cell.bundle, cell.input_size], sizes, orders)
    )
    planned = replace(planned, cells=tuple(different))
    cells = tuple(_shared(cell, count, streams) for cell in planned.cells for count in threads)
    search = Search(
        cells,
        Bounds(max_latency_ms, max_memory_mb, max_drop),
        pixels={one: _mean_pixels(preprocess, sizes) for one, preprocess in resizing.items()},
    )
    machine = describe_machine()
    now = BenchResults("", machine, measured_on.description, settings, ())
    with journal_beside(output, "tune") as journal:
        runner = Runner(
            planned.bundles, measured_on, journal, limits(cell_timeout), Path(engine_cache), {"machine": plain(machine)}
        )
        # From file to boxes, which decides.
        look = Settings(min_seconds=look_seconds, min_count=0, max_seconds=look_seconds)
        session = _Session(search, known_bundles, engines, runner, look, settings, accuracy, progress)
        for cell, result, file in reuse([Path(path) for path in results], search.cells, now):
            search.known[cell] = session.add(cell, result, file.settings.quick)
        reused = len(search.known)
        for note in measured_on.notes:
            progress.note(note)
        known = f", {reused} of them known from --results" if reused else ""
        progress.stage(f"{len(search.cells)} configurations of {len(search.by_model)} models{known}")
        own = [cell for cell in planned.cells if cell.input_size is None]
        for line in replace(planned, cells=tuple(own)).lines():
            progress.stage(line)
        if resized := dict.fromkeys(cell.input_size for cell in planned.cells if cell.input_size):
            progress.stage(f"  each at its bundle's own input size and at {', '.join(map(size_in_words, resized))}")
        complete = search.run(
            session.look_at,
            session.finish,
            session.drop,
            out_of_time=lambda: budget_seconds is not None and time.monotonic() - start > budget_seconds,
            exhaustive=exhaustive,
        )
        if exhaustive and accuracy:
            for model in search.by_model:
                if search.known.get(search.start(model)):
                    session.drop(model)
        if not search.finished:
            raise session.no_choice()
        choice, *others = [session.configuration(cell, output) for cell in list(search.finished)[:2]]
        deploy = Deploy(
            created=datetime.now(UTC).isoformat(timespec="seconds"),
            summary="",
            choice=choice,
            runner_up=others[0] if others else None,
            bounds=search.bounds,
            knee=session.knee(choice.cell),
            search=SearchRecord(
                cells=len(search.cells),
                measured=len(search.known),
                reused=reused,
                seconds=round(time.monotonic() - start, 1),
                exhaustive=exhaustive,
                complete=complete,
            ),
            machine=machine,
            data=measured_on.description,
            shapes=_input_shapes(
                dataset, known_bundles[choice.cell.bundle].at_size(choice.cell.input_size), choice.cell
            ),
            sizes=session.sizes(choice.cell),
        )
        best, *second = search.finished.values()
        no_smaller = search.no_smaller(choice.cell)
        summary = summarize(deploy, best, second[0] if second else None, session.failed(), no_smaller)
        deploy = replace(deploy, summary=summary)
        check_file(output, "yml", force=force)  # somebody else may have been faster
        deploy.write(output)
    return deploy


def _differs(cell: Cell, preprocess: Preprocess, sizes: Iterable[tuple[int, int]], orders: Sequence[Order]) -> bool:
    """Whether the cell is one of those asked for, and no other forms the same batches of images of these sizes."""
    if cell.batch_size == 1:
        return cell.order == "listed"
    alike = len({preprocess.input_size(*size) for size in sizes}) == 1
    return cell.order in ([order for order in orders if order == "listed" or not alike] or ["listed"])


def _shared(cell: Cell, threads: int, cpus: int) -> Cell:
    """The cell with so many threads, in as many streams as there are CPUs for where its engine has streams."""
    streams = min(max(cpus // threads, 1), MOST_AT_ONCE)
    if streams == 1 or ENGINES[cell.engine].obstacle_to_streams(cell.device):
        return replace(cell, threads=threads)
    return replace(cell, threads=threads, streams=streams, scenario="offline")


def _mean_pixels(preprocess: Preprocess, sizes: Sequence[tuple[int, int]]) -> float:
    """Of the network's input for one of the images of these sizes."""
    return fmean(math.prod(preprocess.input_size(*size)) for size in sizes)


def _input_shapes(dataset: CocoDataset, bundle: Bundle, cell: Cell) -> tuple[Shape, ...]:
    """Of the full batches that the cell makes of all images that can be read, as `Deploy` has them."""
    sizes = []
    for image in dataset.images:
        with suppress(DataError):  # mAP, which needs them all, says so; the choice holds without
            sizes.append(bundle.manifest.preprocess.input_size(*image.size()))
    counts = Counter((cell.batch_size, *one.size) for one in group(sizes, cell.batch_size, cell.order))
    shapes = tuple(shape for shape, _ in counts.most_common())
    if len(shapes) > MOST_SHAPES:
        profile = Profile.spanning(shapes)
        shapes = (*shapes[: MOST_SHAPES - 2], profile.smallest, profile.largest)
    return shapes


def _accuracy_of(result: CellResult) -> Accuracy | str:
    """What was measured, or why there is no mAP to compare with."""
    if result.accuracy is None:
        return result.reason or result.accuracy_reason or "unknown"
    return result.accuracy if result.ap is not None else "it is undefined, as the images have no objects to find"


@dataclass
class _Session:
    """What measures, and what it has measured.

    `results`: the latest of each cell, and whether it was too brief for figures to be quoted. `accuracies`: of each
    model, or why there is none.
    """

    search: Search
    bundles: Mapping[BundleIdentity, Bundle]
    engines: Sequence[str]
    runner: Runner
    look: Settings
    settings: Settings
    accuracy: bool
    progress: Progress
    results: dict[Cell, tuple[CellResult, bool]] = field(default_factory=dict)
    accuracies: dict[Model, Accuracy | str] = field(default_factory=dict)

    def add(self, cell: Cell, result: CellResult, quick: bool) -> Measured | None:
        """Keep a result, and return what was measured; None where that failed, for a reason that is told."""
        if result.status == "failed" and (cell not in self.results or self.results[cell][0].status != "failed"):
            self.progress.note(f"{cell}: {result.reason}")
        self.results[cell] = result, quick
        if result.ap is not None:
            self.accuracies[model_of(cell)] = _accuracy_of(result)
        return Measured.of(result)

    def failed(self) -> list[CellResult]:
        """The results of cells that could not be measured."""
        return [result for result, _ in self.results.values() if result.status == "failed"]

    def look_at(self, step: Step) -> dict[Cell, Measured | None]:
        """Measure each cell once, briefly."""
        known = f"{len(self.search.known)} of {len(self.search.cells)} cells known"
        self.progress.stage(f"{known}; next: {step.why} (threads: {step.cells[0].threads})")
        return self._measure(step.cells, self.look)

    def finish(self, cells: Sequence[Cell]) -> dict[Cell, Measured | None]:
        """Measure the cells at length, interleaved, and with a latency bound until its percentile is known."""
        settings = self.settings
        self.progress.stage(f"{len(cells)} cells at length, in {settings.rounds} rounds")
        if self.search.bounds.max_latency_ms is not None:
            settings = replace(settings, tail_count=math.ceil(TAIL_COUNT / settings.rounds))
        return self._measure(cells, settings)

    def _measure(self, cells: Sequence[Cell], settings: Settings) -> dict[Cell, Measured | None]:
        results = self.runner.measure(cells, settings, progress=self.progress)
        return {cell: self.add(cell, one, settings.quick) for cell, one in zip(cells, results, strict=True)}

    def drop(self, model: Model) -> float | None:
        """What the model loses in mAP against FP32, in the same engine where that runs; None where it is not asked for.

        A model whose mAP cannot be measured loses all of it. Raises `EngineError` where that of FP32 cannot be.
        """
        if not self.accuracy:
            return None
        reference = self._reference(model.engine)
        if reference is None:
            if self.search.bounds.max_drop is not None:
                problem = "none of the engines runs an FP32 bundle to measure the mAP drop against"
                raise EngineError(problem, "Add an engine that does to --engines, or leave --max-drop out.")
            self._accuracy(model)
            return None
        base = self._accuracy(reference)
        if isinstance(base, str):
            problem = f"the mAP of {reference.bundle.directory} in FP32 could not be measured: {base}"
            raise EngineError(problem, "Remedy that, or leave --max-drop out and add --no-accuracy.")
        found = self._accuracy(model)
        return base.ap - (0.0 if isinstance(found, str) else found.ap)

    def _reference(self, engine: str) -> Model | None:
        """The first FP32 bundle in this engine, else in one of those asked for that runs it; None without one."""
        device = self.search.cells[0].device
        for identity, bundle in self.bundles.items():
            if bundle.manifest.precision == "fp32":
                for one in (engine, *self.engines):
                    if not obstacle_to(one, bundle, "fp32", device):
                        return Model(identity, one, "fp32")
                return None
        return None

    def _accuracy(self, model: Model) -> Accuracy | str:
        if model not in self.accuracies:
            (result,) = self.runner.measure([self._first(model)], self.look, accuracy=True, progress=self.progress)
            self.accuracies[model] = _accuracy_of(result)
        return self.accuracies[model]

    def _first(self, model: Model) -> Cell:
        """The cell whose process measured the model first: mAP depends on neither batch size nor threads."""
        if model in self.search.by_model:
            return self.search.start(model)
        size = self.bundles[model.bundle].manifest.inputs[0].shape[0] or 1
        return replace(
            self.search.cells[0],
            **model._asdict(),
            threads=max(cell.threads for cell in self.search.cells),
            streams=1,
            batch_size=size,
            order="listed",
            scenario="single-stream" if size == 1 else "multi-stream",
            tf32=model.precision == "fp32" and any(cell.tf32 for cell in self.search.cells),
        )

    def configuration(self, cell: Cell, output: Path) -> Configuration:
        """A cell that was measured at length with its evidence, as it is written to `output`."""
        (result, quick), measured = self.results[cell], self.search.finished[cell]
        reference = self._reference(cell.engine)
        accuracy, of_reference = (self.accuracies.get(one) if one else None for one in (model_of(cell), reference))
        ap, base = (one.ap if isinstance(one, Accuracy) else None for one in (accuracy, of_reference))
        network = [1e3 * cell.streams * cell.batch_size / ms for ms in result.latency_ms if ms > 0]
        mixed = [run.mixed_batches for run in result.runs]
        evidence = Evidence(
            images_per_s=median([value for run in measured.passes for value in run]),
            latency_p50_ms=percentile(result.file_ms, 50),
            latency_p99_ms=percentile(result.file_ms, BOUND_PERCENT) if measured.tail.known else None,
            latency_max_ms=max(result.file_ms),
            network_images_per_s=percentile(network or [0.0], 50),
            network_p50_ms=percentile(result.latency_ms, 50),
            quick=quick,
            padded=None if None in mixed else any(mixed),
            memory_mb=round(measured.memory_mb, 1),
            ap=ap,
            ap_drop=base - ap if ap is not None and base is not None else None,
            ap_images=accuracy.images if isinstance(accuracy, Accuracy) else None,
            runs=len(result.runs),
            started=result.runs[0].started,
        )
        directory = self.bundles[cell.bundle].directory.resolve()
        path = Path(os.path.relpath(directory, output.absolute().parent.resolve())).as_posix()
        return Configuration(path, cell, evidence)

    def knee(self, choice: Cell) -> Knee | None:
        """Of the choice's model, which has an input size, threads and order; None for a single measured batch size."""
        line = self.search.line(model_of(choice), choice.threads, None if choice.batch_size == 1 else choice.order)
        measured = {cell.batch_size: found for cell in line if (found := self.search.known.get(cell)) is not None}
        return find_knee(measured) if len(measured) > 1 else None

    def sizes(self, choice: Cell) -> SizeChoice | None:
        """What the choice's input size costs and gains; None where its bundle had no other."""
        model, search = model_of(choice), self.search
        if len(search.families[model.own]) == 1:
            return None
        own_size = self.bundles[choice.bundle].manifest.preprocess.target_size
        speed, ap_less = None, None
        if choice.input_size and search.own_size:
            speed = speed_ratio(search.own_size[1], search.finished[choice])
            here, there = self.accuracies.get(model), self._accuracy(model.own)
            if isinstance(here, Accuracy) and isinstance(there, Accuracy):
                ap_less = there.ap - here.ap
        alike = [one for one in search.drops if (one.bundle, one.precision) == (choice.bundle, choice.precision)]
        alike.sort(key=lambda one: one.engine == choice.engine)  # its own engine overrides what others lose
        drops = {one.input_size or own_size: search.drops[one] for one in alike}
        return SizeChoice(own_size, speed, ap_less, tuple(sorted(drops.items(), reverse=True)))

    def no_choice(self) -> Exception:
        """Why there is nothing to deploy."""
        miss = self.search.nearest()
        if miss is not None:
            return BoundsError(
                f"no configuration keeps the bounds: the nearest is {miss_in_words(miss)}",
                "Loosen that bound, or give other bundles; what was measured is kept for the next run with this "
                "--output.",
            )
        failed = [f"; {one.cell.setup()}: {one.reason}" for one in self.failed()]
        why = failed[0] if failed else ": batches took no time at all, so that the clock is of no use"
        return EngineError(f"nothing could be measured{why}")
