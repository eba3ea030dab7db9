"""`gfldeploy tune`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from gfldeploy.cli.console import TerminalProgress
from gfldeploy.cli.options import (
    MEASUREMENT,
    PATH,
    CommaSeparated,
    FiniteFloat,
    annotation_options,
    options,
    output_options,
)
from gfldeploy.engines.base import Device, Precision
from gfldeploy.engines.hardware import usable_threads
from gfldeploy.errors import OutputError
from gfldeploy.files import check_file

if TYPE_CHECKING:
    from gfldeploy.tune.deploy_file import Deploy
    from gfldeploy.tune.session import PreparedTune

__all__ = ["command"]


def _all_threads() -> tuple[int, ...]:
    """1, doubled up to all."""
    most = usable_threads()
    return (*(1 << power for power in range(most.bit_length()) if 1 << power < most), most)


@click.command(name="tune")
@click.argument("bundles", nargs=-1, metavar="BUNDLE...", type=PATH)
@options(*annotation_options(required=False), *MEASUREMENT)
@click.option(
    "--batch-sizes", type=CommaSeparated(), default="1,2,4,8,16", show_default=True, help="Batch sizes to choose from."
)
@click.option(
    "--threads",
    type=CommaSeparated(),
    default=_all_threads,
    show_default="1,2,4,... up to all available",
    help="Numbers of CPU threads of one inference to choose from.",
)
@click.option(
    "--policies",
    type=CommaSeparated(("in-order", "grouped")),
    default="in-order,grouped",
    show_default=True,
    help="How batches may be formed: of images as they come, padded to a common size, or of one size each.",
)
@click.option(
    "--max-latency-ms",
    type=FiniteFloat(0, min_open=True),
    help="Bound of the 99th percentile of a batch's latency, from file to boxes. Where too few batches were timed to "
    "know that, all of them must be within it, and deploy.yml says so. Cells are timed for up to five times as long to "
    "know it.",
)
@click.option(
    "--max-memory-mb", type=FiniteFloat(0, min_open=True), help="Bound of peak resident memory, without the images."
)
@click.option(
    "--max-drop", type=FiniteFloat(0, 1), help="Largest loss of mAP against the first FP32 bundle, such as 0.01."
)
@click.option(
    "--results",
    type=PATH,
    multiple=True,
    metavar="FILE",
    help="Results of `gfldeploy bench` on this machine and data: the cells that they hold are not measured again "
    "briefly. May be given more than once.",
)
@click.option(
    "--look-seconds",
    type=FiniteFloat(0),
    default=0.5,
    show_default=True,
    help="Time each cell for at least this long when it is first looked at.",
)
@click.option(
    "--budget-seconds",
    type=FiniteFloat(0),
    help="Look at no more cells after this long; the final measurements and mAP come on top.",
)
@click.option("--exhaustive", is_flag=True, help="Measure every cell at length, to judge the search by.")
@click.option(
    "--check",
    type=PATH,
    metavar="FILE",
    help="Measure nothing: say whether this deploy.yml holds for this machine and its bundle, or the BUNDLE given.",
)
@output_options("File to write the choice and its evidence to.", Path("deploy.yml"))
def command(
    bundles: tuple[Path, ...],
    data: Path | None,
    images: Path | None,
    max_latency_ms: float | None,
    max_memory_mb: float | None,
    max_drop: float | None,
    engines: tuple[str, ...],
    precisions: tuple[Precision, ...],
    batch_sizes: tuple[int, ...],
    threads: tuple[int, ...],
    policies: tuple[Any, ...],
    device: Device,
    results: tuple[Path, ...],
    rounds: int,
    min_seconds: float,
    min_count: int,
    look_seconds: float,
    limit: int,
    accuracy: bool,
    accuracy_limit: int | None,
    budget_seconds: float | None,
    exhaustive: bool,
    cell_timeout: float,
    engine_cache: Path,
    output: Path,
    force: bool,
    check: Path | None,
) -> None:
    """Find the fastest engine, precision, batch size, threads and batching that keep the bounds.

    The fastest is what has most images a second from file to boxes, one batch after the other. Every engine and
    precision that the BUNDLEs are made for gets a short look; the hopeless ones are left there, larger batches are
    tried of the others until throughput no longer rises, and the best are measured at length, interleaved. mAP is
    measured of what is about to be chosen alone. Give the FP32 and the INT8 bundle together.

    Interrupted or killed, the same command resumes where it stopped.

    \b
    Example: gfldeploy tune gfl_r50 gfl_r50_int8 --data val.json --max-latency-ms 100
    """
    if check is not None:
        _check(check, bundles)
        return
    if not bundles:
        raise click.UsageError("Missing argument 'BUNDLE...'")
    if data is None:
        raise click.UsageError("Missing option '--data'")
    if max_drop is not None and not accuracy:
        raise click.UsageError("--max-drop needs mAP: leave --no-accuracy out")
    _check_output(output, force)

    from gfldeploy.bench.journal import journal_beside
    from gfldeploy.bench.results import Settings
    from gfldeploy.bench.session import BenchRequest
    from gfldeploy.tune.search import Bounds
    from gfldeploy.tune.session import TuneRequest, prepare, run

    settings = Settings(
        min_seconds=min_seconds,
        min_count=min_count,
        max_seconds=5 * min_seconds,
        rounds=rounds,
        quick=Settings.is_quick(rounds, min_seconds, min_count),
    )
    request = TuneRequest(
        bench=BenchRequest(
            bundles=bundles,
            annotations=data,
            settings=settings,
            image_dir=images,
            engines=engines,
            precisions=precisions,
            batch_sizes=batch_sizes,
            device=device,
            timed_images=limit,
            accuracy=accuracy,
            accuracy_images=accuracy_limit,
            cell_timeout_s=cell_timeout,
            engine_cache=engine_cache,
        ),
        bounds=Bounds(max_latency_ms, max_memory_mb, max_drop),
        look=Settings(min_seconds=look_seconds, min_count=min_count, max_seconds=look_seconds, quick=True),
        threads=threads,
        policies=policies,
        results=results,
        exhaustive=exhaustive,
        budget_s=budget_seconds,
    )
    prepared = prepare(request)
    _show_space(prepared)
    with journal_beside(output, "tune") as journal:
        deploy = run(prepared, output, journal, TerminalProgress().stage)
        _check_output(output, force)  # somebody else may have been faster
        deploy.write(output)
    click.echo(f"{deploy.summary}\n")
    _show(deploy)
    click.echo(f"Wrote {output}")


def _show(deploy: Deploy) -> None:
    """The choice and the runner-up, from file to boxes."""
    from gfldeploy.bench.table import text_of
    from gfldeploy.cli.tables import TableColumn, show_table

    columns = (
        *(TableColumn(header, right=False) for header in ("", "engine", "precision")),
        TableColumn("bundle", drop=8, right=False),
        TableColumn("batch"),
        TableColumn("batches", drop=3, right=False),
        TableColumn("threads", drop=2),
        TableColumn("images/s"),
        TableColumn("median,\nms", drop=1),
        TableColumn("p99,\nms", drop=4),
        TableColumn("longest,\nms", drop=5),
        TableColumn("mAP"),
        TableColumn("memory\nMB", drop=6),
        TableColumn("network,\nimages/s", drop=7),
    )
    lines = []
    for name, one in (("choice", deploy.choice), ("second", deploy.runner_up)):
        if one is not None:
            found = one.evidence
            numbers = (found.images_per_s, found.latency_p50_ms, found.latency_p99_ms, found.latency_max_ms)
            lines.append(
                (
                    *(name, one.engine, one.precision, one.bundle.rpartition("/")[2], str(one.batch_size)),
                    *(one.policy, str(one.threads)),
                    *(text_of(value, interval=False) for value in numbers),
                    text_of(found.ap, 4),
                    text_of(found.memory_mb, 0),
                    text_of(found.network_images_per_s, interval=False),
                )
            )
    show_table(columns, lines, "From file to boxes, one batch after the other", "deploy.yml has everything.")


def _check(path: Path, bundles: tuple[Path, ...]) -> None:
    from gfldeploy.bundle import Bundle
    from gfldeploy.machine import describe_machine
    from gfldeploy.tune.deploy_file import Deploy

    if len(bundles) > 1:
        raise click.UsageError("--check takes one BUNDLE at most")
    deploy, machine = Deploy.read(path), describe_machine()
    deploy.check(Bundle.open(bundles[0] if bundles else deploy.bundle_path(path)), machine)
    for change in deploy.software_changes(machine):
        click.echo(f"Changed since it was tuned: {change}")
    click.echo(f"{path} holds for this machine and this bundle.")


def _check_output(output: Path, force: bool) -> None:
    """Refuse now what would otherwise fail after the measuring."""
    check_file(output, "yml", force=force)
    parent = next(folder for folder in output.absolute().parents if folder.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
        raise OutputError(f"cannot write {output}: {parent} is not a writable folder", "Choose another --output.")


def _show_space(prepared: PreparedTune) -> None:
    """What may be chosen and what cannot run, on stderr."""
    for note in prepared.bench.notes:
        click.echo(f"Note: {note}", err=True)
    reused = len(prepared.reused.cells)
    known = f", {reused} of them known from --results" if reused else ""
    click.echo(f"{len(prepared.space.cells)} configurations of {len(prepared.space.models)} models{known}.", err=True)
    for item in prepared.skipped:
        batch = f" batch {item.batch_size}" if item.batch_size else ""
        remedy = f"; {item.remedy}" if item.remedy else ""
        click.echo(f"  skip  {item.engine:20} {item.precision:5}{batch} {item.reason}{remedy}", err=True)
