"""Progress as the commands show it: stages and notes on standard error, and bars in a terminal alone."""

from __future__ import annotations

import os
import pty
import re
import subprocess
import sys

import click
import pytest

from gfldeploy.cli.console import TerminalProgress
from gfldeploy.progress import SILENT, Progress

WORK = """
import click
from gfldeploy.cli.console import TerminalProgress
with click.Context(click.Command("work")):
    progress = TerminalProgress()
    progress.step("images", 1, 3)
    progress.step("images", 2, 3)
    progress.stage("writing")
    progress.step("rounds", 1, 2)
    raise SystemExit(3)
"""


def tell(progress: Progress) -> None:
    progress.stage("reading \x1b[2J")
    progress.step("images", 1, 2)
    progress.note("the annotations are few")
    progress.step("images", 2, 2)


def test_without_a_terminal_there_are_lines_alone(capsys: pytest.CaptureFixture[str]) -> None:
    with click.Context(click.Command("work")):
        tell(TerminalProgress())
    shown, told = capsys.readouterr()
    assert shown == ""
    assert re.fullmatch(r"\[ +0\.\d s\] reading \\x1b\[2J\nNote: the annotations are few\n", told)
    tell(SILENT)
    assert capsys.readouterr() == ("", "")


def test_a_bar_ends_with_its_work_and_with_the_command() -> None:
    main_end, terminal = pty.openpty()
    done = subprocess.run(
        [sys.executable, "-c", WORK], stderr=terminal, env={**os.environ, "TERM": "xterm"}, timeout=60
    )
    assert done.returncode == 3
    told = os.read(main_end, 65536).decode()
    assert "images" in told and "2/3" in told and "rounds" in told and "] writing" in told
    assert told.rfind("\x1b[?25h") > told.rfind("\x1b[?25l") >= 0, "the cursor is there again"
