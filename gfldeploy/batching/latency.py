"""How long a batch will take: fitted to measurements, corrected by what is seen as it runs."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import combinations

import numpy as np

from gfldeploy.batching.buckets import Size, area

__all__ = ["LatencyModel", "Point"]

# Weight of a new observation against all earlier ones of the same batch size and input size.
_LEARNING = 0.2
# What one call of `fade` takes of all of them.
_FADING = 0.05
# Batch sizes by input sizes that are told apart: those seen last. A server without buckets may meet any number.
_MOST_REMEMBERED = 1024


@dataclass(frozen=True)
class Point:
    """A measurement: `ms` milliseconds for a batch of `images` padded to `size`."""

    images: int
    size: Size
    ms: float

    def __post_init__(self) -> None:
        if self.images < 1 or min(self.size) < 1 or self.ms <= 0:
            raise ValueError("images, size and ms must be positive")


class LatencyModel:
    """Milliseconds of a batch: a + b x images + c x pixels of the batch, with nothing negative, times a correction.

    Where `a` is 0, a larger batch is no cheaper by the image and batching does not pay. The correction is learnt for
    each batch size and input size from `observe`; what was never seen, or not for long among many others, takes that of
    everything seen.
    """

    def __init__(self, per_batch_ms: float, per_image_ms: float, per_megapixel_ms: float) -> None:
        """Raises `ValueError` for a negative number, or if all are 0."""
        self.coefficients = (per_batch_ms, per_image_ms, per_megapixel_ms)
        if min(self.coefficients) < 0 or not any(self.coefficients):
            raise ValueError("times must not be negative, nor all of them 0")
        self._ratios: dict[tuple[int, Size], float] = {}
        self._spread = 0.0
        self._overall = 1.0

    @classmethod
    def fit(cls, points: Iterable[Point]) -> LatencyModel:
        """Least relative squares under the constraint that nothing is negative. Raises `ValueError` without points.

        With three coefficients, the best of all subsets of them that come out positive is the constrained optimum.
        """
        measured = list(points)
        if not measured:
            raise ValueError("there must be at least one measurement")
        rows = np.array([(1.0, one.images, one.images * area(one.size) / 1e6) for one in measured])
        scaled = rows / np.array([[one.ms] for one in measured])
        best, least = (0.0, 0.0, 0.0), np.inf
        for count in (1, 2, 3):
            for chosen in combinations(range(3), count):
                solution, *_ = np.linalg.lstsq(scaled[:, chosen], np.ones(len(measured)), rcond=None)
                error = float(((scaled[:, chosen] @ solution - 1) ** 2).sum())
                if solution.min() >= 0 and error < least * (1 - 1e-9):
                    values = [0.0, 0.0, 0.0]
                    for index, value in zip(chosen, solution.tolist(), strict=True):
                        values[index] = value
                    best, least = (values[0], values[1], values[2]), error
        return cls(*best)

    def predict(self, images: int, size: Size) -> float:
        """Milliseconds that a batch is expected to take."""
        return self._prior(images, size) * self._ratios.get((images, size), self._overall)

    def margin(self, images: int, size: Size) -> float:
        """Milliseconds to plan with: what it is expected to take, and twice its mean deviation."""
        return self.predict(images, size) * (1 + 2 * self._spread)

    def observe(self, images: int, size: Size, ms: float) -> None:
        """Learn what a batch took. An exponentially weighted mean: old observations fade.

        One batch counts for twice what was expected at most: the first of a shape, which an engine prepares itself for,
        or one that another process held up, says little of the next.
        """
        if ms <= 0:
            return
        ratio = ms / self._prior(images, size)
        expected = self._ratios.get((images, size), self._overall)
        self._spread += _LEARNING * (min(abs(ratio / expected - 1), 1.0) - self._spread)
        self._ratios.pop((images, size), None)  # to stand behind all others: the first was not seen for longest
        self._ratios[images, size] = expected + _LEARNING * (min(ratio, 2 * expected) - expected)
        if len(self._ratios) > _MOST_REMEMBERED:
            del self._ratios[next(iter(self._ratios))]
        self._overall += _LEARNING * (min(ratio, 2 * self._overall) - self._overall)

    def fade(self) -> None:
        """Forget a little of what was seen, towards what was measured at first.

        For when nothing runs because everything seems too slow: without new observations that would never end.
        """
        self._overall += _FADING * (1 - self._overall)
        for key, ratio in self._ratios.items():
            self._ratios[key] = ratio + _FADING * (1 - ratio)
        self._spread -= _FADING * self._spread

    def _prior(self, images: int, size: Size) -> float:
        per_batch, per_image, per_megapixel = self.coefficients
        return per_batch + images * (per_image + per_megapixel * area(size) / 1e6)
