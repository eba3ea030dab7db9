"""The images of a benchmark as the network's input: decoded and preprocessed before anything is timed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from gfldeploy.batching.buckets import Order, Size, area
from gfldeploy.errors import DataError
from gfldeploy.images.decode import read_image
from gfldeploy.images.preprocess import Prepared, Preprocess

__all__ = ["Batch", "make_batches", "padding_ratio", "prepare_images", "shape_counts"]


@dataclass(frozen=True)
class Batch:
    """What one inference takes: float32 [N, 3, H, W].

    `real_pixels`: of the images in it, as resized, without padding. `places`: of those images among all, from 0.
    `mixed`: they have several input sizes, so that some are padded to another's.
    """

    tensor: NDArray[np.float32]
    real_pixels: int
    places: tuple[int, ...]
    mixed: bool

    @property
    def pixels(self) -> int:
        """Of the whole batch, padding included."""
        batch, _, height, width = self.tensor.shape
        return int(batch * height * width)


def prepare_images(paths: Sequence[Path], preprocess: Preprocess) -> list[Prepared]:
    """Decode and preprocess every image. Raises `DataError` for none, and for one that cannot be read."""
    if not paths:
        raise DataError("there are no images to measure on", "Give at least one.")
    return [preprocess(read_image(path)) for path in paths]


def make_batches(
    images: Sequence[Prepared], preprocess: Preprocess, batch_size: int, order: Order = "listed"
) -> list[Batch]:
    """Batches of exactly `batch_size` images each: listed, or bucketed by input size, so that none is padded.

    The last batch, or the last of each bucket, is filled up with the first images of the data, or of the bucket.
    Bucketed batches need all images at once: the offline scenario.
    """
    buckets: dict[Size | None, list[int]] = {}
    for place, image in enumerate(images):
        size = preprocess.padded_size(*image.tensor.shape[1:]) if order == "bucketed" else None
        buckets.setdefault(size, []).append(place)
    return [batch for places in buckets.values() for batch in _batches(images, places, preprocess, batch_size)]


def padding_ratio(batches: Sequence[Batch]) -> float:
    """Pixels of the batches by pixels of the images in them."""
    return sum(batch.pixels for batch in batches) / sum(batch.real_pixels for batch in batches)


def shape_counts(batches: Sequence[Batch]) -> dict[str, int]:
    """How many batches have which shape, such as "1x3x800x1216"."""
    return dict(Counter("x".join(map(str, batch.tensor.shape)) for batch in batches))


def _batches(images: Sequence[Prepared], places: Sequence[int], preprocess: Preprocess, batch_size: int) -> list[Batch]:
    count = -(-len(places) // batch_size) * batch_size
    cycle = tuple(places[number % len(places)] for number in range(count))
    return [_batch(images, cycle[start : start + batch_size], preprocess) for start in range(0, count, batch_size)]


def _batch(images: Sequence[Prepared], places: tuple[int, ...], preprocess: Preprocess) -> Batch:
    chosen = [images[place] for place in places]
    sizes = [one.tensor.shape[1:] for one in chosen]
    return Batch(
        preprocess.batch(chosen),
        sum(area(size) for size in sizes),
        places,
        mixed=len({preprocess.padded_size(*size) for size in sizes}) > 1,
    )
