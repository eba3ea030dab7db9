"""Standard streams that are closed, full or gone: the work is done, and an exit code says what could not be told."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest


def shell(line: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """Run a line of bash in which `gfldeploy` is this one."""
    define = f'gfldeploy() {{ {shlex.quote(sys.executable)} -P -m gfldeploy "$@"; }}\nset -o pipefail\n'
    return subprocess.run(["bash", "-c", define + line], capture_output=True, text=True, cwd=folder)


FULL = "Error: cannot write to standard output: No space left on device. Send it somewhere else.\n"


@pytest.mark.parametrize(
    ("redirection", "code", "errors"),
    [
        (">&-", 0, ""),
        ("<&- >&- 2>&-", 0, ""),
        ("> /dev/full", 2, FULL),
        ("> /dev/full 2> /dev/full", 2, ""),
        ("| head -1 > /dev/null", 0, ""),
    ],
)
def test_streams_that_take_nothing(redirection: str, code: int, errors: str, tmp_path: Path) -> None:
    done = shell(f"gfldeploy --help {redirection}", tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (code, "", errors)
    assert list(tmp_path.iterdir()) == []


def test_results_are_not_printed_into(tiny_bundle: Path, tiny_coco: Path, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    command = f"gfldeploy predict {tiny_bundle} {tiny_coco.parent / 'images'} --engine onnxruntime"
    assert shell(f"{command} -o open 2> /dev/null", tmp_path).returncode == 0
    assert shell(f"{command} -o closed <&- >&- 2>&-", tmp_path).returncode == 0
    for name in ("detections.jsonl", "coco.json", "images.json"):
        assert (tmp_path / "closed" / name).read_bytes() == (tmp_path / "open" / name).read_bytes()


def test_a_folder_that_is_gone(tmp_path: Path) -> None:
    done = shell("mkdir gone; cd gone; rmdir ../gone; gfldeploy inspect x", tmp_path)
    assert (done.returncode, done.stderr) == (
        2,
        "Error: the current directory does not exist any more. Change to another one.\n",
    )


def test_a_bug_has_an_exit_code_of_its_own(tmp_path: Path) -> None:
    code = (
        "import sys, gfldeploy.cli\nfrom gfldeploy.__main__ import main\n"
        "def command(*arguments, **options): raise LookupError('where?')\n"
        "gfldeploy.cli.cli.main = command\nmain()\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ})
    assert done.returncode == 70
    assert done.stderr.startswith("Traceback") and done.stderr.endswith("LookupError: where?\n")
