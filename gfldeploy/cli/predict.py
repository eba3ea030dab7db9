"""`gfldeploy predict`."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import TYPE_CHECKING, get_args

import click

from gfldeploy.batching.buckets import StreamOrder
from gfldeploy.cli.console import progress_bars
from gfldeploy.cli.options import FILE, PATH, FiniteFloat, WholeNumber, engine_cache_option, output_option
from gfldeploy.engines.base import DEVICES, PRECISIONS, Device, Precision
from gfldeploy.engines.registry import ANY_SHAPE_ENGINES, PREFERRED_ENGINES
from gfldeploy.errors import DataError
from gfldeploy.files import check_apart
from gfldeploy.predict.outputs import DEFAULT_THRESHOLD

if TYPE_CHECKING:
    from gfldeploy.images.coco import CocoDataset
    from gfldeploy.predict.engine_selection import Choice
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
    "--threshold",
    type=FiniteFloat(0, 1),
    default=DEFAULT_THRESHOLD,
    show_default=True,
    help="The least score in detections.jsonl and in pictures. coco.json has all that NMS leaves, which mAP needs.",
)
@click.option("--draw-threshold", type=FiniteFloat(0, 1), help="The least score in pictures.  [default: --threshold]")
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
    type=click.Choice(ANY_SHAPE_ENGINES),
    help=f"Default: that of deploy.yml, else the first of {', '.join(PREFERRED_ENGINES)} that runs it here.",
)
@click.option("--precision", type=click.Choice(PRECISIONS), help="Default: that of deploy.yml or the bundle.")
@click.option("--device", type=click.Choice(DEVICES), help="Default: that of deploy.yml, else cpu.")
@click.option("--batch-size", type=WholeNumber(1), help="Default: that of deploy.yml, else 1.")
@click.option(
    "--order",
    type=click.Choice(get_args(StreamOrder)),
    help="How batches are formed. bucketed: of one input size each; listed: as the images come, padded to a common "
    "size, which changes scores and boxes.  [default: that of deploy.yml, else bucketed]",
)
@click.option("--threads", type=WholeNumber(1), help="Of one inference. Default: that of deploy.yml, else all.")
@engine_cache_option
@click.option("--force", is_flag=True, help="Replace the results if there are any, and what is left of another run.")
def command(
    source: Path,
    inputs: tuple[Path, ...],
    output: Path,
    data: Path | None,
    draw: bool,
    threshold: float,
    draw_threshold: float | None,
    decode: str,
    engine: str | None,
    precision: Precision | None,
    device: Device | None,
    batch_size: int | None,
    order: StreamOrder | None,
    threads: int | None,
    engine_cache: Path,
    force: bool,
) -> int:
    """Detect in images, folders of them, and videos.

    OUTPUT gets detections.jsonl, a line for each image or frame, in order, with what scores at least --threshold;
    coco.json, everything as COCO results, and images.json, what its ids stand for. Boxes are in pixels of the image as
    it is. What cannot be read is a line with an "error", is named, and does not stop the rest; the exit code is then 1.

    Batches hold images of one input size, so that an image has the detections that it has by itself; in OpenVINO INT8,
    but for rounding where there are more than four shapes of batches.

    Interrupted or killed, the same command resumes where it stopped, to the same bytes.
    """
    # Before OpenCV is loaded: what its video library has to say comes as an error of ours.
    os.environ.setdefault("OPENCV_FFMPEG_LOGLEVEL", "-8")
    from gfldeploy.predict.draw import drawing_notes
    from gfldeploy.predict.engine_selection import choose
    from gfldeploy.predict.session import PredictRequest, predict
    from gfldeploy.predict.sources import is_video

    choice = choose(source, engine, precision, device, threads, batch_size, engine_cache, order)
    read = [source, *inputs] if data is None else [source, data, *inputs]
    check_apart(output, read, choice.bundle.directory)
    dataset, files, notes = _inputs(inputs, data, output)
    drawn = threshold if draw_threshold is None else draw_threshold
    request = PredictRequest(
        choice, files, output, dataset, threshold, drawn if draw else None, decode == "fast", force
    )
    if dataset is not None:
        notes += [*dataset.notes, *dataset.match(choice.bundle.manifest.classes).notes]
    if draw:
        notes += drawing_notes(choice.bundle.manifest.classes, any(map(is_video, files)))
    for note in (*choice.notes, *notes):
        click.echo(f"Note: {note}", err=True)
    _announce(choice)
    start = time.monotonic()
    with progress_bars() as progress:
        summary = predict(request, progress)
    _report(summary, threshold, time.monotonic() - start)
    click.echo(str(output))
    return 1 if summary.failed else 0


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
        output = Path(os.path.abspath(output))  # noqa: PTH100 - "." has no name, and links are not to be followed
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
    listed = ", batches as listed" if choice.order == "listed" and choice.batch_size > 1 else ""
    click.echo(
        f"{choice.bundle.name} in {choice.engine} {options.precision} on {options.device}, batch {choice.batch_size}, "
        f"{options.threads} thread{'' if options.threads == 1 else 's'}{listed} ({choice.why})",
        err=True,
    )


def _report(summary: Summary, threshold: float, seconds: float) -> None:
    click.echo(
        f"{summary.images:,} images"
        + (f" ({summary.kept:,} of them by an earlier run)" if summary.kept else "")
        + f" in {seconds:.1f} s, {summary.detections:,} detections"
        + (f" from a score of {threshold:g} on" if threshold else "")
        + (f"; {summary.failed:,} could not be read:" if summary.failed else ""),
        err=True,
    )
    for reason in summary.reasons:
        click.echo(f"  {reason}", err=True)
    if more := summary.failed - len(summary.reasons):
        click.echo(f"  and {more:,} more, see detections.jsonl", err=True)
    if summary.incomplete:
        click.echo(
            f"Note: {summary.incomplete:,} of them may lack detections, or have other ones, that score below "
            f"{summary.lack_below:.3g} (may_lack_below in detections.jsonl): the bundle does not decode enough anchors "
            "for them; one exported with --candidates all does",
            err=True,
        )
