"""Results as figures in plotly.js's format: plain dictionaries of `data` and `layout`, without colours of the page."""

from __future__ import annotations

import colorsys
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from gfldeploy.bench.cell import STREAMS
from gfldeploy.bench.estimates import Estimate
from gfldeploy.bench.results import BenchResults
from gfldeploy.bench.table import Row, rows

__all__ = ["COLOURS", "GREY", "Plot", "pareto_front", "plots"]

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
class _Measured:
    """A cell that was measured, and the series of lines that it is a point of."""

    row: Row
    series: str
    style: Style


def plots(results: BenchResults) -> list[Plot]:
    """Every figure that the results have something for."""
    measured = _measured(results)
    batches = [one for one in measured if one.row.cell.scenario != "server"]
    streams = [one for one in measured if one.row.cell.scenario in STREAMS]
    makers: list[tuple[Callable[[list[_Measured]], Plot | None], list[_Measured]]] = [
        (_throughput, batches),
        (_latency, batches),
        (_network_throughput, batches),
        (_network_latency, streams),
        (_distributions, streams),
        (_stages, batches),
        (_accuracy, batches),
        (lambda some: _in_time(some, results.settings.latency_bound_ms), [one for one in measured if one.row.served]),
        (lambda some: _server(some, results.settings.latency_bound_ms), [one for one in measured if one.row.cell.rate]),
        (_peaks, measured),
        (_timelines, measured),
    ]
    made = [make(some) for make, some in makers if some]
    return [plot for plot in made if plot is not None]


