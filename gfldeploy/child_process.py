"""Runs one piece of work in a process of its own, so that a crash, a hang or a leak of it touches nothing else.

The parent calls `run_child` with a module whose `__main__` calls `serve`. They exchange JSON files in a folder of
their own, which is the child's only argument and its TMPDIR: `request.json`, `answer.json`, and `progress`.
"""

from __future__ import annotations

import json
import math
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import psutil

from gfldeploy.errors import EngineError, GfldeployError
from gfldeploy.files import scratch_directory, write_json
from gfldeploy.progress import SILENT, Progress, Silent
from gfldeploy.signals import child_environment, die_with_parent
from gfldeploy.system import end_of, kill_tree, start_apart

_REQUEST, _ANSWER, _PROGRESS = "request.json", "answer.json", "progress"
_POLL_S = 0.25
_TAIL_BYTES = 4096


@dataclass(frozen=True)
class Limits:
    """What a process may take: seconds without progress, and 10^6 bytes of resident memory with all it started."""

    timeout_s: float = 600.0
    memory_mb: float = math.inf


DEFAULT_LIMITS = Limits()
# For work with steps that take their time without a sign of progress.
NO_LIMITS = Limits(timeout_s=math.inf)


def run_child(
    module: str | Sequence[str],
    request: Mapping[str, Any],
    *,
    limits: Limits = DEFAULT_LIMITS,
    environment: Mapping[str, str] | None = None,
    subject: str | None = None,
    remedy: str | None = None,
    progress: Progress = SILENT,
) -> dict[str, Any]:
    """Run a module, or another command line, on a JSON-ready request and return its answer.

    The process has this one's environment with `environment` on top. Whatever ends this function, KeyboardInterrupt
    included, kills the process and all it started. `progress` is told what the child tells its `PARENT`.

    Raises `EngineError` with the child's own problem and remedy if it raised a `GfldeployError`; with the last line of
    its standard error if it crashed; or if it exceeded the limits or gave no JSON object. `subject` puts "`subject`
    failed: " before the problem, `remedy` is for failures without a remedy of their own. Raises `OutputError` if there
    is no place for temporary files.
    """
    # -P: a folder named onnx or paddle in the current directory (a bundle has both) must not shadow the package.
    command = [sys.executable, "-P", "-m", module] if isinstance(module, str) else list(module)
    with scratch_directory() as folder:
        (folder / _REQUEST).write_bytes(json.dumps(request).encode())
        try:
            _run(command, folder, limits, environment or {}, progress)
            answer = _read_answer(folder / _ANSWER)
        except EngineError as error:
            problem = f"{subject} failed: {error.problem}" if subject else error.problem
            raise EngineError(problem, error.remedy or remedy) from error
    return answer


def serve(work: Callable[[dict[str, Any]], Mapping[str, Any] | None]) -> None:
    """The child's main function: answer the request with what `work` returns, or with the `GfldeployError` it raises.

    Anything else that it raises ends the process with a traceback, for the parent to report.
    """
    die_with_parent()
    with suppress(OSError):  # when memory runs out, the kernel is to kill this process, not the user's others
        Path("/proc/self/oom_score_adj").write_text("1000", encoding="utf-8")
    folder = _folder()
    try:
        answer = work(json.loads((folder / _REQUEST).read_text(encoding="utf-8"))) or {}
    except GfldeployError as error:
        answer = {"reason": error.problem, "remedy": error.remedy}
    write_json(folder / _ANSWER, answer)


class _Parent(Silent):
    """The progress of the parent, which restarts the child's time limit with each step."""

    def step(self, label: str, done: int, total: int) -> None:
        with suppress(OSError), (_folder() / _PROGRESS).open("ab") as file:
            file.write(json.dumps([label, done, total]).encode() + b"\n")


# For the child.
PARENT: Progress = _Parent()


def _folder() -> Path:
    return Path(sys.argv[1])


def _run(
    command: Sequence[str], folder: Path, limits: Limits, environment: Mapping[str, str], progress: Progress
) -> None:
    """Run the command to its end. Raises `EngineError` if it fails or exceeds the limits."""
    # A file rather than a pipe: a child that does not stop writing cannot block this process. What packages print on
    # standard output goes nowhere. The process group of its own is there to be killed whole.
    (folder / _PROGRESS).touch()
    with (folder / "stderr").open("wb") as stderr, (folder / _PROGRESS).open(encoding="utf-8") as reports:
        process = subprocess.Popen(
            [*command, str(folder)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=stderr,
            # So that no file of its outlives it.
            env=child_environment({**environment, **dict.fromkeys(("TMPDIR", "TEMP", "TMP"), str(folder))}),
            **start_apart(),
        )
        try:
            _wait(process, limits, reports, progress)
        finally:
            kill_tree(process)
            process.wait()
    if process.returncode:
        raise EngineError(_exit_reason(process.returncode, folder / "stderr"))


def _wait(process: subprocess.Popen[bytes], limits: Limits, reports: IO[str], progress: Progress) -> None:
    """Wait for the end of the process and pass on its progress. Raises `EngineError` beyond the limits."""
    deadline = time.monotonic() + limits.timeout_s
    running = True
    while running:
        with suppress(subprocess.TimeoutExpired):
            process.wait(min(_POLL_S, max(deadline - time.monotonic(), 0)))
            running = False
        for line in iter(reports.readline, ""):
            deadline = time.monotonic() + limits.timeout_s
            progress.step(*json.loads(line))
        if running and time.monotonic() >= deadline:
            problem = f"it took longer than {limits.timeout_s:g} s"
            raise EngineError(problem, "raise the cell timeout, or use smaller batches or inputs")
        if running and limits.memory_mb < math.inf and _resident_mb(process.pid) > limits.memory_mb:
            problem = f"out of memory: it took more than {limits.memory_mb:.0f} MB"
            raise EngineError(problem, "raise the memory limit, or use smaller batches or inputs")


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
    last = f": {lines[-1]}" if lines else ""
    return f"the process {end_of(code) or f'ended with exit code {code}'}{last}"


def _read_answer(path: Path) -> dict[str, Any]:
    """The answer. Raises `EngineError` if it is none, or what the child raised on purpose."""
    try:
        answer = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise EngineError("the process ended without an answer") from None
    except (OSError, ValueError) as error:
        raise EngineError(f"the process answered nonsense: {error}") from error
    if not isinstance(answer, dict):
        raise EngineError("the process answered nonsense: not an object")
    if "reason" in answer:
        raise EngineError(answer["reason"], answer.get("remedy"))
    return answer
