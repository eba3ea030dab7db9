"""Benchmark results as a page: what to ship, the evidence, and how it was measured."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from html import escape
from pathlib import Path
from string import Template

from gfldeploy.bench.estimates import Estimate
from gfldeploy.bench.report.plots import label, plots
from gfldeploy.bench.report.shell import machine_line, sections, write_page
from gfldeploy.bench.results import BenchResults
from gfldeploy.bench.table import FLAGS, UNKNOWN, Row, rows

__all__ = ["short_answer", "write_report"]

# What quantising may cost by default (`gfldeploy quantize --max-drop`): within it accuracy counts as the same.
_SAME_ACCURACY = 0.005
_BODY = Path(__file__).with_name("bench.html")


def write_report(results: BenchResults, path: Path) -> None:
    """Write the page, replacing any other file. Raises `OutputError`."""
    figures = plots(results)
    body = Template(_BODY.read_text(encoding="utf-8")).substitute(
        table=_table(rows(results)),
        missing=_missing(rows(results)),
        sections=sections(figures),
        machine="\n".join(f"<dt>{escape(key)}</dt><dd>{escape(value)}</dd>" for key, value in _facts(results)),
        flags="\n".join(f"<dt>{escape(flag)}</dt><dd>{escape(what)}</dd>" for flag, what in FLAGS.items()),
    )
    subtitle = machine_line(results.machine, results.created)
    write_page(path, "gfldeploy benchmark", subtitle, short_answer(results), body, figures)


def short_answer(results: BenchResults) -> list[str]:
    """What to ship by these results, in plain sentences, each with its figures, and what is not known."""
    measured = [row for row in rows(results) if row.status == "ok" and row.images_per_s is not None]
    if not measured:
        return ["Nothing could be measured; the reasons are below."]
    fastest = max(measured, key=lambda row: row.images_per_s or 0.0)
    sentences = [f"Most images a second: {_named(fastest)} with {_figures(fastest)}."]
    singles = [row for row in measured if row.scenario == "single-stream" and row.median_ms]
    if singles:
        quick = min(singles, key=lambda row: row.median_ms.value if row.median_ms else 0.0)
        sentences.append(f"Shortest latency of one image: {_named(quick)} with {_ms(quick.median_ms)}.")
    servers = [(row, row.served) for row in measured if row.served]
    if servers:
        row, served = max(servers, key=lambda one: one[1].in_time_per_s)
        share = f", {served.percent_of_possible:.0f}% of what is possible" if served.percent_of_possible else ""
        bound_ms = results.settings.latency_bound_ms or 0.0
        sentences.append(
            f"Most answers within {bound_ms:g} ms: {_named(row)} with {served.in_time_per_s:.1f} images/s{share}."
        )
    reference = [row.ap for row in measured if row.precision == "fp32" and row.ap is not None]
    if reference:
        safe = [row for row in measured if row.ap is not None and row.ap >= max(reference) - _SAME_ACCURACY]
        best = max(safe, key=lambda row: row.images_per_s or 0.0)
        same = "the same" if best == fastest else _named(best)
        sentences.append(
            f"Fastest within {_SAME_ACCURACY} mAP of the best FP32 ({max(reference):.4f}): {same}, {_figures(best)}."
        )
    else:
        sentences.append("How accurate they are is not known: mAP of FP32 was not measured.")
    flags = dict.fromkeys(flag for row in measured for flag in row.flags)
    if flags:
        sentences.append(f"To be read with care: {'; '.join(f'{flag} ({FLAGS[flag]})' for flag in flags)}.")
    return sentences


def _named(row: Row) -> str:
    return f"{label(row)}, bundle {row.bundle}"


def _figures(row: Row) -> str:
    accuracy = f"mAP {row.ap:.4f}" if row.ap is not None else "unknown mAP"
    return f"{row.images_per_s:.1f} images/s, {accuracy}"


def _ms(estimate: Estimate | None) -> str:
    if estimate is None:
        return ""
    value = f"{estimate.value:.2f} ms"
    if estimate.low is None or estimate.high is None:
        return value
    return f"{value} ({estimate.low:.2f} to {estimate.high:.2f})"


_HEADERS = (
    "bundle",
    "engine",
    "precision",
    "device",
    "scenario",
    "batch",
    "median ms (95%)",
    "p90 ms",
    "p99 ms",
    "images/s",
    "file to boxes, ms",
    "mAP",
    "convs below FP32",
    "% of peak",
    "% of bandwidth",
    "in time/s",
    "% of possible",
    "turned away, %",
    "images in a batch",
    "padding",
    "memory MB",
    "flags",
)


def _table(shown: Sequence[Row]) -> str:
    head = "".join(f'<th scope="col"><button type="button">{escape(header)}</button></th>' for header in _HEADERS)
    body = []
    for row in shown:
        if row.status != "ok":
            continue
        cells = "".join(
            f"<td{'' if value is None else f' data-value={chr(34)}{value}{chr(34)}'}>{escape(text)}</td>"
            for text, value in _cells(row)
        )
        body.append(f"<tr>{cells}</tr>")
    return f"<thead><tr>{head}</tr></thead><tbody>{''.join(body)}</tbody>"


def _cells(row: Row) -> Iterator[tuple[str, float | None]]:
    """The text of each column, and what it is sorted by where that is a number."""
    for text in (row.bundle or "", row.engine, row.precision, row.device, _scenario(row)):
        yield text, None
    yield str(row.batch_size), float(row.batch_size or 0)
    for estimate in (row.median_ms, row.p90_ms, row.p99_ms):
        yield _ms(estimate).replace(" ms", ""), estimate.value if estimate else None
    for value, digits in ((row.images_per_s, 1), (row.end_to_end_ms, 2)):
        yield "" if value is None else f"{value:.{digits}f}", value
    yield (UNKNOWN, None) if row.ap is None else (f"{row.ap:.4f}", row.ap)
    yield row.low_precision or "", None
    for value in (row.percent_of_peak, row.percent_of_bandwidth, row.memory_mb):
        yield "" if value is None else f"{value:.0f}", value
    served = row.served
    rejected = 100 * served.rejected if served else None
    for value, digits in (
        (served.in_time_per_s if served else None, 1),
        (served.percent_of_possible if served else None, 0),
        (rejected, 0),
        (served.mean_batch if served else None, 1),
        (row.padding, 2),
    ):
        yield "" if value is None else f"{value:.{digits}f}", value
    yield " ".join(row.flags), None


def _scenario(row: Row) -> str:
    return f"{row.scenario} {row.rate:g}/s, {row.policy}" if row.rate else str(row.scenario)


def _missing(shown: Sequence[Row]) -> str:
    """What was not measured, and what is to be said of what was."""
    items = []
    for row in shown:
        if row.note:
            batch = f", batch {row.batch_size}" if row.batch_size else ""
            bundle = f" of {row.bundle}" if row.bundle else ""
            items.append(
                f"<li><b>{escape(f'{row.engine} {row.precision}{batch}{bundle}')}</b>: {escape(row.note)}</li>"
            )
    return f"<ul>{''.join(items)}</ul>" if items else "<p>Nothing: every cell was measured as asked.</p>"


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
    yield "images", f"{data.timed_images} timed; mAP: {accuracy}; annotations SHA-256 {data.annotations_sha256[:16]}"
    yield (
        "timing",
        f"{settings.rounds} rounds, each cell {settings.min_seconds:g} to {settings.max_seconds:g} s and "
        f"{settings.min_count} inferences at least in each, after {settings.warmup} of every shape",
    )
    bundles = dict.fromkeys((cell.bundle.directory, cell.bundle.digest) for cell in results.cells if cell.bundle)
    yield "bundles", "; ".join(f"{directory} (SHA-256 {digest[:16]})" for directory, digest in bundles)
    overheads = [
        run.monitored.overhead_percent for cell in results.cells for run in cell.runs if run.monitored is not None
    ]
    if overheads:
        yield "hardware monitor", f"took {max(overheads):.2f}% of one CPU at most"
