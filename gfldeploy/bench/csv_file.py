"""Results as comma-separated values, for a spreadsheet or a data frame."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator
from pathlib import Path

from gfldeploy.bench.estimates import Estimate
from gfldeploy.bench.results import BenchResults
from gfldeploy.bench.table import COLUMNS, NOT_MEASURED, Row, rows
from gfldeploy.files import write_text
from gfldeploy.text import spreadsheet_cell

__all__ = ["write_csv"]

_BOUNDS = ("", "_low", "_high")


def write_csv(results: BenchResults, path: Path) -> None:
    """Write one line for each cell below a line of column names, which hold the units; replaces any other file.

    Columns are `table.COLUMNS`, `status` and `note`; `_low` and `_high` are the bounds of 95 % intervals. A field is
    empty where there is nothing to show, but `ap` is "unknown" of a measured cell without one. Text that a spreadsheet
    would take for a formula has an apostrophe before it. Raises `OutputError`.
    """
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(_names())
    for row in rows(results):
        writer.writerow([spreadsheet_cell(value) for value in (*_fields(row), row.result.status, row.note)])
    write_text(path, text.getvalue())


def _names() -> Iterator[str]:
    for column in COLUMNS:
        if column.interval:
            name = column.key.removesuffix("_ms")
            yield from (f"{name}{bound}_ms" for bound in _BOUNDS)
        else:
            yield column.key
    yield from ("status", "note")


def _fields(row: Row) -> Iterator[str | int | float | None]:
    """The values of the columns, as they are."""
    for column in COLUMNS:
        value = column.value(row)
        if value == NOT_MEASURED:
            value = None
        if isinstance(value, Estimate):
            yield from (value.value, value.low, value.high)
        else:
            yield value
            if column.interval:
                yield from (None, None)
