"""`gfldeploy quantize`."""

from __future__ import annotations

from pathlib import Path

import click

from gfldeploy.cli.console import TerminalProgress, command_line
from gfldeploy.cli.options import (
    BUNDLE,
    DIRECTORY,
    FILE,
    IMAGES,
    THREADS,
    FiniteFloat,
    WholeNumber,
    options,
    output_options,
)
from gfldeploy.engines.hardware import usable_threads
from gfldeploy.images.coco import CocoDataset
from gfldeploy.quant.distill import DEFAULT_STEPS
from gfldeploy.quant.fallback import MOST_FLOAT_MACS
from gfldeploy.quant.gate import DEFAULT_MAX_DROP, DEFAULT_MIN_AGREEMENT, GateLimits
from gfldeploy.quant.ptq import ALGORITHMS, AUTO
from gfldeploy.quant.quantizer import METHODS, Method, QuantizeRequest, quantize_bundle
from gfldeploy.quant.samples import DEFAULT_SAMPLES, calibration_images

__all__ = ["command"]


@click.command("quantize")
@options(BUNDLE, *IMAGES)
@output_options("Directory to write the INT8 bundle to.")
@click.option(
    "--algo",
    metavar=f"[auto|{'|'.join(ALGORITHMS)}]",
    default="hist",
    help=f"PaddleSlim's calibration algorithm; auto tries {', '.join(AUTO)} and takes the best.",
)
@click.option(
    "--method",
    type=click.Choice(METHODS),
    default="ptq",
    help="How to quantise. ptq calibrates. distill then fine-tunes the weights on the same images, without labels, to "
    "give in INT8 what FP32 gives, and keeps whichever is measured to be closer.",
)
@click.option(
    "--distill-steps",
    type=WholeNumber(1),
    show_default=str(DEFAULT_STEPS),
    help="Number of steps of --method distill, each of two images.",
)
@click.option(
    "--samples",
    type=WholeNumber(1),
    show_default=f"{DEFAULT_SAMPLES}, or all if there are fewer",
    help="Number of images to calibrate on, spread evenly over all.",
)
@click.option("--eval-data", type=FILE, help="COCO annotations (.json) of other images, to measure mAP on.")
@click.option(
    "--eval-images",
    type=DIRECTORY,
    show_default="images/ beside the annotations, else their folder",
    help="Folder in which the file names of --eval-data start.",
)
@click.option(
    "--eval-limit",
    type=WholeNumber(1),
    show_default="all",
    help="Measure mAP on only this number of images, the first of the list.",
)
@click.option(
    "--max-drop",
    type=FiniteFloat(0, 1),
    show_default=f"{DEFAULT_MAX_DROP:g}",
    help="Largest absolute loss of mAP that INT8 may have in any engine. Needs --eval-data.",
)
@click.option(
    "--min-agreement",
    type=FiniteFloat(0, 1),
    show_default=f"{DEFAULT_MIN_AGREEMENT:g}",
    help="Without --eval-data: smallest share of the FP32 detections on calibration images that INT8 must find again; "
    "0 publishes the bundle unjudged.",
)
@click.option(
    "--keep-float",
    metavar="PATTERN",
    multiple=True,
    help="Leave these convolutions in float: the path of a layer (the bundle's layers.json) or the name of a group "
    "(shown by --sensitivity), with * and ? as in a shell. May be given more than once.",
)
@click.option(
    "--fallback/--no-fallback",
    default=True,
    help="Where INT8 loses too much, put the most sensitive groups of convolutions back to float, as few as needed, "
    f"with at most {MOST_FLOAT_MACS:.0%} of the multiply-accumulates. Without it, fail at once.",
)
@click.option(
    "--sensitivity",
    is_flag=True,
    help="Rank the groups of convolutions by what INT8 in each alone does, even if nothing is lost, into the bundle's "
    "sensitivity.json.",
)
@THREADS
def command(
    bundle: Path,
    data: Path,
    images: Path | None,
    output: Path,
    algo: str,
    samples: int | None,
    eval_data: Path | None,
    eval_images: Path | None,
    eval_limit: int | None,
    max_drop: float | None,
    min_agreement: float | None,
    method: Method,
    distill_steps: int | None,
    keep_float: tuple[str, ...],
    fallback: bool,
    sensitivity: bool,
    threads: int | None,
    force: bool,
) -> None:
    """Make an INT8 bundle from an FP32 one: PaddleSlim's static quantisation on your images.

    One calibration gives the Paddle program for oneDNN and the QDQ ONNX files. Before the bundle is published they are
    run: 90% of the convolutions must run in INT8, and mAP on --eval-data, or without it the detections on calibration
    images, must stay close to FP32 in Paddle, in ONNX Runtime, and in a simulation of TensorRT on the CPU. What loses
    too much goes back to float, group by group, and the bundle's parity.json says what that costs in speed.

    \b
    Example: gfldeploy quantize gfl_r50 --data calib_images/ --output gfl_r50_int8
    """
    if eval_data is None:
        for name, value in (("--eval-images", eval_images), ("--eval-limit", eval_limit), ("--max-drop", max_drop)):
            if value is not None:
                raise click.UsageError(f"{name} needs --eval-data.")
    elif min_agreement is not None:
        raise click.UsageError("--min-agreement is for quantising without --eval-data; with it, use --max-drop.")
    if distill_steps is not None and method != "distill":
        raise click.UsageError("--distill-steps needs --method distill.")
    progress = TerminalProgress()
    if True:
        made = quantize_bundle(
            QuantizeRequest(
                bundle=bundle,
                images=calibration_images(data, images, samples),
                output=output,
                algorithm=algo,
                method=method,
                distill_steps=distill_steps or DEFAULT_STEPS,
                evaluation=CocoDataset.load(eval_data, eval_images, eval_limit) if eval_data else None,
                annotations=eval_data,
                limits=GateLimits(
                    DEFAULT_MAX_DROP if max_drop is None else max_drop,
                    DEFAULT_MIN_AGREEMENT if min_agreement is None else min_agreement,
                ),
                keep_float=keep_float,
                fallback=fallback,
                sensitivity=sensitivity,
                force=force,
                threads=threads or usable_threads(),
                command=command_line(),
            ),
            progress.stage,
            progress.step,
        )
    click.echo(made.directory)
