"""`gfldeploy eval`."""

from __future__ import annotations

import json
from typing import Any

import click

from gfldeploy.accuracy import Accuracy, EvalResults, evaluate
from gfldeploy.batching.buckets import ORDERS, size_in_words
from gfldeploy.cli import options
from gfldeploy.cli.console import TerminalProgress, console, gate_code
from gfldeploy.engines.base import with_tf32
from gfldeploy.gates import accuracy_gate


@click.command("eval")
@options.group(options.BUNDLE, *options.ANNOTATIONS, *options.NMS, *options.ENGINE)
@options.input_sizes("measure, one after the other")
@options.group(*options.TILES, options.batching(ORDERS, "listed"), options.limit())
@click.option(
    "--end-to-end", is_flag=True, help="Run the ONNX file that deploys by itself, with its own normalisation and NMS."
)
@options.group(*options.RAY, options.ENGINE_CACHE)
@click.option(
    "--min-map",
    type=options.FiniteFloat(0, 1),
    show_default="none",
    help="Exit with 1 if the mAP, 0 to 1, is lower: at any of the input sizes.",
)
@options.JSON
def command(as_json: bool, min_map: float | None, **given: Any) -> int:
    """Measure COCO mAP through an engine: preprocessing and NMS are the same in all of them.

    \b
    Example: gfldeploy eval gfl_r50_int8 --data val.json --engine openvino
    """
    found = evaluate(**given, progress=TerminalProgress())
    if as_json:
        click.echo(json.dumps(found.to_dict(), indent=2))
    else:
        _show(found, given["batch_size"], given["order"])
    return 0 if min_map is None else gate_code(accuracy_gate(found, min_map))


def _show(found: EvalResults, batch_size: int, order: str) -> None:
    over = f", {found.matched} of {found.classes} classes" if found.matched < found.classes else ""
    how = f"{found.engine} {with_tf32(found.precision, found.tf32)}, batch {batch_size} {order}"
    how += f", in {found.tiling}" if found.tiling else ""
    for name, value in found.detection.given.items():
        how += f", {name} {','.join(value) if isinstance(value, tuple) else value}"
    if not found.at_sizes:
        console().print(f"{_in_words(found.accuracy)}  ({found.accuracy.images} images{over}, {how})")
    for size, one in found.at_sizes.items():
        console().print(f"{size_in_words(size)}: {_in_words(one)}  ({one.images} images{over}, {how})")


def _in_words(one: Accuracy) -> str:
    named = {
        "mAP": one.ap, "AP50": one.ap50, "AP75": one.ap75,
        "small": one.ap_small, "medium": one.ap_medium, "large": one.ap_large,
    }  # fmt: skip
    return "  ".join(f"{name} {'undefined' if value == -1 else f'{value:.4f}'}" for name, value in named.items())
