"""`gfldeploy export`."""

from __future__ import annotations

import re
from typing import Any

import click

from gfldeploy.candidates import DEFAULT_CANDIDATES, MOST_CANDIDATES
from gfldeploy.cli import options
from gfldeploy.cli.console import TerminalProgress, command_line
from gfldeploy.export.exporter import export_bundle


def _candidates(word: str) -> int | str:
    if word in ("auto", "all"):
        return word
    if not re.fullmatch(r"[0-9]{1,6}", word) or not 1 <= int(word) <= MOST_CANDIDATES:
        raise ValueError(f"{word!r} is neither a whole number from 1 to {MOST_CANDIDATES} nor all or auto")
    return int(word)


@click.command("export")
@click.option("--config", "-c", required=True, type=options.FILE, help="PaddleDetection config (.yml) of a GFL.")
@click.option("--weights", "-w", type=options.FILE, help="Trained checkpoint (.pdparams).")
@click.option(
    "--random-weights",
    type=options.WholeNumber(0),
    metavar="SEED",
    help="Use reproducible random weights in place of a checkpoint.",
)
@options.output("Directory to write the bundle to.")
@click.option(
    "--input-shape",
    type=options.Parsed("SHAPE", options.input_shape),
    metavar="[Nx]HxW",
    show_default="any size",
    help="Fix the size of the network's input, in pixels.",
)
@click.option(
    "--candidates",
    type=options.Parsed("CANDIDATES", _candidates),
    metavar="K|all|auto",
    default="auto",
    help=f"Number of anchors to decode of each image, those with the highest scores: 1 to {MOST_CANDIDATES}, or "
    f"all. auto: {DEFAULT_CANDIDATES}; all where keep_top_k is above {DEFAULT_CANDIDATES // 10} or -1, or where test "
    "images would lose detections; with one class at least nms_top_k.",
)
@click.option(
    "--score-threshold",
    type=options.FiniteFloat(0, 1),
    show_default="the config's",
    help="Score that a detection must exceed to leave NMS, in everything that runs the bundle. mAP needs a low one.",
)
@click.option(
    "--nms-threshold",
    type=options.FiniteFloat(0, 1),
    show_default="the config's",
    help="IoU with a better box of its class above which NMS drops a box.",
)
@click.option(
    "--keep-top-k",
    type=options.WholeNumber(1, 100_000),
    show_default="the config's",
    help="The most detections of an image that leave NMS.",
)
@click.option("--with-nms", is_flag=True, help="Add PaddleDetection's own graph with NMS, for its deploy tools.")
@click.option(
    "--end-to-end/--no-end-to-end",
    default=True,
    show_default=True,
    help="Add the ONNX files that deploy by themselves: pixels in, detections out.",
)
@click.option(
    "--golden",
    type=options.FILE,
    metavar="IMAGE",
    show_default="a drawn picture",
    help="An image, reduced to 512 px, that the bundle holds with the detections in it, for checking ports of it.",
)
@options.THREADS
def command(**given: Any) -> None:
    """Turn a trained GFL into a bundle: Paddle and ONNX graphs without NMS, BatchNorm folded.

    The graphs decode the anchors with the highest scores, as many as NMS can need, not all of the tens of thousands.
    Where a number given for --candidates may lose detections, export, inspect and predict say so.

    Every graph is compared with the eager PaddleDetection model, in the engine that will run it, before the bundle is
    published.

    \b
    Example: gfldeploy export --config gfl_r50.yml --weights model_final.pdparams --output gfl_r50
    """
    bundle = export_bundle(**given, command=command_line(), progress=TerminalProgress())
    click.echo(bundle.directory)
