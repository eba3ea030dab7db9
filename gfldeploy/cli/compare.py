"""`gfldeploy compare`."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

import click

from gfldeploy.cli import options
from gfldeploy.cli.console import gate_code
from gfldeploy.gates import DEFAULT_PERCENT

if TYPE_CHECKING:
    from gfldeploy.bench.compare import Comparison, Difference, OneSided, Pair
    from gfldeploy.bench.estimates import Estimate

_FAIL = "--fail-if-slower"


class _Command(click.Command):
    """Click takes whatever follows for the value of an option that may go without one: a file, too."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        for place, (word, following) in enumerate(pairwise([*args, ""])):
            if word == "--":
                break
            if word == _FAIL and not following.replace(".", "", 1).isdecimal():
                args = [*args[:place], f"{_FAIL}={DEFAULT_PERCENT:g}", *args[place + 1 :]]
        return super().parse_args(ctx, args)


@click.command("compare", cls=_Command)
@click.argument("a", metavar="A.json", type=options.PATH)
@click.argument("b", metavar="[B.json]", type=options.PATH, required=False)
@click.option(
    "--bundles",
    type=options.Parsed("A,B", str, listed=True),
    metavar="A,B",
    show_default="none",
    help="Compare two bundles of one file, by the names of their directories. Their rounds were interleaved, so that "
    "what slows the machine down for a while is no difference.",
)
@click.option("--different-machines", is_flag=True, help="Compare even if the hardware differs.")
@click.option(
    "--different-data", is_flag=True, help="Compare even if the timed images, or how they were timed, differ."
)
@click.option(
    _FAIL,
    type=options.FiniteFloat(0),
    is_flag=False,
    flag_value=DEFAULT_PERCENT,
    metavar="[PERCENT]",
    help=f"Exit with 1 if a cell of A is slower in B by more than this (without a number: {DEFAULT_PERCENT:g}) and "
    "than the noise, through the network or from file to boxes; and if that is not known, as of a cell that B lacks, "
    "that failed there, or that has too few samples.",
)
@options.JSON
def command(
    a: Path,
    b: Path | None,
    bundles: tuple[str, ...] | None,
    different_machines: bool,
    different_data: bool,
    fail_if_slower: float | None,
    as_json: bool,
) -> int:
    """Compare two results files, or two bundles in one, with intervals.

    For each cell this shows the ratio of the median latencies of the network alone, B to A, with its 95% confidence
    interval, and whether B is faster, slower, or no difference was found, because the interval includes 1; then the
    same ratio from file to boxes. For servers it shows the images answered in time instead, since their latencies do
    not include rejected images. Packages and drivers may differ, and are listed where they do.

    \b
    Example: gfldeploy compare before.json after.json
    """
    from gfldeploy.bench.compare import compare
    from gfldeploy.gates import speed_gate
    from gfldeploy.serialization import plain

    if bundles is not None and len(bundles) != 2:
        raise click.UsageError("--bundles takes two names of directories, such as old,new")
    pair = None if bundles is None else (bundles[0], bundles[1])
    found = compare(a, b, bundles=pair, different_machines=different_machines, different_data=different_data)
    if as_json:
        click.echo(json.dumps(plain(found), indent=2))
    elif found.identical:
        click.echo(f"{a} and {b} hold the same results.")
    else:
        _show(found)
    return 0 if fail_if_slower is None else gate_code(speed_gate(found, fail_if_slower))


def _show(found: Comparison) -> None:
    from gfldeploy.bench.table import FLAGS

    _show_pairs(found.pairs)
    counts = Counter(pair.verdict for pair in found.pairs)
    click.echo(f"B is {', '.join(f'{verdict}: {count}' for verdict, count in counts.items())}.")
    if len(found.pairs) >= 10:
        click.echo(f"Of {len(found.pairs)} cells, {len(found.pairs) * 0.05:.0f} or so would differ by chance alone.")
    for flag, meaning in FLAGS.items():
        if any(flag in pair.a_flags or flag in pair.b_flags for pair in found.pairs):
            click.echo(f"{flag}: {meaning}")
    _show_one_sided("Only in A", found.only_a)
    _show_one_sided("Only in B", found.only_b)
    _show_one_sided("Failed in both", found.failed, "")
    _show_differences("Hardware", found.hardware)
    _show_differences("Timing", found.data)
    _show_differences("Software", found.software)
    _show_differences("Other", found.notes)


def _show_pairs(pairs: Sequence[Pair]) -> None:
    from gfldeploy.bench.columns import Column
    from gfldeploy.cli.tables import show_table

    changed = any(pair.bundle_changed for pair in pairs)
    accuracy = any(pair.ap_difference is not None for pair in pairs)
    cells = [pair.cell for pair in pairs]
    columns: tuple[Column[Pair], ...] = (
        Column("cell", "cell", lambda pair: pair.cell.name(cells), words=True, wrap=True),
        Column("a", "A", lambda pair: pair.a_ms.value, "ms"),
        Column("b", "B", lambda pair: pair.b_ms.value, "ms"),
        Column("ratio", "B / A", lambda pair: pair.ratio, digits=3),
        Column("verdict", "B is", lambda pair: pair.verdict.removesuffix(" found"), words=True),
        Column("file", "B / A, file to boxes", _file_ratio, digits=3, drop=1),
        Column("in_time", "in time/s", _in_time, drop=1),
        Column("ap", "mAP", lambda pair: _points(pair.ap_difference) if accuracy else None),
        Column("bundle", "bundle", lambda pair: _bundle(pair) if changed else None, words=True, drop=2),
        Column("flags", "flags", _flags, words=True, wrap=True, drop=3),
    )
    servers = {pair.cell.is_server for pair in pairs}
    what = ["The network alone, median of a batch"] if False in servers else []
    what += ["Servers from arrival to answer, median of an image"] if True in servers else []
    show_table(columns, pairs, "; ".join(what), "--json has everything.")


def _file_ratio(pair: Pair) -> Estimate | None:
    return next((one.ratio for one in pair.slowness if one.figure == "file to boxes"), None)


def _in_time(pair: Pair) -> str:
    from gfldeploy.bench.columns import text_of

    if pair.a_in_time_per_s is None:
        return ""
    return f"{text_of(pair.a_in_time_per_s)}, {text_of(pair.b_in_time_per_s)}"


def _bundle(pair: Pair) -> str:
    return "changed" if pair.bundle_changed else "same"


def _points(difference: float | None) -> str:
    return "unknown" if difference is None else f"{difference:+.3f}"


def _flags(pair: Pair) -> str:
    sides = (("A", pair.a_flags), ("B", pair.b_flags))
    return "; ".join(f"{side} {' '.join(flags)}" for side, flags in sides if flags)


def _show_one_sided(where: str, found: Sequence[OneSided], whose: str = "in the other, ") -> None:
    cells = [one.cell for one in found]
    for one in found:
        reason = f" ({whose}{one.reason})" if one.reason else ""
        click.echo(f"{where}: {one.cell.name(cells)}{reason}")


def _show_differences(title: str, differences: Sequence[Difference]) -> None:
    for one in differences:
        click.echo(f"{title}: {one.what}: {one.a or 'none'} in A, {one.b or 'none'} in B")
