"""Benchmark results as a page: what to deploy, the evidence, and how it was measured."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from html import escape
from pathlib import Path
from string import Template

from gfldeploy.batching.buckets import size_in_words
from gfldeploy.bench.cell import Cell, several_bundles
from gfldeploy.bench.columns import Column, text_of
from gfldeploy.bench.estimates import Estimate, median
from gfldeploy.bench.limits import network_limits
from gfldeploy.bench.report.plots import Plot, plots
from gfldeploy.bench.results import BenchResults
from gfldeploy.bench.table import COLUMNS, FLAGS, UNKNOWN, Row, best_of_each, notes, rows
from gfldeploy.engines.base import with_tf32
from gfldeploy.engines.registry import title_of
from gfldeploy.files import StrPath, check_file, write_text
from gfldeploy.machine import Machine
from gfldeploy.text import printable

# What quantising may cost by default (`gfldeploy quantize --max-drop`): within it accuracy counts as the same.
_SAME_ACCURACY = 0.005
_FIRST_LOOK = "A first look: each cell was measured too briefly for figures to be quoted."
_PADDED = (
    "Its batches hold images of several sizes, padded to the largest, which changes boxes and scores (group "
    "normalisation takes in the padding); mAP is of batch 1."
)
_SERVERS = {
    "server": "of the arrival, without decoding",
    "http": "over HTTP, from the time that a request was planned for",
}
_TEMPLATE = Path(__file__).with_name("page.html")
_BODY = Path(__file__).with_name("bench.html")


def report(results: BenchResults | StrPath, *, output: StrPath | None = None, force: bool = False) -> Path:
    """Turn results into one HTML page, which needs no network.

    Args:
        results: Results of `benchmark`, or a file of them.
        output: The page to write; by default RESULTS.html beside the file, or results.html.
        force: Replace the page if it exists and gfldeploy made it. The one beside the file, which `benchmark` writes
            with it, is made again in any case.

    Returns:
        The page.

    Raises:
        DataError: The file cannot be read.
        OutputError: The page exists already, or cannot be written.
    """
    source = Path("results") if isinstance(results, BenchResults) else Path(results)
    read = results if isinstance(results, BenchResults) else BenchResults.read(source)
    page = source.with_suffix(".html") if output is None else Path(output)
    check_file(page, "html", force=force or (output is None and read is not results))
    write_report(read, page)
    return page


def write_report(results: BenchResults, path: Path) -> None:
    """Write the page, replacing any other file. Raises `OutputError`."""
    figures = plots(results)
    shown = rows(results)
    measured = [row for row in shown if row.ok]
    best = best_of_each(measured)
    servers = [row for row in measured if row.is_server]
    several = several_bundles([row.cell for row in best])
    first = [column for column in COLUMNS if column.first and (several or column.key != "bundle")]
    body = Template(_BODY.read_text(encoding="utf-8")).substitute(
        best=_table("best", best, first) if best else "<p>No batches were measured.</p>",
        servers=f"<section><h2>Servers</h2>{_table('servers', servers)}</section>" if servers else "",
        count=f"{len(measured)} cell{'' if len(measured) == 1 else 's'}",
        table=_table("cells", measured),
        missing=_missing(shown),
        sections=sections(figures),
        machine="\n".join(f"<dt>{escape(key)}</dt><dd>{escape(value)}</dd>" for key, value in _facts(results)),
        flags="\n".join(f"<dt>{escape(flag)}</dt><dd>{escape(what)}</dd>" for flag, what in FLAGS.items()),
    )
    subtitle = machine_line(results.machine, results.created)
    write_page(path, "gfldeploy benchmark", subtitle, short_answer(results), body, figures)


def short_answer(results: BenchResults) -> list[str]:
    """What to deploy, in plain sentences with figures, and what is not known."""
    shown = rows(results)
    measured = [row for row in shown if row.ok]
    if not measured:
        return ["Nothing could be measured; the reasons are below."]
    sentences = [_FIRST_LOOK] if results.settings.quick else []
    # A smaller input size is faster and costs mAP: sizes have sentences of their own, which weigh both.
    own = [row for row in measured if row.cell.input_size is None] or measured
    best = best_of_each(own)
    if best:
        sentences += _fastest(own, best)
    if len({row.cell.input_size for row in measured}) > 1:
        sentences += _by_size(measured, best)
    for scenario, what in _SERVERS.items():
        servers = [(row, row.served) for row in measured if row.served and row.cell.scenario == scenario]
        if servers:
            row, served = max(servers, key=lambda one: one[1].in_time_per_s)
            share = f", {served.percent_of_possible:.0f}% of what is possible" if served.percent_of_possible else ""
            bound = f"{results.settings.latency_bound_ms or 0.0:g} ms {what}"
            sentences.append(f"Most answers within {bound}: {_named(row)}: {served.in_time_per_s:.1f} images/s{share}.")
    flags = dict.fromkeys(flag for row in measured for flag in row.flags if flag not in ("quick", "padded"))
    if flags:
        sentences.append(f"Read with care: {'; '.join(f'{flag} ({FLAGS[flag]})' for flag in flags)}.")
    return sentences


def _fastest(measured: Sequence[Row], best: Sequence[Row]) -> Iterator[str]:
    """The fastest of all, of each engine, without padding, for one image, and of those as accurate as FP32."""
    fastest = best[0]
    if fastest.file_images_per_s is None:
        yield "Nothing was measured from file to boxes: the figures are of the network alone."
        yield f"Highest throughput: {_named(fastest)}: {_figures(fastest)}."
    else:
        yield f"Highest throughput from file to boxes: {_named(fastest)}: {_figures(fastest)}."
    if fastest.cell.device == "gpu" and (reasons := network_limits(fastest)):
        yield f"What limits its network: {'; '.join(reasons)}."
    engines: dict[str, Row] = {}
    for row in best:
        engines.setdefault(row.cell.engine, row)
    if len(engines) > 1:
        yield f"Each engine at its best: {'; '.join(map(_speed, engines.values()))}."
    if "padded" in fastest.flags:
        yield _PADDED
        if whole := best_of_each([row for row in measured if "padded" not in row.flags]):
            yield f"The fastest without padding: {_named(whole[0])}: {_figures(whole[0])}."
    singles = [row for row in measured if row.cell.scenario == "single-stream" and row.file_ms()]
    if singles:
        quick = min(singles, key=lambda row: median(row.result.file_ms).value)
        yield (
            f"Lowest latency of one image from file to boxes: {_named(quick)}: {_ms(quick.file_ms())}; the network "
            f"alone {_ms(quick.latency_ms())}."
        )
    reference = [row.ap for row in best if row.cell.precision == "fp32" and row.ap is not None]
    if reference:
        safe = next(row for row in best if row.ap is not None and row.ap >= max(reference) - _SAME_ACCURACY)
        same = "the same" if safe == fastest else f"{_named(safe)}: {_figures(safe)}"
        yield f"Fastest within {_SAME_ACCURACY} mAP of the best FP32 ({max(reference):.4f}): {same}."
    else:
        yield "Their accuracy is not known: mAP of FP32 was not measured."


def _by_size(measured: Sequence[Row], own: Sequence[Row]) -> Iterator[str]:
    """What other input sizes gain at the same accuracy. `own`: the best at the bundles' own."""
    reference = [row.ap for row in own if row.cell.precision == "fp32" and row.ap is not None]
    safe = [row for row in best_of_each(measured) if row.ap is not None and reference]
    if safe := [row for row in safe if (row.ap or 0.0) >= max(reference) - _SAME_ACCURACY]:
        yield f"Fastest within {_SAME_ACCURACY} mAP of that at any input size: {_named(safe[0])}: {_figures(safe[0])}."
    front = sorted((row for row in best_of_each(measured) if row.on_front), key=lambda row: -(row.ap or 0.0))
    listed = [f"{_model(row.cell)}, batch {row.cell.batch_size} ({_speed_and_ap(row)})" for row in front]
    if listed:
        yield f"Nothing is faster and as accurate, from the most accurate: {'; '.join(listed)}."


