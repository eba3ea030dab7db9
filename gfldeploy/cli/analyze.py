"""`gfldeploy analyze`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from gfldeploy.analysis.record import Analysis, columns
from gfldeploy.analysis.session import analyze
from gfldeploy.cli import options
from gfldeploy.cli.console import TerminalProgress
from gfldeploy.cli.tables import show_table
from gfldeploy.engines.base import with_tf32


@click.command("analyze")
@options.group(options.BUNDLE, *options.ANNOTATIONS, *options.ENGINE, options.INPUT_SIZE)
@options.batch_sizes("compare with batch 1", "2,4,8")
@options.limit(32)
@click.option("--rounds", type=options.WholeNumber(2), default=5, help="Number of interleaved rounds of all batches.")
@options.PEAK
@click.option(
    "--invariance/--no-invariance", default=True, help="Compare the detections of batches with those of batch 1."
)
@options.ENGINE_CACHE
@options.output("File to write; a page (.html) is written beside it.", Path("analysis.json"))
def command(output: Path, **given: Any) -> None:
    """Say why images take longer in larger batches, or no less.

    The same images run in batches of every size, listed and bucketed by input size, interleaved. The change in the
    time of an image is split into padding, convolutions, the network's other work, and host work.

    \b
    Example: gfldeploy analyze gfl_r50 --data val.json --batch-sizes 2,4
    """
    found = analyze(**given, output=output, progress=TerminalProgress())
    _show(found)
    click.echo(f"Wrote {output} and {output.with_suffix('.html')}")


def _show(found: Analysis) -> None:
    threads = f"{found.threads} thread{'' if found.threads == 1 else 's'}"
    how = f"{found.engine} {with_tf32(found.precision, found.tf32)}, {threads}"
    title = f"{how}: ms of an image from file to boxes, and the changes"
    show_table(columns(found), found.batches, title, "The page has every column.")
    for sentence in found.answer:
        click.echo(sentence)
