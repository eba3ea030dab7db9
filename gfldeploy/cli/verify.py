"""`gfldeploy verify`."""

from __future__ import annotations

from pathlib import Path

import click

from gfldeploy.bundle import Bundle
from gfldeploy.cli.console import TerminalProgress
from gfldeploy.cli.options import BUNDLE, THREADS, options
from gfldeploy.engines.hardware import usable_threads
from gfldeploy.inspection import verify

__all__ = ["command"]


@click.command("verify")
@options(BUNDLE, THREADS)
def command(bundle: Path, threads: int | None) -> None:
    """Hash a bundle's files again and compare its graphs with each other.

    \b
    Example: gfldeploy verify gfl_r50_int8
    """
    for line in verify(Bundle.open(bundle), threads or usable_threads(), TerminalProgress().stage):
        click.echo(line)
