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
    """The knee of one engine, precision, number of threads and order, by batch size. Raises `ValueError` without any.

    "Faster beyond the noise": the interval of the ratio of throughputs (`measured.speed_ratio`) lies above 1.
    """
    sizes = sorted(measured)

    def is_faster(size: int, than: int) -> bool:
        return (speed_ratio(measured[than], measured[size]).low or 0) > 1

    knee = min(size for size in sizes if not any(is_faster(larger, size) for larger in sizes if larger > size))
    curve = tuple(CurvePoint(size, measured[size].images_per_s) for size in sizes)
    return Knee(knee, curve, knee == sizes[-1])
