"""How long a batch will take: fitted to measurements, corrected by observations at work."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import chain, combinations

import numpy as np

from gfldeploy.batching.buckets import Size, area

# Weight of a new observation against all earlier ones of the same batch size and input size.
_LEARNING = 0.2
# Mean deviations to plan with: of normally distributed times one in a hundred exceeds them.
_MARGIN = 3
# Share of what was learnt that one call of `fade` forgets.
_FADING = 0.05
# So many pairs of a batch size and an input size are told apart, those seen last: a server without buckets may meet any
# number.
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
    """Milliseconds of a batch: a + b x images + c x pixels of the batch, none of them negative, times a correction.

    With `a` = 0 a larger batch costs no less per image, and batching does not pay. `observe` learns the correction for
    each batch size and input size; those not seen, or not lately among many others, take the overall correction.
    """

    def __init__(self, per_batch_ms: float, per_image_ms: float, per_megapixel_ms: float) -> None:
        """Raises `ValueError` for a negative number, or if all are 0."""
        self.coefficients = (per_batch_ms, per_image_ms, per_megapixel_ms)
        if min(self.coefficients) < 0 or not any(self.coefficients):
            raise ValueError("times must not be negative, nor all of them 0")
        self._ratios: dict[tuple[int, Size], float] = {}
        self._spread = 0.0
        self._overall = 1.0
        self._predicted: dict[tuple[int, Size], float] = {}  # since the last observation

    @classmethod
    def fit(cls, points: Iterable[Point]) -> LatencyModel:
        """Least squares of relative errors, no coefficient negative. Raises `ValueError` without points.

        Of three coefficients, the best subset whose least-squares solution is not negative is the constrained optimum.
        """
        measured = list(points)
        if not measured:
            raise ValueError("there must be at least one measurement")
        rows = np.array([(1.0, one.images, one.images * area(one.size) / 1e6) for one in measured])
        scaled = rows / np.array([[one.ms] for one in measured])
        best, smallest = np.zeros(3), np.inf
        for chosen in chain.from_iterable(combinations(range(3), count) for count in (1, 2, 3)):
            solution, *_ = np.linalg.lstsq(scaled[:, chosen], np.ones(len(measured)), rcond=None)
            error = float(((scaled[:, chosen] @ solution - 1) ** 2).sum())
            if solution.min() >= 0 and error < smallest * (1 - 1e-9):
                best, smallest = np.zeros(3), error
                best[list(chosen)] = solution
        return cls(*best.tolist())

    def predict(self, images: int, size: Size) -> float:
        """Milliseconds that a batch is expected to take."""
        known = self._predicted.get((images, size))
        if known is None:
            known = self._prior(images, size) * self._ratios.get((images, size), self._overall)
            self._predicted[images, size] = known
        return known

    def margin(self, images: int, size: Size) -> float:
        """Milliseconds to plan with: the expected time and three times its mean deviation, which few batches exceed."""
        return self.predict(images, size) * (1 + _MARGIN * self._spread)

    def observe(self, images: int, size: Size, ms: float) -> None:
        """Learn what a batch took, by an exponentially weighted mean.

        No batch counts for more than twice the expected time: the first of a shape, for which an engine prepares
        itself, or one that another process held up, says little of the next.
        """
        if ms <= 0:
            return
        ratio = ms / self._prior(images, size)
        expected = self._ratios.get((images, size), self._overall)
        self._predicted.clear()
        self._spread += _LEARNING * (min(abs(ratio / expected - 1), 1.0) - self._spread)
        self._ratios.pop((images, size), None)  # moves behind all others: the first is the one not seen for longest
        self._ratios[images, size] = expected + _LEARNING * (min(ratio, 2 * expected) - expected)
        if len(self._ratios) > _MOST_REMEMBERED:
            del self._ratios[next(iter(self._ratios))]
        self._overall += _LEARNING * (min(ratio, 2 * self._overall) - self._overall)

    def fade(self) -> None:
        """Forget a little of what was learnt, towards what was measured at first.

        For when nothing runs because everything seems too slow: without new observations that would not end.
        """
        self._predicted.clear()
        self._overall += _FADING * (1 - self._overall)
        for key, ratio in self._ratios.items():
            self._ratios[key] = ratio + _FADING * (1 - ratio)
        self._spread -= _FADING * self._spread

    def _prior(self, images: int, size: Size) -> float:
        per_batch, per_image, per_megapixel = self.coefficients
        return per_batch + images * (per_image + per_megapixel * area(size) / 1e6)
