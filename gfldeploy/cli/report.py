"""`gfldeploy report`."""

from __future__ import annotations

from pathlib import Path

import click

from gfldeploy.cli import options


@click.command(name="report")
@click.argument("results", type=options.PATH, metavar="RESULTS.json")
@options.output("HTML page to write.", required=False, show_default="RESULTS.html beside the file")
def command(results: Path, output: Path | None, force: bool) -> None:
    """Turn a file of `gfldeploy bench` into one HTML page, which needs no network.

    The short answer, a table that can be sorted, interactive plots, the machine and the settings.

    \b
    Example: gfldeploy report results.json
    """
    from gfldeploy.bench.report.page import report

    click.echo(f"Wrote {report(results, output=output, force=force)}")
