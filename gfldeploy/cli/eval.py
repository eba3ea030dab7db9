"""`gfldeploy eval`."""

from __future__ import annotations

import json
from typing import Any

import click

from gfldeploy.accuracy import Accuracy, evaluate
from gfldeploy.batching.buckets import ORDERS, size_in_words
from gfldeploy.cli import options
from gfldeploy.cli.console import TerminalProgress, console
from gfldeploy.engines.base import with_tf32
from gfldeploy.serialization import plain


@click.command("eval")
@options.group(options.BUNDLE, *options.ANNOTATIONS, *options.NMS, *options.ENGINE)
@options.input_sizes("measure, one after the other")
@options.group(*options.TILES, options.batching(ORDERS, "listed"), options.limit())
@click.option(
    "--end-to-end", is_flag=True, help="Run the ONNX file that deploys by itself, with its own normalisation and NMS."
)
@options.group(*options.RAY, options.ENGINE_CACHE, options.JSON)
def command(as_json: bool, **given: Any) -> None:
    """Measure COCO mAP through an engine: preprocessing and NMS are the same in all of them.

    \b
    Example: gfldeploy eval gfl_r50_int8 --data val.json --engine openvino
    """
    found = evaluate(**given, progress=TerminalProgress())
    if as_json:
        values = {**_defined(found.accuracy), "notes": found.notes}
        if found.detection.given:
            values["detection"] = plain(found.detection.given)
        if found.at_sizes:
            values["input_sizes"] = {size_in_words(size): _defined(one) for size, one in found.at_sizes.items()}
        click.echo(json.dumps(values, indent=2))
        return
    over = f", {found.matched} of {found.classes} classes" if found.matched < found.classes else ""
    how = f"{found.engine} {with_tf32(found.precision, found.tf32)}, batch {given['batch_size']} {given['order']}"
    how += f", in {found.tiling}" if found.tiling else ""
    for name, value in found.detection.given.items():
        how += f", {name} {','.join(value) if isinstance(value, tuple) else value}"
    if not found.at_sizes:
        console().print(f"{_in_words(found.accuracy)}  ({found.accuracy.images} images{over}, {how})")
    for size, one in found.at_sizes.items():
        console().print(f"{size_in_words(size)}: {_in_words(one)}  ({one.images} images{over}, {how})")


def _defined(found: Accuracy) -> dict[str, Any]:
    """What is undefined, -1 in pycocotools, is null."""
    return {name: None if value == -1 else value for name, value in found.to_dict().items()}


def _in_words(one: Accuracy) -> str:
    named = {
        "mAP": one.ap, "AP50": one.ap50, "AP75": one.ap75,
        "small": one.ap_small, "medium": one.ap_medium, "large": one.ap_large,
    }  # fmt: skip
    return "  ".join(f"{name} {'undefined' if value == -1 else f'{value:.4f}'}" for name, value in named.items())