def _speed_and_ap(row: Row) -> str:
    return f"mAP {row.ap:.4f}, {text_of(row.deciding_images_per_s)} images/s"


def _named(row: Row) -> str:
    cell = row.cell
    return f"{_model(cell)}, batch {cell.batch_size}{cell.load}, bundle {cell.bundle.directory}"


def _speed(row: Row) -> str:
    speed = row.images_per_s if row.file_images_per_s is None else row.file_images_per_s
    return f"{_model(row.cell)} {text_of(speed)} images/s"


def _model(cell: Cell) -> str:
    """Engine and precision, the file that deploys by itself, tiles, several streams, and an input size that is not the
    bundle's own."""
    more = " by itself" if cell.end_to_end else ""
    more += f" at {size_in_words(cell.input_size)}" if cell.input_size else ""
    more += f" in {cell.tiling}" if cell.tiling else ""
    more += f" in {cell.streams} streams" if cell.streams > 1 else ""
    return f"{title_of(cell.engine)} {with_tf32(cell.precision.upper(), cell.tf32)}{more}"


def _figures(row: Row) -> str:
    accuracy = f"mAP {row.ap:.4f}" if row.ap is not None else f"{UNKNOWN} mAP"
    network = f"the network alone {text_of(row.images_per_s)} images/s"
    if row.file_images_per_s is None:
        return f"{network}, {accuracy}"
    return f"{text_of(row.file_images_per_s)} images/s, {_ms(row.file_ms())} per batch, {accuracy}; {network}"


