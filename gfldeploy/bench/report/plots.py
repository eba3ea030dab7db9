"""Results as figures in plotly.js's format: plain dictionaries of `data` and `layout`, without colours of the page."""

from __future__ import annotations

import colorsys
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from gfldeploy.batching.buckets import size_in_words
from gfldeploy.bench.cell import STREAMS
from gfldeploy.bench.estimates import Estimate
from gfldeploy.bench.results import BenchResults
from gfldeploy.bench.table import Row, best_of_each, rows
from gfldeploy.engines.base import PRECISIONS

# Okabe and Ito's palette for colour-blind readers, without its black and its yellow, which vanish on one background,
# and two more. Grey is for what is no series.
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#D55E00", "#56B4E9", "#8C6BB1", "#A0A020")
GREY = "#999999"
_DASHES = ("solid", "dash", "dot", "dashdot")
_SYMBOLS = ("circle", "square", "diamond", "cross", "triangle-up")
# A series this many times as large as the middle one makes the others flat lines: the axis becomes logarithmic.
_FLATTENS = 5.0
_STAGES = {
    "decode_ms": "decode",
    "preprocess_ms": "preprocess",
    "input_copy_ms": "input copy",
    "inference_ms": "inference",
    "output_copy_ms": "output copy",
    "postprocess_ms": "NMS",
}
_THROUGHPUT = "Decoding, preprocessing and NMS included. A line that falls has passed its best batch size."
_LATENCY = "Median of a whole batch, with its 95% interval where the samples support one."
_PREPARED = "On batches that were prepared before."
_MOST_POINTS = 2000
# Timelines shown at first; the legend brings the others.
_TIMELINES = 3


@dataclass(frozen=True)
class Plot:
    """A figure with its heading and what to see in it; `height` in pixels."""

    title: str
    about: str
    data: list[dict[str, Any]]
    layout: dict[str, Any]
    height: int = 420


