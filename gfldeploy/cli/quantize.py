"""`gfldeploy quantize`."""

from __future__ import annotations

from typing import Any

import click

from gfldeploy.cli import options
from gfldeploy.cli.console import TerminalProgress, command_line
from gfldeploy.quant.fallback import MOST_FLOAT_MACS
from gfldeploy.quant.gate import DEFAULT_MAX_DROP, DEFAULT_MIN_AGREEMENT
from gfldeploy.quant.method import DEFAULT_STEPS
from gfldeploy.quant.methods import METHODS
from gfldeploy.quant.quantizer import quantize_bundle
from gfldeploy.quant.samples import DEFAULT_SAMPLES

_ALGORITHMS = tuple(dict.fromkeys(name for method in METHODS.values() for name in method.algorithms))
_AUTO = tuple(dict.fromkeys(name for method in METHODS.values() for name in method.auto))


@click.command("quantize")
@options.group(options.BUNDLE, *options.IMAGES)
@options.output("Directory to write the INT8 bundle to.")
@click.option(
    "--algo",
    metavar=f"[auto|{'|'.join(_ALGORITHMS)}]",
    show_default=_ALGORITHMS[0],
    help=f"Calibration algorithm of the method; auto tries {', '.join(_AUTO)} and takes the best.",
)
@click.option(
    "--method",
    type=click.Choice(tuple(METHODS)),
    default="ptq",
    help=f"How to quantise. {' '.join(f'{method.name} {method.help}' for method in METHODS.values())}",
)
@click.option(
    "--distill-steps",
    type=options.WholeNumber(1),
    show_default=str(DEFAULT_STEPS),
    help="Number of steps of --method distill, each of two images.",
)
@click.option(
    "--samples",
    type=options.WholeNumber(1),
    show_default=f"{DEFAULT_SAMPLES}, or all if there are fewer",
    help="Number of images to calibrate on, spread evenly over all.",
)
@options.input_sizes("judge INT8 at besides the bundle's own, which alone decides about publishing", "none")
@options.group(*options.annotations_of("other images, to measure mAP on", "--eval-", required=False))
@options.limit(purpose=" for mAP", name="--eval-limit")
@click.option(
    "--max-drop",
    type=options.FiniteFloat(0, 1),
    show_default=f"{DEFAULT_MAX_DROP:g}",
    help="Largest absolute loss of mAP that INT8 may have in any engine. Needs --eval-data.",
)
@click.option(
    "--min-agreement",
    type=options.FiniteFloat(0, 1),
    show_default=f"{DEFAULT_MIN_AGREEMENT:g}",
    help="Without --eval-data: smallest share of the FP32 detections on calibration images that INT8 must find again; "
    "0 accepts any.",
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
    help="Measure what INT8 does in each group of convolutions alone, even if nothing is lost, and write the ranking "
    "into the bundle's sensitivity.json.",
)
@options.group(options.THREADS, *options.RAY_ON_CPUS)
def command(**given: Any) -> None:
    """Make an INT8 bundle from an FP32 one: static quantisation, calibrated on your images.

    One calibration gives the Paddle program for oneDNN and the QDQ ONNX files. They are run before the bundle is
    published: 90% of the convolutions must run in INT8, and mAP on --eval-data, or without it the detections on
    calibration images, must stay close to FP32 in every engine and in a simulation of TensorRT on the CPU. Groups of
    convolutions that lose too much go back to float, and the bundle's parity.json says what that costs in speed.

    With --input-sizes the same is measured at other input sizes, and the bundle records where INT8 holds: predict runs
    it at no others.

    \b
    Example: gfldeploy quantize gfl_r50 --data calib_images/ --output gfl_r50_int8
    """
    made = quantize_bundle(**given, command=command_line(), progress=TerminalProgress())
    click.echo(made.directory)
