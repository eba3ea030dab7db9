"""The HTML page: complete, escaped, and without the network."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
from sample_results import FAILED, OK, RUN, SKIPPED, STAGES, altered, sample_results

from gfldeploy.batching.latency import Point
from gfldeploy.bench.report.page import short_answer, write_report
from gfldeploy.bench.report.plots import plots
from gfldeploy.bench.results import BenchResults, Serving
from gfldeploy.bench.table import pareto_front
from gfldeploy.bench.timing import Samples, Stages
from gfldeploy.cli import main

EVIL = '</script><img src=x onerror="alert(1)">'


class Page(HTMLParser):
    """The tags with their attributes, the text of each table cell, and the figures' data."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.cells: list[str] = []
        self.scripts: dict[str, str] = {}
        self.open = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self.open = f"script {dict(attrs).get('id')}" if tag == "script" else tag
        if tag == "td":
            self.cells.append("")

    def handle_endtag(self, tag: str) -> None:
        self.open = ""

    def handle_data(self, data: str) -> None:
        if self.open == "td":
            self.cells[-1] += data
        elif self.open.startswith("script"):
            self.scripts[self.open] = self.scripts.get(self.open, "") + data


def many() -> BenchResults:
    """Three series of two batch sizes, a server at two rates, one failure and what cannot run."""
    cells = []
    for engine, precision, ms in (
        ("paddle", "fp32", 20.0),
        ("onnxruntime", "fp32", 12.0),
        ("onnxruntime", "int8", 6.0),
    ):
        for size in (1, 4):
            samples = Samples(
                tuple(ms * size + k % 7 / 10 for k in range(50)), (), size, 50 * size, ms * size / 20, True
            )
            stages = Stages(**dict.fromkeys(STAGES, (ms * size / 5,) * 4) | {"end_to_end_ms": (ms * size * 1.2,) * 4})
            cells.append(
                altered(
                    OK,
                    engine=engine,
                    precision=precision,
                    batch_size=size,
                    runs=(replace(RUN, samples=samples, stages=stages),),
                )
            )
    serving = Serving(60, 10, (Point(1, (64, 96), 5.0),), 55)
    runs = tuple(replace(run, serving=serving) for run in cells[-1].runs)
    served = [altered(cells[-1], scenario="server", rate=rate, policy="adaptive", runs=runs) for rate in (10.0, 20.0)]
    settings = replace(sample_results().settings, latency_bound_ms=100.0)
    return replace(sample_results(), settings=settings, cells=(*cells, *served, FAILED, SKIPPED))


@pytest.fixture
def text(tmp_path: Path) -> str:
    write_report(many(), tmp_path / "report.html")
    return (tmp_path / "report.html").read_text()


def table(text: str, name: str) -> list[dict[str, str]]:
    """The lines of a table by its headings."""
    part = text[text.index(f'<table id="{name}">') :]
    part = part[: part.index("</table>")]
    heads = [re.sub("<.*?>", "", head) for head in re.findall("<th.*?</th>", part)]
    cells = Page(part).cells
    assert len(cells) % len(heads) == 0
    return [dict(zip(heads, cells[k : k + len(heads)], strict=True)) for k in range(0, len(cells), len(heads))]


def test_the_best_batch_of_each_comes_first_and_all_cells_on_demand(text: str) -> None:
    best, cells, servers = (table(text, name) for name in ("best", "cells", "servers"))
    assert [(one["engine"], one["precision"], one["batch"]) for one in best] == [
        ("onnxruntime", "int8", "1"),
        ("onnxruntime", "fp32", "1"),
        ("paddle", "fp32", "1"),
    ]
    # 6 ms for an image, 1.2 times that from file to boxes.
    assert list(best[0])[:5] == ["engine", "precision", "batch", "file to boxes, images/s", "mAP"]
    assert (best[0]["file to boxes, images/s"], best[0]["mAP"]) == ("138.9", "0.5000")
    assert (best[0]["network, images/s"], best[0]["memory, MB"]) == ("166.7", "280")
    assert len(cells) == 8
    assert cells[0]["network, ms"] == "20.30 ±0.10" and cells[0]["file to boxes, images/s"] == "41.67"
    assert [one["arriving/s"] for one in servers] == ["10", "20"]
    last = servers[-1]
    assert (last["in time, images/s"], last["% of possible"], last["rejected, %"], last["mean batch"]) == (
        *("41.67", "91", "17", "66.7"),
    )
    assert text.index("<details>") < text.index('<table id="cells">') < text.index("</details>")
    assert text.count("failed: it crashed") == 1 and text.count("skipped: it cannot; Try x") == 1


