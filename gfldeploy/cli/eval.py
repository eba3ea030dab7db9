"""`gfldeploy eval`."""

from __future__ import annotations

import json
from typing import Any

import click

from gfldeploy.accuracy import evaluate
from gfldeploy.batching.buckets import ORDERS
from gfldeploy.cli import options
from gfldeploy.cli.console import TerminalProgress, console
from gfldeploy.engines.base import with_tf32


@click.command("eval")
@options.group(options.BUNDLE, *options.ANNOTATIONS, *options.ENGINE)
@options.group(options.batching(ORDERS, "listed"), options.limit(), options.ENGINE_CACHE, options.JSON)
def command(as_json: bool, **given: Any) -> None:
    """Measure COCO mAP through an engine: preprocessing and NMS are the same in all of them.

    \b
    Example: gfldeploy eval gfl_r50_int8 --data val.json --engine openvino
    """
    found = evaluate(**given, progress=TerminalProgress())
    if as_json:
        # What is undefined, -1 in pycocotools, is null.
        values = {name: None if value == -1 else value for name, value in found.accuracy.to_dict().items()}
        click.echo(json.dumps({**values, "notes": found.notes}, indent=2))
        return
    one = found.accuracy
    named = {
        "mAP": one.ap, "AP50": one.ap50, "AP75": one.ap75,
        "small": one.ap_small, "medium": one.ap_medium, "large": one.ap_large,
    }  # fmt: skip
    shown = "  ".join(f"{name} {'undefined' if value == -1 else f'{value:.4f}'}" for name, value in named.items())
    over = f", {found.matched} of {found.classes} classes" if found.matched < found.classes else ""
    how = f"{found.engine} {with_tf32(found.precision, found.tf32)}, batch {given['batch_size']} {given['order']}"
    console().print(f"{shown}  ({one.images} images{over}, {how})")
