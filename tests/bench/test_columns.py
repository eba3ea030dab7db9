"""A column is one entry of a list, wherever it is shown."""

from __future__ import annotations

import csv
from dataclasses import replace
from pathlib import Path

import pytest
from sample_results import OK, RUN, altered, sample_results

from gfldeploy.bench.columns import Column, text_of
from gfldeploy.bench.estimates import Estimate
from gfldeploy.bench.report.page import write_report
from gfldeploy.bench.results import Idle, Monitored, Run
from gfldeploy.bench.table import COLUMNS, Row, write_csv
from gfldeploy.bench.timing import Samples
from gfldeploy.cli.results import show_results


def test_a_column_is_one_entry(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)
    toy: Column[Row] = Column(
        "load_s", "load", lambda row: row.result.runs[0].load_s if row.ok else None, "s", digits=3
    )
    COLUMNS.append(toy)
    try:
        results = sample_results()
        show_results(results)
        write_csv(results, tmp_path / "results.csv")
        write_report(results, tmp_path / "results.html")
    finally:
        COLUMNS.remove(toy)
    terminal, page = capsys.readouterr().out, (tmp_path / "results.html").read_text()
    assert "load," in terminal and "0.500" in terminal
    assert "load, s" in page and ">0.500</td>" in page
    with (tmp_path / "results.csv").open(newline="") as file:
        assert [line["load_s"] for line in csv.DictReader(file)] == ["0.5", "", ""]


def test_keys_are_unique_and_hold_the_unit() -> None:
    keys = [column.key for column in COLUMNS]
    assert len(set(keys)) == len(keys)
    assert all(column.key.endswith("_ms") for column in COLUMNS if column.interval)


def test_what_is_the_same_in_every_row_is_left_out() -> None:
    (threads,) = (column for column in COLUMNS if column.key == "threads")
    one, two = (Row(altered(OK, threads=count), sample_results()) for count in (1, 2))
    assert threads.shown([one, two]) and not threads.shown([one, one])
    assert not replace(threads, value=lambda row: None, constant=False).shown([one])


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, ""),
        ("word", "word"),
        (3, "3"),
        (0.1234, "0.123"),
        (12.345, "12.35"),
        (1234.5, "1234.5"),
        (Estimate(12.0, None, None, 3), "12.00"),
        (Estimate(12.0, 11.0, 13.0, 30), "12.00 ±1.00"),
        (Estimate(12.0, 11.0, 14.0, 30), "12.00 (11.00-14.00)"),
    ],
)
def test_as_many_digits_as_the_size_deserves(value: str | float | Estimate | None, text: str) -> None:
    assert text_of(value) == text


def watched(**changed: object) -> Run:
    """Three seconds of the network after one of warm-up, then two of whole batches, on a GPU that has 500 W then."""
    seconds = tuple(float(second) for second in range(1, 7))
    monitored = Monitored(
        t_s=seconds,
        gpu_percent=(10.0, 90.0, 96.0, 98.0, 30.0, 20.0),
        gpu_memory_mb=(2500.0, 3000.0, 3000.0, 3000.0, 3100.0, 3000.0),
        gpu_power_w=(100.0, 490.0, 500.0, 510.0, 200.0, 150.0),
        gpu_clock_mhz=(1980.0, 1500.0, 1400.0, 1400.0, 1980.0, 1980.0),
    )
    samples = Samples(
        (500.0,) * 6, (600.0, 400.0), batch_size=100, images=600, wall_s=3.0, stable=True, energy_j=1440.0
    )
    one = replace(RUN, samples=samples, monitored=monitored, idle=Idle(0.0, 0.0, 0.0, gpu_memory_mb=700.0))
    return replace(one, **changed)  # type: ignore[arg-type]


def test_a_gpu_is_judged_while_the_network_runs_alone() -> None:
    row = Row(replace(OK, runs=(watched(),)), sample_results())
    # Means of the second before, so that the first of them is of the warm-up.
    assert row.gpu_percent == pytest.approx(284 / 3) and row.gpu_clock_mhz == pytest.approx(4300 / 3)
    assert row.gpu_memory_mb == 2400.0
    assert row.gpu_power_w == 480.0 and row.joules_per_image == pytest.approx(480 / 200)
    samples = replace(watched().samples, energy_j=None)
    sampled = Row(replace(OK, runs=(watched(samples=samples),)), sample_results())
    assert sampled.gpu_power_w == 500.0
    brief = Row(replace(OK, runs=(watched(samples=replace(samples, wall_s=0.5, energy_j=900.0)),)), sample_results())
    assert brief.gpu_power_w is brief.joules_per_image is brief.gpu_percent is None
    assert Row(OK, sample_results()).gpu_memory_mb is None
