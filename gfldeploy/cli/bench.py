"""`gfldeploy bench`."""

from __future__ import annotations

import os
from collections.abc import Sequence
from datetime import UTC, datetime
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from gfldeploy.cli.console import console, stages
from gfldeploy.cli.options import CommaSeparated, threads_option
from gfldeploy.engines.base import DEVICES, PRECISIONS, Device, Precision
from gfldeploy.engines.registry import ENGINES
from gfldeploy.errors import DataError, EngineError, GfldeployError, OutputError

if TYPE_CHECKING:
    from gfldeploy.bench.matrix import Plan
    from gfldeploy.bench.results import BenchResults
    from gfldeploy.bench.table import Row
    from gfldeploy.bundle import Bundle

__all__ = ["command"]


@click.command(name="bench")
@click.argument("bundles", nargs=-1, required=True, metavar="BUNDLE...", type=click.Path(path_type=Path))
@click.option(
    "--data", required=True, type=click.Path(path_type=Path), metavar="COCO.json", help="A COCO annotation file."
)
@click.option(
    "--images",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="Where its file names start.  [default: images/ beside it, else its folder]",
)
@click.option(
    "--engines", type=CommaSeparated(tuple(ENGINES)), default=",".join(ENGINES), show_default=True, help="What runs."
)
@click.option("--precisions", type=CommaSeparated(PRECISIONS), default=",".join(PRECISIONS), show_default=True)
@click.option("--batch-sizes", type=CommaSeparated(), default="1,2,4,8", show_default=True)
@click.option("--device", type=click.Choice(DEVICES), default="cpu", show_default=True)
@threads_option
@click.option(
    "--min-seconds", type=click.FloatRange(0), default=2.0, show_default=True, help="Time each cell at least so long."
)
@click.option(
    "--min-count", type=click.IntRange(1), default=10, show_default=True, help="Time at least so many inferences."
)
@click.option("--limit", type=click.IntRange(1), default=64, show_default=True, help="Images used for timing.")
@click.option("--accuracy/--no-accuracy", default=True, show_default=True, help="Measure mAP too.")
@click.option("--accuracy-limit", type=click.IntRange(1), help="Images used for mAP.  [default: all]")
@click.option(
    "--cell-timeout",
    type=click.FloatRange(0, min_open=True),
    default=600.0,
    show_default=True,
    help="Seconds after which a cell has failed; for mAP, seconds without an image done.",
)
@click.option(
    "--output", "-o", type=click.Path(path_type=Path), default=Path("results.json"), show_default=True, help="The file."
)
@click.option("--force", is_flag=True, help="Replace the output file if it exists.")
def command(
    bundles: tuple[Path, ...],
    data: Path,
    images: Path | None,
    engines: tuple[str, ...],
    precisions: tuple[Precision, ...],
    batch_sizes: tuple[int, ...],
    device: Device,
    threads: int,
    min_seconds: float,
    min_count: int,
    limit: int,
    accuracy: bool,
    accuracy_limit: int | None,
    cell_timeout: float,
    output: Path,
    force: bool,
) -> None:
    """Measure engines, precisions and batch sizes side by side.

    Every BUNDLE runs in every engine and precision it is made for, each cell in a process of its own; what cannot run
    is listed with the reason. Latencies are of the network alone, on real images; preprocessing and NMS are recorded
    apart. mAP is measured at batch 1, once for each engine and precision.
    """
    from gfldeploy.bench.matrix import plan as make_plan
    from gfldeploy.bench.results import BenchResults, DataDescription, Settings
    from gfldeploy.bench.runner import AccuracyData, run_plan
    from gfldeploy.bench.table import rows
    from gfldeploy.files import sha256
    from gfldeploy.images.coco import CocoDataset
    from gfldeploy.machine import describe_machine

    _check_output(output, force)
    opened = _open(bundles)
    timed = CocoDataset.load(data, images, limit)
    evaluated = _accuracy_data(data, images, accuracy_limit, opened) if accuracy else None
    plan = make_plan(opened, engines, precisions, batch_sizes, device, threads)
    _show_plan(plan)
    if not plan.cells:
        first = plan.skipped[0]
        raise EngineError(f"nothing to run: {first.engine} {first.precision} on {device}: {first.reason}", first.remedy)
    settings = Settings(min_seconds, min_count)
    stage = stages()
    cells = run_plan(
        plan,
        [image.path for image in timed.images],
        settings,
        AccuracyData(data, images, accuracy_limit) if accuracy else None,
        cell_timeout,
        lambda done, total, description: stage(f"{min(done + 1, total)}/{total} {description}"),
    )
    results = BenchResults(
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        machine=describe_machine(),
        data=DataDescription(sha256(data), len(timed.images), evaluated),
        settings=settings,
        cells=cells,
    )
    results.write(output)
    _show_results(results, rows(results))
    click.echo(f"Wrote {output}")
    if not any(cell.status == "ok" for cell in cells):
        failed = next(cell for cell in cells if cell.status == "failed")
        raise EngineError(
            f"no cell could be measured; {failed.engine} {failed.precision}: {failed.reason}", failed.remedy
        )


