"""`gfldeploy bench`."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from gfldeploy.cli.console import stages
from gfldeploy.cli.options import (
    PATH,
    CommaSeparated,
    FiniteFloat,
    PositiveNumbers,
    WholeNumber,
    engine_cache_option,
    threads_option,
    yaml_config_option,
)
from gfldeploy.engines.base import DEVICES, PRECISIONS, Device, Precision
from gfldeploy.engines.registry import DEFAULT_ENGINES, ENGINES, TENSORRT_ENGINES, capability
from gfldeploy.errors import EngineError, OutputError, UnsupportedError
from gfldeploy.files import check_file, is_unfinished
from gfldeploy.signals import hold_interrupts

if TYPE_CHECKING:
    from gfldeploy.bench.session import PreparedBench

__all__ = ["command"]

_SCENARIOS = ("single-stream", "multi-stream", "offline", "server")
_POLICIES = ("no-batching", "fixed-timeout", "adaptive")


@click.command(name="bench")
@click.argument("bundles", nargs=-1, required=True, metavar="BUNDLE...", type=PATH)
@yaml_config_option
@click.option("--data", required=True, type=PATH, metavar="COCO.json", help="A COCO annotation file.")
@click.option(
    "--images",
    type=PATH,
    metavar="DIR",
    help="Where its file names start.  [default: images/ beside it, else its folder]",
)
@click.option(
    "--engines",
    type=CommaSeparated(tuple(ENGINES)),
    default=",".join(DEFAULT_ENGINES),
    show_default=True,
    help=f"What runs, of {', '.join(ENGINES)}.",
)
@click.option("--precisions", type=CommaSeparated(PRECISIONS), default=",".join(PRECISIONS), show_default=True)
@click.option("--batch-sizes", type=CommaSeparated(), default="1,2,4,8", show_default=True)
@click.option(
    "--scenarios",
    type=CommaSeparated(_SCENARIOS),
    default="single-stream,multi-stream",
    show_default=True,
    help="After MLPerf: queries of 1 image, or of a batch, one after the other (single-stream, multi-stream); all "
    "images at once, grouped by size (offline); random arrivals (server).",
)
@click.option("--rates", type=PositiveNumbers(), default=(), help="Images a second that arrive at the server.")
@click.option(
    "--policies",
    type=CommaSeparated(_POLICIES),
    default=",".join(_POLICIES),
    show_default=True,
    help="What the server does with images that wait: one after the other (batch 1); a batch when it is full or its "
    "oldest image has waited for a tenth of the bound; what gfldeploy's dynamic batcher decides.",
)
@click.option(
    "--latency-bound-ms",
    type=FiniteFloat(0, min_open=True),
    help="Deadline of the server, from arrival to answer: a later answer counts for nothing.",
)
@click.option("--trt", is_flag=True, help="Add both ways to TensorRT, and run on the GPU.")
@click.option("--device", type=click.Choice(DEVICES), default="cpu", show_default=True)
@threads_option
@click.option(
    "--rounds",
    type=WholeNumber(1),
    default=3,
    show_default=True,
    help="Run every cell once a round, so that a machine that slows down favours none; medians are over all rounds.",
)
@click.option(
    "--min-seconds",
    type=FiniteFloat(0),
    default=2.0,
    show_default=True,
    help="Time each cell at least so long, in each round.",
)
@click.option(
    "--min-count",
    type=WholeNumber(1),
    default=10,
    show_default=True,
    help="Time at least so many inferences, in each round.",
)
@click.option(
    "--max-seconds",
    type=FiniteFloat(0),
    help="Time no longer, though medians still change by over 2%.  [default: 5 times --min-seconds]",
)
@click.option("--limit", type=WholeNumber(1), default=32, show_default=True, help="Images for timing, all of them.")
@click.option("--accuracy/--no-accuracy", default=True, show_default=True, help="Measure mAP too.")
@click.option("--accuracy-limit", type=WholeNumber(1), help="Images used for mAP.  [default: all]")
@click.option("--peak/--no-peak", default=True, show_default=True, help="Measure what the engines reach at best too.")
@click.option(
    "--monitor-hz",
    type=FiniteFloat(0, 100),
    default=5.0,
    show_default=True,
    help="Hardware samples a second; 0 for none.",
)
@click.option(
    "--cell-timeout",
    type=FiniteFloat(0, min_open=True),
    default=600.0,
    show_default=True,
    help="Seconds after which a cell has failed; for mAP, seconds without an image done.",
)
@click.option(
    "--memory-limit",
    type=FiniteFloat(0, min_open=True),
    metavar="MB",
    help="Resident memory beyond which a cell has failed.  [default: 90% of what is free]",
)
@click.option("--seed", type=WholeNumber(0), default=0, show_default=True, help="Of the arrival times.")
@engine_cache_option
@click.option(
    "--output",
    "-o",
    type=PATH,
    default=Path("results.json"),
    show_default=True,
    help="The file; a table (.csv) and a report (.html) are written beside it.",
)
@click.option("--force", is_flag=True, help="Replace the output files if they exist.")
def command(
    bundles: tuple[Path, ...],
    data: Path,
    images: Path | None,
    engines: tuple[str, ...],
    precisions: tuple[Precision, ...],
    batch_sizes: tuple[int, ...],
    scenarios: tuple[Any, ...],
    rates: tuple[float, ...],
    policies: tuple[Any, ...],
    latency_bound_ms: float | None,
    trt: bool,
    device: Device,
    threads: int,
    rounds: int,
    min_seconds: float,
    min_count: int,
    max_seconds: float | None,
    limit: int,
    accuracy: bool,
    accuracy_limit: int | None,
    peak: bool,
    monitor_hz: float,
    cell_timeout: float,
    memory_limit: float | None,
    seed: int,
    engine_cache: Path,
    output: Path,
    force: bool,
) -> None:
    """Measure engines, precisions and batch sizes side by side.

    Every BUNDLE runs in every engine and precision it is made for, each cell in a process of its own; what cannot run
    is listed with the reason. Whole batches are timed from file to boxes, one after the other and stage by stage, and
    the network alone on the same images, prepared before; servers from the arrival of an image to the end of its
    batch, without decoding. mAP is measured at batch 1, once for each engine and precision.

    Interrupted or killed, the same command resumes where it stopped.
    """
    if trt:
        _check_tensorrt()
        engines, device = tuple(dict.fromkeys((*engines, *TENSORRT_ENGINES))), "gpu"
    if ("server" in scenarios) != bool(rates):
        raise click.UsageError("the server scenario needs --rates, and --rates needs the server scenario")
    if rates and latency_bound_ms is None:
        raise click.UsageError("the server scenario needs --latency-bound-ms")
    if max_seconds is not None and max_seconds < min_seconds:
        raise click.UsageError("--max-seconds is less than --min-seconds")
    resumed = _check_output(output, force)

    from gfldeploy.bench.csv_file import write_csv
    from gfldeploy.bench.journal import journal_beside
    from gfldeploy.bench.report.page import write_report
    from gfldeploy.bench.results import Settings
    from gfldeploy.bench.session import BenchRequest, prepare, run
    from gfldeploy.cli.results import show_results

    request = BenchRequest(
        bundles=bundles,
        annotations=data,
        settings=Settings(
            min_seconds=min_seconds,
            min_count=min_count,
            max_seconds=5 * min_seconds if max_seconds is None else max_seconds,
            rounds=rounds,
            seed=seed,
            latency_bound_ms=latency_bound_ms,
            monitor_hz=monitor_hz,
            quick=Settings.is_quick(rounds, min_seconds, min_count),
        ),
        image_dir=images,
        engines=engines,
        precisions=precisions,
        batch_sizes=batch_sizes,
        scenarios=scenarios,
        rates=rates,
        policies=policies,
        device=device,
        threads=threads,
        timed_images=limit,
        accuracy=accuracy,
        accuracy_images=accuracy_limit,
        peaks=peak,
        cell_timeout_s=cell_timeout,
        memory_limit_mb=memory_limit,
        engine_cache=engine_cache,
    )
    prepared = prepare(request)
    _show_plan(prepared)
    if not prepared.plan.cells:
        if not prepared.plan.skipped:
            raise EngineError(
                "nothing to run: the scenarios do not go with the batch sizes",
                "single-stream and no-batching take batches of 1, multi-stream and the other policies larger ones.",
            )
        first = prepared.plan.skipped[0]
        problem = f"nothing to run: {first.cell.engine} {first.cell.precision} on {device}: {first.reason}"
        raise EngineError(problem, _sentence(first.remedy))
    with journal_beside(output, "bench") as journal:
        results = run(prepared, journal, _progress())
        with hold_interrupts():
            _check_output(output, force, resumed)  # somebody else may have been faster
            write_report(results, output.with_suffix(".html"))
            write_csv(results, output.with_suffix(".csv"))
            results.write(output)
    show_results(results)
    click.echo(f"Wrote {output}, and beside it {output.stem}.csv and {output.stem}.html")
    if not any(cell.status == "ok" for cell in results.cells):
        failed = next(cell for cell in results.cells if cell.status == "failed")
        problem = f"no cell could be measured; {failed.cell.engine} {failed.cell.precision}: {failed.reason}"
        raise EngineError(problem, _sentence(failed.remedy))


def _check_tensorrt() -> None:
    """Stop before any work where neither way to TensorRT is open."""
    closed = [capability(engine, "fp16", "gpu") for engine in TENSORRT_ENGINES]
    if all(not one.works for one in closed):
        reasons = dict.fromkeys(one.reason for one in closed)
        remedies = dict.fromkeys(one.remedy for one in closed if one.remedy)
        raise UnsupportedError(
            f"--trt cannot work here: {'; '.join(map(str, reasons))}", _sentence("; ".join(remedies))
        )


def _check_output(output: Path, force: bool, resumed: bool | None = None) -> bool:
    """Refuse now what would otherwise fail after an hour of measuring.

    `resumed`, returned: whether this goes on from a run that was killed, perhaps after it had written the first files.
    """
    if resumed is None:
        resumed = is_unfinished(output, "bench") and not output.exists()
    if output.is_dir():
        raise OutputError(f"{output} is a directory", "Give a file name as --output.")
    if output.suffix != ".json":
        raise OutputError(f"{output} does not end in .json", "A .csv and a .html are written beside it: name it so.")
    check_file(output, "json", force=force)
    check_file(output.with_suffix(".csv"), "csv", force=force or resumed)
    check_file(output.with_suffix(".html"), "html", force=force or resumed)
    parent = next(folder for folder in output.absolute().parents if folder.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
        raise OutputError(f"cannot write {output}: {parent} is not a writable folder", "Choose another --output.")
    return resumed


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


def _show_plan(prepared: PreparedBench) -> None:
    """What will run and what will not, on stderr."""
    plan = prepared.plan
    for note in prepared.notes:
        click.echo(f"Note: {note}", err=True)
    click.echo(
        f"Plan: {len(plan.cells)} cell{'' if len(plan.cells) == 1 else 's'} to measure, "
        f"{_duration(prepared.least_s)} at least{', and mAP' if prepared.evaluated else ''}.",
        err=True,
    )
    for line in plan.lines():
        click.echo(line, err=True)


def _sentence(remedy: str | None) -> str | None:
    """The registry's remedies are clauses; an error's remedy is a sentence."""
    return f"{remedy[0].upper()}{remedy[1:].rstrip('.')}." if remedy else None
