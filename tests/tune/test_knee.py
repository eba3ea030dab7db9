"""Where throughput stops to rise."""

from __future__ import annotations

import pytest

from gfldeploy.tune.knee import Knee, find_knee
from gfldeploy.tune.measured import Measured, Tail

SPREAD = (0.99, 1.0, 1.01, 0.995, 1.005, 1.0)


def runs(images_per_s: float, count: int = 3, spread: tuple[float, ...] = SPREAD) -> Measured:
    return Measured((tuple(images_per_s * one for one in spread),) * count, 1.0, Tail(1.0, 1.0, 400, True), 1.0)


@pytest.mark.parametrize(
    ("speeds", "knee", "last"),
    [
        ((50, 80, 100, 99.9), 4, False),
        ((50, 80, 100, 120), 8, True),
        ((100, 90, 80, 70), 1, False),
        ((100, 100, 100, 100), 1, False),
        ((50, 49, 60, 60), 4, False),  # a flat step on the way is no knee
        ((50,), 1, True),
    ],
)
def test_the_knee_is_where_no_larger_batch_is_faster(speeds: tuple[float, ...], knee: int, last: bool) -> None:
    sizes = (1, 2, 4, 8)
    found = find_knee({size: runs(speed) for size, speed in zip(sizes, speeds, strict=False)})
    assert (found.batch_size, found.last) == (knee, last)
    assert [size for size, _ in found.curve] == list(sizes[: len(speeds)])
    assert found.curve[0][1] == pytest.approx(speeds[0])


@pytest.mark.parametrize("spread", [SPREAD, (1.0,)])
def test_single_runs_must_differ_by_more_than_runs_do(spread: tuple[float, ...]) -> None:
    short = {1: runs(100, 1, spread), 2: runs(104, 1, spread)}
    assert find_knee(short).batch_size == 1
    assert find_knee(short | {4: runs(108, 1, spread)}).batch_size == 2
    assert find_knee({1: runs(100), 2: runs(104)}).batch_size == 2, "several runs tell"


def test_nothing_has_no_knee() -> None:
    with pytest.raises(ValueError, match="empty"):
        find_knee({})
    with pytest.raises(ValueError, match="the knee lie on it"):
        Knee(2, ((1, 10.0),))