def pareto_front(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Those points (x, y) that no other is as good as in both and better than in one, by rising x; more is better."""
    front: list[tuple[float, float]] = []
    for x, y in sorted(set(points), key=lambda point: (-point[0], -point[1])):
        if not front or y > front[-1][1]:
            front.append((x, y))
    return front[::-1]


def _measured(results: BenchResults) -> list[_Measured]:
    shown = [row for row in rows(results) if row.ok]
    cells = [row.cell for row in shown]
    found: list[_Measured] = []
    styles: dict[str, Style] = {}
    for row in shown:
        cell = row.cell
        series = cell.setup(cells)
        series += f", {cell.policy or cell.scenario}" if cell.scenario not in STREAMS else ""
        found.append(_Measured(row, series, styles.setdefault(series, Style(len(styles)))))
    return found


def _lines(measured: Sequence[_Measured]) -> Iterator[tuple[str, Style, list[_Measured]]]:
    """Name, style and points of each series, by batch size."""
    for series in dict.fromkeys(one.series for one in measured):
        points = sorted((one for one in measured if one.series == series), key=lambda one: one.row.cell.batch_size)
        yield series, points[0].style, points


def _throughput(measured: list[_Measured]) -> Plot | None:
    """From file to boxes."""
    about = (
        "One batch after the other, decoding, preprocessing and NMS included. A line that falls has passed its best "
        "batch size."
    )
    return _speeds("Throughput from file to boxes", about, measured, lambda row: row.file_images_per_s)


def _network_throughput(measured: list[_Measured]) -> Plot | None:
    about = "Completed images by wall time, on batches that were prepared before."
    return _speeds("Throughput of the network alone", about, measured, lambda row: row.images_per_s)


def _speeds(title: str, about: str, measured: list[_Measured], speed: Callable[[Row], float | None]) -> Plot | None:
    known = [one for one in measured if speed(one.row) is not None]
    if not known:
        return None
    data = [
        {
            "type": "scatter",
            "mode": "lines+markers",
            "name": name,
            "x": [one.row.cell.batch_size for one in points],
            "y": [speed(one.row) or 0.0 for one in points],
            "line": style.line,
            "marker": style.marker,
            "hovertemplate": "batch %{x}: %{y:.1f} images/s",
        }
        for name, style, points in _lines(known)
    ]
    return Plot(title, about, data, _axes("batch size", "images/s", measured, data))


def _latency(measured: list[_Measured]) -> Plot | None:
    about = "Median of a whole batch, with its 95% interval where the samples support one."
    return _latencies("Latency from file to boxes", about, measured, lambda row: row.file_ms)


def _network_latency(measured: list[_Measured]) -> Plot | None:
    about = "The same of the network alone, on batches that were prepared before."
    return _latencies("Latency of the network alone", about, measured, lambda row: row.median_ms)


def _latencies(
    title: str, about: str, measured: list[_Measured], latency: Callable[[Row], Estimate | None]
) -> Plot | None:
    known = [one for one in measured if latency(one.row)]
    if not known:
        return None
    data = []
    for name, style, points in _lines(known):
        estimates = [e for one in points if (e := latency(one.row))]
        spread = [(e.high - e.value, e.value - e.low) if e.high and e.low else (0.0, 0.0) for e in estimates]
        data.append(
            {
                "type": "scatter",
                "mode": "lines+markers",
                "name": name,
                "x": [one.row.cell.batch_size for one in points],
                "y": [e.value for e in estimates],
                "error_y": {
                    "type": "data",
                    "symmetric": False,
                    "array": [above for above, _ in spread],
                    "arrayminus": [below for _, below in spread],
                    "color": style.colour,
                },
                "line": style.line,
                "marker": style.marker,
                "hovertemplate": "batch %{x}: %{y:.2f} ms",
            }
        )
    return Plot(title, about, data, _axes("batch size", "ms for a batch", measured, data))


def _distributions(measured: list[_Measured]) -> Plot:
    random = np.random.default_rng(0)
    data = []
    for one in reversed(measured):  # the first at the top
        values = np.asarray(one.row.result.latency_ms)
        if len(values) > _MOST_POINTS:
            values = random.choice(values, _MOST_POINTS, replace=False)
        data.append(
            {
                "type": "box",
                "name": f"{one.series}, batch {one.row.cell.batch_size}",
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
    return Plot("How latencies are spread", about, data, layout, 140 + 24 * len(measured))


def _stages(measured: list[_Measured]) -> Plot | None:
    known = [one for one in measured if one.row.result.file_ms][::-1]
    if not known:
        return None
    names = [f"{one.series}, batch {one.row.cell.batch_size}" for one in known]
    data: list[dict[str, Any]] = []
    for (field, name), colour in zip(_STAGES.items(), COLOURS, strict=False):
        values = [
            statistics.median(value for run in one.row.result.runs for value in getattr(run.stages, field))
            / one.row.cell.batch_size
            for one in known
        ]
        data.append(
            {
                "type": "bar",
                "orientation": "h",
                "name": name,
                "x": [round(value, 4) for value in values],
                "y": names,
                "marker": {"color": colour},
                "hovertemplate": f"{name}: %{{x:.2f}} ms",
            }
        )
    axis: dict[str, Any] = {"title": {"text": "ms for an image"}, "automargin": True}
    layout = {"barmode": "stack", "xaxis": axis, "yaxis": {"automargin": True}}
    about = "Medians by image, from the file to the boxes, one stage after the other."
    totals = [sum(trace["x"][number] for trace in data) for number in range(len(names))]
    edge = _FLATTENS * statistics.median(totals)
    if beyond := {name: total for name, total in zip(names, totals, strict=True) if total > edge}:
        axis["range"] = [0, 1.05 * max([total for total in totals if total <= edge])]
        longest = max(beyond, key=lambda name: beyond[name])
        about += (
            f" {len(beyond)} bar{'s go' if len(beyond) > 1 else ' goes'} on beyond the edge, the longest, {longest}, "
            f"to {beyond[longest]:.0f} ms; a double click shows all of them."
        )
    return Plot("Where the time goes", about, data, layout, 180 + 24 * len(known))


def _accuracy(measured: list[_Measured]) -> Plot | None:
    accurate = [one for one in measured if one.row.ap is not None]
    whole = any(one.row.file_images_per_s is not None for one in accurate)

    def speed(one: _Measured) -> float:
        return (one.row.file_images_per_s if whole else one.row.images_per_s) or 0.0

    known = [one for one in accurate if speed(one)]
    if not known:
        return None
    data: list[dict[str, Any]] = [
        {
            "type": "scatter",
            "mode": "markers",
            "name": series,
            "x": [speed(one) for one in points],
            "y": [one.row.ap for one in points],
            "text": [f"batch {one.row.cell.batch_size}" for one in points],
            "marker": style.marker | {"size": 9},
            "hovertemplate": "%{text}: %{x:.1f} images/s, mAP %{y:.4f}",
        }
        for series, style, points in _lines(known)
    ]
    front = pareto_front([(speed(one), one.row.ap or 0.0) for one in known])
    data.append(
        {
            "type": "scatter",
            "mode": "lines",
            "name": "Pareto front",
            "x": [x for x, _ in front],
            "y": [y for _, y in front],
            "line": {"dash": "dot", "color": "#888888", "shape": "vh"},
            "hoverinfo": "skip",
        }
    )
    what = "from file to boxes" if whole else "of the network alone"
    layout = {"xaxis": _axis(f"images/s {what}"), "yaxis": _axis("mAP")}
    about = "Right is faster, up is more accurate: what lies on the dotted line is beaten by nothing in both."
    return Plot("Accuracy against speed", about, data, layout)


def _servers(measured: Sequence[_Measured]) -> Iterator[tuple[str, Style, list[_Measured]]]:
    """The name, the style and the points of each server, by the rate of arrivals."""
    for number, name in enumerate(dict.fromkeys(f"{one.series}, batch {one.row.cell.batch_size}" for one in measured)):
        some = (one for one in measured if f"{one.series}, batch {one.row.cell.batch_size}" == name)
        yield name, Style(number), sorted(some, key=lambda one: one.row.cell.rate or 0)


def _in_time(measured: list[_Measured], bound_ms: float | None) -> Plot:
    rates = sorted({one.row.cell.rate for one in measured if one.row.cell.rate})
    grey = {"color": "#888888", "dash": "dot"}
    data: list[dict[str, Any]] = [
        {"type": "scatter", "mode": "lines", "name": "all that arrive", "x": rates, "y": rates, "line": grey}
    ]
    for name, style, points in _servers(measured):
        some = [(one.row.cell.rate, one.row.served) for one in points if one.row.served]
        data.append(
            {
                "type": "scatter",
                "mode": "lines+markers",
                "name": name,
                "x": [rate for rate, _ in some],
                "y": [served.in_time_per_s for _, served in some],
                "line": style.line,
                "marker": style.marker,
                "hovertext": [f"{100 * served.rejected:.0f}% rejected" for _, served in some],
            }
        )
    layout = {"xaxis": _axis("images arriving a second"), "yaxis": _axis("images a second answered in time")}
    about = f"Answers within {bound_ms:g} ms of the arrival, by what the server does with the images that wait."
    return Plot("Server: answers in time", about, data, layout)


def _server(measured: list[_Measured], bound_ms: float | None) -> Plot:
    data = []
    for series, style, points in _servers(measured):
        for name, percent, dash in (("median", 50, "solid"), ("p90", 90, "dash"), ("p99", 99, "dot")):
            estimates = [one.row.percentile(percent) for one in points]
            some = [(one.row.cell.rate, e.value) for one, e in zip(points, estimates, strict=True) if e]
            if some:
                data.append(
                    {
                        "type": "scatter",
                        "mode": "lines+markers",
                        "name": f"{series}: {name}",
                        "x": [rate for rate, _ in some],
                        "y": [value for _, value in some],
                        "line": {"color": style.colour, "dash": dash},
                        "marker": style.marker,
                    }
                )
    layout = {"xaxis": _axis("images arriving a second"), "yaxis": _axis("ms from arrival to result") | {"type": "log"}}
    about = "Images arrive at random; where the lines turn up, the engine no longer keeps up with them."
    if bound_ms:
        bound = {"type": "line", "xref": "paper", "x0": 0, "x1": 1, "y0": bound_ms, "y1": bound_ms}
        layout["shapes"] = [bound | {"line": {"color": "#888888", "dash": "dot"}}]  # type: ignore[assignment]
        about += f" The dotted level is the bound of {bound_ms:g} ms."
    return Plot("Server: latency of what was not rejected", about, data, layout)


def _peaks(measured: list[_Measured]) -> Plot | None:
    best: dict[str, tuple[_Measured, float]] = {}
    for one in measured:
        if one.row.gmac_per_s and one.row.gmac_per_s > best.get(one.series, (one, 0.0))[1]:
            best[one.series] = (one, one.row.gmac_per_s)
    if not best:
        return None
    names = list(best)[::-1]
    peaks = [best[name][0].row.result.peak for name in names]
    peak = [one.gmac_per_s if one else None for one in peaks]
    data: list[dict[str, Any]] = [
        {"type": "bar", "orientation": "h", "name": "reached", "y": names, "x": [best[name][1] for name in names]}
    ]
    if any(peak):
        data.append({"type": "bar", "orientation": "h", "name": "peak of the engine here", "y": names, "x": peak})
    for trace, colour in zip(data, (COLOURS[0], GREY), strict=False):
        trace["marker"] = {"color": colour}
        trace["hovertemplate"] = "%{x:.1f} GMAC/s"
    layout = {"barmode": "group", "xaxis": _axis("10⁹ multiply-accumulates a second"), "yaxis": {"automargin": True}}
    about = "At the best batch size, padding included; against convolutions that suit the engine, measured here."
    return Plot("Arithmetic reached", about, data, layout, 160 + 44 * len(names))


def _timelines(measured: list[_Measured]) -> Plot | None:
    seen = [one for one in measured if one.row.result.runs[0].monitored and one.row.result.runs[0].monitored.t_s]
    if not seen:
        return None
    gpu = any(one.row.result.runs[0].monitored and one.row.result.runs[0].monitored.gpu_percent for one in seen)
    data: list[dict[str, Any]] = []
    for number, one in enumerate(seen):
        record = one.row.result.runs[0].monitored
        assert record is not None
        columns = [("CPU %", "y", [statistics.fmean(values) for values in record.cpu_percent])]
        columns.append(("MB", "y2", list(record.rss_mb)))
        if gpu:
            columns.append(("GPU %", "y3", list(record.gpu_percent)))
        for unit, axis, values in columns:
            data.append(
                {
                    "type": "scatter",
                    "mode": "lines",
                    "name": f"{one.series}, batch {one.row.cell.batch_size}",
                    "legendgroup": str(number),
                    "showlegend": axis == "y",
                    "visible": True if number < _TIMELINES else "legendonly",
                    "x": [round(t, 2) for t in record.t_s],
                    "y": [round(value, 1) for value in values],
                    "yaxis": axis,
                    "line": Style(number).line,
                    "hovertemplate": f"%{{y:.0f}} {unit}",
                }
            )
    spans = [(0.7, 1.0), (0.36, 0.64), (0.0, 0.3)] if gpu else [(0.55, 1.0), (0.0, 0.45)]
    layout: dict[str, Any] = {"xaxis": _axis("seconds from the first warm-up") | {"anchor": "y3" if gpu else "y2"}}
    titles = ("CPU %, mean", "memory, MB", "GPU %")
    for name, title, span in zip(("yaxis", "yaxis2", "yaxis3"), titles, spans, strict=False):
        layout[name] = _axis(title) | {"domain": list(span)}
    about = (
        "The first round of each cell; click on a name to show or hide it. After the network alone come whole batches."
    )
    return Plot("The machine meanwhile", about, data, layout, 560)


def _axes(x: str, y: str, measured: Sequence[_Measured], data: Sequence[dict[str, Any]]) -> dict[str, Any]:
    sizes = sorted({one.row.cell.batch_size for one in measured if one.row.cell.batch_size})
    largest = [max(trace["y"]) for trace in data]
    flat = max(largest) > _FLATTENS * statistics.median(largest) and min(min(trace["y"]) for trace in data) > 0
    return {
        "xaxis": _axis(x) | {"type": "log", "tickvals": sizes, "ticktext": list(map(str, sizes))},
        "yaxis": _axis(y) | ({"type": "log", "dtick": "D2"} if flat else {}),
    }


def _axis(title: str) -> dict[str, Any]:
    return {"title": {"text": title}, "automargin": True, "rangemode": "tozero" if title != "mAP" else "normal"}
