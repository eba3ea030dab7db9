"""`gfldeploy tune`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from gfldeploy.cli.console import TerminalProgress
from gfldeploy.cli.options import (
    MEASUREMENT,
    PATH,
    FiniteFloat,
    Names,
    WholeNumbers,
    annotation_options,
    options,
    output_options,
)

if TYPE_CHECKING:
    from gfldeploy.tune.deploy_file import Deploy

__all__ = ["command"]


@click.command(name="tune")
@click.argument("bundles", nargs=-1, metavar="BUNDLE...", type=PATH)
@options(*annotation_options(required=False), *MEASUREMENT)
@click.option("--batch-sizes", type=WholeNumbers(), default="1,2,4,8,16", help="Batch sizes to choose from.")
@click.option(
    "--threads",
    type=WholeNumbers(),
    show_default="1,2,4,... up to all available",
    help="Numbers of CPU threads of one inference to choose from.",
)
@click.option(
    "--orders",
    type=Names(("listed", "bucketed")),
    default="listed,bucketed",
    help="How batches may be formed: of images as they are listed, padded to a common size, or of images of one size.",
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
def command(bundles: tuple[Path, ...], data: Path | None, output: Path, check: Path | None, **given: Any) -> None:
    """Find the fastest engine, precision, batch size, threads and batching that keep the bounds.

    The fastest is what has most images a second from file to boxes, one batch after the other. Every engine and
    precision that the BUNDLEs are made for gets a short look; the hopeless ones are left there, larger batches are
    tried of the others until throughput no longer rises, and the best are measured at length, interleaved. mAP is
    measured of what is about to be chosen alone. Give the FP32 and the INT8 bundle together.

    Interrupted or killed, the same command resumes where it stopped.

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


def _show(deploy: Deploy) -> None:
    """The choice and the runner-up, from file to boxes."""
    from gfldeploy.bench.columns import text_of
    from gfldeploy.cli.tables import TableColumn, show_table

    columns = (
        *(TableColumn(header, right=False) for header in ("", "engine", "precision")),
        TableColumn("bundle", drop=8, right=False),
        TableColumn("batch"),
        TableColumn("order", drop=3, right=False),
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
            cell, found = one.cell, one.evidence
            numbers = (found.images_per_s, found.latency_p50_ms, found.latency_p99_ms, found.latency_max_ms)
            lines.append(
                (
                    *(name, cell.engine, cell.precision, cell.bundle.directory, str(cell.batch_size)),
                    *(cell.order, str(cell.threads)),
                    *(text_of(value, interval=False) for value in numbers),
                    text_of(found.ap, 4),
                    text_of(found.memory_mb, 0),
                    text_of(found.network_images_per_s, interval=False),
                )
            )
    show_table(columns, lines, "From file to boxes, one batch after the other", "deploy.yml has everything.")
