"""`gfldeploy analyze`."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path

import click

from gfldeploy.analysis.causes import PARTS, analyze_passes
from gfldeploy.analysis.invariance import Invariance, measure_invariance
from gfldeploy.analysis.record import Analysis
from gfldeploy.analysis.sweep import arrangements, measure_passes
from gfldeploy.bench.cell import BundleIdentity, Cell
from gfldeploy.bench.cost import count_cost
from gfldeploy.bench.runner import run_peak
from gfldeploy.bundle import Bundle
from gfldeploy.cli.console import progress_bars, stages
from gfldeploy.cli.options import DIRECTORY, FILE, PATH, CommaSeparated, WholeNumber, bundle_argument, engine_options
from gfldeploy.cli.tables import TableColumn, show_table
from gfldeploy.engines.base import Device, EngineOptions, Precision
from gfldeploy.engines.registry import open_engine, preferred_engine
from gfldeploy.errors import GfldeployError, OutputError, UnsupportedError
from gfldeploy.files import check_file
from gfldeploy.images.coco import CocoDataset
from gfldeploy.machine import describe_machine
from gfldeploy.signals import hold_interrupts

__all__ = ["command"]


@click.command("analyze")
@bundle_argument
@click.option("--data", required=True, type=FILE, help="COCO annotations (.json).")
@click.option("--images", type=DIRECTORY, help="Folder of the images. Default: images/ beside the annotations.")
@engine_options
@click.option("--batch-sizes", type=CommaSeparated(), default="2,4,8", show_default=True, help="Beside batch 1.")
@click.option("--limit", type=WholeNumber(1), default=32, show_default=True, help="Use the first N images only.")
@click.option("--rounds", type=WholeNumber(2), default=5, show_default=True, help="How often each is run, interleaved.")
@click.option("--peak/--no-peak", default=True, show_default=True, help="Measure what the engine reaches at best too.")
@click.option(
    "--invariance/--no-invariance", default=True, show_default=True, help="Compare detections with those of batch 1."
)
@click.option(
    "--output", "-o", type=PATH, default=Path("analysis.json"), show_default=True,
    help="The file; a page (.html) is written beside it.",
)  # fmt: skip
@click.option("--force", is_flag=True, help="Replace the output files if they exist.")
def command(
    bundle: Path,
    data: Path,
    images: Path | None,
    engine: str | None,
    precision: Precision | None,
    device: Device,
    threads: int,
    batch_sizes: tuple[int, ...],
    limit: int,
    rounds: int,
    peak: bool,
    invariance: bool,
    output: Path,
    force: bool,
) -> None:
    """Say why images take longer in larger batches, or no less.

    The same images run in batches of every size, as listed and grouped by input
    size, interleaved. The change in the time of an image is split into padding,
    convolutions, the network's other work, and host work.
    """
    _check_output(output, force)
    opened = Bundle.open(bundle)
    if (fixed := opened.manifest.inputs[0].shape[0]) is not None:
        raise UnsupportedError(f"{bundle} takes batches of {fixed} only", "Export it without a fixed batch size.")
    dataset = CocoDataset.load(data, images, limit)
    options = EngineOptions(precision or opened.manifest.precision, device, threads)
    engine = engine or preferred_engine(opened, options.precision, device)[0]
    for note in dataset.notes:
        click.echo(f"Note: {note}", err=True)
    report = stages()
    chosen = arrangements(batch_sizes)
    best = None
    if peak:
        report("measuring what the engine reaches at best")
        best = run_peak(
            Cell(
                bundle=BundleIdentity.of(opened),
                engine=engine,
                precision=options.precision,
                device=device,
                threads=threads,
                batch_size=1,
                scenario="single-stream",
            )
        )
    compared: list[Invariance] = []
    with open_engine(engine, opened, options) as running, progress_bars() as bars:
        report("running the same images in batches of every size, interleaved")
        paths = [image.path for image in dataset.images]
        measured = measure_passes(running, paths, opened, chosen, rounds, lambda done, n: bars("passes", done, n))
        if invariance:
            report("comparing detections with those of batch 1")
            compared = measure_invariance(
                running, dataset, opened, batch_sizes, lambda done, n: bars("comparing", done, n)
            )
    found = Analysis(
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        machine=describe_machine(),
        bundle=BundleIdentity.of(opened),
        engine=engine,
        precision=options.precision,
        threads=threads,
        images=len(paths),
        peak=best,
        rounds=tuple(tuple(passes) for passes in measured),
        batches=tuple(analyze_passes(measured, _macs(opened, dataset), best.gmac_per_s if best else None)),
        invariance=tuple(compared),
    )
    _check_output(output, force)  # somebody else may have been faster
    with hold_interrupts():
        found.write(output)
    _show(found)
    click.echo(f"Wrote {output} and {output.with_suffix('.html')}")


def _check_output(output: Path, force: bool) -> None:
    if output.suffix == ".html":
        raise OutputError(f"{output} is where the page would be", "Give the name of a .json file.")
    check_file(output, "json", force=force)
    check_file(output.with_suffix(".html"), "html", force=force)


def _macs(bundle: Bundle, dataset: CocoDataset) -> float | None:
    """Of one image by itself, the mean; None where the graph cannot be counted."""
    sizes = [bundle.manifest.preprocess.input_size(*image.size()) for image in dataset.images]
    try:
        return count_cost(bundle, bundle.manifest.precision, sizes, {(1, *size): 1 for size in sizes}).macs
    except GfldeployError:
        return None


def _show(found: Analysis) -> None:
    parts = [part for part in PARTS if found.batches and part in found.batches[0].parts]
    columns = (
        TableColumn("batch"),
        TableColumn("listed"),
        TableColumn("bucketed"),
        *(TableColumn(part.replace(" ", "\n"), drop=3) for part in parts),
        TableColumn("unexplained", drop=4),
        TableColumn("padded", drop=1),
        TableColumn("% of\npeak", drop=5),
        TableColumn("cause", right=False, text=True, drop=2),
    )
    lines = [
        (
            *(str(one.batch_size), f"{one.ms:.1f}", f"{one.grouped_ms:.1f}"),
            *(f"{one.parts[part].ms:+.1f}" for part in parts),
            *(f"{one.unexplained_ms:+.1f}", f"{one.padding:.2f}x"),
            "" if one.percent_of_peak is None else f"{one.percent_of_peak:.0f}",
            one.cause,
        )
        for one in found.batches
    ]
    threads = f"{found.threads} thread{'' if found.threads == 1 else 's'}"
    title = f"{found.engine} {found.precision}, {threads}, ms an image from file to boxes"
    show_table(columns, lines, title, "The page has every column.")
    for sentence in found.answer:
        click.echo(sentence)
