"""Tables in terminals of every width: nothing is cut, and what matters stays."""

from __future__ import annotations

import os
import pty
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from operator import itemgetter
from pathlib import Path

import pytest
from sample_deploy import DEPLOY
from sample_results import FAILED, OK, RUN, SKIPPED, altered, sample_results

from gfldeploy.analysis.causes import analyze_passes
from gfldeploy.analysis.record import Analysis
from gfldeploy.analysis.sweep import Pass
from gfldeploy.batching.buckets import Order
from gfldeploy.batching.latency import Point
from gfldeploy.bench.cell import BundleIdentity
from gfldeploy.bench.columns import Column
from gfldeploy.bench.results import BenchResults, Serving
from gfldeploy.bench.timing import Samples, Stages
from gfldeploy.cli import analyze, main, tune
from gfldeploy.cli.results import show_results
from gfldeploy.cli.tables import show_table
from gfldeploy.machine import describe_machine

Shown = Callable[[Callable[[], object], int | None], str]


@pytest.fixture
def shown(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Shown:
    """What is printed in a terminal of so many columns; None for none."""

    def run(show: Callable[[], object], columns: int | None = 80) -> str:
        if columns is None:
            monkeypatch.delenv("COLUMNS", raising=False)
        else:
            monkeypatch.setenv("COLUMNS", str(columns))
        show()
        return capsys.readouterr().out

    return run


def command(*arguments: object) -> Callable[[], None]:
    def run() -> None:
        with pytest.raises(SystemExit) as stopped:
            main([*map(str, arguments)])
        assert stopped.value.code == 0

    return run


def table(text: str) -> list[str]:
    """The lines from the headings to the first that is blank."""
    lines = text.splitlines()
    (rule,) = [number for number, line in enumerate(lines) if set(line.strip()) == {"─"}][:1]
    first = rule
    while first and lines[first - 1].strip():
        first -= 1
    last = next((number for number in range(rule, len(lines)) if not lines[number].strip()), len(lines))
    return lines[first:last]


def many(*bundles: str) -> BenchResults:
    """Long engine names in two precisions and batch sizes, for each of the bundles, one that failed, one skipped."""
    times = tuple(1234.5 + k for k in range(400))
    run = replace(
        RUN,
        samples=Samples(times, (), 1, 400, 500.0, True),
        stages=Stages(*([times] * 7)),
        convolutions={"int8": 111},
        not_low_precision=(),
    )
    cells = [
        altered(
            OK,
            bundle=replace(OK.cell.bundle, directory=bundle),
            engine=engine,
            precision=precision,
            batch_size=size,
            runs=(run,) * 3,
        )
        for bundle in bundles
        for engine in ("onnxruntime-tensorrt", "openvino")
        for precision in ("fp32", "int8")
        for size in (1, 16)
    ]
    return replace(sample_results(), cells=(*cells, FAILED, SKIPPED))


def test_results_keep_engine_batch_speed_and_map(shown: Shown) -> None:
    narrow = shown(lambda: show_results(many("one")), 80)
    lines = table(narrow)
    assert max(map(len, lines)) <= 80 and len(lines) == 5 + 8
    for line in lines[5:]:
        # 1 image in 1434 ms, 16 in the same.
        assert re.match(r"(onnxruntime-tensorrt|openvino) +(fp32|int8) +(1 +0\.697|16 +11\.16) ", line)
        assert "0.5000" in line
    assert "network, ms" in narrow.split("Too narrow for: ")[1]
    wide = shown(lambda: show_results(many("one")), None)
    assert "Too narrow" not in wide and "111 of 111" in wide and "1434.0 ±" in wide, "without a terminal, all of it"


def test_results_of_several_bundles_name_them(shown: Shown) -> None:
    lines = table(shown(lambda: show_results(many("first_bundle", "second_bundle")), 80))
    assert max(map(len, lines)) <= 80
    assert sum("second_bundle" in line and "0.5000" in line for line in lines) == 8


def test_servers_keep_what_they_answer_in_time(shown: Shown) -> None:
    serving = Serving(50, 10, (Point(1, (64, 96), 5.0),), 40)
    run = replace(RUN, serving=serving, samples=Samples((5.0,) * 40, (), 2, 40, 4.0, True))
    cells = tuple(
        altered(OK, scenario="server", rate=rate, policy="fixed-timeout", runs=(run,)) for rate in (12.0, 100.0)
    )
    results = replace(sample_results(), cells=cells, settings=replace(sample_results().settings, latency_bound_ms=50.0))
    lines = table(shown(lambda: show_results(results), 80))
    assert max(map(len, lines)) <= 80
    assert all(re.search(r"fixed-timeout +2 +10\.00 +0\.5000", line) for line in lines[-2:])


@pytest.mark.slow
def test_compare_keeps_times_ratio_and_map(shown: Shown, tmp_path: Path) -> None:
    results = many("a_bundle_with_a_long_name", "another_bundle_with_a_long_name")
    for name in ("a.json", "b.json"):
        results.write(tmp_path / name)
        results = replace(results, created="2026-01-02T00:00:00+00:00")
    text = shown(command("compare", tmp_path / "a.json", tmp_path / "b.json"), 80)
    lines = table(text)
    assert max(map(len, lines)) <= 80
    assert (
        sum(bool(re.search(r" 1434\.0 +1434\.0 +1\.000 +no difference +1\.000 +\+0\.000$", line)) for line in lines)
        == 16
    )
    assert "1.000 (0." in shown(command("compare", tmp_path / "a.json", tmp_path / "b.json"), None)


def test_audit_keeps_batch_order_padding_and_macs(shown: Shown, tiny_bundle: Path, tiny_coco: Path) -> None:
    run = command("audit", "--data", tiny_coco, "--config-or-bundle", tiny_bundle, "--batch-sizes", "1,4")
    lines = table(shown(run, 80))
    assert max(map(len, lines)) <= 80
    heads = " ".join(lines[:2])
    assert all(head in heads for head in ("batch", "order", "pixels", "GMAC", "mixed", "activations"))
    assert sum(line.split()[:2] == ["4", "bucketed"] for line in lines) == 1
    assert "mean" in shown(run, None)


def test_analyze_keeps_its_numbers_whole(shown: Shown) -> None:
    def one(size: int, order: Order, ms: float) -> Pass:
        share = None if (size, order) == (8, "listed") else 0.8
        return Pass(size, order, 1000.0, 0, 0, ms, 0, ms + 1000, 0.0, 1.5, share)

    passes = [[one(1, "listed", 1e4 + k), one(8, "listed", 2e4 + k), one(8, "bucketed", 1.5e4 + k)] for k in range(3)]
    found = Analysis(
        created="2026-01-01T00:00:00+00:00",
        machine=describe_machine(),
        bundle=BundleIdentity("tiny", "tiny", "ab" * 32),
        engine="onnxruntime",
        precision="fp32",
        threads=2,
        tf32=False,
        input_size=None,
        images=8,
        peak=None,
        rounds=tuple(map(tuple, passes)),
        batches=tuple(analyze_passes(passes)),
        invariance=(),
    )
    lines = table(shown(lambda: analyze._show(found), 80))
    assert max(map(len, lines)) <= 80
    assert re.search(r"^ *8 +21001\.0 +16001\.0 ", lines[-1])


def test_tune_keeps_engine_batch_speed_and_map(shown: Shown) -> None:
    lines = table(shown(lambda: tune._show(DEPLOY), 80))
    assert max(map(len, lines)) <= 80
    assert re.match(r"choice +onnxruntime +int8 +2 .* 80\.00 .* 0\.7010", lines[-2])
    assert re.match(r"second +onnxruntime +fp32 +1 .* 80\.00 ", lines[-1])
    assert "network," in shown(lambda: tune._show(DEPLOY), None)


def test_doctor_and_inspect(shown: Shown, tiny_bundle: Path) -> None:
    doctor = shown(command("doctor", "--all"), 80)
    assert max(map(len, table(doctor))) <= 80
    assert re.search(r"^onnxruntime +cpu +fp32 +(yes|no) ", doctor, re.MULTILINE)
    assert max(map(len, shown(command("inspect", tiny_bundle), 80).splitlines())) <= 80


@pytest.mark.parametrize("columns", [1, 10, 30, 60, 200])
def test_no_number_is_cut_at_any_width(columns: int, shown: Shown) -> None:
    heads: list[Column[tuple[str, ...]]] = [
        Column("what", "what", itemgetter(0), words=True),
        Column("first", "first number", itemgetter(1)),
        Column("second", "second", itemgetter(2), drop=1),
    ]
    lines = [(f"line {k}", "1234567.89", f"{k}2345.6") for k in range(3)]
    text = shown(lambda: show_table(heads, lines, "A [title]", "Look elsewhere."), columns)
    assert text.count("1234567.89") == 3 and "A [title]" in text
    assert ("Too narrow for: second. Look elsewhere." in text) == ("02345.6" not in text)
    assert ("02345.6" in text) == (columns >= 30)


def test_of_what_fits_the_most_important_stays(shown: Shown) -> None:
    heads: list[Column[tuple[str, ...]]] = [
        Column(name, name, itemgetter(place), drop=place) for place, name in enumerate(("a", "wide", "b", "c"))
    ]
    text = shown(lambda: show_table(heads, [("1", "x" * 30, "22", "3")]), 20)
    assert "Too narrow for: wide." in text and text.splitlines()[0].split() == ["a", "b", "c"]
    assert shown(lambda: show_table(heads, [("1", "", "22", "3")]), 20).splitlines()[0].split() == ["a", "b", "c"]


def test_a_real_terminal(tmp_path: Path) -> None:
    many("one").write(tmp_path / "a.json")
    replace(many("one"), created="2026-01-02T00:00:00+00:00").write(tmp_path / "b.json")
    main_end, terminal = pty.openpty()
    os.set_blocking(main_end, False)
    environment = {key: value for key, value in os.environ.items() if key not in ("COLUMNS", "LINES")}
    script = (
        "import fcntl, struct, sys, termios; fcntl.ioctl(1, termios.TIOCSWINSZ, struct.pack('HHHH', 24, 80, 0, 0)); "
        "from gfldeploy.cli import main; main(sys.argv[1:])"
    )
    subprocess.run(
        [sys.executable, "-c", script, "compare", str(tmp_path / "a.json"), str(tmp_path / "b.json")],
        stdout=terminal, check=True, env={**environment, "TERM": "xterm"}, timeout=120,
    )  # fmt: skip
    text = re.sub(r"\x1b\[[0-9;]*m", "", os.read(main_end, 65536).decode().replace("\r", ""))
    lines = table(text)
    assert max(map(len, lines)) <= 80
    assert sum(bool(re.search(r" 1\.000 +no difference +1\.000 +\+0\.000$", line)) for line in lines) == 8
