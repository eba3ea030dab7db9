"""Runs a plan: one process per cell, so that a crash, a hang or a leak of one cannot touch the others."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from gfldeploy.accuracy import Accuracy
from gfldeploy.bench.matrix import Cell, Plan, Skipped
from gfldeploy.bench.records import build, plain
from gfldeploy.bench.results import BundleIdentity, CellResult, Run, Settings
from gfldeploy.bench.worker import AccuracyRequest, TimingRequest
from gfldeploy.bundle import Bundle
from gfldeploy.errors import DataError

__all__ = ["WORKER", "AccuracyData", "Progress", "run_plan"]

# -P: a folder named onnx or paddle in the current directory (a bundle has both) must not shadow the package.
WORKER = (sys.executable, "-P", "-m", "gfldeploy.bench.worker")

Progress = Callable[[int, int, str], None]

_POLL_S = 0.5
_TAIL_BYTES = 4096


@dataclass(frozen=True)
class AccuracyData:
    """What accuracy is measured on: the first `limit` images of a COCO file, None for all; see `CocoDataset.load`."""

    annotations: Path
    image_dir: Path | None = None
    limit: int | None = None


@dataclass(frozen=True)
class _Failure:
    reason: str
    remedy: str | None


def run_plan(
    plan: Plan,
    images: Sequence[Path],
    settings: Settings,
    accuracy: AccuracyData | None = None,
    timeout_s: float = 600.0,
    progress: Progress | None = None,
    command: Sequence[str] = WORKER,
) -> tuple[CellResult, ...]:
    """Measure every cell of the plan on these images; the results are in the plan's order, the skipped ones last.

    Each of `settings.rounds` rounds runs every cell once, in order; a cell that failed is not tried again. Then, unless
    `accuracy` is None, each bundle x engine x precision of which a cell was measured is evaluated, once.

    A process that crashes, exits with an error, answers nonsense, or takes longer than `timeout_s` (for accuracy:
    finishes no image for so long) becomes a result with its reason, and the rest goes on. Whatever ends this function,
    KeyboardInterrupt included, kills the process at work and all it started.

    `progress(done, total, description)` is called before each process, with the number of processes done and in all,
    and once at the end. `command` is the worker's command line. Raises `BundleError` for a bundle that cannot be read.
    """
    identities = {cell.bundle: BundleIdentity.of(Bundle.open(cell.bundle)) for cell in plan.cells}
    models = {_model(cell): cell for cell in reversed(plan.cells)} if accuracy else {}
    total = len(plan.cells) * settings.rounds + len(models)
    done = 0

    def start(description: str) -> None:
        nonlocal done
        if progress is not None:
            progress(done, total, description)
        done += 1

    runs: dict[Cell, list[Run]] = {cell: [] for cell in plan.cells}
    failures: dict[Cell, _Failure] = {}
    for _ in range(settings.rounds):
        for cell in plan.cells:
            start(str(cell))
            if cell in failures:
                continue
            run = _time(cell, images, settings, timeout_s, command)
            if isinstance(run, Run):
                runs[cell].append(run)
            else:
                failures[cell] = run
    measured = {_model(cell) for cell in plan.cells if cell not in failures}
    accuracies: dict[tuple[object, ...], Accuracy | _Failure] = {}
    for model, cell in reversed(models.items()):
        start(f"{cell.bundle.name}: {cell.engine} {cell.precision} on {cell.device}, accuracy")
        if accuracy is not None and model in measured:
            accuracies[model] = _accuracy(cell, accuracy, timeout_s, command)
    if progress is not None:
        progress(total, total, "done")
    return (
        *(
            _cell_result(cell, identities[cell.bundle], runs[cell], failures.get(cell), accuracies.get(_model(cell)))
            for cell in plan.cells
        ),
        *(_skipped_result(item) for item in plan.skipped),
    )


def _model(cell: Cell) -> tuple[object, ...]:
    """What accuracy depends on: not the batch size."""
    return cell.bundle, cell.engine, cell.precision, cell.device


def _time(
    cell: Cell, images: Sequence[Path], settings: Settings, timeout_s: float, command: Sequence[str]
) -> Run | _Failure:
    with tempfile.TemporaryDirectory(prefix="gfldeploy-bench-") as name:
        request = TimingRequest(cell, tuple(path.absolute() for path in images), settings, Path(name) / "result.json")
        answer = _ask("timing", request, Path(name), timeout_s, command)
    if not isinstance(answer, _Failure):
        try:
            return build(Run, answer.get("run"), "run")
        except DataError as error:
            answer = _Failure(f"the process answered nonsense: {error.problem}", None)
    return _without_path(answer, cell.bundle)


def _accuracy(cell: Cell, data: AccuracyData, timeout_s: float, command: Sequence[str]) -> Accuracy | _Failure:
    with tempfile.TemporaryDirectory(prefix="gfldeploy-bench-") as name:
        directory = Path(name)
        request = AccuracyRequest(
            cell, data.annotations, data.image_dir, data.limit, directory / "result.json", directory / "progress"
        )
        answer = _ask("accuracy", request, directory, timeout_s, command)
    if not isinstance(answer, _Failure):
        try:
            return build(Accuracy, answer.get("accuracy"), "accuracy")
        except DataError as error:
            answer = _Failure(f"the process answered nonsense: {error.problem}", None)
    return _without_path(answer, cell.bundle)


def _ask(
    kind: str, request: TimingRequest | AccuracyRequest, directory: Path, timeout_s: float, command: Sequence[str]
) -> Mapping[str, Any] | _Failure:
    """Run one worker process on one request. `directory` is its own."""
    asked, errors = directory / "request.json", directory / "stderr"
    asked.write_text(json.dumps({"kind": kind, "request": plain(request)}), encoding="utf-8")
    # Files rather than pipes: a worker that neither reads nor stops writing cannot block this process. What engines
    # print on stdout goes nowhere. The process group of its own is there to be killed whole.
    with asked.open("rb") as stdin, errors.open("wb") as stderr:
        process = subprocess.Popen(
            command, stdin=stdin, stdout=subprocess.DEVNULL, stderr=stderr, start_new_session=True
        )
        try:
            in_time = _wait(process, timeout_s, directory / "progress")
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    if not in_time:
        remedy = "raise the cell timeout, or use smaller batches or inputs"
        return _Failure(f"it took longer than {timeout_s:g} s", remedy)
    if process.returncode:
        return _Failure(_exit_reason(process.returncode, errors), None)
    return _read_answer(request.result)


def _wait(process: subprocess.Popen[bytes], timeout_s: float, progress: Path) -> bool:
    """Whether the process ended within `timeout_s` of its start or of its last sign of progress."""
    deadline = time.monotonic() + timeout_s
    seen = 0
    while True:
        try:
            process.wait(min(_POLL_S, max(deadline - time.monotonic(), 0)))
        except subprocess.TimeoutExpired:
            with suppress(FileNotFoundError):
                changed = progress.stat().st_mtime_ns
                if changed != seen:
                    seen, deadline = changed, time.monotonic() + timeout_s
            if time.monotonic() >= deadline:
                return False
        else:
            return True


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
    if "reason" in answer:
        remedy = answer.get("remedy")
        return _Failure(str(answer["reason"]), None if remedy is None else str(remedy))
    return answer


def _without_path(failure: _Failure, bundle: Path) -> _Failure:
    """Results are published: name the bundle, not where it lies on this machine."""
    return replace(failure, reason=failure.reason.replace(str(bundle), bundle.resolve().name))


def _cell_result(
    cell: Cell,
    identity: BundleIdentity,
    runs: Sequence[Run],
    failure: _Failure | None,
    accuracy: Accuracy | _Failure | None,
) -> CellResult:
    measured = accuracy if isinstance(accuracy, Accuracy) else None
    return CellResult(
        bundle=identity,
        engine=cell.engine,
        precision=cell.precision,
        device=cell.device,
        batch_size=cell.batch_size,
        threads=cell.threads,
        status="failed" if failure else "ok",
        reason=failure.reason if failure else None,
        remedy=failure.remedy if failure else None,
        runs=tuple(runs),
        accuracy=measured,
        accuracy_reason=accuracy.reason if isinstance(accuracy, _Failure) else None,
    )


def _skipped_result(skipped: Skipped) -> CellResult:
    identity = BundleIdentity.of(Bundle.open(skipped.bundle)) if skipped.bundle else None
    return CellResult(
        bundle=identity,
        engine=skipped.engine,
        precision=skipped.precision,
        device=skipped.device,
        batch_size=skipped.batch_size,
        threads=skipped.threads,
        status="skipped",
        reason=skipped.reason,
        remedy=skipped.remedy,
        runs=(),
        accuracy=None,
        accuracy_reason=None,
    )
