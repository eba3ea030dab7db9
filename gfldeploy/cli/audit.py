"""`gfldeploy audit`."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import groupby
from operator import attrgetter
from typing import TYPE_CHECKING, Any

import click

from gfldeploy.bench.columns import Column
from gfldeploy.cli import options
from gfldeploy.cli.console import TerminalProgress, gate_code
from gfldeploy.cli.tables import show_table
from gfldeploy.serialization import plain

if TYPE_CHECKING:
    from gfldeploy.batching.audit import Audit, AuditRow

_NAMED = 3  # images left out that are named


@click.command("audit")
@options.group(*options.IMAGES)
@click.option(
    "--config-or-bundle",
    required=True,
    type=options.PATH,
    help="PaddleDetection config (.yml), or a bundle, which gives MACs and memory too.",
)
@options.batch_sizes("compare", show_default="1,2,4,8,16, or the only one that the bundle takes")
@options.input_sizes("compare with that of the bundle or config", "none")
@options.group(*options.TILES)
@click.option(
    "--buckets",
    type=options.WholeNumber(1),
    show_default="no limit",
    help="Largest number of sizes of bucketed batches.",
)
@options.seed("the shuffled order")
@click.option(
    "--max-padding",
    type=options.FiniteFloat(1),
    metavar="RATIO",
    show_default="none",
    help="Exit with 1 if listed batches of any of the sizes (with --buckets: bucketed ones; with --tile: those of "
    "tiles) have more than this many times the pixels of the resized images.",
)
@options.JSON
def command(as_json: bool, max_padding: float | None, **given: Any) -> int:
    """Show what batches of your images would cost, before any inference.

    A batch is padded to one size: where it holds a portrait and a landscape image, every image in it costs more pixels
    than alone. For each batch size this shows how many more with the images listed, shuffled, sorted by size, and
    bucketed (images of one input size in each batch). Only the headers of the files are read; images that cannot be
    used are named and left out.

    With --tile it also shows how many tiles and inferences an image is then, and what they cost.

    \b
    Example: gfldeploy audit --data images/ --config-or-bundle gfl_r50
    """
    from gfldeploy.analysis.audit import audit
    from gfldeploy.gates import padding_gate

    found = audit(**given, progress=TerminalProgress())
    _report_left_out(found)
    if as_json:
        click.echo(json.dumps(plain(found), indent=2))
    else:
        _show(found)
    if max_padding is None:
        return 0
    return gate_code(padding_gate(found, max_padding, "bucketed" if given["buckets"] else "listed"))


def _report_left_out(found: Audit) -> None:
    if not found.left_out:
        return
    total = len(found.left_out) + found.images
    click.echo(f"{len(found.left_out)} of {total} images cannot be used and are left out:", err=True)
    for one in found.left_out[:_NAMED]:
        click.echo(f"  {one.reason}", err=True)
    if more := len(found.left_out[_NAMED:]):
        click.echo(f"  and {more} more (--json names all)", err=True)


def _show_tiles(found: Audit) -> None:
    _report_left_out(found)
    columns: tuple[Column[AuditRow], ...] = (
        Column("batch_size", "batch", lambda row: row.batch_size),
        Column("inferences", "inferences", lambda row: f"{row.inferences:,.1f}", "an image"),
        *_OF_BATCHES,
    )
    click.echo()
    show_table(columns, found.rows, elsewhere="--json has everything.")
    for sentence in found.answer:
        click.echo(sentence)


def _show(found: Audit) -> None:
    from gfldeploy.analysis.audit import gmac

    alike = [
        size
        for size, rows in groupby(found.rows, attrgetter("batch_size"))
        if len({replace(row, order="listed") for row in rows}) == 1
    ]
    columns: tuple[Column[AuditRow], ...] = (
        Column("batch_size", "batch", lambda row: row.batch_size),
        Column("order", "order", lambda row: "any" if row.batch_size in alike else row.order, words=True),
        Column("padding", "pixels", lambda row: f"{row.padding:.3f}x"),
        Column("macs", "GMAC", lambda row: row.macs and gmac(row.macs)),
        Column("mixed", "mixed", lambda row: f"{row.mixed / row.batches:.0%}"),
        *_OF_BATCHES,
    )
    rows = [row for row in found.rows if row.batch_size not in alike or row.order == "listed"]
    show_table(columns, rows, elsewhere="--json has everything.")
    work = ", GMAC: per image" if found.macs else ""
    memory = "; activations: an estimate for FP32, the input included, weights not" if found.macs else ""
    click.echo(
        f"pixels: by those of the same images at batch 1{work}; mixed: batches with portrait and landscape images"
    )
    click.echo(f"input: of the largest batch, and of the mean one{memory}\n")
    for sentence in found.answer:
        click.echo(sentence)
    if found.in_tiles is not None:
        _show_tiles(found.in_tiles)
    if found.macs is None:
        click.echo("For MACs and the memory of activations, give a bundle of `gfldeploy export` with an ONNX graph.")


def _largest(row: AuditRow) -> str:
    count, height, width = row.largest
    return f"{count}x3x{height}x{width}"


def _activations(row: AuditRow) -> str | None:
    return None if row.activation_bytes is None else f"{row.activation_bytes / 1e6:,.0f}"


_OF_BATCHES: tuple[Column[AuditRow], ...] = (
    Column("batches", "batches", lambda row: f"{row.batches:,}", drop=3),
    Column("largest", "largest batch", _largest, drop=2),
    Column("input", "input", lambda row: f"{row.input_bytes / 1e6:,.1f}", "MB", drop=1),
    Column("mean_input", "mean input", lambda row: f"{row.mean_input_bytes / 1e6:,.1f}", "MB", drop=4),
    Column("activations", "activations", _activations, "MB", drop=1),
)
