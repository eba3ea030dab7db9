"""Benchmark results as a terminal table."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import click

from gfldeploy.bench.estimates import Estimate
from gfldeploy.bench.results import BenchResults
from gfldeploy.bench.table import FLAGS, Row, Served, rows
from gfldeploy.cli.console import console

if TYPE_CHECKING:
    from rich.table import Table

__all__ = ["interval", "number", "show_results"]

# Which of these a cell has follows from its batch size.
_STREAMS = {"single-stream", "multi-stream"}


@dataclass(frozen=True)
class _Column:
    """`cell`: the text of a row. `optional`: left out where the table is too wide, the highest first; 0 for never."""

    header: str
    cell: Callable[[Row], str]
    right: bool = True
    optional: int = 0


def show_results(results: BenchResults) -> None:
    """The measured cells as a table, then a line for each of the others: reasons are too long for a column."""
    shown = rows(results)
    measured = [row for row in shown if row.status == "ok"]
    if measured:
        _show_table(results, measured)
    for flag in FLAGS:
        if any(flag in row.flags for row in measured):
            click.echo(f"{flag}: {FLAGS[flag]}")
    for row in shown:
        if row.note:
            click.echo(f"{_name(row, shown)}: {row.note}")


def number(value: float | None, decimals: int | None = None) -> str:
    """With so many decimals; by default as many as its size deserves."""
    if value is None:
        return ""
    return f"{value:.{_decimals(value) if decimals is None else decimals}f}"


def interval(estimate: Estimate | None, decimals: int | None = None) -> str:
    """An estimate with its interval: `12.3 ±0.2` where it is as wide on both sides, else `12.3 (12.2-12.8)`."""
    if estimate is None:
        return ""
    if decimals is None:
        decimals = _decimals(estimate.value)
    value = f"{estimate.value:.{decimals}f}"
    if estimate.low is None or estimate.high is None:
        return value
    below, above = (
        f"{width:.{decimals}f}" for width in (estimate.value - estimate.low, estimate.high - estimate.value)
    )
    if below == above:
        return f"{value} ±{above}"
    return f"{value} ({estimate.low:.{decimals}f}-{estimate.high:.{decimals}f})"


def _decimals(value: float) -> int:
    return 3 if value < 1 else 2 if value < 100 else 1


def _show_table(results: BenchResults, measured: Sequence[Row]) -> None:
    from rich.measure import Measurement

    terminal = console()
    columns = _columns(results, measured)
    left_out: list[str] = []
    while True:
        table = _table(results, measured, columns)
        wide = Measurement.get(terminal, terminal.options.update(max_width=10_000), table).maximum > terminal.width
        last = max(columns, key=lambda column: column.optional)
        if not wide or not last.optional:
            break
        columns.remove(last)
        left_out.append(last.header)
    terminal.print(table)
    if left_out:
        click.echo(f"Too narrow for: {', '.join(left_out)}. The CSV file has every column.")


def _table(results: BenchResults, measured: Sequence[Row], columns: Sequence[_Column]) -> Table:
    from rich.box import SIMPLE_HEAD
    from rich.markup import escape
    from rich.table import Table

    table = Table(title=escape(_title(results, measured)), box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    for column in columns:
        table.add_column(column.header, justify="right" if column.right else "left", no_wrap=True)
    for row in measured:
        table.add_row(*(escape(column.cell(row)) for column in columns))
    return table


def _title(results: BenchResults, measured: Sequence[Row]) -> str:
    """The machine, and what all cells have in common."""
    parts = [results.machine.cpu]
    if len(threads := {row.threads for row in measured}) == 1:
        (count,) = threads
        parts.append(f"{count} thread{'s' if count > 1 else ''}")
    if len(devices := {row.device for row in measured}) == 1:
        parts += [*devices]
    if len(scenarios := {row.scenario for row in measured}) == 1:
        parts += [str(scenario) for scenario in scenarios]
    return ", ".join(parts)


def _columns(results: BenchResults, measured: Sequence[Row]) -> list[_Column]:
    """What the rows differ in, then what they hold."""
    columns = [_Column("engine", lambda row: f"{row.engine} {row.precision}", right=False)]
    if _several(measured, lambda row: row.bundle):
        columns.insert(0, _Column("bundle", lambda row: row.bundle or "", right=False))
    if _several(measured, lambda row: row.device):
        columns.append(_Column("device", lambda row: row.device, right=False))
    if _several(measured, lambda row: row.threads):
        columns.append(_Column("threads", lambda row: str(row.threads)))
    servers = all(row.scenario == "server" for row in measured)
    if _several(measured, lambda row: row.rate) and servers:
        columns.append(_Column("rate", lambda row: f"{row.rate:g}/s"))
    elif _scenarios_vary(measured):
        columns.append(_Column("scenario", _scenario, right=False))
    columns.append(_Column("policy", lambda row: row.policy or "", right=False))
    columns += [
        _Column("batch", lambda row: str(row.batch_size)),
        _Column("median ms", lambda row: _median(row, servers)),
        _Column("p90", lambda row: number(row.p90_ms.value if row.p90_ms else None), optional=6),
        _Column("p99", lambda row: number(row.p99_ms.value if row.p99_ms else None)),
        _Column(f"within {results.settings.latency_bound_ms or 0:g} ms", _within, optional=1),
        _Column("in time\nimages/s", _of_served(lambda served: number(served.in_time_per_s))),
        _Column("of pos-\nsible", _of_served(lambda served: _percent(served.percent_of_possible))),
        _Column("turned\naway", _of_served(lambda served: _percent(100 * served.rejected))),
        _Column("mean\nbatch", _of_served(lambda served: number(served.mean_batch, 1)), optional=4),
        _Column("padding", lambda row: number(row.padding, 2) if row.served else "", optional=2),
        # Of servers, what counts is what they answer in time.
        _Column("images/s", lambda row: number(row.images_per_s), optional=3 if servers else 0),
        _Column("file to\nboxes, ms", lambda row: number(row.end_to_end_ms), optional=7),
        _Column("mAP", lambda row: row.accuracy),
        _Column("low-prec.\nconvs", lambda row: row.low_precision or "", optional=5),
        _Column("memory\nMB", lambda row: number(row.memory_mb, 0), optional=9),
        _Column("% of\npeak", lambda row: number(row.percent_of_peak, 0), optional=8),
        _Column("flags", lambda row: " ".join(row.flags), right=False),
    ]
    return [column for column in columns if any(column.cell(row) for row in measured)]


def _several(measured: Sequence[Row], value: Callable[[Row], object]) -> bool:
    return len({value(row) for row in measured}) > 1


def _scenarios_vary(shown: Sequence[Row]) -> bool:
    scenarios = {row.scenario for row in shown if row.scenario}
    return (len(scenarios) > 1 and not scenarios <= _STREAMS) or len({row.rate for row in shown if row.rate}) > 1


def _scenario(row: Row) -> str:
    return f"{row.scenario} {row.rate:g}/s" if row.rate else str(row.scenario)


def _within(row: Row) -> str:
    bound = row.served.bound if row.served else None
    return "" if bound is None else f"{'yes' if bound.held else 'no'} (p{bound.percent})"


def _median(row: Row, servers: bool) -> str:
    """Without its interval in a table of servers, which has more columns."""
    return number(row.median_ms.value if row.median_ms else None) if servers else interval(row.median_ms)


def _of_served(text: Callable[[Served], str]) -> Callable[[Row], str]:
    """Nothing of the other scenarios."""
    return lambda row: text(row.served) if row.served else ""


def _percent(value: float | None) -> str:
    return "" if value is None else f"{value:.0f}%"


def _name(row: Row, shown: Sequence[Row]) -> str:
    """What tells the row from the others."""
    parts = [row.engine, row.precision]
    if row.batch_size:
        parts.append(f"batch {row.batch_size}")
    if row.scenario and _scenarios_vary(shown):
        parts.append(_scenario(row))
    if row.policy:
        parts.append(row.policy)
    if _several(shown, lambda one: one.device):
        parts.append(f"on {row.device}")
    if _several(shown, lambda one: one.threads):
        parts.append(f"with {row.threads} thread{'s' if row.threads > 1 else ''}")
    if row.bundle and len({one.bundle for one in shown if one.bundle}) > 1:
        parts.append(f"of {row.bundle}")
    return " ".join(parts)
