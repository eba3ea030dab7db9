"""The CSV file: every cell, and what servers answered in time."""

from __future__ import annotations

import csv
import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from sample_results import OK, RUN, altered, sample_results

from gfldeploy.batching.latency import Point
from gfldeploy.bench.cell import BundleIdentity
from gfldeploy.bench.results import Serving
from gfldeploy.bench.table import write_csv
from gfldeploy.bench.timing import Samples
from gfldeploy.bundle import Bundle
from gfldeploy.cli.results import show_results


def lines(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_a_line_for_each_cell(tiny_bundle: Path, tmp_path: Path) -> None:
    write_csv(sample_results(), tmp_path / "results.csv")
    ok, failed, skipped = lines(tmp_path / "results.csv")
    assert (ok["network_median_ms"], ok["padding"], ok["low_precision_convolutions"]) == ("13.0", "1.25", "52 of 53")
    assert (ok["file_to_boxes_median_ms"], ok["file_to_boxes_median_low_ms"]) == ("18.0", "")
    assert float(ok["file_to_boxes_images_per_s"]) == pytest.approx(8 / 0.072) and ok["status"] == "ok"
    assert ok["policy"] == ok["in_time_per_s"] == ok["rejected_percent"] == ok["bound_held"] == ""
    assert ok["answer_median_ms"] == "", "that is of servers"
    bundle = Bundle.open(shutil.copytree(tiny_bundle, tmp_path / os.fsdecode(b"caf\xe9")))
    write_csv(replace(sample_results(), cells=(altered(OK, bundle=BundleIdentity.of(bundle)),)), tmp_path / "x.csv")
    assert lines(tmp_path / "x.csv")[0]["bundle"] == r"caf\udce9", "bytes that are no text of a file"
    assert failed["note"] == "failed: it crashed" and (skipped["batch_size"], skipped["padding"]) == ("2", "")


def test_a_server(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    serving = Serving(50, 10, (Point(1, (64, 96), 5.0),), 40)
    run = replace(RUN, serving=serving, samples=Samples((5.0,) * 30 + (99.0,) * 10, (), 2, 40, 4.0, True))
    cell = altered(OK, scenario="server", rate=12.0, policy="adaptive", runs=(replace(run, shapes={"2x3x64x96": 20}),))
    settings = replace(sample_results().settings, latency_bound_ms=50.0)
    results = replace(sample_results(), cells=(cell,), settings=settings)
    write_csv(results, tmp_path / "results.csv")
    (line,) = lines(tmp_path / "results.csv")
    assert (line["policy"], line["in_time_per_s"], line["rejected_percent"], line["mean_batch"]) == (
        *("adaptive", "7.5", "20.0", "2.0"),
    )
    assert (line["percent_of_possible"], line["bound_held"]) == ("75.0", "no (p90)")
    assert (line["answer_median_ms"], line["network_median_ms"]) == ("5.0", "")
    monkeypatch.delenv("COLUMNS", raising=False)
    show_results(results)
    shown = capsys.readouterr().out
    assert "adaptive" in shown and "7.50" in shown and " 75 " in shown and " 20 " in shown and "no (p90)" in shown
