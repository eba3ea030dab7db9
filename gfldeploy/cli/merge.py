"""`gfldeploy merge`."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import click

from gfldeploy.cli import options
from gfldeploy.cli.console import TerminalProgress
from gfldeploy.cli.predict import report


@click.command("merge")
@click.argument("parts", nargs=-1, required=True, metavar="PART...", type=options.SOURCE)
@options.output("Folder to write the results to, here or at an address of a filesystem.", type=options.SOURCE)
@options.DRAW
def command(output: Path, **given: Any) -> int:
    """Make the results of one run from the parts that `gfldeploy predict --shard K/N` wrote.

    PART are the folders of all N parts, in any order. OUTPUT receives what one `gfldeploy predict` would have written,
    byte for byte where all machines have the same processor; where they have not, predict.json lists them. A part that
    is missing, damaged or of another run is named. The images are needed again for --draw alone.

    \b
    Example: gfldeploy merge parts/* --output found
    """
    from gfldeploy.predict.parts import merge_parts

    start = time.monotonic()
    found = merge_parts(**given, output=output, progress=TerminalProgress())
    report(found, time.monotonic() - start)
    click.echo(str(output))
    return 1 if found.failed else 0
