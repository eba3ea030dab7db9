"""The knee: the batch size past which throughput no longer rises beyond the noise."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from gfldeploy.tune.measured import Measured, speed_ratio

__all__ = ["CurvePoint", "Knee", "find_knee"]


@dataclass(frozen=True)
class CurvePoint:
    """Images a second at one batch size."""

    batch_size: int
    images_per_s: float


@dataclass(frozen=True)
class Knee:
    """`batch_size`: the smallest that no larger measured one is faster than, beyond the noise.

    `curve`: all that were measured, the smallest batch first. `last`: it is the largest of them, so that a larger one,
    which a bound or the list of sizes kept from being measured, might be faster still.
    """

    batch_size: int
    curve: tuple[CurvePoint, ...]
    last: bool

    def __post_init__(self) -> None:
        sizes = [point.batch_size for point in self.curve]
        if sizes != sorted(set(sizes)) or self.batch_size not in sizes:
            raise ValueError("the curve must go from the smallest batch to the largest, and the knee lie on it")


def find_knee(measured: Mapping[int, Measured]) -> Knee:
    """The knee of one engine, precision, number of threads and order, by batch size.

    "Faster beyond the noise": the interval of the ratio of throughputs (`measured.speed_ratio`) lies above 1. Raises
    `ValueError` without any.
    """
    sizes = sorted(measured)
    if not sizes:
        raise ValueError("there must be at least one batch size")
    knee = next(
        size
        for number, size in enumerate(sizes)
        if not any(_faster(measured[size], measured[larger]) for larger in sizes[number + 1 :])
    )
    curve = tuple(CurvePoint(size, measured[size].images_per_s) for size in sizes)
    return Knee(knee, curve, knee == sizes[-1])


def _faster(base: Measured, other: Measured) -> bool:
    low = speed_ratio(base, other).low
    return low is not None and low > 1
