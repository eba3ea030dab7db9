"""Which images go into one batch: by input size, so that no image is padded to the size of another.

Everything here is arithmetic on sizes, without an image or an engine: `audit` predicts with it what `bench`, `eval` and
the batcher do.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Literal, TypeVar, get_args

import numpy as np

Item = TypeVar("Item")
# (height, width) in pixels: of the network's input for one image, rounded up to its stride; or an input size, which is
# what images are resized to before.
Size = tuple[int, int]
# listed: as the images come; shuffled: at random; sorted: by size; bucketed: images of one input size in each batch, or
# of one bucket of sizes.
Order = Literal["listed", "shuffled", "sorted", "bucketed"]
ORDERS: tuple[Order, ...] = get_args(Order)
# Those that need not know all images before the first batch.
STREAM_ORDERS: tuple[Order, ...] = ("listed", "bucketed")
_MOST_COMPARED = 512


@dataclass(frozen=True)
class Group:
    """One batch: `indices` of its images among all, in order, and the `size` that they are padded to."""

    indices: tuple[int, ...]
    size: Size


def area(size: Size) -> int:
    """In pixels."""
    return size[0] * size[1]


def size_in_words(size: Size) -> str:
    """Height and width, such as "800x1344"."""
    return f"{size[0]}x{size[1]}"


def union(sizes: Iterable[Size]) -> Size:
    """The smallest size that holds all of them: 800x1216 and 1216x800 need 1216x1216. Raises `ValueError` for none."""
    heights, widths = zip(*sizes, strict=True)
    return max(heights), max(widths)


def padding(groups: Iterable[Group], sizes: Sequence[Size]) -> float:
    """Pixels of the batches by pixels of their images, each at its own size: 1.0 without padding to another's."""
    paid = own = 0
    for one in groups:
        paid += len(one.indices) * area(one.size)
        own += sum(area(sizes[index]) for index in one.indices)
    return paid / own


def is_mixed(group: Group, sizes: Sequence[Size]) -> bool:
    """Whether the batch holds both portrait and landscape images; square ones are neither."""
    turns = {(height > width) - (height < width) for height, width in (sizes[index] for index in group.indices)}
    return {1, -1} <= turns


def choose_buckets(sizes: Iterable[Size], most: int | None = None) -> tuple[Size, ...]:
    """The sizes of batches, the smallest first: those of the images, merged until there are `most`.

    Few are for engines that compile for each shape; None keeps every distinct size, so that nothing is padded. Each
    step merges the two buckets whose union adds the fewest pixels over all images: agglomerative, not optimal, and
    never worse than one bucket for all. More than 512 distinct sizes, as without a stride, are rounded up first. Raises
    `ValueError` without sizes or with `most` below 1.
    """
    counts = Counter(sizes)
    if most is not None:
        counts = _coarser(counts)
    if not counts or (most is not None and most < 1):
        raise ValueError("there must be at least one size, and most must be at least 1")
    buckets = np.array(sorted(counts), dtype=np.int64)
    numbers = np.array([counts[height, width] for height, width in buckets.tolist()], dtype=np.int64)
    pixels = numbers * buckets.prod(axis=1)
    while len(buckets) > (most or len(buckets)):
        unions = np.maximum(buckets[:, None], buckets[None]).prod(axis=2)
        added = (unions * (numbers[:, None] + numbers[None]) - pixels[:, None] - pixels[None]).astype(np.float64)
        np.fill_diagonal(added, np.inf)
        first, second = sorted(divmod(int(added.argmin()), len(buckets)))
        buckets[first] = np.maximum(buckets[first], buckets[second])
        numbers[first] += numbers[second]
        buckets, numbers = np.delete(buckets, second, axis=0), np.delete(numbers, second)
        pixels = numbers * buckets.prod(axis=1)
    distinct = {(int(height), int(width)) for height, width in buckets}
    return tuple(sorted(distinct, key=lambda size: (area(size), size)))


