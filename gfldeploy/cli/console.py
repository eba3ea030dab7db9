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

__all__ = ["Progress", "command_line", "console", "progress_bar", "progress_bars", "stages"]

Progress = Callable[[int, int], None]


def console() -> Console:
    """A console on stdout, 120 columns wide where neither a terminal nor the environment says otherwise."""
    known = sys.stdout.isatty() or os.environ.get("COLUMNS", "").isdecimal()
    return escaping_console(width=None if known else 120)


def stages() -> Callable[[str], None]:
    """A reporter that prints each stage's name on stderr as it starts, with the seconds since the command began."""
    start = time.monotonic()

    def report(stage: str) -> None:
        click.echo(f"[{time.monotonic() - start:6.1f} s] {printable(stage, keep='')}", err=True)

    return report


@contextmanager
def progress_bar(label: str) -> Iterator[Progress]:
    """A callback `(done, total)` behind a progress bar with rate and time left; silent where stderr is no terminal."""
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
    from rich.progress import Progress as RichProgress

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with RichProgress(
        *columns, console=escaping_console(stderr=True), transient=True, disable=not sys.stderr.isatty()
    ) as bar:
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


@contextmanager
def progress_bars() -> Iterator[Callable[[str, int, int], None]]:
    """A callback `(label, done, total)` behind one bar at a time, which goes when it is full or a new label comes."""
    with ExitStack() as stack:
        current: dict[str, Progress] = {}

        def advance(label: str, done: int, total: int) -> None:
            if label not in current:
                stack.pop_all().close()
                current.clear()
                current[label] = stack.enter_context(progress_bar(label))
            current[label](done, total)
            if done >= total:
                stack.pop_all().close()
                current.clear()

        yield advance


def command_line() -> str:
    """This command, with paths cut to their last part: a bundle must not carry paths of the machine that made it."""
    return shlex.join(["gfldeploy", *(Path(word).name if "/" in word else word for word in sys.argv[1:])])
