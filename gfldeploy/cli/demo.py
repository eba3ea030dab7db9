"""`gfldeploy demo`."""

from __future__ import annotations

from pathlib import Path

import click

from gfldeploy.cli import options
from gfldeploy.cli.console import TerminalProgress


@click.command("demo")
@options.output("Directory to write.", Path("gfldeploy-demo"))
@options.THREADS
def command(output: Path, threads: int | None, force: bool) -> None:
    """Export, quantise and benchmark the built-in detector.

    A small GFL trained on generated shapes goes through every step that your own detector would. Takes a few minutes
    and leaves the bundles, the images, results.json and summary.md in the output directory.
    """
    from gfldeploy.cli.results import show_results
    from gfldeploy.demo.pipeline import explain, run_demo

    results = run_demo(output, force=force, threads=threads, progress=TerminalProgress())
    show_results(results)
    for line in explain(results):
        click.echo(f"\n{line}")
    click.echo(f"\nWrote {output}: fp32/ and int8/ (bundles), data/, results.json, results.html, summary.md.")
