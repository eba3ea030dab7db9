"""`gfldeploy demo`."""

from __future__ import annotations

from pathlib import Path

import click

from gfldeploy.cli.console import progress_bars, stages
from gfldeploy.cli.options import PATH, force_option, threads_option

__all__ = ["command"]


@click.command("demo")
@click.option(
    "--output",
    "-o",
    type=PATH,
    default=Path("gfldeploy-demo"),
    show_default=True,
    help="Directory to write.",
)
@threads_option
@force_option
def command(output: Path, threads: int, force: bool) -> None:
    """Export, quantise and benchmark the built-in detector.

    A small GFL trained on generated shapes goes through every step that your own detector would. Takes a few minutes
    and leaves the bundles, the images, results.json and summary.md in the output directory.
    """
    from gfldeploy.cli.results import show_results
    from gfldeploy.demo.pipeline import explain, run_demo

    with progress_bars() as progress:
        results = run_demo(output, force=force, threads=threads, report=stages(), progress=progress)
    show_results(results)
    for line in explain(results):
        click.echo(f"\n{line}")
    click.echo(f"\nWrote {output}: fp32/ and int8/ (bundles), data/, results.json, results.html, summary.md.")
