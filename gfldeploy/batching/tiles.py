"""Large images in tiles: where they are cut, which tiles go into one inference, and one result out of those of all.

Small objects vanish when a large image is resized to the network's input; in tiles they keep their pixels. The idea and
its defaults are those of SAHI (Akyon et al., Slicing Aided Hyper Inference, ICIP 2022, arXiv:2202.06934; obss/sahi on
GitHub): an overlap of 0.2, the last tiles shifted inwards, the whole image beside the tiles. How results are merged is
not: see `nms.merge_tiles`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import product
from operator import index
from typing import NamedTuple, Self

import numpy as np
from numpy.typing import NDArray

from gfldeploy.batching.buckets import Size, group_stream, size_in_words
from gfldeploy.detections import Detections
from gfldeploy.engines.base import Shape
from gfldeploy.errors import DataError, UsageError
from gfldeploy.images.preprocess import Preprocess
from gfldeploy.nms import NmsParams, merge_tiles

DEFAULT_OVERLAP = 0.2
# Of an image: what is found in each waits for the last one.
_MOST_TILES = 10_000
_MOST_OVERLAP = 0.9
# A box that ends so near to an edge of its tile, by the side of the tile, is of an object that the edge may cut.
_NEAR_EDGE = 0.01


class Region(NamedTuple):
    """A part of an image, in pixels."""

    top: int
    left: int
    height: int
    width: int

    @property
    def size(self) -> Size:
        """(height, width)."""
        return self.height, self.width

    def of(self, image: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """Its pixels, without a copy; of an `image` [h, w, 3]."""
        return image[self.top : self.top + self.height, self.left : self.left + self.width]


@dataclass(frozen=True)
class Tiling:
    """How images are cut into tiles.

    `tile`: its size, (height, width) in pixels of the image. `overlap`: of two neighbours, by the side of a tile, 0 to
    0.9. All tiles of an image have one size: the last row and the last column are shifted inwards, and a side of the
    image that is not longer than that of a tile is not cut. An image that is not cut is detected in as without tiles;
    one that is cut is also detected in as a whole, for objects that no tile holds.

    Raises `UsageError` for values that cannot be.
    """

    tile: Size
    overlap: float = DEFAULT_OVERLAP

    def __post_init__(self) -> None:
        if min(self.tile) < 1:
            raise UsageError(f"a tile of {size_in_words(self.tile)} px has no pixels", "Give --tile as HEIGHTxWIDTH.")
        if not 0 <= self.overlap <= _MOST_OVERLAP:
            problem = f"tiles cannot overlap by {self.overlap}"
            raise UsageError(problem, f"Give a share of the tile from 0 to {_MOST_OVERLAP}.")

    @classmethod
    def of(cls, tile: Size | None, overlap: float | None) -> Self | None:
        """What is asked for by these two; None for no tiles. Raises `UsageError`, as for an overlap without a tile."""
        if tile is None:
            if overlap is not None:
                raise UsageError("--overlap is of tiles, and there are none", "Give --tile too.")
            return None
        try:
            height, width = map(index, tile)
        except (TypeError, ValueError) as error:
            problem = f"a tile is {tile!r:.40}"
            raise UsageError(problem, "Give its (height, width), whole numbers of pixels.") from error
        return cls((height, width), DEFAULT_OVERLAP if overlap is None else overlap)

    def __str__(self) -> str:
        overlap = "" if self.overlap == DEFAULT_OVERLAP else f" that overlap by {self.overlap:g}"
        return f"tiles of {size_in_words(self.tile)}{overlap}"

    def regions(self, height: int, width: int) -> tuple[Region, ...]:
        """Of an image of this size, in pixels: the tiles, row by row, then the whole; only that if it is not cut.

        Raises `DataError` for more than 10,000 tiles.
        """
        tops, tile_h = self._starts(height, self.tile[0])
        lefts, tile_w = self._starts(width, self.tile[1])
        if len(tops) * len(lefts) > _MOST_TILES:
            raise DataError(
                f"an image of {width} x {height} px makes {len(tops) * len(lefts):,} {self}",
                f"Give larger tiles, or less overlap: {_MOST_TILES:,} are the most.",
            )
        tiles = [Region(top, left, tile_h, tile_w) for top, left in product(tops, lefts)]
        return tuple(tiles if len(tiles) == 1 else [*tiles, Region(0, 0, height, width)])

    def _starts(self, side: int, tile: int) -> tuple[list[int], int]:
        """Where tiles begin along a side of an image, and how long they are."""
        if side <= tile:
            return [0], side
        step = max(tile - round(self.overlap * tile), 1)
        return [*range(0, side - tile, step), side - tile], tile


@dataclass(frozen=True)
class InTiles:
    """How the images of a run are cut, and what is made of the results.

    `batch_size`: tiles of one inference, at most.
    """

    tiling: Tiling
    batch_size: int

    def batches(self, size: Size, preprocess: Preprocess) -> list[tuple[list[Region], Size]]:
        """The inferences of an image of this size, (height, width) in pixels, each with that of the network's input.

        At most `batch_size` regions of one input size each, of no other image: what is found in an image depends on
        nothing else. Raises `DataError` as `Tiling.regions`.
        """
        items = ((region, preprocess.input_size(*region.size)) for region in self.tiling.regions(*size))
        return list(group_stream(items, self.batch_size))

    def shapes(self, sizes: Iterable[Size], preprocess: Preprocess) -> Iterator[Shape]:
        """(batch, height, width) of the inferences of images of these sizes; none of one that makes too many tiles."""
        for size in sizes:
            with suppress(DataError):
                for regions, (height, width) in self.batches(size, preprocess):
                    yield len(regions), height, width

    def merged(self, found: Sequence[tuple[Region, Detections]], size: Size, nms: NmsParams) -> Detections:
        """What is in an image of this size, in its pixels, by what is in each of its regions, in the region's pixels.

        See `nms.merge_tiles`. What is found in an image that is not cut stays as it is.
        """
        if len(found) == 1:
            return found[0][1]
        return merge_tiles(*moved(found, size), nms)


def moved(found: Sequence[tuple[Region, Detections]], size: Size) -> tuple[list[Detections], list[NDArray[np.bool_]]]:
    """What is in each region of an image of this size, in pixels of the image, and which boxes end at an inner edge."""
    corners = [np.array([region.left, region.top] * 2, np.float32) for region, _ in found]
    parts = [replace(one, boxes=one.boxes + corner) for (_, one), corner in zip(found, corners, strict=True)]
    return parts, [_is_cut(one.boxes, region, size) for region, one in found]


def _is_cut(boxes: NDArray[np.float32], region: Region, size: Size) -> NDArray[np.bool_]:
    """Which boxes, in pixels of the region, end at an edge of it that is not one of the image."""
    near_y, near_x = np.float32(_NEAR_EDGE * region.height), np.float32(_NEAR_EDGE * region.width)
    cut = np.zeros(len(boxes), np.bool_)
    if region.left > 0:
        cut |= boxes[:, 0] <= near_x
    if region.top > 0:
        cut |= boxes[:, 1] <= near_y
    if region.left + region.width < size[1]:
        cut |= boxes[:, 2] >= region.width - near_x
    if region.top + region.height < size[0]:
        cut |= boxes[:, 3] >= region.height - near_y
    return cut
