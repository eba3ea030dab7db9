"""`gfldeploy eval`."""

from __future__ import annotations

import json
from pathlib import Path

import click

from gfldeploy.accuracy import evaluate
from gfldeploy.batching.buckets import ORDERS, Order
from gfldeploy.bundle import Bundle
from gfldeploy.cli.console import console, progress_bar
from gfldeploy.cli.options import DIRECTORY, FILE, WholeNumber, bundle_argument, engine_options, json_option
from gfldeploy.engines.base import Device, EngineOptions, Precision
from gfldeploy.engines.registry import open_engine, preferred_engine
from gfldeploy.errors import UnsupportedError
from gfldeploy.images.coco import CocoDataset

__all__ = ["command"]


@click.command("eval")
@bundle_argument
@click.option("--data", required=True, type=FILE, help="COCO annotations (.json).")
@click.option("--images", type=DIRECTORY, help="Folder of the images. Default: images/ beside the annotations.")
@engine_options
@click.option("--batch-size", type=WholeNumber(1), default=1, show_default=True)
@click.option(
    "--order",
    type=click.Choice(ORDERS),
    default="listed",
    show_default=True,
    help="How batches are formed; bucketed: of one input size each, which pads no image to another's size.",
)
@click.option("--limit", type=WholeNumber(1), help="Use the first N images only.")
@json_option
def command(
    bundle: Path,
    data: Path,
    images: Path | None,
    engine: str | None,
    precision: Precision | None,
    device: Device,
    threads: int,
    batch_size: int,
    order: Order,
    limit: int | None,
    as_json: bool,
) -> None:
    """Measure COCO mAP through an engine: one preprocessing and one NMS for all of them."""
    opened = Bundle.open(bundle)
    manifest = opened.manifest
    dataset = CocoDataset.load(data, images, limit)
    fixed = manifest.inputs[0].shape[0]
    if fixed is not None and (fixed != batch_size or len(dataset.images) % fixed):
        count = len(dataset.images)
        remedy = f"Use --batch-size {fixed} --limit {count - count % fixed}." if count >= fixed else "Add images."
        raise UnsupportedError(
            f"{bundle} takes batches of {fixed} only, not {count} images in batches of {batch_size}", remedy
        )
    options = EngineOptions(precision or manifest.precision, device, threads)
    engine = engine or preferred_engine(opened, options.precision, device)[0]
    match = dataset.match(manifest.classes)
    notes = [*manifest.notes, *dataset.notes, *match.notes]
    notes += [note] if (note := dataset.size_note()) else []
    for note in notes:
        click.echo(f"Note: {note}", err=True)
    with open_engine(engine, opened, options) as running, progress_bar("evaluating") as progress:
        result = evaluate(
            running, dataset, manifest.preprocess, manifest.nms, manifest.classes, batch_size, progress, order
        )
    if as_json:
        # What is undefined, -1 in pycocotools, is null.
        values = {name: None if value == -1 else value for name, value in result.to_dict().items()}
        click.echo(json.dumps({**values, "notes": notes}, indent=2))
        return
    named = {
        "mAP": result.ap, "AP50": result.ap50, "AP75": result.ap75,
        "small": result.ap_small, "medium": result.ap_medium, "large": result.ap_large,
    }  # fmt: skip
    shown = "  ".join(f"{name} {'undefined' if value == -1 else f'{value:.4f}'}" for name, value in named.items())
    missing = sum(one is None for one in match.category_ids)
    over = f", {len(manifest.classes) - missing} of {len(manifest.classes)} classes" if missing else ""
    console().print(
        f"{shown}  ({result.images} images{over}, {engine} {options.precision}, batch {batch_size} {order})"
    )
