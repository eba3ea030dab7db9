"""The knee: the batch size past which throughput no longer rises beyond the noise."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from gfldeploy.tune.measured import Measured, speed_ratio


@dataclass(frozen=True)
class Knee:
    """`batch_size`: the smallest for which no larger measured one is faster beyond the noise.

    `curve`: all measured sizes, the smallest first, with their images a second.
    """

    batch_size: int
    curve: tuple[tuple[int, float], ...]

    def __post_init__(self) -> None:
        sizes = [size for size, _ in self.curve]
        if sizes != sorted(set(sizes)) or self.batch_size not in sizes:
            raise ValueError("the curve must go from the smallest batch to the largest, and the knee lie on it")

    @property
    def last(self) -> bool:
        """Whether a larger batch, which a bound or the list of sizes excluded, might be faster still."""
        return self.batch_size == self.curve[-1][0]


def find_knee(measured: Mapping[int, Measured]) -> Knee:
    """The knee of one engine, precision, number of threads and order, by batch size. Raises `ValueError` without any.

    "Faster beyond the noise": the interval of the ratio of throughputs (`measured.speed_ratio`) lies above 1.
    """
    sizes = sorted(measured)

    def is_faster(size: int, than: int) -> bool:
        return (speed_ratio(measured[than], measured[size]).low or 0) > 1

    knee = min(size for size in sizes if not any(is_faster(larger, size) for larger in sizes if larger > size))
    return Knee(knee, tuple((size, measured[size].images_per_s) for size in sizes))