def test_files_without_times_from_file_to_boxes(tmp_path: Path) -> None:
    results = many()
    bare = tuple(altered(cell, runs=tuple(replace(run, stages=None) for run in cell.runs)) for cell in results.cells)
    old = replace(results, cells=bare[:6])
    write_report(old, tmp_path / "report.html")
    best = table((tmp_path / "report.html").read_text(), "best")
    assert [one["file to boxes, images/s"] for one in best] == ["not measured"] * 3
    assert [one["network, images/s"] for one in best] == ["166.7", "83.33", "50.00"]
    assert short_answer(old)[0] == "Nothing was measured from file to boxes: the figures are of the network alone."
    assert next(plot.title for plot in plots(old)) == "Throughput of the network alone"


def test_no_two_series_have_one_colour_however_many_there_are() -> None:
    cells = [
        altered(cell, bundle=replace(OK.cell.bundle, directory=f"bundle {number}"))
        for number in range(12)
        for cell in many().cells[:6]
    ]
    throughput, *_ = plots(replace(many(), cells=tuple(cells)))
    assert len({trace["line"]["color"] for trace in throughput.data}) == len(throughput.data) == 36


def test_a_series_that_flattens_the_others_makes_the_axis_logarithmic() -> None:
    slow = altered(many().cells[1], engine="paddle-plain")
    stages = Stages(**dict.fromkeys(STAGES, (900.0,) * 4) | {"end_to_end_ms": (5400.0,) * 4})
    slow = replace(slow, runs=tuple(replace(run, stages=stages) for run in slow.runs))
    figures = {plot.title: plot for plot in plots(replace(many(), cells=(*many().cells[:6], slow)))}
    assert figures["Latency from file to boxes"].layout["yaxis"]["type"] == "log"
    assert "type" not in figures["Throughput from file to boxes"].layout["yaxis"]
    where = figures["Where the time goes"]
    assert where.layout["xaxis"]["range"][1] < 100 and "paddle-plain fp32, batch 4, to 1350 ms" in where.about


def test_nothing_is_fetched(text: str) -> None:
    page = Page(text)
    for tag, attributes in page.tags:
        assert tag not in {"link", "iframe", "object", "embed", "img"}
        assert not {"src", "href", "srcset", "data"} & attributes.keys()
    style = text[text.index("<style>") : text.index("</style>")]
    assert "@import" not in style and "url(" not in style
    assert len(text.encode()) < 6_000_000


def test_names_are_escaped(tmp_path: Path) -> None:
    evil = altered(OK, bundle=replace(OK.cell.bundle, directory=EVIL))
    results = replace(sample_results(), cells=(evil, altered(OK, precision="fp32"), altered(FAILED, reason=EVIL)))
    write_report(results, tmp_path / "report.html")
    page = Page((tmp_path / "report.html").read_text())
    assert not [tag for tag, attributes in page.tags if tag == "img" or "onerror" in attributes]
    assert EVIL in page.cells


