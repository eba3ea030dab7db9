"""Runs a plan: one process for each thing to measure, so that a crash, a hang or a leak of one touches no other."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from gfldeploy.accuracy import Accuracy
from gfldeploy.bench.cell import BundleIdentity, Cell
from gfldeploy.bench.cost import count_cost
from gfldeploy.bench.journal import Journal
from gfldeploy.bench.matrix import Plan
from gfldeploy.bench.monitor import wait_until_idle
from gfldeploy.bench.results import BenchResults, CellResult, Cost, Peak, Settings
from gfldeploy.bench.worker import AccuracyRequest, PeakRequest, Timed, TimingRequest
from gfldeploy.bundle import Bundle
from gfldeploy.child_process import DEFAULT_LIMITS, Limits, run_child
from gfldeploy.engines.cache import DEFAULT_ENGINE_CACHE
from gfldeploy.errors import DataError, EngineError, GfldeployError
from gfldeploy.serialization import build, plain

__all__ = ["Data", "Progress", "run_peak", "run_plan"]

_WORKER = "gfldeploy.bench.worker"

Progress = Callable[[int, int, str], None]


@dataclass(frozen=True)
class Data:
    """What is measured on: `images` for timing; for accuracy the first `accuracy_limit` (None: all) of a COCO file.

    `annotations` is None where accuracy is not to be measured. `digest` is of the contents of all of it.
    """

    images: tuple[Path, ...]
    digest: str
    annotations: Path | None = None
    image_dir: Path | None = None
    accuracy_limit: int | None = None


@dataclass(frozen=True)
class _Failure:
    reason: str
    remedy: str | None


@dataclass(frozen=True)
class _Step:
    """One process: a `round` of a cell, the accuracy of a bundle in an engine, or the peak of an engine.

    `cell`: of an accuracy or a peak, one of those that it is of.
    """

    kind: Literal["timing", "accuracy", "peak"]
    cell: Cell
    round: int = 0

    def __str__(self) -> str:
        cell = self.cell
        if self.kind == "peak":
            return f"peak of {cell.setup()}"
        if self.kind == "accuracy":
            return f"{cell.bundle.directory}: {cell.setup()}, accuracy"
        return str(cell)


def run_plan(
    plan: Plan,
    data: Data,
    settings: Settings,
    journal: Journal,
    *,
    limits: Limits = DEFAULT_LIMITS,
    engine_cache: Path = DEFAULT_ENGINE_CACHE,
    peaks: bool = False,
    about: Mapping[str, Any] | None = None,
    progress: Progress = lambda done, total, description: None,
    worker: str | Sequence[str] = _WORKER,
) -> tuple[CellResult, ...]:
    """Measure every cell of the plan; the results are in the plan's order, the skipped ones last.

    Each of `settings.rounds` rounds runs every cell once, in order; a cell that failed is not tried again. Then each
    bundle x engine x precision of which a cell was measured is evaluated, once, if there are annotations; then, with
    `peaks`, what each engine x precision reaches at best.

    Every answer goes to the `journal`, failures included, and what is there already is not measured again. `about` is
    what else answers depend on, the machine and its software: part of the question.

    A process that crashes, exits with an error, answers nonsense, or goes beyond the `limits` becomes a result with its
    reason, and the rest goes on. Whatever ends this function, KeyboardInterrupt included, kills the process at work and
    all it started.

    `progress(done, total, description)` is called before each process, with the number of processes done and in all,
    and once at the end; processes of an earlier run are not counted. `worker` is the worker's module or command line.
    Raises `BundleError` for a bundle that cannot be read.
    """
    steps = _steps(plan, settings.rounds, data.annotations is not None, peaks)

    def question(step: _Step) -> dict[str, Any]:
        cell = {**plain(step.cell), "bundle": step.cell.bundle.digest}
        return {
            "schema": BenchResults.FORMAT.schema, "kind": step.kind, "cell": cell, "round": step.round,
            "settings": plain(settings), "data": data.digest, "about": about or {},
        }  # fmt: skip

    answers: dict[_Step, Timed | Accuracy | Peak | _Failure] = {}
    for step in steps:
        kept = journal.find(question(step))
        if kept is not None:
            answer = _read(kept, step, plan.bundles[step.cell.bundle])
            if "reason" in kept or not isinstance(answer, _Failure):  # what cannot be read is no answer
                answers[step] = answer
    pending = [step for step in steps if step not in answers and _worth_it(step, steps, answers)]
    for number, step in enumerate(pending):
        progress(number, len(pending), str(step))
        if not _worth_it(step, steps, answers):
            continue
        answers[step] = _run(step, plan.bundles[step.cell.bundle], data, settings, limits, engine_cache, worker)
        journal.keep(question(step), _written(answers[step]))
    progress(len(pending), len(pending), "done")
    costs = _Costs(plan.bundles)
    return (*(_cell_result(cell, answers, settings.rounds, costs) for cell in plan.cells), *plan.skipped)


def run_peak(cell: Cell, *, limits: Limits = DEFAULT_LIMITS, worker: str | Sequence[str] = _WORKER) -> Peak:
    """What the cell's engine reaches here at best, measured in a process of its own; a failure is its `reason`."""
    answer = _ask("peak", PeakRequest(cell), limits, worker)
    if "reason" in answer:
        return Peak(None, None, str(answer["reason"]))
    return build(Peak, answer.get("peak"), "peak")


