"""`gfldeploy predict`."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import TYPE_CHECKING

import click

from gfldeploy.cli.console import progress_bars
from gfldeploy.cli.options import FILE, PATH, FiniteFloat, engine_cache_option, output_option
from gfldeploy.engines.base import DEVICES, PRECISIONS, Device, Precision
from gfldeploy.engines.registry import ENGINES, TENSORRT_ENGINES
from gfldeploy.errors import DataError

if TYPE_CHECKING:
    from gfldeploy.images.coco import CocoDataset
    from gfldeploy.predict.choice import Choice
    from gfldeploy.predict.outputs import Summary

__all__ = ["command"]


@click.command("predict")
@click.argument("source", metavar="BUNDLE|deploy.yml", type=PATH)
@click.argument("inputs", nargs=-1, metavar="INPUT...", type=PATH)
@output_option("Folder for the results.")
@click.option(
    "--data",
    type=FILE,
    metavar="COCO.json",
    help="Detect in the images of these annotations and use their ids. INPUT may then say where file names start.",
)
@click.option(
    "--draw",
    is_flag=True,
    help="Draw the boxes too: pictures/*.jpg, and *.mp4 of videos, which browsers play where OpenCV has the codec.",
)
@click.option(
    "--draw-threshold", type=FiniteFloat(0, 1), default=0.4, show_default=True, help="Draw from this score on."
)
@click.option(
    "--threshold",
    type=FiniteFloat(0, 1),
    default=0.0,
    help="Write detections from this score on.  [default: all that NMS leaves]",
)
@click.option(
    "--decode",
    type=click.Choice(["exact", "fast"]),
    default="exact",
    show_default=True,
    help="fast: decode JPEGs at 1/2, 1/4 or 1/8 where they are that much larger than the network's input; scores and "
    "boxes then differ a little.",
)
@click.option(
    "--engine",
    type=click.Choice([name for name in ENGINES if name not in TENSORRT_ENGINES]),
    help="Default: that of deploy.yml, else openvino, onnxruntime or paddle, the first that can.",
)
@click.option("--precision", type=click.Choice(PRECISIONS), help="Default: that of deploy.yml or the bundle.")
@click.option("--device", type=click.Choice(DEVICES), help="Default: that of deploy.yml, else cpu.")
@click.option("--batch-size", type=click.IntRange(1), help="Default: that of deploy.yml, else 1.")
@click.option("--threads", type=click.IntRange(1), help="Of one inference. Default: that of deploy.yml, else all.")
@engine_cache_option
@click.option("--force", is_flag=True, help="Replace the results if there are any, and what is left of another run.")
def command(
    source: Path,
    inputs: tuple[Path, ...],
    output: Path,
    data: Path | None,
    draw: bool,
    draw_threshold: float,
    threshold: float,
    decode: str,
    engine: str | None,
    precision: Precision | None,
    device: Device | None,
    batch_size: int | None,
    threads: int | None,
    engine_cache: Path,
    force: bool,
) -> None:
    """Detect in images, folders of them, and videos.

    OUTPUT gets detections.jsonl, a line for each image or frame, in order; coco.json, the same as COCO results, and
    images.json, what its ids stand for. Boxes are in pixels of the image as it is. What cannot be read is a line with
    an "error", is named, and does not stop the rest.

    Batches hold images of one input size, so that an image has the detections that it has by itself; in OpenVINO INT8,
    but for rounding where there are more than four shapes of batches.

    Interrupted or killed, the same command goes on where it stopped, to the same bytes.
    """
    # Before OpenCV is loaded: what its video library has to say comes as an error of ours.
    os.environ.setdefault("OPENCV_FFMPEG_LOGLEVEL", "-8")
    from gfldeploy.predict.choice import choose
    from gfldeploy.predict.draw import drawing_notes
    from gfldeploy.predict.session import PredictRequest, predict
    from gfldeploy.predict.sources import is_video

    choice = choose(source, engine, precision, device, threads, batch_size, engine_cache)
    dataset, files, notes = _inputs(inputs, data, output)
    request = PredictRequest(
        choice, files, output, dataset, threshold, draw_threshold if draw else None, decode == "fast", force
    )
    if dataset is not None:
        notes += [*dataset.notes, *dataset.match(choice.bundle.manifest.classes).notes]
    if draw:
        notes += drawing_notes(choice.bundle.manifest.classes, any(map(is_video, files)))
    for note in (*choice.notes, *notes):
        click.echo(f"Note: {note}", err=True)
    _announce(choice)
    start = time.monotonic()
    try:
        with progress_bars() as progress:
            summary = predict(request, progress)
    except KeyboardInterrupt:
        click.echo("What was detected so far is kept: the same command goes on from there.", err=True)
        raise
    _report(summary, time.monotonic() - start)
    click.echo(str(output))


def _inputs(
    inputs: tuple[Path, ...], data: Path | None, output: Path
) -> tuple[CocoDataset | None, list[Path], list[str]]:
    """The annotations, the files, and what is to be said of what is not among them."""
    from gfldeploy.images.coco import CocoDataset
    from gfldeploy.predict.sources import list_inputs

    if data is None:
        if not inputs:
            raise click.UsageError("Missing argument 'INPUT...'")
        notes: list[str] = []
        exclude = (output, output.with_name(f"{output.name}.unfinished"))
        return None, list_inputs(inputs, exclude, notes.append), notes
    if len(inputs) > 1:
        raise click.UsageError("With --data, INPUT is the one folder in which its file names start")
    dataset = CocoDataset.load(data, inputs[0] if inputs else None)
    files = [image.path for image in dataset.images]
    if len(set(files)) < len(files):
        raise DataError(f"{data} lists a file twice", "Give every image one id.")
    return dataset, files, []


def _announce(choice: Choice) -> None:
    options = choice.options
    click.echo(
        f"{choice.bundle.name} in {choice.engine} {options.precision} on {options.device}, batch {choice.batch_size}, "
        f"{options.threads} thread{'' if options.threads == 1 else 's'} ({choice.why})",
        err=True,
    )


def _report(summary: Summary, seconds: float) -> None:
    click.echo(
        f"{summary.images:,} images"
        + (f" ({summary.kept:,} of them by an earlier run)" if summary.kept else "")
        + f" in {seconds:.1f} s, {summary.detections:,} detections"
        + (f"; {summary.failed:,} could not be read:" if summary.failed else ""),
        err=True,
    )
    for reason in summary.reasons:
        click.echo(f"  {reason}", err=True)
    if more := summary.failed - len(summary.reasons):
        click.echo(f"  and {more:,} more, see detections.jsonl", err=True)