def test_the_figures_hold_the_samples(text: str) -> None:
    figures = json.loads(Page(text).scripts["script figures"])
    by_title = {plot.title: figure for plot, figure in zip(plots(many()), figures, strict=True)}
    assert len(by_title) == 11
    boxes = by_title["How latencies are spread"]["data"]
    # From below, so that the first cell is on top.
    assert boxes[-1]["name"] == "paddle fp32, batch 1" and sorted(boxes[-1]["x"])[0] == 20.0
    assert len(boxes[-1]["x"]) == 50
    throughput = {trace["name"]: trace for trace in by_title["Throughput of the network alone"]["data"]}
    assert throughput["onnxruntime int8"]["x"] == [1, 4]
    assert throughput["onnxruntime int8"]["y"] == pytest.approx([1 * 50 / 0.3, 4 * 50 / 1.2])
    assert len({trace["line"]["color"] for trace in figures[0]["data"]}) == 3
    whole = {trace["name"]: trace for trace in by_title["Throughput from file to boxes"]["data"]}
    assert whole["onnxruntime int8"]["y"] == pytest.approx([1e3 / 7.2] * 2)
    in_time = by_title["Server: answers in time"]
    server = by_title["Server: latency of what was not rejected"]
    assert (
        in_time["data"][0]["y"] == [10.0, 20.0] and in_time["data"][1]["name"] == "onnxruntime int8, adaptive, batch 4"
    )
    assert in_time["data"][1]["y"] == pytest.approx([50 / 1.2] * 2)
    assert server["layout"]["shapes"][0]["y0"] == 100.0 and server["data"][0]["x"] == [10.0, 20.0]


def test_the_short_answer() -> None:
    results = many()
    fastest, engines, shortest, accurate = short_answer(replace(results, cells=results.cells[:6]))
    assert fastest == (
        "Highest throughput from file to boxes: ONNX Runtime INT8, batch 1, bundle "
        "tiny_dir: 138.9 images/s, 7.20 ms per batch, mAP 0.5000; the network alone 166.7 images/s."
    )
    assert engines == "Each engine at its best: ONNX Runtime INT8 138.9 images/s; Paddle Inference FP32 41.67 images/s."
    assert shortest.startswith("Lowest latency of one image from file to boxes: ONNX Runtime INT8, batch 1")
    assert "of the best FP32 (0.5000): the same" in accurate
    assert OK.accuracy is not None
    worse = tuple(
        altered(cell, accuracy=replace(OK.accuracy, ap=0.49)) if cell.cell.precision == "int8" else cell
        for cell in results.cells[:6]
    )
    assert ": ONNX Runtime FP32, batch" in short_answer(replace(results, cells=worse))[3]
    unknown = tuple(altered(cell, accuracy=None) for cell in results.cells[:6])
    assert "not known" in short_answer(replace(results, cells=unknown))[3]
    assert (
        "Most answers within 100 ms of the arrival, without decoding: ONNX Runtime INT8, batch 4, server at 10 "
        "images/s, adaptive, bundle tiny_dir: 41.7 images/s, 91% of what is possible." in short_answer(results)
    )
    quick = replace(results, settings=replace(results.settings, rounds=1))
    assert short_answer(quick)[0].startswith("A first look: each cell was measured too briefly")
    assert short_answer(replace(results, cells=(FAILED,))) == ["Nothing could be measured; the reasons are below."]


def test_the_short_answer_names_the_input_size_and_streams() -> None:
    faster = altered(OK, input_size=(256, 384), batch_size=1, streams=2, scenario="offline")
    (answer, *_) = (line for line in short_answer(replace(sample_results(), cells=(faster,))) if "Highest" in line)
    assert f"ONNX Runtime {faster.cell.precision.upper()} at 256x384 in 2 streams, batch 1, offline" in answer


def test_what_pads_says_that_it_changes_boxes() -> None:
    stages = Stages(**dict.fromkeys(STAGES, (1.0,) * 4) | {"end_to_end_ms": (4.0,) * 4})
    one, padded = many().cells[4:6]
    padded = replace(padded, runs=tuple(replace(run, mixed_batches=1, stages=stages) for run in padded.runs))
    answer = short_answer(replace(many(), cells=(one, padded)))
    assert "batch 4" in answer[0] and answer[1].startswith("Its batches hold images of several sizes, padded to the")
    assert "changes boxes and scores" in answer[1]
    assert answer[2].startswith("The fastest without padding: ONNX Runtime INT8, batch 1")


