"""`gfldeploy bench`."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from gfldeploy.cli.console import TerminalProgress
from gfldeploy.cli.options import (
    ANNOTATIONS,
    MEASUREMENT,
    PATH,
    THREADS,
    FiniteFloat,
    Names,
    PositiveNumbers,
    WholeNumber,
    WholeNumbers,
    options,
    output_options,
)
from gfldeploy.engines.base import Device, Precision
from gfldeploy.engines.hardware import usable_threads
from gfldeploy.engines.registry import TENSORRT_ENGINES, capability
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
@options(*ANNOTATIONS, *MEASUREMENT, THREADS)
@click.option("--batch-sizes", type=WholeNumbers(), default="1,2,4,8", help="Batch sizes to measure.")
@click.option(
    "--scenarios",
    type=Names(_SCENARIOS),
    default="single-stream,multi-stream",
    help="Scenarios after MLPerf: queries of 1 image, or of a batch, one after the other (single-stream, "
    "multi-stream); all images at once, bucketed by size (offline); random arrivals (server).",
)
@click.option(
    "--rates", type=PositiveNumbers(), default=(), help="Arrival rates of the server scenario, in images per second."
)
@click.option(
    "--policies",
    type=Names(_POLICIES),
    default=",".join(_POLICIES),
    help="What the server does with images that wait. no-batching: run one after the other; fixed-timeout: run a batch "
    "when it is full or its oldest image has waited for a tenth of the bound; adaptive: gfldeploy's dynamic batcher.",
)
@click.option(
    "--latency-bound-ms",
    type=FiniteFloat(0, min_open=True),
    help="Deadline of the server scenario, from arrival to answer.",
)
@click.option("--trt", is_flag=True, help="Add both engines of TensorRT, and run on the GPU.")
@click.option(
    "--max-seconds",
    type=FiniteFloat(0),
    show_default="5 times --min-seconds",
    help="Stop timing a cell after this long in a round, even if its median still changes by over 2%.",
)
@click.option("--peak/--no-peak", default=True, help="Measure what the engines reach at best too.")
@click.option(
    "--monitor-hz", type=FiniteFloat(0, 100), default=5.0, help="Number of hardware samples per second; 0 for none."
)
@click.option(
    "--memory-limit",
    type=FiniteFloat(0, min_open=True),
    metavar="MB",
    show_default="90% of what is free",
    help="Resident memory beyond which a cell has failed.",
)
@click.option("--seed", type=WholeNumber(0), default=0, help="Seed of the server's arrival times.")
@output_options("File to write; a table (.csv) and a report (.html) are written beside it.", Path("results.json"))
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
    threads: int | None,
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

    \b
    Example: gfldeploy bench gfl_r50 gfl_r50_int8 --data val.json --output results.json
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
        threads=threads or usable_threads(),
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
    stage = TerminalProgress().stage
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
