"""A column is one entry of a list, wherever it is shown."""

from __future__ import annotations

import csv
from dataclasses import replace
from pathlib import Path

import pytest
from sample_results import OK, altered, sample_results

from gfldeploy.bench.columns import Column, text_of
from gfldeploy.bench.estimates import Estimate
from gfldeploy.bench.report.page import write_report
from gfldeploy.bench.table import COLUMNS, Row, write_csv
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
