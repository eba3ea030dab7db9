"""`analysis.json` and its page: the measurements, and the conclusions from them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any, TypeVar

from gfldeploy.analysis.causes import PART_NAMES, PARTS, BatchAnalysis, Part, sentences
from gfldeploy.analysis.invariance import Invariance
from gfldeploy.analysis.sweep import Pass
from gfldeploy.batching.buckets import STREAM_ORDERS, Size, size_in_words
from gfldeploy.bench.cell import BundleIdentity
from gfldeploy.bench.columns import Column
from gfldeploy.bench.estimates import Estimate
from gfldeploy.bench.report.page import machine_line, sections, write_page
from gfldeploy.bench.report.plots import COLOURS, GREY, Plot
from gfldeploy.bench.results import Peak, defined_ap
from gfldeploy.engines.base import Precision, with_tf32
from gfldeploy.files import write_json
from gfldeploy.machine import Machine
from gfldeploy.serialization import plain

SCHEMA = 1
Line = TypeVar("Line")


@dataclass(frozen=True)
class Analysis:
    """Everything that `gfldeploy analyze` found.

    `rounds`: the passes of each; `created`: UTC, ISO 8601; `input_size`: (height, width) in pixels, None for the
    bundle's own.
    """

    created: str
    machine: Machine
    bundle: BundleIdentity
    engine: str
    precision: Precision
    threads: int
    tf32: bool
    input_size: Size | None
    images: int
    peak: Peak | None
    rounds: tuple[tuple[Pass, ...], ...]
    batches: tuple[BatchAnalysis, ...]
    invariance: tuple[Invariance, ...]

    @property
    def answer(self) -> list[str]:
        """Two sentences for each batch size, and one for each order about the detections."""
        told = [" ".join(sentences(one)) for one in self.batches]
        return told + told_invariance(self.invariance)

    def to_dict(self) -> dict[str, Any]:
        """As JSON-ready data."""
        return {"schema": SCHEMA, **plain(self), "answer": self.answer}

    def write(self, path: Path) -> None:
        """Write `path` (JSON) and the page beside it (.html). Raises `OutputError`."""
        write_json(path, self.to_dict())
        figures = [_stacked(self)]
        at = f" at {size_in_words(self.input_size)}" if self.input_size else ""
        model = f"{self.engine} {with_tf32(self.precision, self.tf32)}{at}"
        title = f"Batch size and speed: {self.bundle.directory}, {model}"
        times = (
            "Milliseconds of one image against batch 1: mean over the typical of "
            f"{len(self.rounds)} rounds, and in brackets the interval of the median."
        )
        lost = "Against the same image alone, of detections with a score of 0.4 or more; lost: not found again."
        tables = [
            _section("The figures", times, columns(self), self.batches),
            _section("What batches do to detections", lost, _INVARIANCE, self.invariance),
        ]
        body = "\n".join([sections(figures), *tables, _HOW])
        write_page(
            path.with_suffix(".html"), title, machine_line(self.machine, self.created), self.answer, body, figures
        )


def told_invariance(found: Sequence[Invariance]) -> list[str]:
    """What batches do to the detections, in a sentence for the worst of each order."""
    told = []
    for order in STREAM_ORDERS:
        some = [one for one in found if one.order == order and one.batch_size > 1]
        if not some:
            continue
        worst = max(some, key=lambda one: (one.lost, one.score_change))
        single = next((one.accuracy for one in found if one.batch_size == 1), None)
        ap = f", mAP {worst.accuracy.ap:.4f} against {single.ap:.4f} alone" if worst.accuracy and single else ""
        told.append(
            f"{order.capitalize()} batches change a score by at most {worst.score_change:.2g} and a box by at most "
            f"{worst.box_change_px:.2g} px, and lose {worst.lost} of {worst.detections} detections "
            f"(batch {worst.batch_size}{ap})."
        )
    return told


def _stacked(analysis: Analysis) -> Plot:
    """Time per image by batch size: that at batch 1, and what each cause adds or takes away."""
    labels = [str(one.batch_size) for one in analysis.batches]
    data: list[dict[str, Any]] = [_bar("as at batch 1", labels, [one.single_ms for one in analysis.batches], GREY)]
    for number, part in enumerate(PARTS):
        values = [one.parts[part].ms if part in one.parts else 0.0 for one in analysis.batches]
        if any(values):
            data.append(_bar(PART_NAMES[part], labels, values, COLOURS[number]))
    data.append(
        {
            "type": "scatter", "mode": "markers", "name": "bucketed", "x": labels,
            "y": [one.bucketed_ms for one in analysis.batches],
            "marker": {"symbol": "line-ew-open", "size": 40, "color": "#009E73", "line": {"width": 3}},
        }
    )  # fmt: skip
    layout = {
        "barmode": "relative",
        "xaxis": {"title": {"text": "batch size, listed"}, "type": "category", "automargin": True},
        "yaxis": {"title": {"text": "ms per image, file to boxes"}, "rangemode": "tozero", "automargin": True},
    }
    return Plot(
        "Where the time of an image goes",
        "Milliseconds of one image: that at batch 1, and what each cause adds (above) or takes away (below the axis). "
        "The line is the same batch size with bucketed images.",
        data,
        layout,
    )


def _bar(name: str, labels: Sequence[str], values: Sequence[float], colour: str) -> dict[str, Any]:
    return {"type": "bar", "name": name, "x": list(labels), "y": list(values), "marker": {"color": colour}}


def columns(analysis: Analysis) -> list[Column[BatchAnalysis]]:
    """Of the table of batch sizes, on the terminal and the page."""

    def change(part: Part) -> Callable[[BatchAnalysis], Estimate]:
        return lambda one: Estimate(one.parts[part].ms, one.parts[part].low, one.parts[part].high, len(analysis.rounds))

    parts = [part for part in PARTS if analysis.batches and part in analysis.batches[0].parts]
    return [
        Column("batch_size", "batch", lambda one: one.batch_size),
        Column("ms", "listed", lambda one: one.ms, digits=1),
        Column("bucketed_ms", "bucketed", lambda one: one.bucketed_ms, digits=1),
        *(Column(part, PART_NAMES[part], change(part), digits=1, drop=3) for part in parts),
        Column("unexplained_ms", "unexplained", lambda one: one.unexplained_ms, digits=1, drop=4),
        Column("padding", "pixels", lambda one: f"{one.padding:.2f}x", drop=1),
        Column("percent_of_peak", "% of peak", lambda one: one.percent_of_peak, digits=0, drop=5),
        Column("cause", "cause", lambda one: one.cause, words=True, wrap=True, drop=2),
    ]


_INVARIANCE: Sequence[Column[Invariance]] = (
    Column("batch_size", "batch", lambda one: one.batch_size),
    Column("order", "order", lambda one: one.order, words=True),
    Column("padding", "padding", lambda one: f"{one.padding:.2f}x"),
    Column("score_change", "largest change of a score", lambda one: f"{one.score_change:.2g}"),
    Column("box_change_px", "of a box", lambda one: f"{one.box_change_px:.2g}", "px"),
    Column("lost", "lost", lambda one: f"{one.lost} of {one.detections}"),
    Column("ap", "mAP", lambda one: defined_ap(one.accuracy), digits=4),
)


def _section(title: str, caption: str, columns: Sequence[Column[Line]], rows: Sequence[Line]) -> str:
    """A table; nothing without rows."""
    if not rows:
        return ""
    shown = [column for column in columns if column.shown(rows)]
    words = {column.key: ' class="text"' if column.words else "" for column in shown}
    titles = "".join(f'<th scope="col"{words[one.key]}>{escape(one.title)}</th>' for one in shown)
    lines = ("".join(f"<td{words[one.key]}>{escape(one.text(row))}</td>" for one in shown) for row in rows)
    return (
        f'<section><h2>{escape(title)}</h2><div class="wide"><table><caption>{escape(caption)}</caption>'
        f"<thead><tr>{titles}</tr></thead><tbody><tr>{'</tr><tr>'.join(lines)}</tr></tbody></table></div></section>"
    )


_HOW = """<section><h2>How it was measured</h2><dl>
<dt>padding</dt><dd>The network on listed batches, less the same on bucketed batches (of one input size each).</dd>
<dt>convolutions, other work</dt><dd>The network on bucketed batches, less that at batch 1: the same images and the same
arithmetic. Split by the time that the engine itself says its convolutions take.</dd>
<dt>host work</dt><dd>Decoding, preprocessing, copies and NMS, timed in the same batches.</dd>
<dt>% of peak</dt><dd>Multiply-accumulates a second in bucketed batches, of what the same engine reaches here on
convolutions that suit it.</dd></dl></section>"""
