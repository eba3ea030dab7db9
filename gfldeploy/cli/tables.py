"""Tables that fit the terminal: columns have a priority, and no number is ever cut."""

from __future__ import annotations

import os
import sys
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import click

from gfldeploy.cli.console import console

if TYPE_CHECKING:
    from rich.table import Table

__all__ = ["TableColumn", "show_table", "wrapped"]

# Of text that may be broken into lines: no narrower than this, and no wider where the output is no terminal.
_LEAST_TEXT, _MOST_TEXT = 24, 100
_GAP = 2


@dataclass(frozen=True)
class TableColumn:
    """`drop`: left out where the terminal is too narrow, the highest first; 0 for never. `right`: numbers, at the right
    edge. `text`: words that may be broken into lines."""

    header: str
    drop: int = 0
    right: bool = True
    text: bool = False


def wrapped(header: str) -> str:
    """The header in lines as narrow as its words, of at least seven characters."""
    return textwrap.fill(header, max(7, *map(len, header.split())), break_long_words=False, break_on_hyphens=False)


def show_table(
    columns: Sequence[TableColumn],
    lines: Sequence[Sequence[str]],
    title: str = "",
    elsewhere: str = "",
    short: Sequence[Sequence[str]] | None = None,
) -> None:
    """Print `lines`, a text for each of the `columns`, on stdout; columns without any text are left out.

    A table that is wider than the terminal (or than the environment's COLUMNS) is made of the `short` lines, if there
    are any, and then loses columns, those with the highest `drop` first, which are named below it; `elsewhere` says
    where they are. If that does not help, each line becomes a paragraph of names and values. Without a terminal
    everything is shown.
    """
    filled = [number for number in range(len(columns)) if any(line[number] for line in lines)]
    most = _width()
    if most is not None and short is not None and _needed(columns, lines, filled) > most:
        lines = short
    kept = filled if most is None else _fitting(columns, lines, filled, most)
    if most is not None and _needed(columns, lines, kept) > most:
        _show_paragraphs(columns, lines, kept, title, most)
    else:
        terminal = console()
        terminal.width = _needed(columns, lines, kept, widest=True) if most is None else most
        terminal.print(_table(columns, lines, kept, title))
    click.echo()
    if left_out := [_one_line(columns[number].header) for number in filled if number not in kept]:
        where = f" {elsewhere}" if elsewhere else ""
        click.echo(f"Too narrow for: {'; '.join(left_out)}.{where}")


def _fitting(
    columns: Sequence[TableColumn], lines: Sequence[Sequence[str]], filled: Sequence[int], most: int
) -> list[int]:
    """The columns that are never left out, and of the others those that there is room for, by their priority."""
    kept = [number for number in filled if not columns[number].drop]
    for number in sorted(filled, key=lambda number: columns[number].drop):
        more = sorted({*kept, number})
        if columns[number].drop and _needed(columns, lines, more) <= most:
            kept = more
    return kept


def _width() -> int | None:
    """Columns of the terminal, None where the output is none and the environment does not say."""
    asked = os.environ.get("COLUMNS", "")
    if asked.isdecimal() and int(asked) > 0:
        return int(asked)
    return console().width if sys.stdout.isatty() else None


def _needed(
    columns: Sequence[TableColumn], lines: Sequence[Sequence[str]], kept: Sequence[int], widest: bool = False
) -> int:
    """Columns of the terminal that these columns of the table take at least; `widest`: without breaking text."""
    from rich.cells import cell_len

    total = 0
    for number in kept:
        column = columns[number]
        cells = max(cell_len(part) for line in lines for part in line[number].splitlines() or [""])
        if column.text:
            cells = min(cells, _MOST_TEXT if widest else _LEAST_TEXT)
        total += max([cells, *(cell_len(part) for part in column.header.splitlines())]) + _GAP
    return max(total - _GAP, 1)


def _table(columns: Sequence[TableColumn], lines: Sequence[Sequence[str]], kept: Sequence[int], title: str) -> Table:
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
    for number in kept:
        column = columns[number]
        justify = "right" if column.right and not column.text else "left"
        table.add_column(
            column.header,
            justify=justify,  # type: ignore[arg-type]
            vertical="top",
            no_wrap=not column.text,
            overflow="fold",
            min_width=None if column.text else 1,
        )
    for line in lines:
        table.add_row(*(escape(line[number]) for number in kept))
    return table


def _show_paragraphs(
    columns: Sequence[TableColumn], lines: Sequence[Sequence[str]], kept: Sequence[int], title: str, most: int
) -> None:
    """Each line of the table as "name value" pairs, broken between pairs where that is possible."""
    if title:
        click.echo(title)
    for line in lines:
        row = ""
        for number in kept:
            if not line[number]:
                continue
            pair = f"{_one_line(columns[number].header)} {_one_line(line[number])}"
            if row and len(row) + len(pair) + 2 > most:
                click.echo(f"{row},")
                row = f"  {pair}"
            else:
                row = f"{row}, {pair}" if row else pair
        click.echo(row)


def _one_line(text: str) -> str:
    return " ".join(text.split())
