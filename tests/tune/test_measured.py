"""What a search may believe of a cell: percentiles that are known, and those that are not."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from sample_results import OK, RUN, altered

from gfldeploy.bench.results import CellResult
from gfldeploy.bench.timing import Stages
from gfldeploy.tune.measured import TAIL_COUNT, Measured, Tail
from gfldeploy.tune.search import Bounds


def cell(*file_ms: float, batches: int = 3) -> CellResult:
    """A cell with these times from file to boxes, in passes of so many batches."""
    run = replace(RUN, stages=Stages(*([file_ms] * 7)), shapes={"2x3x64x96": batches})
    return altered(OK, runs=(run,))


def measured(*file_ms: float) -> Measured:
    found = Measured.of(cell(*file_ms))
    assert found is not None
    return found


def test_speed_and_latency_are_from_file_to_boxes() -> None:
    # Passes of three batches of two images: 6 images in 60 ms, and in 120.
    found = measured(10, 20, 30, 20, 40, 60)
    assert found.passes[0] == pytest.approx((100, 50)) and len(found.passes) == 1
    assert (found.median_ms, found.tail.ms) == (25, 60)


def test_streams_have_as_many_batches_under_way() -> None:
    """Each batch takes as long for its image; the images a second are those of all streams."""
    streams = altered(cell(10, 20, 30, 20, 40, 60), scenario="offline", order="bucketed", streams=3)
    found = Measured.of(streams)
    assert found is not None and found.passes[0] == pytest.approx((300, 150)) and found.median_ms == 25


@pytest.mark.parametrize("runs", [(replace(RUN, stages=None),), (RUN, replace(RUN, stages=None))])
def test_what_was_not_measured_from_file_to_boxes_is_not_believed(runs: tuple[Any, ...]) -> None:
    assert Measured.of(altered(OK, runs=runs)) is None and Measured.of(OK) is not None
    assert Measured.of(cell(0.0, 1.0, 1.0)) is None


def test_the_99th_percentile_is_known_from_368_samples_on() -> None:
    few, enough = (Tail.of(tuple(map(float, range(1, n + 1)))) for n in (TAIL_COUNT - 1, TAIL_COUNT))
    assert (few.known, few.ms, few.what) == (False, 367, "the largest of 367, which are too few to know p99")
    assert (enough.known, enough.what) == (True, "p99")
    assert enough.ms == pytest.approx(np.percentile(range(1, 369), 99))


@pytest.mark.parametrize("n", [1, 5, 40, 400])
def test_what_the_percentile_is_not_below_holds_as_often_as_it_says(n: int) -> None:
    random = np.random.default_rng(n)
    truth = float(np.exp(0.5 * 2.3263478740408408))  # of a lognormal: the normal's 99th percentile
    lower = [Tail.of(tuple(random.lognormal(0, 0.5, n))).low_ms for _ in range(800)]
    assert np.mean([one <= truth for one in lower]) >= 0.96


def test_a_pause_in_a_first_look_neither_keeps_a_bound_nor_ends_a_climb() -> None:
    bounds = Bounds(max_latency_ms=50)
    paused = measured(*[10.0] * 39, 500.0)
    assert not bounds.keeps(paused) and bounds.may_keep(paused) and not bounds.hopeless(paused)
    slow = measured(*[10.0] * 30, *[60.0] * 10)
    assert not bounds.may_keep(slow) and bounds.hopeless(slow)
    assert not bounds.keeps(measured(*[10.0] * 392, *[500.0] * 8))
    assert bounds.keeps(measured(*[10.0] * 399, 500.0)), "one in 400 is beyond the 99th percentile"
