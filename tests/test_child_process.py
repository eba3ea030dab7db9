"""Children that answer, fail on purpose, crash, hang, and report."""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
from recorded_progress import RecordedProgress

from gfldeploy.child_process import Limits, run_child
from gfldeploy.errors import EngineError

PRELUDE = (
    "import json, os, signal, sys, time\n"
    "from gfldeploy.child_process import PARENT, serve\n"
    "from gfldeploy.errors import DataError\n"
    "def work(request):\n    "
)


def child(code: str) -> list[str]:
    """A command line whose `work` is `code`: statements in one line, or lines indented by four spaces."""
    return [sys.executable, "-c", f"{PRELUDE}{code}\nserve(work)"]


def test_the_answer_and_every_report(monkeypatch: pytest.MonkeyPatch) -> None:
    code = (
        "[PARENT.step('work', done, 3) for done in (1, 2, 3)]\n"
        "    return {'sum': sum(request['numbers']), 'flag': os.environ['FLAG'], 'temporary': os.environ['TMPDIR']}"
    )
    progress = RecordedProgress()
    answer = run_child(
        child(code),
        {"numbers": [1, 2]},
        environment={"FLAG": "on"},
        progress=progress,
    )
    assert (answer["sum"], answer["flag"]) == (3, "on")
    assert progress.steps == [("work", done, 3) for done in (1, 2, 3)]
    folder = Path(answer["temporary"])
    assert folder != Path(tempfile.gettempdir()) and not folder.exists()


def test_a_child_without_an_answer_of_its_own() -> None:
    assert run_child(child("pass"), {}) == {}


@pytest.mark.parametrize(
    ("code", "problem", "remedy"),
    [
        ("raise DataError('no image', 'Add one.')", "the work failed: no image", "Add one."),
        ("raise DataError('no image')", "the work failed: no image", "Try another."),
        ("raise LookupError('where?')", "failed: the process ended with exit code 1: LookupError: where?", None),
        ("sys.stderr.write('first\\noops\\n'); os.abort()", "the process crashed with SIGABRT: oops", None),
        ("os.kill(os.getpid(), signal.SIGKILL)", "killed by SIGKILL, perhaps because memory ran out", None),
        ("os._exit(0)", "the process ended without an answer", None),
        ("open(sys.argv[1] + '/answer.json', 'w').write('['); os._exit(0)", "the process answered nonsense: ", None),
        ("return [1]", "the process answered nonsense: not an object", None),
    ],
)  # fmt: skip
def test_failures(code: str, problem: str, remedy: str | None) -> None:
    with pytest.raises(EngineError) as caught:
        run_child(child(code), {}, subject="the work", remedy="Try another.")
    assert problem in caught.value.problem
    assert caught.value.remedy == (remedy or "Try another.")


@pytest.mark.parametrize(
    ("code", "limits", "problem"),
    [
        ("time.sleep(300)", Limits(0.5), "it took longer than 0.5 s"),
        (
            "hoard = bytearray(os.urandom(1) * 400_000_000); time.sleep(300)",
            Limits(memory_mb=200),
            "out of memory: it took more than 200 MB",
        ),
    ],
)
def test_limits_kill_the_child_with_all_it_started(code: str, limits: Limits, problem: str, tmp_path: Path) -> None:
    note = tmp_path / "pid"
    started = f"import subprocess; open({str(note)!r}, 'w').write(str(subprocess.Popen(['sleep', '300']).pid))\n    "
    with pytest.raises(EngineError, match=problem) as caught:
        run_child([sys.executable, "-c", f"import os, time\nif True:\n    {started}{code}"], {}, limits=limits)
    assert caught.value.remedy
    assert wait_until_dead(int(note.read_text()))


@pytest.mark.slow
def test_progress_restarts_the_time_limit() -> None:
    code = "[(PARENT.step('work', number, 8), time.sleep(0.4)) for number in range(8)]"
    assert run_child(child(code), {}, limits=Limits(2)) == {}


@pytest.mark.slow
def test_what_lies_in_the_current_directory_is_not_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "numpy.py").write_text("raise SystemExit('shadowed')")
    with pytest.raises(EngineError, match="KeyError: 'bundle'"):
        run_child("gfldeploy.quant.ptq", {})


def test_the_child_dies_with_its_parent(tmp_path: Path) -> None:
    note = tmp_path / "pid"
    hang = child(f"open({str(note)!r}, 'w').write(str(os.getpid())); time.sleep(300)")
    code = f"from gfldeploy.child_process import run_child; run_child({hang!r}, {{}})"
    with subprocess.Popen([sys.executable, "-c", code]) as parent:
        for _ in range(600):
            if note.exists() and note.read_text():
                break
            time.sleep(0.05)
        parent.kill()
    assert wait_until_dead(int(note.read_text()))


def wait_until_dead(pid: int) -> bool:
    """A process that was killed but not yet collected is dead."""
    for _ in range(100):
        try:
            if Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] in "ZX":
                return True
        except FileNotFoundError:
            return True
        time.sleep(0.05)
    return False