def _steps(plan: Plan, rounds: int, accuracy: bool, peaks: bool) -> list[_Step]:
    """In the order in which they are run."""
    steps = [_Step("timing", cell, number) for number in range(rounds) for cell in plan.cells]
    if accuracy:
        steps += [_Step("accuracy", cell) for cell in _first_of(plan.cells, _model)]
    if peaks:
        steps += [_Step("peak", cell) for cell in _first_of(plan.cells, _configuration)]
    return steps


def _first_of(cells: Sequence[Cell], key: Callable[[Cell], Hashable]) -> list[Cell]:
    """The first cell of each key."""
    return list({key(cell): cell for cell in reversed(cells)}.values())[::-1]


def _model(cell: Cell) -> Hashable:
    """What accuracy depends on: neither the batch size nor the scenario."""
    return cell.bundle, cell.engine, cell.precision, cell.device


def _configuration(cell: Cell) -> Hashable:
    """What an engine's peak depends on: not the bundle either."""
    return cell.engine, cell.precision, cell.device, cell.threads


def _worth_it(step: _Step, steps: Sequence[_Step], answers: Mapping[_Step, object]) -> bool:
    """Whether a step still has a use: another round of a cell that failed has none, nor has what no cell needs now."""
    alike: Callable[[Cell], Hashable] = {"timing": lambda cell: cell, "accuracy": _model, "peak": _configuration}[
        step.kind
    ]
    rounds = [other for other in steps if other.kind == "timing" and alike(other.cell) == alike(step.cell)]
    failed = {other.cell for other in rounds if isinstance(answers.get(other), _Failure)}
    return any(other.cell not in failed for other in rounds)


def _run(
    step: _Step,
    bundle: Path,
    data: Data,
    settings: Settings,
    limits: Limits,
    engine_cache: Path,
    worker: str | Sequence[str],
) -> Timed | Accuracy | Peak | _Failure:
    """Run the step's process and read its answer."""
    cell = step.cell
    idle = wait_until_idle(cell.device)
    request: TimingRequest | AccuracyRequest | PeakRequest
    if step.kind == "timing":
        images = tuple(path.absolute() for path in data.images)
        request = TimingRequest(cell, bundle, images, settings, idle, engine_cache)
    elif step.kind == "accuracy":
        assert data.annotations is not None
        request = AccuracyRequest(cell, bundle, data.annotations, data.image_dir, data.accuracy_limit, engine_cache)
    else:
        request = PeakRequest(cell)
    return _read(_ask(step.kind, request, limits, worker), step, bundle)


