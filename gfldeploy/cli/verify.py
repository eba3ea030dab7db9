"""`gfldeploy verify`."""

from __future__ import annotations

from pathlib import Path

import click

from gfldeploy.bundle import Bundle
from gfldeploy.cli.console import stages
from gfldeploy.cli.options import bundle_argument, threads_option
from gfldeploy.inspection import verify

__all__ = ["command"]


@click.command("verify")
@bundle_argument
@threads_option
def command(bundle: Path, threads: int) -> None:
    """Hash a bundle's files again and compare its graphs with each other."""
    for line in verify(Bundle.open(bundle), threads, stages()):
        click.echo(line)
