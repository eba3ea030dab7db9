"""What batches of a user's images would cost, from request to result: what `gfldeploy audit` runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from gfldeploy.batching.audit import Audit, Survey, audit_sizes, audit_tiles, survey
from gfldeploy.batching.buckets import Size, size_in_words
from gfldeploy.batching.tiles import Tiling
from gfldeploy.bundle import Bundle
from gfldeploy.errors import BundleError, UnsupportedError, UsageError
from gfldeploy.files import StrPath
from gfldeploy.images.coco import CocoDataset, list_images
from gfldeploy.images.preprocess import Preprocess
from gfldeploy.macs import count_work, peak_activations
from gfldeploy.progress import SILENT, Progress

_BATCH_SIZES = (1, 2, 4, 8, 16)
_NAMED = 3  # images of another size than annotated
_SPOKEN_BATCH = 8  # the batch size that the sentences are about, if it is there
_CONFIG_SUFFIXES = (".yml", ".yaml")

_Count = Callable[[set[Size]], Mapping[Size, int]]


def audit(
    *,
    data: StrPath,
    config_or_bundle: StrPath,
    images: StrPath | None = None,
    batch_sizes: Sequence[int] | None = None,
    input_sizes: Sequence[Size] = (),
    tile: Size | None = None,
    overlap: float | None = None,
    buckets: int | None = None,
    seed: int = 0,
    progress: Progress = SILENT,
) -> Audit:
    """Compute what batches of images would cost in padding, MACs and memory, before any inference.

    Only the headers of the files are read. Images that cannot be used are left out, and named in the result.

    Args:
        data: A folder of images, or COCO annotations (.json).
        config_or_bundle: A PaddleDetection config (.yml), or a bundle, which gives MACs and memory too.
        images: The folder in which the annotations' file names start; by default `images/` beside them.
        batch_sizes: By default 1, 2, 4, 8 and 16, or the only one that the bundle takes.
        input_sizes: Other sizes, (height, width) in pixels, to which images are resized, as `target_size` in
            PaddleDetection; what they cost is in `at_sizes`.
        tile: The size, (height, width) in pixels of the image, of tiles that larger images are cut into; what that
            costs is in `in_tiles`.
        overlap: Of two neighbouring tiles, by the side of a tile; by default 0.2.
        buckets: The largest number of sizes that bucketed batches may have; None for no limit.
        seed: Seed of the shuffled order.
        progress: Told of the headers that are read.

    Returns:
        The costs by batch size and order, and what they say in sentences.

    Raises:
        UsageError: `images` was given with a folder, or the tiles cannot be.
        DataError: Annotations cannot be read, or no image can be used.
        BundleError: `config_or_bundle` is neither a bundle nor a config, or a damaged one, or does not take an input
            size.
        ConfigError: The config cannot be used.
        UnsupportedError: The bundle does not take these batch sizes.
    """
    tiling = Tiling.of(tile, overlap)
    preprocess, bundle = _open(Path(config_or_bundle))
    others = {size: _resized(preprocess, bundle, size) for size in input_sizes}
    sizes = _batch_sizes(bundle, batch_sizes)
    paths, annotated = _images(Path(data), None if images is None else Path(images))
    found = survey(paths, preprocess, progress)
    pairs = zip(found.paths, found.original, strict=True)
    if other := [path.name for path, size in pairs if annotated.get(path, size) != size]:
        names = ", ".join(other[:_NAMED]) + (" ..." if len(other) > _NAMED else "")
        problem = f"{len(other)} images have another size than their annotations say ({names})"
        progress.note(f"{problem}; the sizes of the files count")
    counts = _counts(bundle) if bundle and bundle.has_graph("onnx") else ()

    def whole_and_in_tiles(found: Survey, preprocess: Preprocess) -> Audit:
        whole = audit_sizes(found, sizes, buckets, seed, *counts)
        if tiling is None:
            return whole
        in_tiles = audit_tiles(found, preprocess, tiling, sizes, *counts)
        return replace(whole, in_tiles=replace(in_tiles, answer=tuple(_of_tiles(whole, in_tiles))))

    result = whole_and_in_tiles(found, preprocess)
    known = dict(zip(found.paths, found.original, strict=True))
    at_sizes = []
    for size, resized in others.items():
        again = survey(found.paths, resized, progress, known)
        one = replace(whole_and_in_tiles(again, resized), left_out=again.left_out, input_size=size)
        at_sizes.append(replace(one, answer=tuple(_sentences(one, buckets, resized.fixed))))
    answer = (*_sentences(result, buckets, preprocess.fixed), *(_cost(result, one) for one in at_sizes))
    return replace(result, answer=answer, left_out=found.left_out, at_sizes=tuple(at_sizes))


def gmac(macs: float) -> str:
    """10^9 multiply-accumulates, in three digits."""
    return f"{macs / 1e9:,.3g}" if macs < 100e9 else f"{macs / 1e9:,.0f}"


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


def _resized(preprocess: Preprocess, bundle: Bundle | None, size: Size) -> Preprocess:
    """How images are prepared at another input size."""
    return replace(preprocess, target_size=size) if bundle is None else bundle.at_size(size).manifest.preprocess


def _batch_sizes(bundle: Bundle | None, given: Sequence[int] | None) -> Sequence[int]:
    only = bundle.manifest.inputs[0].shape[0] if bundle else None
    if bundle and only is not None and given is not None and tuple(given) != (only,):
        raise UnsupportedError(f"{bundle.directory} takes batches of {only} only", f"Use --batch-sizes {only}.")
    return given or ((only,) if only is not None else _BATCH_SIZES)


def _images(data: Path, images: Path | None) -> tuple[list[Path], dict[Path, Size]]:
    """The files in their order, and by file the height and width in pixels that annotations give."""
    if data.is_dir():
        if images is not None:
            raise UsageError("--images goes with annotations, and --data is a folder", "Leave --images out.")
        return list_images(data), {}
    listed = CocoDataset.load(data, images).images
    return [image.path for image in listed], {
        image.path: (image.height, image.width) for image in listed if image.height and image.width
    }


def _counts(bundle: Bundle) -> tuple[_Count, _Count]:
    """MACs and activations by input size."""
    onnx_file, _ = bundle.graph("onnx")
    strides = bundle.manifest.strides
    return (
        lambda sizes: {size: one.macs for size, one in count_work(onnx_file, sizes, strides).items()},
        lambda sizes: peak_activations(onnx_file, sizes, strides),
    )


def _cost(own: Audit, other: Audit) -> str:
    """What an image costs at another input size, in a sentence."""
    assert other.input_size is not None
    work = f" ({gmac(other.macs)} GMAC instead of {gmac(own.macs)})" if other.macs and own.macs else ""
    rows = {(row.order, row.batch_size): row for row in other.rows}
    spoken = max((row.batch_size for row in other.rows if row.batch_size <= _SPOKEN_BATCH), default=1)
    listed = rows.get(("listed", spoken))
    batch = f"; at batch {spoken}, listed, {listed.padding:.2f}x that" if listed and spoken > 1 else ""
    lost = len(other.left_out)
    without = f" ({lost} more images cannot be used: a side vanishes)" if lost else ""
    pixels = f"{other.pixels / own.pixels:.2f}x the pixels"
    return f"At {size_in_words(other.input_size)} an image has {pixels}{work}{batch}{without}."


def _of_tiles(whole: Audit, in_tiles: Audit) -> Iterator[str]:
    """What images cost in tiles, and how well batches fill."""
    work = f" ({gmac(in_tiles.macs)} GMAC instead of {gmac(whole.macs)})" if in_tiles.macs and whole.macs else ""
    most = f", {in_tiles.most_inputs:,} at most" if in_tiles.most_inputs > in_tiles.inputs else ""
    yield (
        f"In {in_tiles.tiling} an image is {_count(in_tiles.inputs)} inputs of the network{most}: "
        f"{_count(in_tiles.pixels / whole.pixels)}x its pixels{work}; rounding up to the stride makes them "
        f"{in_tiles.rounding:.3f}x the pixels of the resized tiles."
    )
    each = ", ".join(f"{row.batch_size}: {_count(row.inferences or 0.0)}" for row in in_tiles.rows)
    yield f"Inferences of an image by batch size, tiles of one input size in each: {each}."


def _count(mean: float) -> str:
    """In three digits, or all of its whole ones."""
    return f"{mean:.3g}" if mean < 999.5 else f"{mean:,.0f}"


def _sentences(result: Audit, buckets: int | None, fixed: bool) -> Iterator[str]:
    """What the rows say."""
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
        work = f" ({gmac(listed.macs)} GMAC instead of {gmac(result.macs)})" if listed.macs and result.macs else ""
        limit = f" in at most {buckets} sizes" if buckets else ""
        yield (
            f"At batch {spoken}, listed, an image costs {listed.padding:.2f}x its pixels{work}: "
            f"{listed.mixed / listed.batches:.0%} of the batches hold portrait and landscape images. "
            f"Bucketed{limit}: {bucketed.padding:.2f}x."
        )
    if result.sizes > 1:
        costs = ", ".join(f"{most}: {cost:.2f}x" for most, cost in result.limited.items())
        yield f"Bucketed with at most this number of sizes: {costs}."
