"""`gfldeploy quantize`."""

from __future__ import annotations

from pathlib import Path

import click

from gfldeploy.cli.console import command_line, progress_bars, stages
from gfldeploy.cli.options import DIRECTORY, bundle_argument, force_option, output_option, threads_option
from gfldeploy.quant.ptq import ALGORITHMS
from gfldeploy.quant.quantizer import DEFAULT_SAMPLES, QuantizeRequest, calibration_images, quantize_bundle

__all__ = ["command"]


@click.command("quantize")
@bundle_argument
@click.option(
    "--data", required=True, type=click.Path(path_type=Path), help="Folder of images, or COCO annotations (.json)."
)
@click.option("--images", type=DIRECTORY, help="Folder of the annotations' images. Default: images/ beside them.")
@output_option("Directory of the INT8 bundle to write.")
@click.option(
    "--algo", type=click.Choice(ALGORITHMS), default="hist", show_default=True, help="PaddleSlim's algorithm."
)
@click.option("--samples", type=click.IntRange(1), default=DEFAULT_SAMPLES, show_default=True, help="Images to use.")
@threads_option
@force_option
def command(
    bundle: Path,
    data: Path,
    images: Path | None,
    output: Path,
    algo: str,
    samples: int,
    threads: int,
    force: bool,
) -> None:
    """Make an INT8 bundle from an FP32 one: PaddleSlim's static quantisation on your images.

    One calibration gives the Paddle program for oneDNN and the QDQ ONNX file. Both are compared with FP32 on
    calibration images before the bundle is published.
    """
    with progress_bars() as progress:
        made = quantize_bundle(
            QuantizeRequest(
                bundle=bundle,
                images=calibration_images(data, images, samples),
                output=output,
                algorithm=algo,
                force=force,
                threads=threads,
                command=command_line(),
            ),
            stages(),
            progress,
        )
    click.echo(made.directory)
