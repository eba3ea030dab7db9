"""Tables that fit the terminal: columns have a priority, and no number is ever cut."""

from __future__ import annotations

import os
import sys
import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING, Generic, TypeVar

import click

from gfldeploy.bench.columns import Column
from gfldeploy.cli.console import console

if TYPE_CHECKING:
    from rich.table import Table

Line = TypeVar("Line")

# Of text that may be broken into lines: no narrower than this, and no wider where the output is no terminal.
_LEAST_TEXT, _MOST_TEXT = 24, 100
_GAP = 2


def show_table(columns: Sequence[Column[Line]], rows: Sequence[Line], title: str = "", elsewhere: str = "") -> None:
    """Print the columns that say anything of these rows, on stdout.

    A table that is wider than the terminal (or than the environment's COLUMNS) first loses its intervals, then columns,
    those with the highest `drop` first, which are named below it; `elsewhere` says where they are. If that does not
    help, each row becomes a paragraph of names and values. Without a terminal everything is shown.
    """
    shown = [column for column in columns if column.shown(rows)]
    most = _width()
    table = _Table(shown, rows)
    if most is not None and table.needed() > most:
        short = _Table(shown, rows, interval=False)
        table = short.fitting(most) if short.needed() > most else short
    if most is not None and table.needed() > most:
        table.show_paragraphs(title, most)
    else:
        terminal = console()
        terminal.width = table.needed(widest=True) if most is None else most
        terminal.print(table.rendered(title))
    click.echo()
    if left_out := [column.title for column in shown if column not in table.columns]:
        where = f" {elsewhere}" if elsewhere else ""
        click.echo(f"Too narrow for: {'; '.join(left_out)}.{where}")


def _width() -> int | None:
    """Columns of the terminal, None where the output is none and the environment does not say."""
    asked = os.environ.get("COLUMNS", "")
    if asked.isdecimal() and int(asked) > 0:
        return int(asked)
    return console().width if sys.stdout.isatty() else None


class _Table(Generic[Line]):
    """Columns and the texts of their rows."""

    def __init__(self, columns: Sequence[Column[Line]], rows: Sequence[Line], interval: bool = True) -> None:
        self.columns = columns
        self._rows, self._interval = rows, interval
        self._headers = [_wrapped(column.title) for column in columns]
        self._lines = [[column.text(row, interval) for column in columns] for row in rows]

    def needed(self, widest: bool = False) -> int:
        """Columns of the terminal that the table takes at least; `widest`: without breaking text."""
        from rich.cells import cell_len

        total = 0
        for number, column in enumerate(self.columns):
            cells = max(cell_len(part) for line in self._lines for part in line[number].splitlines() or [""])
            if column.wrap:
                cells = min(cells, _MOST_TEXT if widest else _LEAST_TEXT)
            total += max([cells, *map(cell_len, self._headers[number].splitlines())]) + _GAP
        return max(total - _GAP, 1)

    def fitting(self, most: int) -> _Table[Line]:
        """With the columns that are never left out, and those of the others that there is room for, by priority."""
        kept = self._with([column for column in self.columns if not column.drop])
        for added in sorted(self.columns, key=lambda column: column.drop):
            more = self._with([column for column in self.columns if column is added or column in kept.columns])
            if added.drop and more.needed() <= most:
                kept = more
        return kept

    def _with(self, columns: Sequence[Column[Line]]) -> _Table[Line]:
        return _Table(columns, self._rows, self._interval)

    def rendered(self, title: str) -> Table:
        from rich.box import SIMPLE_HEAD
        from rich.markup import escape
        from rich.table import Table

        table = Table(
            title=escape(title) or None,
            title_justify="left",
            box=SIMPLE_HEAD,
            show_edge=False,
            padding=(0, _GAP - 1, 0, 0),
            pad_edge=False,
        )
        for column, header in zip(self.columns, self._headers, strict=True):
            table.add_column(
                header,
                justify="left" if column.words else "right",
                vertical="top",
                no_wrap=not column.wrap,
                overflow="fold",
                min_width=None if column.wrap else 1,
            )
        for line in self._lines:
            table.add_row(*map(escape, line))
        return table

    def show_paragraphs(self, title: str, most: int) -> None:
        """Print each row as "name value" pairs, broken between pairs where that is possible."""
        if title:
            click.echo(title)
        for line in self._lines:
            row = ""
            for column, text in zip(self.columns, line, strict=True):
                if not text:
                    continue
                pair = f"{column.title} {' '.join(text.split())}"
                if row and len(row) + len(pair) + 2 > most:
                    click.echo(f"{row},")
                    row = f"  {pair}"
                else:
                    row = f"{row}, {pair}" if row else pair
            click.echo(row)


def _wrapped(header: str) -> str:
    """The header in lines as narrow as its words, of at least seven characters."""
    return textwrap.fill(header, max([7, *map(len, header.split())]), break_long_words=False, break_on_hyphens=False)
