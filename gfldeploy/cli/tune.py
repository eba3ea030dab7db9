"""`gfldeploy tune`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from gfldeploy.batching.buckets import STREAM_ORDERS
from gfldeploy.cli import options
from gfldeploy.cli.console import TerminalProgress

if TYPE_CHECKING:
    from gfldeploy.bench.cell import Cell
    from gfldeploy.tune.deploy_file import Configuration, Deploy


@click.command(name="tune")
@click.argument("bundles", nargs=-1, metavar="BUNDLE...", type=options.PATH)
@options.group(*options.annotations_of(required=False), *options.MEASUREMENT)
@options.batch_sizes("choose from", "1,2,4,8,16")
@click.option(
    "--threads",
    type=options.WHOLE_NUMBERS,
    show_default="1,2,4,... up to all available, in as many streams as there are CPUs for",
    help="Numbers of CPU threads of one inference to choose from, one inference at once.",
)
@click.option(
    "--orders",
    type=options.names(STREAM_ORDERS),
    default=",".join(STREAM_ORDERS),
    help="How batches may be formed: of images as they are listed, padded to a common size, or of images of one size.",
)
@options.input_sizes("choose from besides each bundle's own, with --max-drop")
@click.option(
    "--max-latency-ms",
    type=options.FiniteFloat(0, min_open=True),
    help="Bound of the 99th percentile of a batch's latency, from file to boxes. Cells are timed for up to five "
    "times as long to know it. Where too few batches were timed even so, all of them must be within the bound, and "
    "deploy.yml says so.",
)
@click.option(
    "--max-memory-mb",
    type=options.FiniteFloat(0, min_open=True),
    help="Bound of peak resident memory, without the images.",
)
@click.option(
    "--max-drop",
    type=options.FiniteFloat(0, 1),
    help="Largest loss of mAP against the first FP32 bundle, such as 0.01.",
)
@click.option(
    "--results",
    type=options.PATH,
    multiple=True,
    metavar="FILE",
    help="Results of `gfldeploy bench` on this machine and data, whose cells are not measured briefly again. May be "
    "given more than once.",
)
@click.option(
    "--look-seconds",
    type=options.FiniteFloat(0),
    default=0.5,
    help="Time each cell for at least this long in its brief measurement.",
)
@click.option(
    "--budget-seconds",
    type=options.FiniteFloat(0),
    help="Measure no more cells briefly after this number of seconds; the longer measurements and mAP come on top.",
)
@click.option("--exhaustive", is_flag=True, help="Measure every cell at length, to check the search.")
@click.option(
    "--check",
    type=options.PATH,
    metavar="FILE",
    help="Measure nothing: say whether this deploy.yml holds for this machine and its bundle, or the BUNDLE given.",
)
@options.output("File to write the choice and its evidence to.", Path("deploy.yml"))
def command(bundles: tuple[Path, ...], data: Path | None, output: Path, check: Path | None, **given: Any) -> None:
    """Find the fastest engine, precision, batch size, threads, batching and input size that keep the bounds.

    The fastest configuration has the highest throughput from file to boxes, one batch after the other. Every engine
    and precision that the BUNDLEs support is measured briefly, and those that cannot win are dropped. Larger batches of
    the others are tried until throughput no longer rises. The best are measured longer, interleaved. mAP is measured
    only of the configuration that is about to be chosen, and of some of the --input-sizes, to find the smallest that
    keeps --max-drop. Give the FP32 and the INT8 bundle together.

    An interrupted or killed command resumes where it stopped when it is run again.

    \b
    Example: gfldeploy tune gfl_r50 gfl_r50_int8 --data val.json --max-latency-ms 100
    """
    from gfldeploy.tune.deploy_file import check_deploy
    from gfldeploy.tune.session import tune_bundles

    if check is not None:
        if len(bundles) > 1:
            raise click.UsageError("--check takes one BUNDLE at most")
        for change in check_deploy(check, *bundles):
            click.echo(f"Changed since it was tuned: {change}")
        click.echo(f"{check} holds for this machine and this bundle.")
        return
    if not bundles:
        raise click.UsageError("Missing argument 'BUNDLE...'")
    if data is None:
        raise click.UsageError("Missing option '--data'")
    deploy = tune_bundles(bundles, data=data, output=output, **given, progress=TerminalProgress())
    click.echo(f"{deploy.summary}\n")
    _show(deploy)
    click.echo(f"Wrote {output}")


def _size(deploy: Deploy, cell: Cell) -> str | None:
    """Where there were several input sizes."""
    from gfldeploy.batching.buckets import size_in_words

    own = None if deploy.sizes is None else "own"
    return own if cell.input_size is None else size_in_words(cell.input_size)


def _show(deploy: Deploy) -> None:
    """The choice and the runner-up, from file to boxes."""
    from gfldeploy.bench.columns import Column
    from gfldeploy.cli.tables import show_table

    columns: tuple[Column[tuple[str, Configuration]], ...] = (
        Column("name", "", lambda one: one[0], words=True),
        Column("engine", "engine", lambda one: one[1].cell.engine, words=True),
        Column("precision", "precision", lambda one: one[1].cell.precision, words=True),
        Column("tf32", "TF32", lambda one: "yes" if one[1].cell.tf32 else None, words=True),
        Column("bundle", "bundle", lambda one: one[1].cell.bundle.directory, words=True, drop=8),
        Column("input_size", "input size", lambda one: _size(deploy, one[1].cell), words=True, drop=1),
        Column("batch_size", "batch", lambda one: one[1].cell.batch_size),
        Column("order", "order", lambda one: one[1].cell.order, words=True, drop=3),
        Column("threads", "threads", lambda one: one[1].cell.threads, drop=2),
        Column("streams", "streams", lambda one: one[1].cell.streams if one[1].cell.streams > 1 else None, drop=2),
        Column("images_per_s", "images/s", lambda one: one[1].evidence.images_per_s),
        Column("latency_p50", "median", lambda one: one[1].evidence.latency_p50_ms, "ms", drop=1),
        Column("latency_p99", "p99", lambda one: one[1].evidence.latency_p99_ms, "ms", drop=4),
        Column("latency_max", "longest", lambda one: one[1].evidence.latency_max_ms, "ms", drop=5),
        Column("ap", "mAP", lambda one: one[1].evidence.ap, digits=4),
        Column("memory", "memory", lambda one: one[1].evidence.memory_mb, "MB", digits=0, drop=6),
        Column("network", "network", lambda one: one[1].evidence.network_images_per_s, "images/s", drop=7),
    )
    rows = [("choice", deploy.choice), *([("second", deploy.runner_up)] if deploy.runner_up else [])]
    show_table(columns, rows, "From file to boxes, one batch after the other", "deploy.yml has everything.")
