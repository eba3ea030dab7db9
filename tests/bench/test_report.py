"""The HTML page: complete, escaped, and without the network."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
from sample_results import FAILED, OK, RUN, SKIPPED, sample_results

from gfldeploy.batching.latency import Point
from gfldeploy.bench.report.page import short_answer, write_report
from gfldeploy.bench.report.plots import pareto_front, plots
from gfldeploy.bench.results import BenchResults, Serving, Stages
from gfldeploy.bench.timing import Samples
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
            stages = Stages(*([(ms * size / 5,) * 4] * 6), end_to_end_ms=(ms * size * 1.2,) * 4)
            cells.append(
                replace(
                    OK,
                    engine=engine,
                    precision=precision,
                    batch_size=size,
                    scenario="single-stream" if size == 1 else "multi-stream",
                    runs=(replace(RUN, samples=samples, stages=stages),),
                )
            )
    serving = Serving(60, 10, (Point(1, (64, 96), 5.0),), 55)
    runs = tuple(replace(run, serving=serving) for run in cells[-1].runs)
    served = [replace(cells[-1], scenario="server", rate=rate, policy="adaptive", runs=runs) for rate in (10.0, 20.0)]
    settings = replace(sample_results().settings, latency_bound_ms=100.0)
    return replace(sample_results(), settings=settings, cells=(*cells, *served, FAILED, SKIPPED))


@pytest.fixture
def text(tmp_path: Path) -> str:
    write_report(many(), tmp_path / "report.html")
    return (tmp_path / "report.html").read_text()


def test_every_measured_cell_is_in_the_table_and_every_other_has_its_reason(text: str) -> None:
    page = Page(text)
    assert len(page.cells) == 22 * 8
    first, last = page.cells[:22], page.cells[-22:]
    assert last[4] == "server 20/s, adaptive" and last[16:21] == ["41.7", "91", "17", "66.7", "1.25"]
    assert first[:6] == ["tiny_dir", "paddle", "fp32", "cpu", "single-stream", "1"]
    assert first[6].startswith("20.30 (") and first[9] == "50.0" and first[11] == "0.5000"
    assert "failed: it crashed" in text and "skipped: it cannot; Try x" in text


def test_nothing_is_fetched(text: str) -> None:
    page = Page(text)
    for tag, attributes in page.tags:
        assert tag not in {"link", "iframe", "object", "embed", "img"}
        assert not {"src", "href", "srcset", "data"} & attributes.keys()
    style = text[text.index("<style>") : text.index("</style>")]
    assert "@import" not in style and "url(" not in style
    assert len(text.encode()) < 6_000_000


def test_names_are_escaped(tmp_path: Path) -> None:
    assert OK.bundle is not None
    evil = replace(OK, bundle=replace(OK.bundle, directory=EVIL))
    results = replace(sample_results(), cells=(evil, replace(OK, precision="fp32"), replace(FAILED, reason=EVIL)))
    write_report(results, tmp_path / "report.html")
    page = Page((tmp_path / "report.html").read_text())
    assert not [tag for tag, attributes in page.tags if tag == "img" or "onerror" in attributes]
    assert EVIL in page.cells


def test_the_figures_hold_the_samples(text: str) -> None:
    figures = json.loads(Page(text).scripts["script figures"])
    assert len(figures) == len(plots(many())) == 9
    boxes = figures[2]["data"]
    # From below, so that the first cell is on top.
    assert boxes[-1]["name"] == "paddle fp32, batch 1" and sorted(boxes[-1]["x"])[0] == 20.0
    assert len(boxes[-1]["x"]) == 50
    throughput = {trace["name"]: trace for trace in figures[0]["data"]}
    assert throughput["onnxruntime int8"]["x"] == [1, 4]
    assert throughput["onnxruntime int8"]["y"] == pytest.approx([1 * 50 / 0.3, 4 * 50 / 1.2])
    assert len({trace["line"]["color"] for trace in figures[0]["data"]}) == 3
    in_time, server = figures[5:7]
    assert (
        in_time["data"][0]["y"] == [10.0, 20.0] and in_time["data"][1]["name"] == "onnxruntime int8, adaptive, batch 4"
    )
    assert in_time["data"][1]["y"] == pytest.approx([50 / 1.2] * 2)
    assert server["layout"]["shapes"][0]["y0"] == 100.0 and server["data"][0]["x"] == [10.0, 20.0]


def test_the_short_answer() -> None:
    results = many()
    fastest, shortest, accurate = short_answer(replace(results, cells=results.cells[:6]))
    assert fastest.startswith("Most images a second: onnxruntime int8, batch 1, bundle tiny_dir with 166.7 images/s")
    assert shortest.startswith("Shortest latency of one image: onnxruntime int8, batch 1")
    assert "of the best FP32 (0.5000): the same" in accurate
    assert OK.accuracy is not None
    worse = tuple(
        replace(cell, accuracy=replace(OK.accuracy, ap=0.49)) if cell.precision == "int8" else cell
        for cell in results.cells[:6]
    )
    assert ": onnxruntime fp32, batch" in short_answer(replace(results, cells=worse))[2]
    unknown = tuple(replace(cell, accuracy=None) for cell in results.cells[:6])
    assert "not known" in short_answer(replace(results, cells=unknown))[2]
    assert any(
        sentence.startswith("Most answers within 100 ms: onnxruntime int8, batch 4, server at 10/s, adaptive, bundle")
        and sentence.endswith("with 41.7 images/s, 91% of what is possible.")
        for sentence in short_answer(results)
    )
    quick = replace(results, settings=replace(results.settings, quick=True))
    assert "quick (measured too briefly" in short_answer(quick)[-1]
    assert short_answer(replace(results, cells=(FAILED,))) == ["Nothing could be measured; the reasons are below."]


def test_pareto_front() -> None:
    points = [(1.0, 9.0), (2.0, 8.0), (2.0, 5.0), (3.0, 3.0), (2.5, 2.0), (1.0, 1.0)]
    assert pareto_front(points) == [(1.0, 9.0), (2.0, 8.0), (3.0, 3.0)]


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
    assert run(source) == 2
    assert "results.html exists already" in capsys.readouterr().err
    assert run(source, "--force") == 0
    assert run(tmp_path / "none.json", "-o", tmp_path / "x.html") == 2
    assert not (tmp_path / "x.html").exists()
