"""What calibration found: the ranges that every INT8 artefact of a bundle is made from."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, NamedTuple, Self

from gfldeploy.errors import BundleError

__all__ = ["Calibration", "ConvRanges", "ConvUse", "OutputRange"]


class ConvUse(NamedTuple):
    """One application of a convolution: its weight name, and which of its uses in graph order (0 unless shared)."""

    weight: str
    use: int


@dataclass(frozen=True)
class OutputRange:
    """The least and greatest value that a convolution gave over the calibration images, after its ReLU if any."""

    low: float
    high: float


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
        """As JSON-ready data; `from_dict` is the inverse."""
        return {**asdict(self), "kept_float": [list(one) for one in sorted(self.kept_float)]}

    @classmethod
    def from_dict(cls, data: Any) -> Self:
        """Check and build. Raises `BundleError` where the data is not what `to_dict` gives."""
        try:
            convolutions = {name: _ranges(entry) for name, entry in data["convolutions"].items()}
            images = dict(data["images"])
            if not all(isinstance(value, str) for value in (data["algorithm"], *images.values())):
                raise TypeError("the algorithm and the images' digests must be text")
            kept = frozenset(ConvUse(name, use) for name, use in data["kept_float"])
            calibration = cls(data["algorithm"], images, convolutions, kept)
            if unknown := kept.difference(calibration.uses):
                raise ValueError(f"kept_float names {list(min(unknown))}, which has no ranges")
            return calibration
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise BundleError(f"calibration.json cannot be read: {error}", "Quantise the bundle again.") from error


def _ranges(entry: Mapping[str, Any]) -> ConvRanges:
    outputs = tuple(OutputRange(**output) for output in entry["outputs"])
    for output in outputs:
        if _number(output.low) > _number(output.high):
            raise ValueError(f"the range {output.low} to {output.high} is empty")
    return ConvRanges(
        tuple(_magnitude(value) for value in entry["inputs"]),
        outputs,
        tuple(_magnitude(value) for value in entry["weights"]),
    )


def _number(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise TypeError(f"{value!r:.40} is no finite number")
    return value


def _magnitude(value: Any) -> float:
    if _number(value) < 0:
        raise ValueError(f"{value} is negative")
    return float(value)
