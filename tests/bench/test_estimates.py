"""Intervals that hold what they say they hold, by simulation and by the textbook's numbers."""

from __future__ import annotations

import numpy as np
import pytest

from gfldeploy.bench.estimates import median, percentile, ratio_of_medians, samples_for, supports


@pytest.mark.parametrize(("percent", "least"), [(50, 6), (90, 36), (95, 72), (99, 368)])
def test_the_least_number_of_samples(percent: int, least: int) -> None:
    # The largest of n samples lies below the percentile with (p/100)^n, which is to be 2.5% at most.
    assert (percent / 100) ** least <= 0.025 < (percent / 100) ** (least - 1)
    assert supports(least, percent) and not supports(least - 1, percent)
    assert samples_for(percent) == least


def test_values() -> None:
    assert median([3, 1, 2]).value == 2 and median([1, 2, 3, 10]).value == 2.5
    # Linear between the neighbours: 90 % of the way through 4 steps lies 0.6 between 4 and 5.
    assert percentile([5, 1, 2, 3, 4], 90).value == pytest.approx(4.6)
    few = percentile([7], 90)
    assert (few.value, few.low, few.high, few.n) == (7, None, None, 1)
    # Of ten samples, the 2nd and the 9th: binomial(10, 1/2) is below 2 with 1.07 %, below 3 with 5.5 %.
    ten = median(range(1, 11))
    assert (ten.low, ten.high) == (2, 9)
    with pytest.raises(ValueError):
        median([])


@pytest.mark.parametrize(("percent", "n"), [(50, 20), (90, 60), (99, 500)])
def test_the_interval_covers_the_percentile_as_often_as_it_says(percent: int, n: int) -> None:
    random = np.random.default_rng(0)
    truth = float(np.percentile(random.lognormal(0, 0.5, 2_000_000), percent))
    estimates = [percentile(random.lognormal(0, 0.5, n).tolist(), percent) for _ in range(600)]
    covered = np.mean(
        [one.low <= truth <= one.high for one in estimates if one.low is not None and one.high is not None]
    )
    assert 0.93 <= covered <= 1


@pytest.mark.slow
def test_the_ratios_interval_covers_it_though_rounds_drift() -> None:
    random = np.random.default_rng(0)
    covered = 0
    for _ in range(40):
        before, after = (
            [(level * random.normal(1, 0.02) * random.lognormal(0, 0.1, 40)).tolist() for _ in range(8)]
            for level in (10.0, 12.0)
        )
        found = ratio_of_medians(before, after, resamples=200)
        assert found.low is not None and found.high is not None
        covered += found.low <= 1.2 <= found.high
    assert 0.85 <= covered / 40 <= 1


def test_ratio() -> None:
    found = ratio_of_medians([[1.0] * 10], [[2.0] * 10])
    assert (found.value, found.low, found.high) == (2, 2, 2)
    assert ratio_of_medians([[1.0, 2.0]], [[2.0]]).low is None
    wrongs: tuple[list[list[float]], ...] = ([], [[]], [[0.0] * 6])
    for wrong in wrongs:
        with pytest.raises(ValueError):
            ratio_of_medians(wrong, [[1.0] * 6])
