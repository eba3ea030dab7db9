"""One column of a table, wherever it is shown: terminal, CSV file and page iterate over the same list."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from gfldeploy.bench.estimates import Estimate

Line = TypeVar("Line")
Value = str | int | float | Estimate | None


@dataclass(frozen=True)
class Column(Generic[Line]):
    """One column.

    `key`: its name in CSV files and JSON. `header`: what people read, `unit` apart. `value`: of a row, None for nothing
    to show. `digits`: of a number; None for as many as its size deserves.

    `words`: it holds words, which stand at the left edge; `wrap`: they may be broken into lines. `drop`: of a terminal
    that is too narrow, the highest goes first; 0 for never. `interval`: the value is an `Estimate`, which takes three
    columns of a CSV file. `constant`: shown only if the rows differ in it. `first`: part of the first table of
    a page.
    """

    key: str
    header: str
    value: Callable[[Line], Value]
    unit: str = ""
    digits: int | None = None
    words: bool = False
    wrap: bool = False
    drop: int = 0
    interval: bool = False
    constant: bool = False
    first: bool = False

    @property
    def title(self) -> str:
        """The header with the unit: "file to boxes, ms"."""
        return ", ".join(filter(None, (self.header, self.unit)))

    def shown(self, rows: Sequence[Line]) -> bool:
        """Whether it says anything of these rows."""
        values = {self.value(row) for row in rows}
        return len(values) > 1 if self.constant else bool(values - {None, ""})

    def text(self, row: Line, interval: bool = True) -> str:
        """The value of a row as text, without its interval if that is too long."""
        return text_of(self.value(row), self.digits, interval)


def text_of(value: Value, digits: int | None = None, interval: bool = True) -> str:
    """A value as text.

    An estimate has its interval, unless `interval` is False: "12.3 ±0.2" where that is as wide on both sides, else
    "12.3 (12.2-12.8)".
    """
    if isinstance(value, Estimate):
        digits = _digits(value.value) if digits is None else digits
        text = f"{value.value:.{digits}f}"
        if not interval or value.low is None or value.high is None:
            return text
        below, above = (f"{width:.{digits}f}" for width in (value.value - value.low, value.high - value.value))
        to = "-" if value.low >= 0 else " to "
        return f"{text} ±{above}" if below == above else f"{text} ({value.low:.{digits}f}{to}{value.high:.{digits}f})"
    if isinstance(value, float):
        return f"{value:.{_digits(value) if digits is None else digits}f}"
    return "" if value is None else str(value)


def _digits(value: float) -> int:
    return 3 if abs(value) < 1 else 2 if abs(value) < 100 else 1
