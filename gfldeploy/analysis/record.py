"""`analysis.json` and its page: the measurements, and the conclusions from them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from gfldeploy.analysis.causes import PART_NAMES, PARTS, BatchAnalysis, sentences
from gfldeploy.analysis.invariance import Invariance
from gfldeploy.analysis.sweep import Pass
from gfldeploy.batching.buckets import STREAM_ORDERS
from gfldeploy.bench.cell import BundleIdentity
from gfldeploy.bench.report.page import machine_line, sections, write_page
from gfldeploy.bench.report.plots import COLOURS, GREY, Plot
from gfldeploy.bench.results import Peak, defined_ap
from gfldeploy.engines.base import Precision
from gfldeploy.files import write_json
from gfldeploy.machine import Machine
from gfldeploy.serialization import plain

__all__ = ["SCHEMA", "Analysis", "told_invariance"]

SCHEMA = 1


@dataclass(frozen=True)
class Analysis:
    """Everything that `gfldeploy analyze` found. `rounds`: the passes of each; `created`: UTC, ISO 8601."""

    created: str
    machine: Machine
    bundle: BundleIdentity
    engine: str
    precision: Precision
    threads: int
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
        title = f"Batch size and speed: {self.bundle.directory}, {self.engine} {self.precision}"
        body = "\n".join([sections(figures), _table(self), _detections(self.invariance), _HOW])
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


def _table(analysis: Analysis) -> str:
    parts = [part for part in PARTS if analysis.batches and part in analysis.batches[0].parts]
    header = ["batch", "listed, ms per image", "bucketed", *(PART_NAMES[part] for part in parts)]
    rows = [
        [
            *(str(one.batch_size), f"{one.ms:.1f}", f"{one.bucketed_ms:.1f}"),
            *(
                f"{change.ms:+.1f} ({change.low:+.1f} to {change.high:+.1f})"
                for change in (one.parts[part] for part in parts)
            ),
            *(f"{one.unexplained_ms:+.2f}", f"{one.padding:.2f}x"),
            *("" if one.percent_of_peak is None else f"{one.percent_of_peak:.0f}", one.cause),
        ]
        for one in analysis.batches
    ]
    caption = (
        "Milliseconds of one image against batch 1: mean over the typical of "
        f"{len(analysis.rounds)} rounds, and in brackets the interval of the median."
    )
    return _section("The figures", caption, [*header, "unexplained", "padding", "% of peak", "cause"], rows)


def _detections(found: Sequence[Invariance]) -> str:
    """What batches do to detections, by batch size and order; nothing if it was not measured."""
    if not found:
        return ""
    header = ["batch", "order", "padding", "largest change of a score", "of a box, px", "lost", "mAP"]
    rows = [
        [
            *(str(one.batch_size), one.order, f"{one.padding:.2f}x", f"{one.score_change:.2g}"),
            *(f"{one.box_change_px:.2g}", f"{one.lost} of {one.detections}"),
            "" if (ap := defined_ap(one.accuracy)) is None else f"{ap:.4f}",
        ]
        for one in found
    ]
    caption = "Against the same image alone, of detections with a score of 0.4 or more; lost: not found again."
    return _section("What batches do to detections", caption, header, rows)


def _section(title: str, caption: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    words = [' class="text"' if any(text[:1].isalpha() for text in texts) else "" for texts in zip(*rows, strict=True)]

    def line(tag: str, texts: Sequence[str]) -> str:
        cells = zip(words, texts, strict=True)
        return f"<tr>{''.join(f'<{tag}{word}>{escape(text)}</{tag[:2]}>' for word, text in cells)}</tr>"

    titles, body = line('th scope="col"', header), "".join(line("td", row) for row in rows)
    return (
        f'<section><h2>{escape(title)}</h2><div class="wide"><table><caption>{escape(caption)}</caption>'
        f"<thead>{titles}</thead><tbody>{body}</tbody></table></div></section>"
    )


_HOW = """<section><h2>How it was measured</h2><dl>
<dt>padding</dt><dd>The network on listed batches, less the same on bucketed batches (of one input size each).</dd>
<dt>convolutions, other work</dt><dd>The network on bucketed batches, less that at batch 1: the same images and the same
arithmetic. Split by the time that the engine itself says its convolutions take.</dd>
<dt>host work</dt><dd>Decoding, preprocessing, copies and NMS, timed in the same batches.</dd>
<dt>% of peak</dt><dd>Multiply-accumulates a second in bucketed batches, of what the same engine reaches here on
convolutions that suit it.</dd></dl></section>"""
