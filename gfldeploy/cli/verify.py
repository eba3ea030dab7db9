"""`gfldeploy verify`."""

from __future__ import annotations

from typing import Any

import click

from gfldeploy.cli import options
from gfldeploy.cli.console import TerminalProgress
from gfldeploy.inspection import verify


@click.command("verify")
@options.group(options.BUNDLE, options.THREADS)
def command(**given: Any) -> None:
    """Hash a bundle's files again, compare its graphs with each other, and check its golden picture.

    \b
    Example: gfldeploy verify gfl_r50_int8
    """
    for line in verify(**given, progress=TerminalProgress()):
        click.echo(line)
