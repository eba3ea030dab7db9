"""What the commands show while they work: progress on stderr, results on stdout."""

from __future__ import annotations

import os
import shlex
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import click

from gfldeploy.cli.plain_text import escaping_console
from gfldeploy.text import printable

if TYPE_CHECKING:
    from rich.console import Console

    from gfldeploy.gates import Gate


def console() -> Console:
    """A console on stdout, 120 columns wide where neither a terminal nor the environment says otherwise."""
    known = sys.stdout.isatty() or os.environ.get("COLUMNS", "").isdecimal()
    return escaping_console(width=None if known else 120)


def gate_code(gate: Gate) -> int:
    """Tell of the gate in one line on stderr, after the results; its exit code, which is not that of an error."""
    click.echo(f"Gate {'passed' if gate.passed else 'failed'}: {' '.join(gate.text.split())}", err=True)
    return 0 if gate.passed else 1


class TerminalProgress:
    """Shows `Progress` on stderr: a line for each stage with the seconds since the start, and one bar at a time.

    Without a terminal there are no bars. The last bar goes when the command ends.
    """

    def __init__(self) -> None:
        self._start = time.monotonic()
        self._bar: tuple[str, Callable[[int, int], None]] | None = None
        self._stack = ExitStack()
        click.get_current_context().call_on_close(self._stack.close)

    def stage(self, text: str) -> None:
        self._end_bar()
        click.echo(f"[{time.monotonic() - self._start:6.1f} s] {printable(text, keep='')}", err=True)

    def step(self, label: str, done: int, total: int) -> None:
        bar = self._bar  # which a stage told by another thread may end meanwhile
        if bar is None or bar[0] != label:
            self._end_bar()
            bar = self._bar = label, self._stack.enter_context(_bar(label))
        bar[1](done, total)
        if done >= total:
            self._end_bar()

    def note(self, text: str) -> None:
        self._end_bar()
        click.echo(f"Note: {printable(text, keep='')}", err=True)

    def _end_bar(self) -> None:
        self._stack.close()
        self._bar = None


@contextmanager
def _bar(label: str) -> Iterator[Callable[[int, int], None]]:
    """A function of what is done and the total: on a terminal, a progress bar with rate and time left."""
    if not sys.stderr.isatty():
        yield lambda done, total: None
        return
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=escaping_console(stderr=True), transient=True) as bar:
        task = bar.add_task(label, total=None, rate="")
        first: list[tuple[float, int]] = []  # when, and what a run before this one had done by then

        def advance(done: int, total: int) -> None:
            now = time.monotonic()
            if not first:
                first.append((now, done))
                bar.reset(task, completed=done, total=total, rate="")
            start, before = first[0]
            rate = f"{(done - before) / (now - start):.3g}/s" if done > before and now > start else ""
            bar.update(task, completed=done, total=total, rate=rate)

        yield advance


def command_line() -> str:
    """This command, with paths cut to their last part: a bundle must not carry paths of the machine that made it."""
    return shlex.join(["gfldeploy", *(Path(word).name if "/" in word else word for word in sys.argv[1:])])
