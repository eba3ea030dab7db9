"""`gfldeploy audit`."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING

import click

from gfldeploy.bundle import Bundle
from gfldeploy.cli.console import progress_bar
from gfldeploy.cli.options import DIRECTORY, PATH, CommaSeparated, WholeNumber, json_option
from gfldeploy.cli.tables import TableColumn, show_table
from gfldeploy.errors import BundleError, UnsupportedError
from gfldeploy.images.preprocess import Preprocess

if TYPE_CHECKING:
    from gfldeploy.batching.audit import Audit, AuditRow, Survey

__all__ = ["command"]

_BATCH_SIZES = "1,2,4,8,16"
_SHOWN = 3  # images left out that are named
_SPOKEN_BATCH = 8  # the batch size that the sentences are about, if it is there
_CONFIG_SUFFIXES = (".yml", ".yaml")


@click.command("audit")
@click.option("--data", required=True, type=PATH, help="Folder of images, or COCO annotations (.json).")
@click.option("--images", type=DIRECTORY, help="Folder of the annotations' images. Default: images/ beside them.")
@click.option(
    "--config-or-bundle",
    "source",
    required=True,
    type=PATH,
    help="A PaddleDetection config (.yml), or a bundle, which gives MACs and memory too.",
)
@click.option("--batch-sizes", type=CommaSeparated(), help=f"Default: {_BATCH_SIZES}, or the bundle's only one.")
@click.option(
    "--buckets", type=WholeNumber(1), help="Limit the sizes that bucketed batches may have. Default: no limit."
)
@click.option("--seed", type=WholeNumber(0), default=0, show_default=True, help="Of the shuffled order.")
@json_option
def command(
    data: Path,
    images: Path | None,
    source: Path,
    batch_sizes: tuple[int, ...] | None,
    buckets: int | None,
    seed: int,
    as_json: bool,
) -> None:
    """Show what batches of your images would cost, before any inference.

    A batch is padded to one size: where it holds a portrait and a landscape image, every image in it costs more pixels
    than alone. For each batch size this shows how many more with the images listed, shuffled, sorted by size, and
    bucketed (images of one input size in each batch). Only the headers of the files are read; images that cannot be
    used are named and left out.
    """
    from gfldeploy.batching.audit import audit, survey

    preprocess, bundle = _open(source)
    batch_sizes = _batch_sizes(bundle, batch_sizes)
    paths, annotated = _images(data, images)
    with progress_bar("reading sizes") as progress:
        found = survey(paths, preprocess, progress)
    _report_left_out(found)
    _report_other_sizes(found, annotated)
    result = audit(
        found, batch_sizes, buckets, seed, *(_counters(bundle) if bundle and bundle.has_graph("onnx") else ())
    )
    if as_json:
        left_out = [{"path": str(one.path), "reason": one.reason} for one in found.left_out]
        click.echo(json.dumps({**asdict(result), "left_out": left_out}, indent=2))
        return
    _show(result)
    for line in _sentences(result, buckets, preprocess.fixed):
        click.echo(line)
    if bundle is None:
        click.echo("For MACs and the memory of activations, give the bundle that `gfldeploy export` makes.")


def _open(source: Path) -> tuple[Preprocess, Bundle | None]:
    """How images are prepared; None in place of the bundle for a config."""
    if source.suffix in _CONFIG_SUFFIXES and not source.is_dir():
        from gfldeploy.export.config import load_detector_config

        reader = load_detector_config(source).reader
        return Preprocess.from_reader(reader["sample_transforms"], reader["batch_transforms"]), None
    if not source.is_dir():
        problem = f"{source} is neither a bundle nor a config"
        raise BundleError(problem, "Give the directory that `gfldeploy export` wrote, or a PaddleDetection .yml file.")
    bundle = Bundle.open(source)
    return bundle.manifest.preprocess, bundle


def _batch_sizes(bundle: Bundle | None, given: tuple[int, ...] | None) -> tuple[int, ...]:
    only = bundle.manifest.inputs[0].shape[0] if bundle else None
    if bundle and only is not None and given not in (None, (only,)):
        raise UnsupportedError(f"{bundle.directory} takes batches of {only} only", f"Use --batch-sizes {only}.")
    return given or ((only,) if only is not None else tuple(map(int, _BATCH_SIZES.split(","))))


def _images(data: Path, images: Path | None) -> tuple[list[Path], dict[Path, tuple[int, int]]]:
    """The files in their order, and by file the height and width in pixels that annotations give."""
    from gfldeploy.images.coco import CocoDataset, list_images

    if data.is_dir():
        if images is not None:
            raise click.UsageError("--images goes with annotations, and --data is a folder")
        return list_images(data), {}
    listed = CocoDataset.load(data, images).images
    return [image.path for image in listed], {
        image.path: (image.height, image.width) for image in listed if image.height and image.width
    }


_Counter = Callable[[set[tuple[int, int]]], Mapping[tuple[int, int], int]]


def _counters(bundle: Bundle) -> tuple[_Counter, _Counter]:
    """MACs and activations by input size."""
    from gfldeploy.macs import count_work, peak_activations

    onnx_file, _ = bundle.graph("onnx")
    strides = bundle.manifest.strides
    return (
        lambda sizes: {size: one.macs for size, one in count_work(onnx_file, sizes, strides).items()},
        lambda sizes: peak_activations(onnx_file, sizes, strides),
    )


def _report_left_out(found: Survey) -> None:
    if not found.left_out:
        return
    total = len(found.left_out) + len(found.paths)
    click.echo(f"{len(found.left_out)} of {total} images cannot be used and are left out:", err=True)
    for one in found.left_out[:_SHOWN]:
        click.echo(f"  {one.reason}", err=True)
    if more := len(found.left_out[_SHOWN:]):
        click.echo(f"  and {more} more (--json names all)", err=True)


def _report_other_sizes(found: Survey, annotated: Mapping[Path, tuple[int, int]]) -> None:
    pairs = zip(found.paths, found.original, strict=True)
    other = [path for path, size in pairs if annotated.get(path, size) != size]
    if other:
        names = ", ".join(path.name for path in other[:_SHOWN]) + (" ..." if len(other) > _SHOWN else "")
        problem = f"{len(other)} images have another size than their annotations say ({names})"
        click.echo(f"{problem}; the files are believed.", err=True)


def _show(result: Audit) -> None:
    columns = (
        TableColumn("batch"),
        TableColumn("order", right=False),
        TableColumn("pixels"),
        TableColumn("GMAC"),
        TableColumn("mixed"),
        TableColumn("batches", drop=3),
        TableColumn("largest batch", drop=2),
        TableColumn("input,\nMB", drop=1),
        TableColumn("mean\ninput, MB", drop=4),
        TableColumn("activations,\nMB", drop=1),
    )
    lines: list[tuple[str, ...]] = []
    for batch_size, group in groupby(result.rows, lambda row: row.batch_size):
        cells = {row.order: tuple(_cells(row)) for row in group}
        if len(set(cells.values())) == 1:  # batches of one image
            lines.append((str(batch_size), "any", *cells["listed"]))
            continue
        lines += [(str(batch_size), order, *texts) for order, texts in cells.items()]
    show_table(columns, lines, elsewhere="--json has everything.")
    work = ", GMAC: per image" if result.macs else ""
    memory = "; activations: an estimate for FP32, the input included, weights not" if result.macs else ""
    click.echo(
        f"pixels: by those of the same images at batch 1{work}; mixed: batches with portrait and landscape images"
    )
    click.echo(f"input: of the largest batch, and of the mean one{memory}\n")


def _cells(row: AuditRow) -> Iterator[str]:
    count, height, width = row.largest
    yield f"{row.padding:.3f}x"
    yield "" if row.macs is None else _gmac(row.macs)
    yield f"{row.mixed / row.batches:.0%}"
    yield f"{row.batches:,}"
    yield f"{count}x3x{height}x{width}"
    yield f"{row.input_bytes / 1e6:,.1f}"
    yield f"{row.mean_input_bytes / 1e6:,.1f}"
    yield "" if row.activation_bytes is None else f"{row.activation_bytes / 1e6:,.0f}"


def _sentences(result: Audit, buckets: int | None, fixed: bool) -> Iterator[str]:
    """What the table says, in words."""
    grown = "bars around the image" if fixed else "rounding up to the stride"
    yield (
        f"{result.images:,} images make {result.sizes} input size{'s' if result.sizes > 1 else ''} at batch 1; "
        f"{grown} makes them {result.rounding:.3f}x the pixels of the resized images."
    )
    sizes = {row.batch_size for row in result.rows}
    spoken = _SPOKEN_BATCH if _SPOKEN_BATCH in sizes else max(sizes)
    rows = {row.order: row for row in result.rows if row.batch_size == spoken}
    listed, bucketed = rows["listed"], rows["bucketed"]
    if spoken > 1:
        work = f" ({_gmac(listed.macs)} GMAC instead of {_gmac(result.macs)})" if listed.macs and result.macs else ""
        limit = f" in at most {buckets} sizes" if buckets else ""
        yield (
            f"At batch {spoken}, listed, an image costs {listed.padding:.2f}x its pixels{work}: "
            f"{listed.mixed / listed.batches:.0%} of the batches hold portrait and landscape images. "
            f"Bucketed{limit}: {bucketed.padding:.2f}x."
        )
    if result.sizes > 1:
        costs = ", ".join(f"{most}: {cost:.2f}x" for most, cost in result.limited.items())
        yield f"Bucketed in no more than so many sizes: {costs}."


def _gmac(macs: float) -> str:
    return f"{macs / 1e9:,.3g}" if macs < 100e9 else f"{macs / 1e9:,.0f}"
