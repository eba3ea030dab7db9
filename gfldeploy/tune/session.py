"""One tuning from request to `deploy.yml`: what `gfldeploy tune` runs."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path

from gfldeploy.accuracy import Accuracy
from gfldeploy.bench.cell import BundleIdentity, Cell
from gfldeploy.bench.estimates import percentile
from gfldeploy.bench.journal import Journal
from gfldeploy.bench.results import BenchResults, CellResult, DataDescription, Settings, defined_ap
from gfldeploy.bench.runner import Data, run_plan
from gfldeploy.bench.session import BenchRequest, PreparedBench, about, describe_data, limits
from gfldeploy.bench.session import prepare as prepare_bench
from gfldeploy.bundle import Bundle
from gfldeploy.engines.registry import capability, missing_graph
from gfldeploy.errors import BoundsError, DataError, EngineError
from gfldeploy.images.coco import CocoDataset
from gfldeploy.machine import Machine, describe_machine
from gfldeploy.tune.deploy_file import Configuration, Deploy, Evidence, SearchRecord
from gfldeploy.tune.knee import Knee, find_knee
from gfldeploy.tune.measured import BOUND_PERCENT, TAIL_COUNT, Measured, measurable, speed
from gfldeploy.tune.race import Outcome, race
from gfldeploy.tune.reuse import Reused, reuse
from gfldeploy.tune.search import (
    Bounds,
    Model,
    Policy,
    Space,
    Step,
    line,
    model_of,
    nearest,
    policy_of,
    scenario_of,
)
from gfldeploy.tune.summary import miss_in_words, summarize

__all__ = ["PreparedTune", "TuneRequest", "prepare", "run"]

Progress = Callable[[str], None]


@dataclass(frozen=True)
class TuneRequest:
    """What to choose from, and what the choice must keep.

    `bench`: the bundles, data, engines, precisions, batch sizes and limits; its `settings` are those of the finish.
    Its threads, scenarios and rates are not used: `threads`: of one inference, each number of them; `policies`: how
    batches may be formed. `look`: the settings of the short runs. `results`: files of `gfldeploy bench` to start from.
    `exhaustive`: measure every cell at length, and every mAP. `budget_s`: seconds after which no more cells are looked
    at.
    """

    bench: BenchRequest
    bounds: Bounds
    look: Settings
    threads: Sequence[int]
    policies: Sequence[Policy] = ("in-order", "grouped")
    results: Sequence[Path] = ()
    exhaustive: bool = False
    budget_s: float | None = None


@dataclass(frozen=True)
class PreparedTune:
    """A request whose bundles, data and results were found sound, with the `space` of cells and what is known of it.

    `skipped`: what cannot run here. `reference`: the first FP32 bundle given, which mAP drops are against.
    """

    request: TuneRequest
    bench: PreparedBench
    space: Space
    skipped: tuple[CellResult, ...]
    data: Data
    description: DataDescription
    machine: Machine
    reference: BundleIdentity | None
    reused: Reused


def prepare(request: TuneRequest) -> PreparedTune:
    """Open and check everything, before anything runs.

    Raises `BundleError`, `DataError`, also for results that are not of this machine, software and data, and
    `EngineError` where nothing can run.
    """
    most = max(request.threads)
    scenarios = ("single-stream", *(scenario_of(policy) for policy in ("in-order", "grouped")))
    bench = prepare_bench(replace(request.bench, threads=most, scenarios=scenarios, rates=()))
    if not bench.plan.cells:
        first = bench.plan.skipped[0]
        problem = (
            f"nothing to choose from: {first.cell.engine} {first.cell.precision} on {first.cell.device}: {first.reason}"
        )
        raise EngineError(problem, f"{first.remedy[0].upper()}{first.remedy[1:]}." if first.remedy else None)
    bundles = {cell.bundle: Bundle.open(bench.plan.bundles[cell.bundle]) for cell in bench.plan.cells}
    policies = {path: _policies(bundle, bench, request.policies) for path, bundle in bundles.items()}
    cells = tuple(
        replace(cell, threads=threads)
        for cell in bench.plan.cells
        for threads in dict.fromkeys(request.threads)
        if policy_of(cell) in policies[cell.bundle] and not (policy_of(cell) == "grouped" and cell.batch_size == 1)
    )
    opened = (Bundle.open(path) for path in request.bench.bundles)
    reference = next((BundleIdentity.of(bundle) for bundle in opened if bundle.manifest.precision == "fp32"), None)
    if request.bounds.max_drop is not None and reference is None:
        raise DataError(
            "there is no FP32 bundle to measure the mAP drop against", "Give it too, or leave --max-drop out."
        )
    space = Space(cells, request.bounds)
    data, description = describe_data(bench)
    machine = describe_machine()
    now = BenchResults("", machine, description, request.bench.settings, ())
    reused = reuse(request.results, space, now)
    return PreparedTune(request, bench, space, bench.plan.skipped, data, description, machine, reference, reused)


def run(prepared: PreparedTune, output: Path, journal: Journal, progress: Progress = lambda text: None) -> Deploy:
    """Search, and return what is to be written to `output`; every process's answer goes to the `journal`.

    Raises `BoundsError` where no cell keeps the bounds, naming the nearest, and `EngineError` where none could be
    measured at all.
    """
    start = time.monotonic()
    session = _Session(prepared, journal, progress)
    request = prepared.request
    outcome = race(
        prepared.space,
        session.look,
        session.finish,
        session.drop,
        known={cell: Measured.of(result) for cell, result in prepared.reused.cells.items()},
        out_of_time=lambda: request.budget_s is not None and time.monotonic() - start > request.budget_s,
        exhaustive=request.exhaustive,
    )
    if request.exhaustive and request.bench.accuracy:
        for model in prepared.space.models:
            if outcome.known.get(prepared.space.start(model)):
                session.drop(model)
    if outcome.choice is None:
        raise _no_choice(prepared, outcome, session.results)
    record = SearchRecord(
        cells=len(prepared.space.cells),
        measured=len(outcome.known),
        reused=len(prepared.reused.cells),
        seconds=round(time.monotonic() - start, 1),
        exhaustive=request.exhaustive,
        complete=outcome.complete,
    )
    ranking = list(outcome.finished)
    second = ranking[1] if len(ranking) > 1 else None
    deploy = Deploy(
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        summary="",
        choice=session.configuration(ranking[0], output),
        runner_up=session.configuration(second, output) if second else None,
        bounds=request.bounds,
        knee=_knee(prepared.space, outcome, ranking[0]),
        search=record,
        machine=prepared.machine,
        data=prepared.description,
    )
    return replace(
        deploy,
        summary=summarize(deploy, outcome.finished[ranking[0]], outcome.finished.get(second) if second else None),
    )


@dataclass
class _Session:
    """What measures. `results`: of each cell, the latest; `quick`: whether that was too brief."""

    prepared: PreparedTune
    journal: Journal
    progress: Progress
    results: dict[Cell, CellResult] = field(default_factory=dict)
    accuracies: dict[Model, Accuracy | None] = field(default_factory=dict)
    quick: dict[Cell, bool] = field(default_factory=dict)
    _why: dict[Model, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.results |= self.prepared.reused.cells
        self.accuracies |= self.prepared.reused.accuracies
        self.quick |= {cell: cell in self.prepared.reused.quick for cell in self.results}

    def look(self, step: Step) -> dict[Cell, Measured | None]:
        """Measure each cell once, briefly."""
        known, threads = len(self.results), step.cells[0].threads
        self.progress(
            f"{known} of {len(self.prepared.space.cells)} cells known; next: {step.why} "
            f"({threads} thread{'' if threads == 1 else 's'})"
        )
        return self._measure(step.cells, self.prepared.request.look)

    def finish(self, cells: Sequence[Cell]) -> dict[Cell, Measured | None]:
        """Measure the cells at length, interleaved; with a latency bound until its percentile is known, if that does
        not take longer than `max_seconds`."""
        rounds = self.prepared.request.bench.settings.rounds
        self.progress(f"{len(cells)} cells at length, in {rounds} rounds")
        settings = self.prepared.request.bench.settings
        if self.prepared.request.bounds.max_latency_ms is not None:
            settings = replace(settings, tail_count=math.ceil(TAIL_COUNT / rounds))
        return self._measure(cells, settings)

    def drop(self, model: Model) -> float | None:
        """What the model loses in mAP against FP32, in the same engine where that runs; None where it is not asked for.

        A model whose mAP cannot be measured loses all of it. Raises `EngineError` where that of FP32 cannot be.
        """
        if not self.prepared.request.bench.accuracy:
            return None
        reference = self._reference(model.engine)
        if reference is None:
            self._accuracy(model)
            return None
        base = self._accuracy(reference)
        if base is None:
            problem = f"the mAP of {reference.bundle.directory} in FP32 could not be measured: {self._why[reference]}"
            raise EngineError(problem, "Remedy that, or leave --max-drop out and add --no-accuracy.")
        found = self._accuracy(model)
        return base if found is None else base - found

    def configuration(self, cell: Cell, output: Path) -> Configuration:
        """A measured cell as it is written to `output`."""
        result = self.results[cell]
        bundle = self.prepared.bench.plan.bundles[cell.bundle].resolve()
        return Configuration(
            bundle=Path(os.path.relpath(bundle, output.absolute().parent.resolve())).as_posix(),
            digest=cell.bundle.digest,
            engine=cell.engine,
            precision=cell.precision,
            device=cell.device,
            threads=cell.threads,
            batch_size=cell.batch_size,
            policy=policy_of(cell),
            evidence=self._evidence(cell, result),
        )

    def _measure(self, cells: Sequence[Cell], settings: Settings) -> dict[Cell, Measured | None]:
        data = replace(self.prepared.data, annotations=None)
        for cell, result in zip(cells, self._run(cells, data, settings), strict=True):
            self.results[cell] = result
            self.quick[cell] = settings.quick
        return {cell: Measured.of(self.results[cell]) if measurable(self.results[cell]) else None for cell in cells}

    def _run(self, cells: Sequence[Cell], data: Data, settings: Settings) -> tuple[CellResult, ...]:
        bench = self.prepared.bench.request

        def report(done: int, total: int, text: str) -> None:
            if done < total:
                self.progress(f"  {text}")

        return run_plan(
            replace(self.prepared.bench.plan, cells=tuple(cells), skipped=()),
            data,
            settings,
            self.journal,
            limits=limits(bench),
            engine_cache=bench.engine_cache,
            about=about(bench, self.prepared.machine),
            progress=report,
        )

    def _reference(self, engine: str) -> Model | None:
        """FP32 in this engine, else in one of those asked for that runs it; None without an FP32 bundle."""
        identity, device = self.prepared.reference, self.prepared.request.bench.device
        if identity is None:
            return None
        bundle = Bundle.open(self.prepared.bench.plan.bundles[identity])
        for one in (engine, *self.prepared.request.bench.engines):
            if capability(one, "fp32", device).works and not missing_graph(bundle, one, "fp32", device):
                return Model(identity, one, "fp32")
        return None

    def _accuracy(self, model: Model) -> float | None:
        """The mAP, measured once; None where that failed, or it is undefined."""
        if model not in self.accuracies:
            cell = self._first(model)
            (result,) = self._run((cell,), self.prepared.data, self.prepared.request.look)
            self.accuracies[model] = result.accuracy
            self._why[model] = result.reason or result.accuracy_reason or "unknown"
        ap = defined_ap(self.accuracies[model])
        if ap is None and self.accuracies[model]:
            self._why[model] = "it is undefined, as the images have no objects to find"
        return ap

    def _first(self, model: Model) -> Cell:
        """The cell whose process measured the model first: mAP depends on neither batch size nor threads."""
        if model in self.prepared.space.models:
            return self.prepared.space.start(model)
        size = Bundle.open(self.prepared.bench.plan.bundles[model.bundle]).manifest.inputs[0].shape[0] or 1
        request = self.prepared.request
        return Cell(
            bundle=model.bundle,
            engine=model.engine,
            precision=model.precision,
            device=request.bench.device,
            threads=max(request.threads),
            batch_size=size,
            scenario=scenario_of("single" if size == 1 else "in-order"),
        )

    def _evidence(self, cell: Cell, result: CellResult) -> Evidence:
        measured = Measured.of(result)
        accuracy = self.accuracies.get(model_of(cell))
        reference = self._reference(cell.engine)
        ap, base = defined_ap(accuracy), defined_ap(self.accuracies.get(reference) if reference else None)
        network = [1e3 * cell.batch_size / ms for ms in result.latency_ms if ms > 0]
        mixed = [run.mixed_batches for run in result.runs]
        return Evidence(
            images_per_s=speed(measured),
            latency_p50_ms=percentile(result.file_ms, 50),
            latency_p99_ms=percentile(result.file_ms, BOUND_PERCENT) if measured.tail.known else None,
            latency_max_ms=max(result.file_ms),
            network_images_per_s=percentile(network or [0.0], 50),
            network_p50_ms=percentile(result.latency_ms, 50),
            quick=self.quick[cell],
            padded=None if None in mixed else any(mixed),
            memory_mb=round(measured.memory_mb, 1),
            ap=ap,
            ap_drop=base - ap if ap is not None and base is not None else None,
            ap_images=accuracy.images if accuracy and ap is not None else None,
            runs=len(result.runs),
            started=result.runs[0].started,
        )


def _policies(bundle: Bundle, bench: PreparedBench, allowed: Sequence[Policy]) -> set[Policy]:
    """Those that differ on these images: grouping is nothing where all have one size as the network's input."""
    dataset = CocoDataset.load(bench.request.annotations, bench.request.image_dir, bench.request.timed_images)
    sizes = {bundle.manifest.preprocess.input_size(*image.size()) for image in dataset.images}
    kept: set[Policy] = {policy for policy in allowed if len(sizes) > 1 or policy != "grouped"}
    return {"single", *(kept or {"in-order"})}


def _knee(space: Space, outcome: Outcome, choice: Cell) -> Knee | None:
    policy = policy_of(choice)
    cells = line(space, model_of(choice), choice.threads, None if policy == "single" else policy)
    measured = {cell.batch_size: found for cell in cells if (found := outcome.known.get(cell)) is not None}
    return find_knee(measured) if len(measured) > 1 else None


def _no_choice(prepared: PreparedTune, outcome: Outcome, results: dict[Cell, CellResult]) -> Exception:
    miss = nearest(prepared.space, outcome.known, outcome.drops)
    if miss is None:
        failed = next((result for result in results.values() if result.status == "failed"), None)
        if failed is None:
            return EngineError("nothing could be measured: batches took no time at all, so that the clock is of no use")
        return EngineError(f"nothing could be measured; {failed.cell.engine} {failed.cell.precision}: {failed.reason}")
    return BoundsError(
        f"no configuration keeps the bounds: the nearest is {miss_in_words(miss)}",
        "Loosen that bound, or give other bundles; what was measured is kept for the next run with this --output.",
    )
