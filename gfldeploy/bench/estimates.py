"""Statistics of latencies with their 95 % confidence intervals."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

CONFIDENCE = 0.95

# Bootstrap resamples: fewer of very many samples, whose interval is narrow enough to stand it.
_RESAMPLES = 2000
_LEAST_RESAMPLES = 400
_RESAMPLED_VALUES = 25_000_000
# Values that are resampled at once: what bounds the memory, 16 MB in float64.
_CHUNK = 1 << 21


@dataclass(frozen=True)
class Estimate:
    """A statistic of `n` samples, with the bounds of its interval: both None where `n` supports none."""

    value: float
    low: float | None
    high: float | None
    n: int

    def __post_init__(self) -> None:
        if self.n < 1 or (self.low is None) != (self.high is None):
            raise ValueError("n must be at least 1, and there must be both bounds or none")


def median(values: Sequence[float]) -> Estimate:
    """The 50th `percentile`: an interval from 6 values on."""
    return percentile(values, 50)


def percentile(values: Sequence[float], percent: float) -> Estimate:
    """The percentile (0 < `percent` < 100), linear between order statistics as NumPy does, and its interval.

    The interval is free of assumptions on the distribution: two order statistics, which leave the percentile out with
    2.5 % at most on either side by the binomial distribution (Conover, Practical Nonparametric Statistics, 3rd ed.,
    section 3.2; Hahn and Meeker, Statistical Intervals, section 5.2). It takes the samples for independent: a machine
    that drifts while it measures moves the whole interval. Raises `ValueError` without values.
    """
    if not len(values):
        raise ValueError("there must be at least one value")
    ordered = np.sort(np.asarray(values, dtype=np.float64))
    ranks = _interval_ranks(len(ordered), percent)
    low, high = (float(ordered[rank - 1]) for rank in ranks) if ranks else (None, None)
    return Estimate(float(np.percentile(ordered, percent)), low, high, len(ordered))


def supports(n: int, percent: float) -> bool:
    """Whether `n` samples are enough for a two-sided interval of the percentile: 6 of the median, 36 of the 90th."""
    return _interval_ranks(n, percent) is not None


def samples_for(percent: float) -> int:
    """The fewest samples that support an interval of the percentile, the 50th or a higher one: 368 of the 99th.

    With fewer the percentile is not known: it may lie above the largest of them.
    """
    if not 50 <= percent < 100:
        raise ValueError("percent must be from 50 to below 100")
    # All of n samples lie below the percentile with (percent / 100) ** n: the upper bound is the largest of them.
    return math.ceil(math.log((1 - CONFIDENCE) / 2) / math.log(percent / 100) - 1e-9)


def lower_limit(values: Sequence[float], percent: float) -> float:
    """What the percentile is not below, with 97.5 %: an order statistic, and the smallest value where none is so sure.

    Unlike `percentile`'s interval it is there however few the values are. Raises `ValueError` without values.
    """
    if not len(values):
        raise ValueError("there must be at least one value")
    ordered = np.sort(np.asarray(values, dtype=np.float64))
    rank = int(np.searchsorted(_binomial_cdf(len(ordered), percent / 100), (1 - CONFIDENCE) / 2, side="right"))
    return float(ordered[max(min(rank, len(ordered)), 1) - 1])


@lru_cache(maxsize=1024)
def _interval_ranks(n: int, percent: float) -> tuple[int, int] | None:
    """The ranks, from 1, of the two order statistics, None where one of them would lie beyond the samples."""
    if not 0 < percent < 100:
        raise ValueError("percent must lie between 0 and 100")
    tail = (1 - CONFIDENCE) / 2
    cdf = _binomial_cdf(n, percent / 100)
    # The percentile is below the l-th smallest with P(B < l), and above the u-th with P(B >= u), B the number of
    # samples below the percentile: the largest such l and the smallest such u.
    low = int(np.searchsorted(cdf, tail, side="right"))
    high = int(np.searchsorted(cdf, 1 - tail)) + 1
    return (low, high) if low >= 1 and high <= n else None


def _binomial_cdf(n: int, probability: float) -> NDArray[np.float64]:
    """P(B <= k) for k = 0 to n, summed from logarithms, in which the terms of large `n` do not underflow."""
    k = np.arange(n)
    steps = np.log((n - k) / (k + 1)) + math.log(probability / (1 - probability))
    logs = n * math.log1p(-probability) + np.concatenate([[0.0], np.cumsum(steps)])
    return np.cumsum(np.exp(logs))


def ratio_of_medians(
    base: Sequence[Sequence[float]], other: Sequence[Sequence[float]], seed: int = 0, resamples: int = _RESAMPLES
) -> Estimate:
    """The median of all rounds of `other` over that of `base`; see `ratios_of_medians`."""
    return ratios_of_medians(base, other, (CONFIDENCE,), seed, resamples)[0]


def ratios_of_medians(
    base: Sequence[Sequence[float]],
    other: Sequence[Sequence[float]],
    confidences: Sequence[float],
    seed: int = 0,
    resamples: int = _RESAMPLES,
    paired: bool = False,
) -> list[Estimate]:
    """The median of all rounds of `other` over that of `base`, with an interval of each of these confidences, 0 to 1.

    `n` is the smaller number of samples. The interval is that of a two-level percentile bootstrap (after Kalibera and
    Jones, Quantifying Performance Changes with Effect Size Confidence Intervals, 2012): the rounds are drawn with
    replacement, and in each of them circular blocks of consecutive samples (Politis and Romano, 1992) of the square
    root of its length, since neighbours are correlated and the inputs come round again. None below 6 samples on either
    side.

    `paired`: the k-th rounds of both were measured beside each other, so that they are drawn together, and what slows
    the machine down for a while is in both.

    With a single round on a side, what differs from one of its runs to the next is not in the interval. A few rounds
    that differ much more than the samples within them give too narrow an interval.

    Raises `ValueError` where a side has no rounds or an empty one, the median of `base` is not positive, or `paired`
    sides have not as many rounds.
    """
    if paired and len(base) != len(other):
        raise ValueError("paired sides must have as many rounds")
    sides = [[np.asarray(values, dtype=np.float64) for values in rounds] for rounds in (base, other)]
    if not all(rounds and all(len(values) for values in rounds) for rounds in sides):
        raise ValueError("each side must have rounds, and each round samples")
    below, above = (float(np.median(np.concatenate(rounds))) for rounds in sides)
    if below <= 0:
        raise ValueError("the median of base must be positive")
    n = min(sum(map(len, rounds)) for rounds in sides)
    if not supports(n, 50):
        return [Estimate(above / below, None, None, n)] * len(confidences)
    total = sum(len(values) for rounds in sides for values in rounds)
    resamples = min(resamples, max(_RESAMPLED_VALUES // total, _LEAST_RESAMPLES))
    generator = np.random.default_rng(seed)
    together = generator.integers(len(base), size=(resamples, len(base))) if paired else None
    denominators, numerators = (_resampled_medians(rounds, resamples, generator, together) for rounds in sides)
    ratios = numerators / denominators
    bounds = [np.percentile(ratios, [50 * (1 - one), 50 * (1 + one)]).tolist() for one in confidences]
    return [Estimate(above / below, low, high, n) for low, high in bounds]


def _resampled_medians(
    rounds: Sequence[NDArray[np.float64]],
    resamples: int,
    generator: np.random.Generator,
    together: NDArray[np.int64] | None = None,
) -> NDArray[np.float64]:
    """The medians of so many two-level resamples, in random order; in that of the rounds that were drawn `together`."""
    drawn = generator.integers(len(rounds), size=(resamples, len(rounds))) if together is None else together
    choices, places = np.unique(np.sort(drawn, axis=1), axis=0, return_inverse=True)
    # Rounds may differ in length; resamples of the same rounds do not, so that those are computed together.
    order = np.argsort(places.reshape(-1), kind="stable")
    medians = [
        np.median(chunk, axis=1, overwrite_input=True)
        for choice, count in zip(choices, np.bincount(places.reshape(-1)), strict=True)
        for chunk in _resample([rounds[k] for k in choice], int(count), generator)
    ]
    found: NDArray[np.float64] = np.concatenate(medians)
    if together is None:
        return generator.permutation(found)
    found[order] = found.copy()
    return found


def _resample(
    rounds: Sequence[NDArray[np.float64]], count: int, generator: np.random.Generator
) -> Iterator[NDArray[np.float64]]:
    """`count` resamples of these rounds, [some of count, all samples], a chunk at a time."""
    step = max(_CHUNK // sum(map(len, rounds)), 1)
    for start in range(0, count, step):
        size = min(step, count - start)
        yield np.concatenate([_blocks(values, size, generator) for values in rounds], axis=1)


def _blocks(values: NDArray[np.float64], count: int, generator: np.random.Generator) -> NDArray[np.float64]:
    """`count` resamples of one round, [count, its length], of blocks that continue at its start where it ends."""
    n = len(values)
    length = max(round(math.sqrt(n)), 1)
    starts = generator.integers(n, size=(count, math.ceil(n / length)))
    windows = np.lib.stride_tricks.sliding_window_view(np.concatenate([values, values[: length - 1]]), length)
    return windows[starts].reshape(count, -1)[:, :n]
