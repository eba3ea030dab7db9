"""`gfldeploy predict`."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from gfldeploy.batching.buckets import STREAM_ORDERS
from gfldeploy.cli import options
from gfldeploy.cli.console import TerminalProgress

if TYPE_CHECKING:
    from gfldeploy.predict.outputs import PredictResults


@click.command("predict")
@click.argument("source", metavar="BUNDLE|deploy.yml", type=options.PATH)
@click.argument("inputs", nargs=-1, metavar="INPUT...", type=options.INPUT)
@options.output("Folder to write the results to, here or at an address of a filesystem.", type=options.SOURCE)
@click.option(
    "--input-list",
    type=options.FILE,
    metavar="FILE.txt",
    help="Text file that names a file to detect in on each line, a path or an address, beside those of INPUT.",
)
@click.option(
    "--data",
    type=options.FILE,
    metavar="COCO.json",
    help="Detect in the images of these annotations and use their ids. INPUT may then say where file names start.",
)
@options.group(options.DRAW, *options.SHOWN, *options.NMS)
@options.group(options.DECODE, *options.ENGINE, options.INPUT_SIZE, *options.TILES)
@click.option(
    "--streams",
    type=options.WholeNumber(1),
    show_default="as many as usable CPUs, with --threads 1",
    help="Number of inferences at once from one engine, on CPUs. The default never has more than 16 images at once: "
    "on more CPUs a stream has several threads. With --threads alone it is 1.",
)
@options.group(
    options.batching(STREAM_ORDERS, batch_size="1; in ONNX Runtime on few CPUs up to 4 small ones"),
    options.ENGINE_CACHE,
)
@click.option(
    "--shard",
    type=options.Parsed("K/N", options.part),
    help="Detect in the K-th of N parts of the inputs, K from 1, and write a part of the results: for the N jobs of "
    "any scheduler. `gfldeploy merge` makes the results of all parts.",
)
@options.group(*options.RAY)
@click.option(
    "--duration",
    type=options.FiniteFloat(0, min_open=True),
    metavar="SECONDS",
    show_default="until Ctrl-C or SIGTERM",
    help="Stop a live source after this time.",
)
@click.option(
    "--reconnects",
    type=options.WholeNumber(0),
    show_default="10",
    help="How often to try to make a lost connection of a live source again before it gives a frame.",
)
def command(output: Path | str, **given: Any) -> int:
    """Detect in images, folders of them, and videos, or in a live source.

    INPUT and OUTPUT may be addresses of filesystems: s3://, gs://, hdfs:// and file://. Credentials are found as by the
    filesystem's own tools. A connection that breaks is tried again; a store that does not answer ends the command.

    OUTPUT receives detections.jsonl (a line for each image or frame, in order, with the detections that score at least
    --threshold), coco.json (all that NMS leaves, which mAP needs, as COCO results) and images.json (the file of each
    image id). Boxes are in pixels of the original image. An image that cannot be read has a line with an "error", is
    named at the end, and does not stop the rest; the exit code is then 1.

    Each batch holds images of one input size (unless --order listed), so that an image has the detections that it has
    alone; OpenVINO INT8 may differ by rounding where there are more than four shapes of batches.

    With --tile, batches hold tiles of one image and one input size, whatever the --order, and boxes of all tiles are
    merged: what two tiles see of one object counts once.

    With a deploy.yml, options that are not given are as in that file. An interrupted or killed command resumes where it
    stopped when it is run again, and writes the same bytes.

    A live source is the only INPUT: the number of a camera, or the address of a stream (rtsp://, http://, https://).
    The newest frame is detected in, those that come meanwhile are dropped. It runs until Ctrl-C, SIGTERM or
    --duration stop it, or it is gone, and OUTPUT then has detections.jsonl, without coco.json and images.json.

    \b
    Example: gfldeploy predict gfl_r50_int8 images/ --output found --draw
    """
    from gfldeploy.engines.heap import leave_to_exit
    from gfldeploy.predict.session import predict_images

    if click.get_current_context().obj:
        leave_to_exit()
    start = time.monotonic()
    found = predict_images(**given, output=output, progress=TerminalProgress())
    report(found, time.monotonic() - start, part=given["shard"] is not None)
    click.echo(str(output))
    return 1 if found.failed or (found.live is not None and found.live.error) else 0


def report(summary: PredictResults, seconds: float, *, part: bool = False) -> None:
    """Say what was found. A `part` has no detections.jsonl, which merging writes."""
    live = summary.live
    click.echo(
        f"{summary.images:,} {'images' if live is None else f'frames of {live.name}'}"
        + (f" ({summary.kept:,} of them by an earlier run)" if summary.kept else "")
        + f" in {seconds:.1f} s, {summary.detections:,} detections"
        + (f" with a score of at least {summary.lowest:g}" if summary.lowest else "")
        + (f"; {summary.failed:,} could not be read" if summary.failed else "")
        + (":" if summary.reasons else ""),
        err=True,
    )
    if live is not None:
        median, longest = (f"{1e3 * one:.3g} ms" for one in live.latency_s)
        click.echo(
            f"  {live.dropped:,} frames dropped, {live.reconnects:,} reconnects; "
            f"from reading a frame to its detections {median} (median), {longest} (longest)",
            err=True,
        )
        if live.error:
            click.echo(f"  {live.error}", err=True)
    for reason in summary.reasons:
        click.echo(f"  {reason}", err=True)
    if summary.reasons and (more := summary.failed - len(summary.reasons)):
        click.echo(f"  and {more:,} more" + (", see detections.jsonl" if not part else ""), err=True)
    if summary.incomplete:
        click.echo(
            f"Note: {summary.incomplete:,} of them may lack detections, or have other ones, that score below "
            f"{summary.lack_below:.3g} (may_lack_below in detections.jsonl): the bundle does not decode enough anchors "
            "for them; one exported with --candidates all does",
            err=True,
        )
