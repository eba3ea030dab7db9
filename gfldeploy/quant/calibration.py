"""The ranges that calibration found, from which all INT8 graphs of a bundle are written."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Self

from gfldeploy.serialization import plain


class ConvUse(NamedTuple):
    """One application of a convolution: its weight name, and which of its uses in graph order (0 unless shared)."""

    weight: str
    use: int


@dataclass(frozen=True)
class OutputRange:
    """The smallest and largest value that a convolution gave over the calibration images, after its ReLU if any.

    Of class logits, and of those of GFLv2's quality, `high` is the logit of a score of 0.99 at least.
    """

    low: float
    high: float

    def __post_init__(self) -> None:
        if self.low > self.high:
            raise ValueError(f"the range {self.low} to {self.high} is empty")


@dataclass(frozen=True)
class ConvRanges:
    """One convolution, keyed by its weight name.

    `inputs`: the clipping threshold of its input, found by PaddleSlim, and `outputs`: the range of its output, one
    entry for each time the graph uses the convolution; a head convolution shared by five pyramid levels has five,
    finest first.
    `weights`: the largest absolute weight of each output channel.
    An integer is round(value / threshold * 127).
    """

    inputs: tuple[float, ...]
    outputs: tuple[OutputRange, ...]
    weights: tuple[float, ...]

    def __post_init__(self) -> None:
        if negative := [value for value in (*self.inputs, *self.weights) if value < 0]:
            raise ValueError(f"{negative[0]} is negative")


@dataclass(frozen=True)
class Calibration:
    """`calibration.json`: `algorithm` as PaddleSlim calls it, the `images` used as {SHA-256: file name}, the ranges.

    `kept_float`: the uses of convolutions that stay in float although they have ranges.
    """

    algorithm: str
    images: Mapping[str, str]
    convolutions: Mapping[str, ConvRanges]
    kept_float: frozenset[ConvUse] = frozenset()

    @property
    def uses(self) -> tuple[ConvUse, ...]:
        """Every use of every convolution that has ranges, kept in float or not."""
        counts = {name: len(entry.inputs) for name, entry in self.convolutions.items()}
        return tuple(ConvUse(name, use) for name, count in counts.items() for use in range(count))

    def keeping(self, kept: Iterable[ConvUse]) -> Self:
        """The same ranges with exactly these uses left in float."""
        return replace(self, kept_float=frozenset(kept))

    def to_dict(self) -> dict[str, Any]:
        """As JSON-ready data."""
        return {**plain(self), "kept_float": [list(one) for one in sorted(self.kept_float)]}
