"""Batches by input size."""

from __future__ import annotations

import random
from collections.abc import Iterator

import pytest

from gfldeploy.batching.buckets import (
    ORDERS,
    Group,
    Order,
    Size,
    area,
    bucket_of,
    choose_buckets,
    group,
    group_stream,
    is_mixed,
    padding,
    union,
)

LANDSCAPE, PORTRAIT = (800, 1216), (1216, 800)


def test_a_batch_of_both_orientations_costs_half_as_much_again() -> None:
    sizes = [LANDSCAPE, PORTRAIT]
    (batch,) = group(sizes, 2, "listed")
    assert batch == Group((0, 1), (1216, 1216))
    assert padding([batch], sizes) == 1216 * 1216 / (800 * 1216) == 1.52
    assert is_mixed(batch, sizes)


def test_bucketed_batches_pad_nothing() -> None:
    sizes = [LANDSCAPE, PORTRAIT] * 8
    batches = group(sizes, 8)
    assert [one.size for one in batches] == [LANDSCAPE, PORTRAIT]
    assert padding(batches, sizes) == 1.0
    assert not any(is_mixed(one, sizes) for one in batches)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("batch_size", [1, 3, 8, 100])
def test_every_image_is_in_one_batch_that_holds_it(order: Order, batch_size: int) -> None:
    sizes = _sizes(57)
    batches = group(sizes, batch_size, order, choose_buckets(sizes, 4))
    assert sorted(index for one in batches for index in one.indices) == list(range(57))
    for one in batches:
        assert 1 <= len(one.indices) <= batch_size
        assert all(sizes[k][0] <= one.size[0] and sizes[k][1] <= one.size[1] for k in one.indices)


def test_sorted_mixes_orientations_once_at_most() -> None:
    sizes = _sizes(64)
    assert sum(is_mixed(one, sizes) for one in group(sizes, 8, "sorted")) <= 1


def test_the_shuffled_order_is_that_of_its_seed() -> None:
    sizes = _sizes(40)
    assert group(sizes, 4, "shuffled", seed=1) == group(sizes, 4, "shuffled", seed=1)
    assert group(sizes, 4, "shuffled", seed=1) != group(sizes, 4, "shuffled", seed=2)


def test_few_buckets_keep_the_orientations_apart() -> None:
    sizes: list[Size] = [(800, 1088), (800, 1216), (800, 1216), (1088, 800), (1216, 800)]
    assert choose_buckets(sizes, 2) == ((800, 1216), (1216, 800))
    assert choose_buckets(sizes, 1) == ((1216, 1216),)
    assert set(choose_buckets(sizes)) == set(sizes)


def test_the_cheapest_are_merged_first() -> None:
    # Merging the two on the left costs 32 x 800 pixels for 1 image, the two on the right the same for 100.
    sizes: list[Size] = [(800, 1056), (800, 1088)] + [(800, 1216)] * 100 + [(800, 1248)]
    assert choose_buckets(sizes, 3) == ((800, 1088), (800, 1216), (800, 1248))


def test_more_buckets_never_cost_more() -> None:
    sizes = _sizes(300)
    costs = [padding(group(sizes, 8, buckets=choose_buckets(sizes, most)), sizes) for most in (1, 2, 4, 8, 16, 1000)]
    assert costs == sorted(costs, reverse=True)
    assert costs[-1] == 1.0


def test_thousands_of_distinct_sizes_do_not_take_for_ever() -> None:
    draw = random.Random(0)
    sizes = [(draw.randint(100, 1300), draw.randint(100, 1300)) for _ in range(5000)]
    buckets = choose_buckets(sizes, 8)
    assert len(buckets) <= 8
    assert all(bucket_of(size, buckets) in buckets for size in sizes)
    assert padding(group(sizes, 8, buckets=buckets), sizes) < padding(group(sizes, 8, "listed"), sizes)


def test_what_no_bucket_holds_keeps_its_size() -> None:
    assert bucket_of((800, 1344), [(800, 1216)]) == (800, 1344)
    assert bucket_of((640, 640), [(1216, 1216), (800, 1216), (640, 672)]) == (640, 672)


def test_no_images() -> None:
    assert group([], 4) == []
    with pytest.raises(ValueError, match="at least one size"):
        choose_buckets([])
    with pytest.raises(ValueError, match="batch_size"):
        group([LANDSCAPE], 0)


def test_sizes() -> None:
    assert union([LANDSCAPE, PORTRAIT]) == (1216, 1216)
    assert area(LANDSCAPE) == 972_800


def _sizes(count: int) -> list[Size]:
    """Such as the 800x1333 rule makes of photographs."""
    draw = random.Random(0)
    sides = [(800, draw.randrange(800, 1345, 32)) for _ in range(count)]
    return [(b, a) if draw.random() < 0.3 else (a, b) for a, b in sides]


@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_a_stream_that_ends_is_cut_as_a_list_is(batch_size: int) -> None:
    sizes = _sizes(57)
    batches = list(group_stream(enumerate(sizes), batch_size))
    assert [Group(tuple(indices), size) for indices, size in batches] == group(sizes, batch_size)


@pytest.mark.parametrize("look_ahead", [0, 1, 5, 40])
@pytest.mark.parametrize("batch_size", [1, 4])
def test_nothing_waits_longer_than_the_look_ahead(look_ahead: int, batch_size: int) -> None:
    sizes = _sizes(200)
    read = 0

    def items() -> Iterator[tuple[int, Size]]:
        nonlocal read
        for index, size in enumerate(sizes):
            read = index + 1
            yield index, size

    seen: list[int] = []
    for indices, size in group_stream(items(), batch_size, look_ahead):
        assert {sizes[index] for index in indices} == {size}
        assert 1 <= len(indices) <= batch_size
        assert read - 1 - min(indices) <= look_ahead, "no further than the batch needs"
        seen += indices
    assert sorted(seen) == list(range(200))


def test_a_stream_refuses_batches_of_none() -> None:
    with pytest.raises(ValueError, match="at least 1"):
        list(group_stream([], 0))