def _coarser(counts: Counter[Size]) -> Counter[Size]:
    """The sizes rounded up until they are few enough to compare each with each."""
    step, rounded = 1, counts
    while len(rounded) > _MOST_COMPARED:
        step *= 2
        rounded = Counter()
        for (height, width), number in counts.items():
            rounded[-(-height // step) * step, -(-width // step) * step] += number
    return rounded


def bucket_of(size: Size, buckets: Sequence[Size]) -> Size:
    """The smallest of the buckets that holds an image of this size; its own size if none does."""
    fitting = [one for one in buckets if one[0] >= size[0] and one[1] >= size[1]]
    return min(fitting, key=area, default=size)


def group(
    sizes: Sequence[Size],
    batch_size: int,
    order: Order = "bucketed",
    buckets: Sequence[Size] | None = None,
    seed: int = 0,
) -> list[Group]:
    """Split images of these sizes into batches of at most `batch_size`, each image in exactly one.

    `buckets`: for the bucketed order; None is every distinct size. Bucketed batches come in the order in which they
    fill, then those that do not fill by their first image, as in `group_stream`. `seed`: of the shuffled order. Raises
    `ValueError` for a batch size below 1 and for another order.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, not {batch_size}")
    if order not in ORDERS:
        raise ValueError(f"order must be one of {', '.join(ORDERS)}, not {order!r}")
    if order == "bucketed":
        buckets = choose_buckets(sizes) if buckets is None and sizes else buckets or ()
        known = {size: bucket_of(size, buckets) for size in set(sizes)}
        pairs = ((index, known[size]) for index, size in enumerate(sizes))
        return [Group(tuple(cut), bucket) for cut, bucket in group_stream(pairs, batch_size)]
    indices = list(range(len(sizes)))
    if order == "shuffled":
        random.Random(seed).shuffle(indices)
    elif order == "sorted":
        indices.sort(key=lambda index: (sizes[index][0] > sizes[index][1], sizes[index]))  # landscape first
    cuts = (tuple(indices[start : start + batch_size]) for start in range(0, len(indices), batch_size))
    return [Group(cut, union(sizes[index] for index in cut)) for cut in cuts]


def group_stream(
    items: Iterable[tuple[Item, Size]], batch_size: int, look_ahead: int | None = None
) -> Iterator[tuple[list[Item], Size]]:
    """Split a stream of items, each with its size, into batches of one size, as `group` in the bucketed order.

    Reads no further than the next batch needs. `look_ahead`: a batch that is not full is yielded when so many items
    have come since its first, so that no more than that many ever wait; None is for a stream that ends. The batches
    depend on the sizes alone. Raises `ValueError` for a batch size below 1.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, not {batch_size}")
    waiting: dict[Size, tuple[int, list[Item]]] = {}  # by size, with the number of the first, in order of that number
    for number, (item, size) in enumerate(items):
        _, batch = waiting.setdefault(size, (number, []))
        batch.append(item)
        if len(batch) == batch_size:
            del waiting[size]
            yield batch, size
        if look_ahead is not None and waiting:
            oldest, (first, _) = next(iter(waiting.items()))
            if number - first >= look_ahead:
                yield waiting.pop(oldest)[1], oldest
    for size, (_, batch) in waiting.items():
        yield batch, size


def stream_batches(
    items: Iterable[tuple[Item, Size]], batch_size: int, order: Order, look_ahead: int | None = None
) -> Iterator[tuple[list[Item], Size]]:
    """Bucketed: `group_stream`. Listed: batches of items as they come, each padded to the size that holds them all.

    An item that cannot be read has a size of 0 pixels, which adds nothing. Raises `ValueError` for another order.
    """
    if order == "bucketed":
        yield from group_stream(items, batch_size, look_ahead)
        return
    if order != "listed":
        raise ValueError(f"a stream cannot be {order}: that takes all of its items")
    remaining = iter(items)
    while batch := list(islice(remaining, batch_size)):
        yield [item for item, _ in batch], union(size for _, size in batch)
