"""The images of a benchmark as the network's input: decoded and preprocessed before anything is timed."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from gfldeploy.batching.buckets import Size, area
from gfldeploy.errors import DataError
from gfldeploy.images.decode import read_image
from gfldeploy.images.preprocess import Prepared, Preprocess

__all__ = ["Batch", "batches_in_order", "padding_ratio", "prepare_images", "shape_counts", "uniform_batches"]


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


def batches_in_order(images: Sequence[Prepared], preprocess: Preprocess, batch_size: int) -> list[Batch]:
    """Batches of the images in their order; the last is filled up from the beginning, so that all are of one size."""
    return _batches(images, range(len(images)), preprocess, batch_size)


def uniform_batches(images: Sequence[Prepared], preprocess: Preprocess, batch_size: int) -> list[Batch]:
    """Batches of images of one size each, so that none is padded to another's; a size's last is filled up with its own.

    An order that only those may choose who have all images at once: the offline scenario.
    """
    by_size: dict[Size, list[int]] = defaultdict(list)
    for place, image in enumerate(images):
        by_size[preprocess.padded_size(*image.tensor.shape[1:])].append(place)
    return [batch for places in by_size.values() for batch in _batches(images, places, preprocess, batch_size)]


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
