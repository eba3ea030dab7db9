"""Runs a plan: one process for each thing to measure, so that a crash, a hang or a leak of one touches no other."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import psutil

from gfldeploy.accuracy import Accuracy
from gfldeploy.bench.cell import BundleIdentity, Cell
from gfldeploy.bench.cost import count_cost
from gfldeploy.bench.journal import Journal
from gfldeploy.bench.matrix import Plan
from gfldeploy.bench.monitor import wait_until_idle
from gfldeploy.bench.results import SCHEMA, CellResult, Cost, Peak, Settings
from gfldeploy.bench.worker import AccuracyRequest, PeakRequest, Timed, TimingRequest
from gfldeploy.bundle import Bundle
from gfldeploy.engines.cache import DEFAULT_ENGINE_CACHE
from gfldeploy.errors import DataError, GfldeployError
from gfldeploy.files import scratch_directory
from gfldeploy.serialization import build, plain
from gfldeploy.signals import child_environment

__all__ = ["WORKER", "Data", "Limits", "Progress", "run_peak", "run_plan"]

# -P: a folder named onnx or paddle in the current directory (a bundle has both) must not shadow the package.
WORKER = (sys.executable, "-P", "-m", "gfldeploy.bench.worker")

Progress = Callable[[int, int, str], None]

_POLL_S = 0.25
_TAIL_BYTES = 4096


@dataclass(frozen=True)
class Limits:
    """What a process may take: seconds (for accuracy: without an image done) and 10^6 bytes of resident memory."""

    timeout_s: float = 600.0
    memory_mb: float = float("inf")


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
    limits: Limits = Limits(),
    engine_cache: Path = DEFAULT_ENGINE_CACHE,
    peaks: bool = False,
    about: Mapping[str, Any] | None = None,
    progress: Progress = lambda done, total, description: None,
    command: Sequence[str] = WORKER,
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
    and once at the end; processes of an earlier run are not counted. `command` is the worker's command line. Raises
    `BundleError` for a bundle that cannot be read.
    """
    steps = _steps(plan, settings.rounds, data.annotations is not None, peaks)

    def question(step: _Step) -> dict[str, Any]:
        cell = {**plain(step.cell), "bundle": step.cell.bundle.digest}
        return {
            "schema": SCHEMA, "kind": step.kind, "cell": cell, "round": step.round,
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
        answers[step] = _run(step, plan.bundles[step.cell.bundle], data, settings, limits, engine_cache, command)
        journal.keep(question(step), _written(answers[step]))
    progress(len(pending), len(pending), "done")
    costs = _Costs(plan.bundles)
    return (*(_cell_result(cell, answers, settings.rounds, costs) for cell in plan.cells), *plan.skipped)


def run_peak(cell: Cell, *, limits: Limits = Limits(), command: Sequence[str] = WORKER) -> Peak:
    """What the cell's engine reaches here at best, measured in a process of its own; a failure is its `reason`."""
    with scratch_directory() as folder:
        answer = _ask("peak", PeakRequest(cell, folder / "result.json"), folder, limits, command)
    if isinstance(answer, _Failure):
        return Peak(None, None, answer.reason)
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
    command: Sequence[str],
) -> Timed | Accuracy | Peak | _Failure:
    """Run the step's process and read its answer."""
    cell = step.cell
    idle = wait_until_idle(cell.device)
    with scratch_directory() as folder:
        result, progress = folder / "result.json", folder / "progress"
        request: TimingRequest | AccuracyRequest | PeakRequest
        if step.kind == "timing":
            images = tuple(path.absolute() for path in data.images)
            request = TimingRequest(cell, bundle, images, settings, idle, engine_cache, result)
        elif step.kind == "accuracy":
            assert data.annotations is not None
            request = AccuracyRequest(
                cell, bundle, data.annotations, data.image_dir, data.accuracy_limit, engine_cache, result, progress
            )
        else:
            request = PeakRequest(cell, result)
        answer = _ask(step.kind, request, folder, limits, command)
    return answer if isinstance(answer, _Failure) else _read(answer, step, bundle)


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
    directory: Path,
    limits: Limits,
    command: Sequence[str],
) -> Mapping[str, Any] | _Failure:
    """Run one worker process on one request. `directory` is its own."""
    asked, errors = directory / "request.json", directory / "stderr"
    asked.write_text(json.dumps({"kind": kind, "request": plain(request)}), encoding="utf-8")
    # Files rather than pipes: a worker that neither reads nor stops writing cannot block this process. What engines
    # print on stdout goes nowhere. The process group of its own is there to be killed whole.
    with asked.open("rb") as stdin, errors.open("wb") as stderr:
        process = subprocess.Popen(
            command,
            stdin=stdin,
            stdout=subprocess.DEVNULL,
            stderr=stderr,
            start_new_session=True,
            env=child_environment({"TMPDIR": str(directory)}),  # so that nothing outlives it there
        )
        try:
            failure = _wait(process, limits, directory / "progress")
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    if failure:
        return failure
    if process.returncode:
        return _Failure(_exit_reason(process.returncode, errors), None)
    return _read_answer(request.result)


def _wait(process: subprocess.Popen[bytes], limits: Limits, progress: Path) -> _Failure | None:
    """Wait for the process to end; None if it did, within the limits. Signs of progress give it its time again."""
    deadline = time.monotonic() + limits.timeout_s
    seen = 0
    while True:
        try:
            process.wait(min(_POLL_S, max(deadline - time.monotonic(), 0)))
        except subprocess.TimeoutExpired:
            with suppress(FileNotFoundError):
                changed = progress.stat().st_mtime_ns
                if changed != seen:
                    seen, deadline = changed, time.monotonic() + limits.timeout_s
            if time.monotonic() >= deadline:
                remedy = "raise the cell timeout, or use smaller batches or inputs"
                return _Failure(f"it took longer than {limits.timeout_s:g} s", remedy)
            if _resident_mb(process.pid) > limits.memory_mb:
                remedy = "raise the memory limit, or use smaller batches or inputs"
                return _Failure(f"out of memory: it took more than {limits.memory_mb:.0f} MB", remedy)
        else:
            return None


def _resident_mb(pid: int) -> float:
    """Resident memory, 10^6 bytes, of a process and all it started; 0 once it is gone."""
    try:
        process = psutil.Process(pid)
        return sum(one.memory_info().rss for one in (process, *process.children(recursive=True))) / 1e6
    except psutil.Error:
        return 0.0


def _exit_reason(code: int, errors: Path) -> str:
    with errors.open("rb") as file:
        file.seek(max(errors.stat().st_size - _TAIL_BYTES, 0))
        lines = [line.strip() for line in file.read().decode(errors="replace").splitlines() if line.strip()]
    said = f": {lines[-1]}" if lines else ""
    if code > 0:
        return f"the process ended with exit code {code}{said}"
    try:
        name = signal.Signals(-code).name
    except ValueError:
        name = f"signal {-code}"
    if -code == signal.SIGKILL:
        return f"the process was killed by {name}, perhaps because memory ran out{said}"
    return f"the process crashed with {name}{said}"


def _read_answer(path: Path) -> Mapping[str, Any] | _Failure:
    try:
        answer = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return _Failure("the process ended without an answer", None)
    except (OSError, ValueError) as error:
        return _Failure(f"the process answered nonsense: {error}", None)
    if not isinstance(answer, dict):
        return _Failure("the process answered nonsense: not an object", None)
    return answer


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
