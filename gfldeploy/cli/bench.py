"""`gfldeploy bench`."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from gfldeploy.cli.console import stages
from gfldeploy.cli.options import CommaSeparated, threads_option
from gfldeploy.engines.base import DEVICES, PRECISIONS, Device, Precision
from gfldeploy.engines.registry import ENGINES
from gfldeploy.errors import EngineError, OutputError

if TYPE_CHECKING:
    from gfldeploy.bench.matrix import Plan

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
    "--rounds",
    type=click.IntRange(1),
    default=3,
    show_default=True,
    help="Run every cell once a round, so that a machine that slows down favours none; medians are over all rounds.",
)
@click.option(
    "--min-seconds",
    type=click.FloatRange(0),
    default=2.0,
    show_default=True,
    help="Time each cell at least so long, in each round.",
)
@click.option(
    "--min-count",
    type=click.IntRange(1),
    default=10,
    show_default=True,
    help="Time at least so many inferences, in each round.",
)
@click.option("--limit", type=click.IntRange(1), default=32, show_default=True, help="Images for timing, all of them.")
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
    rounds: int,
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
    from gfldeploy.bench.session import BenchRequest, prepare, run
    from gfldeploy.cli.results import show_results

    _check_output(output, force)
    prepared = prepare(
        BenchRequest(
            bundles=bundles,
            annotations=data,
            image_dir=images,
            engines=engines,
            precisions=precisions,
            batch_sizes=batch_sizes,
            device=device,
            threads=threads,
            rounds=rounds,
            min_seconds=min_seconds,
            min_count=min_count,
            timed_images=limit,
            accuracy=accuracy,
            accuracy_images=accuracy_limit,
            cell_timeout_s=cell_timeout,
        )
    )
    _show_plan(prepared.plan)
    if not prepared.plan.cells:
        first = prepared.plan.skipped[0]
        problem = f"nothing to run: {first.engine} {first.precision} on {device}: {first.reason}"
        raise EngineError(problem, _sentence(first.remedy))
    results = run(prepared, _progress())
    results.write(output)
    show_results(results)
    click.echo(f"Wrote {output}")
    if not any(cell.status == "ok" for cell in results.cells):
        failed = next(cell for cell in results.cells if cell.status == "failed")
        problem = f"no cell could be measured; {failed.engine} {failed.precision}: {failed.reason}"
        raise EngineError(problem, _sentence(failed.remedy))


def _check_output(output: Path, force: bool) -> None:
    """Refuse now what would otherwise fail after an hour of measuring."""
    if output.is_dir():
        raise OutputError(f"{output} is a directory", "Give a file name as --output.")
    if output.exists() and not force:
        raise OutputError(f"{output} exists already", "Choose another --output, or add --force to replace it.")
    parent = next(folder for folder in output.absolute().parents if folder.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
        raise OutputError(f"cannot write {output}: {parent} is not a writable folder", "Choose another --output.")


def _progress() -> Callable[[int, int, str], None]:
    """A reporter of each step, with the time left if the others take as long as those done so far."""
    stage = stages()
    start = time.monotonic()

    def report(done: int, total: int, description: str) -> None:
        left = ""
        if 0 < done < total:
            left = f" (about {_duration((time.monotonic() - start) / done * (total - done))} left)"
        stage(f"{min(done + 1, total)}/{total} {description}{left}")

    return report


def _duration(seconds: float) -> str:
    """In the unit that it is read in, a whole number of it."""
    if seconds < 59.5:
        return f"{max(round(seconds), 1)} s"
    return f"{round(seconds / 60)} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def _show_plan(plan: Plan) -> None:
    """What will run and what will not, on stderr."""

    def model(cell: Any) -> str:
        return f"{cell.engine:12} {cell.precision:5} {cell.bundle.name}"

    click.echo(f"Plan: {len(plan.cells)} cell{'' if len(plan.cells) == 1 else 's'} to measure.", err=True)
    for name, cells in groupby(plan.cells, model):
        click.echo(f"  run   {name}, batch {', '.join(str(cell.batch_size) for cell in cells)}", err=True)
    for item in plan.skipped:
        batch = f" batch {item.batch_size}" if item.batch_size else ""
        remedy = f"; {item.remedy}" if item.remedy else ""
        click.echo(f"  skip  {item.engine:12} {item.precision:5}{batch} {item.reason}{remedy}", err=True)


def _sentence(remedy: str | None) -> str | None:
    """The registry's remedies are clauses; an error's remedy is a sentence."""
    return f"{remedy[0].upper()}{remedy[1:].rstrip('.')}." if remedy else None
