"""What batches of images would cost, before any inference: padding, MACs and memory by batch size and order.

A batch is padded to one size, so that a portrait and a landscape image in it cost more than both would alone. `survey`
reads the headers of the files; the rest is arithmetic on sizes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from gfldeploy.batching.buckets import ORDERS, Group, Order, Size, area, choose_buckets, group, is_mixed, padding
from gfldeploy.batching.tiles import InTiles, Region, Tiling
from gfldeploy.errors import DataError
from gfldeploy.images.decode import image_size
from gfldeploy.images.preprocess import Preprocess
from gfldeploy.macs import BYTES
from gfldeploy.progress import SILENT, Progress

_FEW_BUCKETS = (1, 2, 4, 8, 16)
_PIXEL_BYTES = 3 * BYTES["fp32"]


@dataclass(frozen=True)
class LeftOut:
    """An image that cannot be used, and why."""

    path: Path
    reason: str


@dataclass(frozen=True)
class Survey:
    """Images by their headers, as listed: (height, width) in pixels.

    `original`: as read; `resized`: by the preprocessing; `inputs`: of the network's input for each image alone.
    """

    paths: tuple[Path, ...]
    original: tuple[Size, ...]
    resized: tuple[Size, ...]
    inputs: tuple[Size, ...]
    left_out: tuple[LeftOut, ...]


@dataclass(frozen=True)
class AuditRow:
    """All batches of one batch size and order.

    `mixed`: how many of the `batches` hold both portrait and landscape images. `padding`: their pixels by those of the
    same images at batch 1. `macs`: the mean of an image, None if unknown. `largest`: images, height and
    width of the batch that takes the most memory. In bytes of FP32: `input_bytes`, the network's input for that batch;
    `mean_input_bytes`, for the mean batch; `activation_bytes`, the estimate of `macs.peak_activations` for the largest
    batch, its input included, None if unknown. `inferences`: of the mean image in tiles; None for whole images.
    """

    batch_size: int
    order: Order
    batches: int
    mixed: int
    padding: float
    macs: float | None
    largest: tuple[int, int, int]
    input_bytes: int
    mean_input_bytes: float
    activation_bytes: int | None
    inferences: float | None = None


@dataclass(frozen=True)
class Audit:
    """What batches of some images would cost.

    `input_size`: (height, width) in pixels to which images are resized, None for the size of the bundle or config.
    `sizes`: how many distinct sizes the network's inputs have at batch 1; `pixels`: the mean of theirs. `rounding`:
    their pixels by those of the resized images, which is the cost of rounding up to the stride, or of the bars around
    an image in a fixed input. `macs`: the mean of an image at batch 1. `limited`: padding of bucketed batches by number
    of buckets. `answer`: what the rows say, in sentences. `left_out`: images that cannot be used. `at_sizes`: the same
    images at other input sizes that were asked for. `in_tiles`: the same images in tiles, if that was asked for.

    In tiles (`tiling`) an image is as many inputs of the network as it has tiles, the whole image among them: `inputs`
    of the mean image, and `most_inputs` of one. `pixels` and `macs` are then of all inputs of an image, and batches,
    always bucketed, have tiles of one image.
    """

    images: int
    sizes: int
    pixels: float
    rounding: float
    macs: float | None
    limited: Mapping[int, float]
    rows: tuple[AuditRow, ...]
    answer: tuple[str, ...] = ()
    left_out: tuple[LeftOut, ...] = ()
    input_size: Size | None = None
    at_sizes: tuple[Audit, ...] = ()
    tiling: Tiling | None = None
    inputs: float = 1.0
    most_inputs: int = 1
    in_tiles: Audit | None = None


def survey(
    paths: Sequence[Path],
    preprocess: Preprocess,
    progress: Progress = SILENT,
    known: Mapping[Path, Size] = MappingProxyType({}),
) -> Survey:
    """Read the headers of the files, but those whose size (height, width) in pixels is `known`.

    Those that cannot be used are left out; raises `DataError` if all are.
    """
    kept: list[tuple[Path, Size, Size, Size]] = []
    left_out = []
    for done, path in enumerate(paths, start=1):
        try:
            size = known.get(path) or image_size(path)
            kept.append((path, size, preprocess.resized_size(*size), preprocess.input_size(*size)))
        except DataError as error:
            problem = error.problem if str(path) in error.problem else f"{path}: {error.problem}"
            left_out.append(LeftOut(path, problem))
        progress.step("reading sizes", done, len(paths))
    if not kept:
        first = f": {left_out[0].reason}" if left_out else ""
        raise DataError(f"none of {len(paths)} images can be used{first}", "Give images that OpenCV reads.")
    files, original, resized, inputs = zip(*kept, strict=True)
    return Survey(files, original, resized, inputs, tuple(left_out))


def audit_sizes(
    found: Survey,
    batch_sizes: Sequence[int],
    most_buckets: int | None = None,
    seed: int = 0,
    macs: Callable[[set[Size]], Mapping[Size, int]] | None = None,
    activations: Callable[[set[Size]], Mapping[Size, int]] | None = None,
) -> Audit:
    """Cut the images into batches of each size and order, and add up what they cost.

    `most_buckets`: of the bucketed order; None is every distinct size. `seed`: of the shuffled order. `macs`,
    `activations`: of one image by the size of the network's input, as `macs.count_work` and `macs.peak_activations`
    count them; each is called once. Raises `ValueError` for no images, or numbers below 1.
    """
    sizes = found.inputs
    distinct = len(set(sizes))
    buckets = choose_buckets(sizes, most_buckets)
    cuts = {
        (batch_size, order): group(sizes, batch_size, order, buckets, seed)
        for batch_size in batch_sizes
        for order in ORDERS
    }
    largest = {key: max(groups, key=_pixels) for key, groups in cuts.items()}
    macs_of = macs(set(sizes) | {one.size for groups in cuts.values() for one in groups}) if macs else None
    activations_of = activations({one.size for one in largest.values()}) if activations else None

    def row(batch_size: int, order: Order) -> AuditRow:
        groups, most = cuts[batch_size, order], largest[batch_size, order]
        images = len(most.indices)
        return AuditRow(
            batch_size=batch_size,
            order=order,
            batches=len(groups),
            mixed=sum(is_mixed(one, sizes) for one in groups),
            padding=padding(groups, sizes),
            macs=sum(len(one.indices) * macs_of[one.size] for one in groups) / len(sizes) if macs_of else None,
            largest=(images, *most.size),
            input_bytes=_pixels(most) * _PIXEL_BYTES,
            mean_input_bytes=sum(map(_pixels, groups)) * _PIXEL_BYTES / len(groups),
            activation_bytes=images * activations_of[most.size] * BYTES["fp32"] if activations_of else None,
        )

    return Audit(
        images=len(sizes),
        sizes=distinct,
        pixels=sum(map(area, sizes)) / len(sizes),
        rounding=sum(map(area, sizes)) / sum(map(area, found.resized)),
        macs=sum(macs_of[size] for size in sizes) / len(sizes) if macs_of else None,
        limited={
            most: padding(group(sizes, 1, buckets=choose_buckets(sizes, most)), sizes)
            for most in (*(few for few in _FEW_BUCKETS if few < distinct), distinct)
        },
        rows=tuple(row(*key) for key in cuts),
    )


def audit_tiles(
    found: Survey,
    preprocess: Preprocess,
    tiling: Tiling,
    batch_sizes: Sequence[int],
    macs: Callable[[set[Size]], Mapping[Size, int]] | None = None,
    activations: Callable[[set[Size]], Mapping[Size, int]] | None = None,
) -> Audit:
    """Cut the images into tiles and their tiles into batches of each size, and add up what they cost.

    `macs`, `activations`: as for `audit_sizes`. Images that make too many tiles are left out; raises `DataError` if all
    do. Raises `ValueError` for batch sizes below 1.
    """
    cuts: list[tuple[Region, ...]] = []
    kept: list[Size] = []
    left_out = []
    for path, size in zip(found.paths, found.original, strict=True):
        try:
            cuts.append(tiling.regions(*size))
            kept.append(size)
        except DataError as error:
            left_out.append(LeftOut(path, f"{path}: {error.problem}"))
    if not cuts:
        raise DataError(f"no image can be cut so: {left_out[0].reason}", "Give larger tiles, or less overlap.")
    regions = [region.size for cut in cuts for region in cut]
    inputs = [preprocess.input_size(*size) for size in regions]

    def batches_of(size: Size, batch_size: int) -> list[Group]:
        cut = InTiles(tiling, batch_size).batches(size, preprocess)
        return [Group(tuple(range(len(some))), padded) for some, padded in cut]

    groups = {count: [one for size in kept for one in batches_of(size, count)] for count in batch_sizes}
    largest = {count: max(batches, key=_pixels) for count, batches in groups.items()}
    macs_of = macs(set(inputs)) if macs else None
    activations_of = activations({one.size for one in largest.values()}) if activations else None
    mean_macs = sum(macs_of[size] for size in inputs) / len(cuts) if macs_of else None

    def row(batch_size: int) -> AuditRow:
        batches, most = groups[batch_size], largest[batch_size]
        images = len(most.indices)
        return AuditRow(
            batch_size=batch_size,
            order="bucketed",
            batches=len(batches),
            mixed=0,
            padding=1.0,
            macs=mean_macs,
            largest=(images, *most.size),
            input_bytes=_pixels(most) * _PIXEL_BYTES,
            mean_input_bytes=sum(map(_pixels, batches)) * _PIXEL_BYTES / len(batches),
            activation_bytes=images * activations_of[most.size] * BYTES["fp32"] if activations_of else None,
            inferences=len(batches) / len(cuts),
        )

    return Audit(
        images=len(cuts),
        sizes=len(set(inputs)),
        pixels=sum(map(area, inputs)) / len(cuts),
        rounding=sum(map(area, inputs)) / sum(area(preprocess.resized_size(*size)) for size in regions),
        macs=mean_macs,
        limited={},
        rows=tuple(map(row, batch_sizes)),
        left_out=tuple(left_out),
        tiling=tiling,
        inputs=len(regions) / len(cuts),
        most_inputs=max(map(len, cuts)),
    )


def _pixels(one: Group) -> int:
    return len(one.indices) * area(one.size)
