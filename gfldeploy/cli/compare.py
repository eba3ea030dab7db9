"""`gfldeploy compare`."""

from __future__ import annotations

import json
from pathlib import Path

import click

from gfldeploy.cli.console import console
from gfldeploy.cli.options import json_option

__all__ = ["command"]


@click.command(name="compare")
@click.argument("first", type=click.Path(path_type=Path), metavar="A.json")
@click.argument("second", type=click.Path(path_type=Path), metavar="B.json")
@click.option("--different-machines", is_flag=True, help="Compare though the machines differ.")
@click.option("--different-data", is_flag=True, help="Compare though images or settings differ.")
@json_option
def command(first: Path, second: Path, different_machines: bool, different_data: bool, as_json: bool) -> None:
    """Compare two files of `gfldeploy bench`: B's latencies against A's, with 95% intervals.

    A ratio below 1 means that B is faster. The intervals hold what differs between the rounds of a file: measure both
    with several rounds.
    """
    from rich.markup import escape
    from rich.table import Table

    from gfldeploy.bench.compare import compare
    from gfldeploy.bench.records import plain
    from gfldeploy.bench.results import BenchResults

    found = compare(
        BenchResults.read(first),
        BenchResults.read(second),
        different_machines=different_machines,
        different_data=different_data,
    )
    if as_json:
        verdicts = [{**plain(one), "verdict": one.verdict} for one in found.differences]
        click.echo(json.dumps({**plain(found), "differences": verdicts}, indent=2))
        return
    table = Table(title=escape(f"latency of {second.name} over {first.name}"))
    for header in ("cell", "ratio", "95% interval", "verdict", "mAP", "note"):
        table.add_column(header)
    for one in found.differences:
        ratio = one.ratio
        notes = [] if one.same_bundle else ["other bundle"]
        table.add_row(
            escape(one.name),
            f"{ratio.value:.3f}",
            "" if ratio.low is None or ratio.high is None else f"{ratio.low:.3f} to {ratio.high:.3f}",
            one.verdict,
            "unknown" if one.ap_change is None else f"{one.ap_change:+.4f}",
            ", ".join([*notes, *one.flags]),
        )
    console().print(table)
    for path, names in ((first, found.only_first), (second, found.only_second)):
        for name in names:
            click.echo(f"only in {path.name}: {name}")
    for warning in found.warnings:
        click.echo(f"differs: {warning}")
