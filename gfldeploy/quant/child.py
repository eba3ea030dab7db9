"""Work in a process of its own: for what needs process-wide switches of Paddle, prints, or keeps memory.

The parent names a module whose `__main__` calls `serve`, and sends it a JSON request on stdin. The child answers with
`progress DONE TOTAL` lines and its exit code; results go to files that the request names.
"""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
from collections import deque
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any

from gfldeploy.errors import EngineError, GfldeployError
from gfldeploy.signals import child_environment, die_with_parent

__all__ = ["old_programs", "report_progress", "run_child", "serve"]


def old_programs(threads: int) -> dict[str, str]:
    """Environment of a child that runs programs of Paddle's old format on so many CPU threads."""
    return {
        "FLAGS_enable_pir_api": "0",
        "FLAGS_paddle_num_threads": str(threads),
        "OMP_NUM_THREADS": str(threads),
    }


def run_child(
    module: str,
    request: Mapping[str, Any],
    *,
    subject: str,
    remedy: str,
    environment: Mapping[str, str] | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> None:
    """Run `module` with `request`, which is JSON-ready, and `environment` on top of this process's.

    Raises `EngineError`, "`subject` failed: ...", with the last line that the child printed if it fails, which is what
    it raised if that was ours, and `remedy`.
    """
    quiet = {"GLOG_minloglevel": "2", "PYTHONWARNINGS": "ignore"}
    # -P: what lies in the user's directory must not be imported.
    with subprocess.Popen(
        [sys.executable, "-P", "-m", module],
        env=child_environment({**quiet, **(environment or {})}),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    ) as process:
        tail: deque[str] = deque(maxlen=40)
        try:
            assert process.stdin is not None
            assert process.stdout is not None
            with suppress(BrokenPipeError):  # the child ended at once: its exit code and last words say why
                process.stdin.write(json.dumps(request))
                process.stdin.close()
            for line in process.stdout:
                if match := re.fullmatch(r"progress (\d+) (\d+)\n", line):
                    progress(int(match[1]), int(match[2]))
                else:
                    tail.append(line.strip())
            code = process.wait()
        except BaseException:
            process.kill()
            raise
    if code != 0:
        problem = next((line for line in reversed(tail) if line), f"exit code {code}")
        if code == -signal.SIGKILL:
            problem = "the process was killed, most likely for want of memory"
        raise EngineError(f"{subject} failed: {problem}", remedy)


def serve(work: Callable[[dict[str, Any]], None]) -> None:
    """The child: do `work` with the request from stdin, and exit with the message of what it raises on purpose."""
    die_with_parent()
    try:
        work(json.load(sys.stdin))
    except GfldeployError as error:
        sys.exit(str(error))


def report_progress(done: int, total: int) -> None:
    """The child: tell the parent. On a line of its own, whatever else has been printed."""
    sys.stdout.write(f"\nprogress {done} {total}\n")
    sys.stdout.flush()