def test_pareto_front() -> None:
    points = [(1.0, 9.0), (2.0, 8.0), (2.0, 5.0), (3.0, 3.0), (2.5, 2.0), (1.0, 1.0)]
    assert pareto_front(points) == [(1.0, 9.0), (2.0, 8.0), (3.0, 3.0)]


def at_sizes() -> BenchResults:
    """The cells of `many` at their own size and at 32x48, twice as fast there; INT8 at 48x64 too, slower than both."""
    assert OK.accuracy is not None
    cells = []
    for cell in many().cells[:6]:
        drop = 0.004 if cell.cell.precision == "int8" else 0.0
        cells.append(altered(cell, accuracy=replace(OK.accuracy, ap=0.5 - drop)))
        for size, factor, lost in (((32, 48), 0.5, 0.2), ((48, 64), 1.5, 0.1)):
            if size == (32, 48) or drop:
                file_ms = tuple(factor * ms for ms in cell.file_ms)
                stages = Stages(**dict.fromkeys(STAGES, file_ms))
                runs = tuple(replace(run, stages=stages) for run in cell.runs)
                accuracy = replace(OK.accuracy, ap=0.5 - drop - lost)
                cells.append(altered(cell, input_size=size, runs=runs, accuracy=accuracy))
    return replace(many(), cells=tuple(cells))


def test_accuracy_against_speed_by_input_size(tmp_path: Path) -> None:
    figure = {plot.title: plot for plot in plots(at_sizes())}["Accuracy against speed"]
    *lines, front = figure.data
    assert {line["name"]: line["text"] for line in lines} == {
        "onnxruntime int8": ["32x48", "own size", "48x64"],
        "onnxruntime fp32": ["32x48", "own size"],
        "paddle fp32": ["32x48", "own size"],
    }
    assert len({line["marker"]["symbol"] for line in lines}) == 2, "the precision, for who sees no colours"
    # INT8 leads at 32x48 and at its own size, FP32 in ONNX Runtime is the most accurate, and faster than in Paddle.
    assert front["y"] == pytest.approx([0.5, 0.496, 0.296])
    assert "onnxruntime int8 at 32x48 (277.8 images/s, mAP 0.2960)" in figure.about
    write_report(at_sizes(), tmp_path / "report.html")
    marked = [one for one in table((tmp_path / "report.html").read_text(), "cells") if one["front"]]
    assert {(one["precision"], one["input size"]) for one in marked} == {
        ("fp32", "own"),
        ("int8", "own"),
        ("int8", "32x48"),
    }
    fastest, *_, safe, listed = short_answer(at_sizes())
    assert "ONNX Runtime INT8, batch 1" in fastest, "at its own size"
    assert safe.startswith("Fastest within 0.005 mAP of that at any input size: ONNX Runtime INT8, batch 1")
    assert listed.endswith("ONNX Runtime INT8 at 32x48, batch 1 (mAP 0.2960, 277.8 images/s).")


def run(*arguments: object) -> int:
    with pytest.raises(SystemExit) as stopped:
        main(["report", *map(str, arguments)])
    assert isinstance(stopped.value.code, int)
    return stopped.value.code


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = tmp_path / "results.json"
    many().write(source)
    assert run(source) == 0
    assert re.search(r"<h1>gfldeploy benchmark</h1>", (tmp_path / "results.html").read_text())
    (tmp_path / "results.html").write_text((tmp_path / "results.html").read_text().replace("gfldeploy benchmark", "x"))
    assert run(source) == 0, "the page beside the results, which bench writes with them, is made again"
    assert "gfldeploy benchmark" in (tmp_path / "results.html").read_text()
    assert run(source, "-o", tmp_path / "results.html") == 2
    assert "results.html exists already" in capsys.readouterr().err
    (tmp_path / "results.html").write_text("a page of mine")
    assert run(source) == 2 and run(source, "--force") == 2
    assert "is not a file that gfldeploy wrote" in capsys.readouterr().err
    assert run(tmp_path / "none.json", "-o", tmp_path / "x.html") == 2
    assert not (tmp_path / "x.html").exists()
    capsys.readouterr()
    assert run(".") == 2 and ". cannot be read" in capsys.readouterr().err
