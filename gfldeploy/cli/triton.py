"""`gfldeploy triton`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from gfldeploy.cli import options
from gfldeploy.cli.console import TerminalProgress


@click.command("triton")
@click.argument("source", metavar="BUNDLE|deploy.yml", type=options.PATH)
@options.output("Model repository to write.")
@click.option("--name", show_default="the bundle's", help="Name of the model in Triton.")
@click.option(
    "--backend",
    type=click.Choice(["python", "onnxruntime"]),
    default="python",
    help="Backend of Triton that runs the network. python: gfldeploy itself, in any engine. onnxruntime: the bundle's "
    "end_to_end.onnx, behind a Python model that decodes and resizes.",
)
@click.option(
    "--instances",
    type=options.WholeNumber(1),
    show_default="the streams of deploy.yml, or 1",
    help="Number of processes of the model, each with an engine of its own.",
)
@click.option(
    "--python-env",
    metavar="DIR",
    show_default="that of Triton",
    help="Python environment with gfldeploy, where Triton runs: an absolute path (EXECUTION_ENV_PATH).",
)
@options.group(*options.ENGINE, options.INPUT_SIZE)
@click.option(
    "--batch-size",
    type=options.WholeNumber(1),
    show_default="that of deploy.yml, or 1",
    help="Largest number of images of one inference, which Triton's dynamic batcher collects.",
)
def command(**given: Any) -> None:
    """Write a model repository for Triton Inference Server.

    The repository holds a copy of the bundle. A request holds one image file of any format that predict reads, and is
    answered with its boxes, scores, classes and count. Options that are not given are as in deploy.yml, or are decided
    where Triton runs. Nothing is loaded here.

    \b
    Example: gfldeploy triton deploy.yml --output models
    """
    from gfldeploy.triton.repository import triton_repository

    written: Path = triton_repository(**given, progress=TerminalProgress())
    click.echo(str(written))