def _check_output(output: Path, force: bool) -> None:
    """Refuse now what would otherwise fail after an hour of measuring."""
    if output.is_dir():
        raise OutputError(f"{output} is a directory", "Give a file name as --output.")
    if output.exists() and not force:
        raise OutputError(f"{output} exists already", "Choose another --output, or add --force to replace it.")
    parent = next(folder for folder in output.absolute().parents if folder.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
        raise OutputError(f"cannot write {output}: {parent} is not a writable folder", "Choose another --output.")


def _open(paths: Sequence[Path]) -> list[Bundle]:
    """Each bundle once, whatever ways its path is written in."""
    from gfldeploy.bundle import Bundle

    unique: dict[Path, Path] = {}
    for path in paths:
        unique.setdefault(path.resolve(), path)
    # A path such as "." has no last part to name the bundle by.
    return [Bundle.open(path if path.name not in ("", "..") else resolved) for resolved, path in unique.items()]


def _accuracy_data(data: Path, images: Path | None, limit: int | None, bundles: Sequence[Bundle]) -> int:
    """The number of images for mAP; raises `DataError` now for what would fail in every cell later."""
    from gfldeploy.images.coco import CocoDataset

    dataset = CocoDataset.load(data, images, limit)
    if not dataset.annotations:
        raise DataError(f"{data} has no boxes to measure mAP against", "Add --no-accuracy to measure speed alone.")
    for bundle in bundles:
        try:
            dataset.class_to_category(bundle.manifest.classes)
        except DataError as error:
            raise DataError(
                f"{bundle.directory}: {error.problem}", f"{error.remedy} Or add --no-accuracy to measure speed alone."
            ) from error
    return len(dataset.images)


def _show_plan(plan: Plan) -> None:
    """What will run and what will not, on stderr."""

    def model(cell: Any) -> str:
        return f"{cell.engine:12} {cell.precision:5} {cell.bundle.name}"

    click.echo(f"Plan: {len(plan.cells)} cells to measure.", err=True)
    for name, cells in groupby(plan.cells, model):
        click.echo(f"  run   {name}, batch {', '.join(str(cell.batch_size) for cell in cells)}", err=True)
    for item in plan.skipped:
        batch = f" batch {item.batch_size}" if item.batch_size else ""
        remedy = f"; {item.remedy}" if item.remedy else ""
        click.echo(f"  skip  {item.engine:12} {item.precision:5}{batch} {item.reason}{remedy}", err=True)


def _show_results(results: BenchResults, shown: Sequence[Row]) -> None:
    """The measured cells as a table, then a line for each of the others: reasons are too long for a column."""
    from rich.markup import escape
    from rich.table import Table

    threads = results.cells[0].threads
    table = Table(title=escape(f"{results.machine.cpu}, {threads} thread{'s' if threads > 1 else ''}"))
    measured = [row for row in shown if row.latency_ms is not None]
    several = len({row.bundle for row in measured}) > 1
    for header in (*(["bundle"] if several else []), "engine", "precision"):
        table.add_column(header)
    for header in ("batch", "median ms", "p90 ms", "images/s", "mAP", "low-prec. convs", "memory MB"):
        table.add_column(header, justify="right")
    for row in measured:
        table.add_row(
            *([escape(row.bundle or "")] if several else []),
            row.engine,
            row.precision,
            str(row.batch_size),
            _number(row.latency_ms, 2),
            _number(row.p90_ms, 2),
            _number(row.images_per_s, 2),
            _number(row.ap, 3),
            row.low_precision or "",
            _number(row.memory_mb, 0),
        )
    if measured:
        console().print(table)
    for row in shown:
        if row.note:
            batch = f" batch {row.batch_size}" if row.batch_size else ""
            bundle = f" of {row.bundle}" if row.bundle and several else ""
            click.echo(f"{row.engine} {row.precision}{batch}{bundle}: {row.note}")


def _number(value: float | None, decimals: int) -> str:
    return "" if value is None else f"{value:.{decimals}f}"