def _ms(estimate: Estimate | None) -> str:
    if estimate is None:
        return ""
    value = f"{text_of(estimate, interval=False)} ms"
    if estimate.low is None or estimate.high is None:
        return value
    return f"{value} ({text_of(estimate.low)} to {text_of(estimate.high)})"


def _table(table_id: str, shown: Sequence[Row], columns: Sequence[Column[Row]] = COLUMNS) -> str:
    """A table of rows that sorts: those of the columns that say anything."""
    columns = [one for one in columns if one.shown(shown)]
    head = "".join(
        f'<th scope="col"{_left(one)}><button type="button">{escape(one.title)}</button></th>' for one in columns
    )
    body = "".join(f"<tr>{''.join(_cell(one, row) for one in columns)}</tr>" for row in shown)
    return (
        f'<div class="wide"><table id="{table_id}"><caption>A click on a heading sorts by it.</caption>'
        f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def _cell(column: Column[Row], row: Row) -> str:
    value = column.value(row)
    key = value.value if isinstance(value, Estimate) else value
    sort = f' data-value="{key}"' if isinstance(key, int | float) else ""
    return f"<td{_left(column)}{sort}>{escape(column.text(row))}</td>"


def _left(column: Column[Row]) -> str:
    return ' class="text"' if column.words else ""


def _missing(shown: Sequence[Row]) -> str:
    """What was not measured, and notes on what was: each reason once."""
    items = [f"<li><b>{escape(names)}</b>: {escape(note)}</li>" for note, names in notes(shown)]
    return f"<ul>{''.join(items)}</ul>" if items else "<p>Nothing: every cell was measured as requested.</p>"


def _facts(results: BenchResults) -> Iterator[tuple[str, str]]:
    """The machine, its software, the data and the settings."""
    machine, data, settings = results.machine, results.data, results.settings
    yield (
        "CPU",
        f"{machine.cpu}; {machine.cores or '?'} cores, {machine.threads} CPUs usable; {' '.join(machine.flags)}",
    )
    yield "memory", f"{machine.memory_gb:g} GB"
    if machine.gpus:
        yield "GPUs", f"{', '.join(machine.gpus)}; driver {machine.driver}"
    yield "system", f"{machine.os}; Python {machine.python}"
    yield "packages", ", ".join(f"{name} {version}" for name, version in machine.packages.items())
    accuracy = "not measured" if data.accuracy_images is None else f"{data.accuracy_images} images"
    annotations = f"; annotations SHA-256 {data.annotations_sha256[:16]}" if data.annotations_sha256 else ""
    yield "images", f"{data.timed_images} timed; mAP: {accuracy}{annotations}"
    yield from _endings(results)
    if all(one.cell.scenario == "http" for one in results.cells):
        yield "timing", f"each load for {settings.min_seconds:g} s, after {settings.warmup_s:g} s that do not count"
    else:
        yield (
            "timing",
            (
                f"{settings.rounds} rounds, each cell {settings.min_seconds:g} to {settings.max_seconds:g} s and "
                f"{settings.min_count} inferences at least in each, after {settings.warmup} of every shape"
            ),
        )
    bundles = dict.fromkeys((one.cell.bundle.directory, one.cell.bundle.digest) for one in results.cells)
    yield "bundles", "; ".join(f"{directory} (SHA-256 {digest[:16]})" for directory, digest in bundles)
    compared = [run.parity for cell in results.cells for run in cell.runs if run.parity is not None]
    if compared:
        images = max(one.images for one in compared)
        references = ", ".join(dict.fromkeys(one.reference for one in compared))
        yield "compared with", f"{references}, on {images} images at most, before anything was timed"
    overheads = [
        run.monitored.overhead_percent for cell in results.cells for run in cell.runs if run.monitored is not None
    ]
    if overheads:
        yield "hardware monitor", f"took {max(overheads):.2f}% of one CPU at most"


def _endings(results: BenchResults) -> Iterator[tuple[str, str]]:
    """How the requests over HTTP ended, and where they came from."""
    for cell in results.cells:
        for traffic in (run.serving.traffic for run in cell.runs if run.serving):
            if traffic is not None:
                ended = ", ".join(f"{count} {ending}" for ending, count in traffic.endings.items())
                where = "on the same machine" if traffic.loopback else "on this machine, the server on another"
                yield (
                    f"requests{cell.cell.load.removeprefix(', http')}",
                    f"{ended}; the client, {where}, took {traffic.client_cpu_percent:.0f}% of one CPU and "
                    f"{traffic.most_connections} connections",
                )


def write_page(
    path: Path, title: str, subtitle: str, answer: Sequence[str], body: str, figures: Sequence[Plot]
) -> None:
    """Write the page, replacing any other file. `answer`: sentences; `body`: HTML, with the `sections` of the figures.

    The page holds plotly.js (MIT licence). Raises `OutputError`.
    """
    from plotly import offline

    data = json.dumps([{"data": one.data, "layout": one.layout} for one in figures], allow_nan=False)
    page = Template(_TEMPLATE.read_text(encoding="utf-8")).substitute(
        title=escape(printable(title)),
        subtitle=escape(printable(subtitle)),
        answer=printable("\n".join(f"<p>{escape(sentence)}</p>" for sentence in answer)),
        body=printable(body),
        figures=data.replace("<", "\\u003c"),  # a tag in a text would end or hide the script that the data are in
        plotly=offline.get_plotlyjs(),
    )
    write_text(path, page)


def sections(figures: Sequence[Plot]) -> str:
    """The places of the figures, in order, each with its heading and what to see in it."""
    return "\n".join(_section(number, plot) for number, plot in enumerate(figures))


def machine_line(machine: Machine, created: str) -> str:
    """Where and when it was measured. `created`: UTC, ISO 8601."""
    gpus = f", {', '.join(machine.gpus)}" if machine.gpus else ""
    return f"{machine.cpu}, {machine.threads} CPUs{gpus}; {created[:16].replace('T', ' ')} UTC"


def _section(number: int, plot: Plot) -> str:
    title, about = escape(plot.title), escape(plot.about)
    return (
        f'<section><h2>{title}</h2><p>{about}</p><div class="plot" id="plot{number}" role="img" '
        f'aria-label="{title}. {about}" style="height:{plot.height}px"></div></section>'
    )