def _read(answer: Mapping[str, Any], step: _Step, bundle: Path) -> Timed | Accuracy | Peak | _Failure:
    """What a worker, or the journal, says of a step."""
    if "reason" in answer:
        remedy = answer.get("remedy")
        failure = _Failure(str(answer["reason"]), None if remedy is None else str(remedy))
    else:
        try:
            if step.kind == "timing":
                return build(Timed, answer.get("timed"), "timed")
            if step.kind == "accuracy":
                return build(Accuracy, answer.get("accuracy"), "accuracy")
            return build(Peak, answer.get("peak"), "peak")
        except DataError as error:
            failure = _Failure(f"the process answered nonsense: {error.problem}", None)
    # Results are published: name the bundle, not where it lies on this machine.
    return replace(failure, reason=failure.reason.replace(str(bundle), step.cell.bundle.directory))


def _written(answer: Timed | Accuracy | Peak | _Failure) -> dict[str, Any]:
    """The inverse of `_read`."""
    if isinstance(answer, _Failure):
        return {"reason": answer.reason, "remedy": answer.remedy}
    kind = {Timed: "timed", Accuracy: "accuracy", Peak: "peak"}[type(answer)]
    return {kind: plain(answer)}


def _ask(
    kind: str,
    request: TimingRequest | AccuracyRequest | PeakRequest,
    limits: Limits,
    worker: str | Sequence[str],
) -> Mapping[str, Any]:
    """What one worker process answers to one request: a result, or the `reason` of a failure and its `remedy`."""
    try:
        return run_child(worker, {"kind": kind, "request": plain(request)}, limits=limits)
    except EngineError as error:
        return {"reason": error.problem, "remedy": error.remedy}


class _Costs:
    """The cost of cells, counted once for all cells with the same bundle, precision and shapes."""

    def __init__(self, bundles: Mapping[BundleIdentity, Path]) -> None:
        self._bundles = bundles
        self._known: dict[Hashable, Cost | None] = {}

    def of(self, cell: Cell, timed: Timed) -> Cost | None:
        key = (cell.bundle, cell.precision, timed.image_sizes, tuple(sorted(timed.run.shapes.items())))
        if key not in self._known:
            sizes = [(height, width) for height, width in timed.image_sizes]
            self._known[key] = None
            with suppress(GfldeployError):  # a graph that cannot be counted is no reason to lose its timing
                bundle = Bundle.open(self._bundles[cell.bundle])
                self._known[key] = count_cost(bundle, cell.precision, sizes, _batches(timed.run.shapes))
        return self._known[key]


def _batches(shapes: Mapping[str, int]) -> dict[tuple[int, int, int], int]:
    """The number of batches by (batch, height, width), from that by "NxCxHxW"."""
    counts = {}
    for text, count in shapes.items():
        batch, _, height, width = map(int, text.split("x"))
        counts[batch, height, width] = count
    return counts


def _cell_result(
    cell: Cell, answers: Mapping[_Step, Timed | Accuracy | Peak | _Failure], rounds: int, costs: _Costs
) -> CellResult:
    found = [answers.get(_Step("timing", cell, number)) for number in range(rounds)]
    timed = [answer for answer in found if isinstance(answer, Timed)]
    failure = next((answer for answer in found if isinstance(answer, _Failure)), None)

    def shared(kind: str, alike: Callable[[Cell], Hashable]) -> object:
        """The answer of a step that several cells share."""
        steps = (step for step in answers if step.kind == kind and alike(step.cell) == alike(cell))
        return next((answers[step] for step in steps), None)

    accuracy, peak = shared("accuracy", _model), shared("peak", _configuration)
    if isinstance(peak, _Failure):
        peak = Peak(None, None, peak.reason)
    return CellResult(
        cell,
        status="failed" if failure else "ok",
        reason=failure.reason if failure else None,
        remedy=failure.remedy if failure else None,
        runs=tuple(answer.run for answer in timed),
        accuracy=accuracy if isinstance(accuracy, Accuracy) else None,
        accuracy_reason=accuracy.reason if isinstance(accuracy, _Failure) else None,
        cost=costs.of(cell, timed[0]) if timed else None,
        peak=peak if isinstance(peak, Peak) else None,
    )
