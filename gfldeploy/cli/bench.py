"""`gfldeploy bench`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from gfldeploy.bench.cell import POLICIES, SCENARIOS, STREAMS
from gfldeploy.cli import options
from gfldeploy.cli.console import TerminalProgress


@click.command(name="bench")
@click.argument("bundles", nargs=-1, required=True, metavar="BUNDLE...", type=options.PATH)
@options.group(*options.ANNOTATIONS, *options.MEASUREMENT, options.THREADS)
@options.batch_sizes("measure", "1,2,4,8")
@options.input_sizes("measure, speed and mAP")
@options.group(*options.TILES)
@click.option(
    "--end-to-end",
    is_flag=True,
    help="Measure the ONNX files that deploy by themselves too, but for the server scenario.",
)
@click.option(
    "--scenarios",
    type=options.names(SCENARIOS),
    default=",".join(STREAMS),
    help="Scenarios after MLPerf: queries of 1 image, or of a batch, one after the other (single-stream, "
    "multi-stream); all images at once, bucketed by size (offline); random arrivals (server).",
)
@click.option(
    "--streams",
    type=options.WHOLE_NUMBERS,
    default="1",
    help="Numbers of inferences at once from one engine, in the offline and server scenarios. They share the CPU "
    "threads.",
)
@click.option(
    "--rates",
    type=options.POSITIVE_NUMBERS,
    default=(),
    help="Arrival rates of the server scenario, in images per second.",
)
@click.option(
    "--policies",
    type=options.names(POLICIES),
    default=",".join(POLICIES),
    help="What the server does with images that wait. no-batching: run one after the other; fixed-timeout: run a batch "
    "when it is full or its oldest image has waited for a tenth of the bound; adaptive: gfldeploy's dynamic batcher.",
)
@click.option(
    "--latency-bound-ms",
    type=options.FiniteFloat(0, min_open=True),
    help="Deadline of the server scenario, from arrival to answer.",
)
@click.option("--trt", is_flag=True, help="Add the engines of TensorRT, and run on the GPU.")
@click.option(
    "--max-seconds",
    type=options.FiniteFloat(0),
    show_default="5 times --min-seconds",
    help="Stop timing a cell after this long in a round, even if its median still changes by over 2%.",
)
@options.PEAK
@click.option(
    "--monitor-hz",
    type=options.FiniteFloat(0, 100),
    default=5.0,
    help="Number of hardware samples per second; 0 for none.",
)
@click.option(
    "--memory-limit",
    type=options.FiniteFloat(0, min_open=True),
    metavar="MB",
    show_default="90% of what is free",
    help="Give a cell up when its process takes more resident memory than this.",
)
@options.seed("the server's arrival times")
@options.output("File to write; a table (.csv) and a report (.html) are written beside it.", Path("results.json"))
def command(output: Path, **given: Any) -> None:
    """Measure engines, precisions and batch sizes side by side.

    Every BUNDLE runs in every engine and precision that it supports, each cell in a process of its own. What cannot run
    is listed with the reason. Whole batches are timed from file to boxes, one after the other and stage by stage, and
    the network alone on the same prepared images. The server scenario is timed from the arrival of an image to the end
    of its batch, without decoding. With --tile, everything but the server is measured in tiles too: an image is then
    all its tiles, of which an inference has the batch size at most. mAP is measured at batch 1, once for each engine
    and precision. What a GPU gives for a few of the images is compared with the CPU first: a row that differs has the
    reason in the place of a speed.

    An interrupted or killed command resumes where it stopped when it is run again.

    \b
    Example: gfldeploy bench gfl_r50 gfl_r50_int8 --data val.json --output results.json
    """
    from gfldeploy.bench.session import benchmark, check_measured
    from gfldeploy.cli.results import show_results

    results = benchmark(**given, output=output, progress=TerminalProgress())
    show_results(results)
    click.echo(f"Wrote {output}, and beside it {output.stem}.csv and {output.stem}.html")
    check_measured(results)
