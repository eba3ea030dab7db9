"""The images of a benchmark as the network's input: decoded and preprocessed before anything is timed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Self

import numpy as np
from numpy.typing import NDArray

from gfldeploy.batching.buckets import Order, Size, area
from gfldeploy.batching.tiles import InTiles
from gfldeploy.engines.base import Engine, Shape, Tensors
from gfldeploy.errors import DataError
from gfldeploy.images.decode import read_image
from gfldeploy.images.preprocess import Prepared, Preprocess


@dataclass(frozen=True)
class Formed:
    """How a batch was formed: its `shape` [N, 3, H, W], and `real_pixels`, of its images as resized, without padding.

    `mixed`: they have several input sizes, so that some are padded to another's.
    """

    shape: tuple[int, ...]
    real_pixels: int
    mixed: bool

    @classmethod
    def of(cls, images: Sequence[Prepared], shape: Sequence[int], preprocess: Preprocess) -> Self:
        """A batch of this shape, of these images."""
        sizes = [one.tensor.shape[1:] for one in images]
        mixed = len({preprocess.padded_size(*size) for size in sizes}) > 1
        return cls(tuple(shape), sum(map(area, sizes)), mixed)


@dataclass(frozen=True)
class Batch:
    """What one inference takes: the network's input, float32 [N, 3, H, W]. `places`: of its images among all, from 0.

    `pixels`: what the file that deploys by itself takes in its place (`Preprocess.pixels_of`); None for the network.
    """

    tensor: NDArray[np.float32]
    places: tuple[int, ...]
    formed: Formed
    pixels: Tensors | None = None

    @property
    def shape(self) -> Shape:
        """(batch, height, width) of the network's input."""
        images, _, height, width = self.formed.shape
        return images, height, width

    @property
    def inputs(self) -> Tensors:
        """Of the engine."""
        return {"image": self.tensor} if self.pixels is None else self.pixels


def placed(batch: Batch, engine: Engine) -> Batch:
    """The batch where the engine copies it from fastest; on a CPU, which reads it where it is, the same."""
    if engine.options.device == "cpu":
        return batch
    tensor = engine.host_array(batch.tensor.size).reshape(batch.tensor.shape)
    tensor[...] = batch.tensor
    return replace(batch, tensor=tensor)


def by_itself(batch: Batch, paths: Sequence[Path], preprocess: Preprocess) -> Batch:
    """The batch for the file that deploys by itself; `paths`: of all images. Raises `DataError`."""
    pixels = preprocess.pixels_of([read_image(paths[place]) for place in batch.places])
    return replace(batch, pixels=pixels, tensor=np.empty((0, *batch.tensor.shape[1:]), np.float32))


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
    batches = []
    for places in buckets.values():
        count = -(-len(places) // batch_size) * batch_size
        cycle = tuple(places[number % len(places)] for number in range(count))
        for start in range(0, count, batch_size):
            chosen = cycle[start : start + batch_size]
            some = [images[place] for place in chosen]
            tensor = preprocess.batch(some)
            batches.append(Batch(tensor, chosen, Formed.of(some, tensor.shape, preprocess)))
    return batches


def tile_batches(paths: Sequence[Path], preprocess: Preprocess, cut: InTiles) -> list[list[Batch]]:
    """Of each image file the batches of its tiles. Raises `DataError` as `prepare_images`, and for too many tiles."""
    if not paths:
        raise DataError("there are no images to measure on", "Give at least one.")
    images = []
    for place, path in enumerate(paths):
        image = read_image(path)
        batches = []
        for regions, _ in cut.batches((image.shape[0], image.shape[1]), preprocess):
            some = [preprocess(region.of(image)) for region in regions]
            tensor = preprocess.batch(some)
            batches.append(Batch(tensor, (place,) * len(some), Formed.of(some, tensor.shape, preprocess)))
        images.append(batches)
    return images


def padding_ratio(batches: Sequence[Formed]) -> float:
    """Pixels of the batches by pixels of the images in them."""
    pixels = sum(batch * height * width for batch, _, height, width in (one.shape for one in batches))
    return pixels / sum(one.real_pixels for one in batches)


def shape_counts(batches: Sequence[Formed]) -> dict[str, int]:
    """How many batches have which shape, such as "1x3x800x1216"."""
    return dict(Counter("x".join(map(str, one.shape)) for one in batches))