@dataclass(frozen=True)
class Style:
    """How the series with this `number`, from 0, is drawn: no two have one colour, and past the palette they differ in
    dashes and markers too."""

    number: int

    @property
    def colour(self) -> str:
        if self.number < len(COLOURS):
            return COLOURS[self.number]
        # By the golden ratio hues never repeat, and neighbours are far apart.
        hue, light = self.number * 0.6180339887 % 1, (0.45, 0.58)[self.number % 2]
        return "#" + "".join(f"{round(255 * part):02X}" for part in colorsys.hls_to_rgb(hue, light, 0.6))

    @property
    def line(self) -> dict[str, Any]:
        return {"color": self.colour, "dash": _DASHES[self.number // len(COLOURS) % len(_DASHES)]}

    @property
    def marker(self) -> dict[str, Any]:
        return {"color": self.colour, "symbol": _SYMBOLS[self.number // len(COLOURS) % len(_SYMBOLS)]}


@dataclass(frozen=True)
class _Point:
    """A cell that was measured, and the series of lines that it is a point of."""

    row: Row
    series: str
    style: Style

    @property
    def size(self) -> int:
        return self.row.cell.batch_size

    @property
    def name(self) -> str:
        return f"{self.series}, batch {self.size}"


def plots(results: BenchResults) -> list[Plot]:
    """Every figure that the results have something for."""
    points = _points(results)
    batches = [one for one in points if not one.row.is_server]
    streams = [one for one in points if one.row.cell.scenario in STREAMS]
    servers = [one for one in points if one.row.cell.rate is not None]
    bound_ms = results.settings.latency_bound_ms
    by_batch_size: list[tuple[str, str, str, Callable[[Row], float | Estimate | None]]] = [
        ("Throughput from file to boxes", _THROUGHPUT, "images/s", lambda row: row.file_images_per_s),
        ("Latency from file to boxes", _LATENCY, "ms for a batch", lambda row: row.file_ms()),
        ("Throughput of the network alone", _PREPARED, "images/s", lambda row: row.images_per_s),
        ("Latency of the network alone", f"{_LATENCY} {_PREPARED}", "ms for a batch", lambda row: row.latency_ms()),
    ]
    accuracy, several = _accuracy(batches), len({one.row.cell.input_size for one in points}) > 1
    figures = [
        accuracy if several else None,
        *(
            _by_batch_size(title, about, unit, [(one, value(one.row)) for one in batches])
            for title, about, unit, value in by_batch_size
        ),
        _distributions(streams),
        _stages([one for one in batches if one.row.result.file_ms][::-1]),
        None if several else accuracy,
        _in_time([one for one in servers if one.row.served], bound_ms),
        _answers(servers, bound_ms),
        _arithmetic(points),
        _timelines(points),
    ]
    return [figure for figure in figures if figure is not None]


def _points(results: BenchResults) -> list[_Point]:
    shown = [row for row in rows(results) if row.ok]
    cells = [row.cell for row in shown]
    found: list[_Point] = []
    styles: dict[str, Style] = {}
    for row in shown:
        series = row.cell.setup(cells)
        series += f", {row.cell.policy or row.cell.scenario}" if row.cell.scenario not in STREAMS else ""
        found.append(_Point(row, series, styles.setdefault(series, Style(len(styles)))))
    return found


def _by_batch_size(
    title: str, about: str, unit: str, values: Sequence[tuple[_Point, float | Estimate | None]]
) -> Plot | None:
    """A line for each series; estimates have their intervals."""
    lines: dict[tuple[str, Style], list[tuple[int, float | Estimate]]] = {}
    for point, value in values:
        if value is not None:
            lines.setdefault((point.series, point.style), []).append((point.size, value))
    data = []
    for (series, style), line in lines.items():
        sizes, found = zip(*sorted(line, key=lambda one: one[0]), strict=True)
        estimates = [one if isinstance(one, Estimate) else Estimate(one, None, None, 1) for one in found]
        spread = [(e.high - e.value, e.value - e.low) if e.high and e.low else (0.0, 0.0) for e in estimates]
        bars = {"type": "data", "symmetric": False, "color": style.colour}
        bars |= {"array": [above for above, _ in spread], "arrayminus": [below for _, below in spread]}
        hover = f"batch %{{x}}: %{{y:.{1 if unit == 'images/s' else 2}f}} {unit.split()[0]}"
        trace = _line(series, sizes, [one.value for one in estimates], style, hovertemplate=hover)
        data.append(trace | ({"error_y": bars} if isinstance(found[0], Estimate) else {}))
    if not data:
        return None
    ticks = sorted({size for trace in data for size in trace["x"]})
    largest = [max(trace["y"]) for trace in data]
    flat = max(largest) > _FLATTENS * statistics.median(largest) and min(min(trace["y"]) for trace in data) > 0
    layout = {
        "xaxis": _axis("batch size") | {"type": "log", "tickvals": ticks, "ticktext": list(map(str, ticks))},
        "yaxis": _axis(unit) | ({"type": "log", "dtick": "D2"} if flat else {}),
    }
    return Plot(title, about, data, layout)


def _distributions(points: list[_Point]) -> Plot | None:
    random = np.random.default_rng(0)
    data = []
    for one in reversed(points):  # the first at the top
        values = np.asarray(one.row.result.latency_ms)
        if len(values) > _MOST_POINTS:
            values = random.choice(values, _MOST_POINTS, replace=False)
        data.append(
            {
                "type": "box",
                "name": one.name,
                "x": [round(float(value), 4) for value in values],
                "marker": {"color": one.style.colour, "size": 3},
                "boxpoints": "outliers",
                "showlegend": False,
                "orientation": "h",
            }
        )
    layout = {
        "xaxis": {"title": {"text": "ms for a batch"}, "type": "log", "automargin": True},
        "yaxis": {"automargin": True},
    }
    about = "The network alone, all samples of all rounds: the box is the middle half, the line in it the median."
    return Plot("How latencies are spread", about, data, layout, 140 + 24 * len(data)) if data else None


def _stages(points: list[_Point]) -> Plot | None:
    if not points:
        return None
    names = [one.name for one in points]
    data = []
    for (field, name), colour in zip(_STAGES.items(), COLOURS, strict=False):
        values = [
            statistics.median(value for run in one.row.result.runs for value in getattr(run.stages, field)) / one.size
            for one in points
        ]
        hover = f"{name}: %{{x:.2f}} ms"
        data.append(_bars(name, [round(value, 4) for value in values], names, colour, hover))
    axis: dict[str, Any] = {"title": {"text": "ms for an image"}, "automargin": True}
    layout = {"barmode": "stack", "xaxis": axis, "yaxis": {"automargin": True}}
    about = "Medians by image, from the file to the boxes, one stage after the other."
    totals = [sum(trace["x"][number] for trace in data) for number in range(len(names))]
    edge = _FLATTENS * statistics.median(totals)
    if beyond := {name: total for name, total in zip(names, totals, strict=True) if total > edge}:
        axis["range"] = [0, 1.05 * max(total for total in totals if total <= edge)]
        longest = max(beyond, key=lambda name: beyond[name])
        about += (
            f" {len(beyond)} bar{'s go' if len(beyond) > 1 else ' goes'} on beyond the edge, the longest, {longest}, "
            f"to {beyond[longest]:.0f} ms; a double click shows all of them."
        )
    return Plot("Where the time goes", about, data, layout, 180 + 24 * len(points))


def _accuracy(points: list[_Point]) -> Plot | None:
    """A line for each engine and precision, from input size to input size: the fastest of the others at each."""
    best = best_of_each([one.row for one in points if one.row.ap is not None and one.row.deciding_images_per_s])
    cells = {row: replace(row.cell, input_size=None, streams=1, scenario="offline") for row in best}
    series: dict[str, list[Row]] = {}
    for row, cell in cells.items():
        series.setdefault(cell.setup(cells.values()), []).append(row)
    if not series:
        return None
    several = len({row.cell.input_size for row in best}) > 1
    data = []
    for number, (name, some) in enumerate(series.items()):
        style = Style(number)
        symbol = _SYMBOLS[PRECISIONS.index(some[0].cell.precision) % len(_SYMBOLS)]
        trace = _line(
            name,
            [_speed_and_ap(row)[0] for row in some],
            [_speed_and_ap(row)[1] for row in some],
            style,
            mode="lines+markers+text" if several else "markers",
            text=[_size(row) if several else "" for row in some],
            textposition="bottom left",
            customdata=[f"{_size(row)}, batch {row.cell.batch_size}{row.cell.load}" for row in some],
            hovertemplate="%{customdata}: %{x:.1f} images/s, mAP %{y:.4f}",
        )
        data.append(trace | {"marker": {"color": style.colour, "symbol": symbol, "size": 9}})
    front = sorted((row for row in best if row.on_front), key=lambda row: row.deciding_images_per_s or 0.0)
    x, y = zip(*map(_speed_and_ap, front), strict=True)
    dotted = {"dash": "dot", "color": GREY, "shape": "vh"}
    ring = {"symbol": "circle-open", "size": 18, "color": GREY, "line": {"width": 2}}
    data.append(_line("Pareto front", x, y, mode="lines+markers", line=dotted, marker=ring, hoverinfo="skip"))
    whole = any(one.row.file_images_per_s is not None for one in points)
    layout = {
        "xaxis": _axis(f"images/s {'from file to boxes' if whole else 'of the network alone'}"),
        "yaxis": _axis("mAP") | {"rangemode": "normal"},
    }
    about = (
        "Right is faster, up is more accurate, each at its best batch size. Nothing beats in both what is ringed, on "
        f"the dotted line: {'; '.join(map(_named, front))}."
    )
    return Plot("Accuracy against speed", about, data, layout, 560 if several else 420)


def _size(row: Row) -> str:
    return size_in_words(row.cell.input_size) if row.cell.input_size else "own size"


def _named(row: Row) -> str:
    return f"{row.cell.setup()} ({row.deciding_images_per_s or 0:.1f} images/s, mAP {row.ap:.4f})"


def _speed_and_ap(row: Row) -> tuple[float, float]:
    return row.deciding_images_per_s or 0.0, row.ap or 0.0


def _servers(points: Sequence[_Point]) -> Iterator[tuple[str, Style, list[_Point]]]:
    """The name, the style and the points of each server, by the rate of arrivals."""
    for number, name in enumerate(dict.fromkeys(one.name for one in points)):
        some = (one for one in points if one.name == name)
        yield name, Style(number), sorted(some, key=lambda one: one.row.cell.rate or 0)


def _in_time(points: list[_Point], bound_ms: float | None) -> Plot | None:
    if not points:
        return None
    rates = sorted({one.row.cell.rate for one in points if one.row.cell.rate})
    data = [_line("all that arrive", rates, rates, mode="lines", line={"color": GREY, "dash": "dot"})]
    for name, style, some in _servers(points):
        served = [one.row.served for one in some if one.row.served]
        rejected = [f"{100 * one.rejected:.0f}% rejected" for one in served]
        x = [one.row.cell.rate for one in some]
        data.append(_line(name, x, [one.in_time_per_s for one in served], style, hovertext=rejected))
    layout = {"xaxis": _axis("images arriving a second"), "yaxis": _axis("images a second answered in time")}
    about = f"Answers within {bound_ms:g} ms of the arrival, or of the planned time over HTTP."
    return Plot("Server: answers in time", about, data, layout)


def _answers(points: list[_Point], bound_ms: float | None) -> Plot | None:
    data = []
    for series, style, some in _servers(points):
        for name, percent, dash in (("median", 50, "solid"), ("p90", 90, "dash"), ("p99", 99, "dot")):
            found = [(one.row.cell.rate, e.value) for one in some if (e := one.row.latency_ms(percent))]
            if found:
                x, y = zip(*found, strict=True)
                data.append(_line(f"{series}: {name}", x, y, style) | {"line": {"color": style.colour, "dash": dash}})
    layout: dict[str, Any] = {
        "xaxis": _axis("images arriving a second"),
        "yaxis": _axis("ms from arrival to result") | {"type": "log"},
    }
    about = "Images arrive at random; where the lines turn up, the server no longer keeps up with them."
    if bound_ms:
        bound = {"type": "line", "xref": "paper", "x0": 0, "x1": 1, "y0": bound_ms, "y1": bound_ms}
        layout["shapes"] = [bound | {"line": {"color": GREY, "dash": "dot"}}]
        about += f" The dotted level is the bound of {bound_ms:g} ms."
    return Plot("Server: latency of what was not rejected", about, data, layout) if data else None


def _arithmetic(points: list[_Point]) -> Plot | None:
    best: dict[str, tuple[_Point, float]] = {}
    for one in points:
        if one.row.gmac_per_s and one.row.gmac_per_s > best.get(one.series, (one, 0.0))[1]:
            best[one.series] = (one, one.row.gmac_per_s)
    if not best:
        return None
    names, found = list(best)[::-1], list(best.values())[::-1]
    peaks = [one.row.result.peak and one.row.result.peak.gmac_per_s for one, _ in found]
    hover = "%{x:.1f} GMAC/s"
    data = [_bars("reached", [reached for _, reached in found], names, COLOURS[0], hover)]
    if any(peaks):
        data.append(_bars("peak of the engine here", peaks, names, GREY, hover))
    layout = {"barmode": "group", "xaxis": _axis("10⁹ multiply-accumulates a second"), "yaxis": {"automargin": True}}
    about = "At the best batch size, padding included; against convolutions that suit the engine, measured here."
    return Plot("Arithmetic reached", about, data, layout, 160 + 44 * len(names))


def _timelines(points: list[_Point]) -> Plot | None:
    seen = [(one, record) for one in points if (record := one.row.result.runs[0].monitored) and record.t_s]
    if not seen:
        return None
    gpu = any(record.gpu_percent for _, record in seen)
    data = []
    for number, (one, record) in enumerate(seen):
        cpu = [statistics.fmean(values) for values in record.cpu_percent]
        columns = [("CPU %", "y", cpu), ("MB", "y2", record.rss_mb)]
        columns += [("GPU %", "y3", record.gpu_percent)] if gpu else []
        for unit, axis, values in columns:
            more: dict[str, Any] = {
                "mode": "lines",
                "legendgroup": str(number),
                "showlegend": axis == "y",
                "visible": True if number < _TIMELINES else "legendonly",
                "yaxis": axis,
                "line": Style(number).line,
                "hovertemplate": f"%{{y:.0f}} {unit}",
            }
            data.append(_line(one.name, [round(t, 2) for t in record.t_s], [round(v, 1) for v in values], **more))
    spans = [(0.7, 1.0), (0.36, 0.64), (0.0, 0.3)] if gpu else [(0.55, 1.0), (0.0, 0.45)]
    layout: dict[str, Any] = {"xaxis": _axis("seconds from the first warm-up") | {"anchor": "y3" if gpu else "y2"}}
    titles = ("CPU %, mean", "memory, MB", "GPU %")
    for name, title, span in zip(("yaxis", "yaxis2", "yaxis3"), titles, spans, strict=False):
        layout[name] = _axis(title) | {"domain": list(span)}
    about = (
        "The first round of each cell; click on a name to show or hide it. After the network alone come whole batches."
    )
    return Plot("The machine meanwhile", about, data, layout, 560)


def _line(name: str, x: Sequence[Any], y: Sequence[Any], style: Style | None = None, **more: Any) -> dict[str, Any]:
    drawn = {"line": style.line, "marker": style.marker} if style else {}
    return {"type": "scatter", "mode": "lines+markers", "name": name, "x": list(x), "y": list(y), **drawn, **more}


def _bars(name: str, x: Sequence[Any], y: Sequence[str], colour: str, hover: str) -> dict[str, Any]:
    marker = {"color": colour}
    return {
        "type": "bar", "orientation": "h", "name": name, "x": x, "y": y, "marker": marker, "hovertemplate": hover,
    }  # fmt: skip


def _axis(title: str) -> dict[str, Any]:
    return {"title": {"text": title}, "automargin": True, "rangemode": "tozero"}
