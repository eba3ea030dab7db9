"""Two results files side by side."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from sample_results import OK, RUN, altered, sample_results

from gfldeploy.batching.latency import Point
from gfldeploy.bench.compare import compare
from gfldeploy.bench.results import BenchResults, CellResult, Serving
from gfldeploy.bench.table import rows
from gfldeploy.bench.timing import Samples
from gfldeploy.cli import main
from gfldeploy.errors import DataError

STEADY = [10.0, 10.2, 9.9, 10.1, 10.0, 9.8, 10.1, 10.0, 9.9, 10.2]


def timed(latencies: Sequence[float], factor: float = 1, **more: Any) -> CellResult:
    """Two rounds of these latencies, times `factor`."""
    samples = Samples(tuple(value * factor for value in latencies), (), 2, 2 * len(latencies), 1.0, True)
    return altered(OK, runs=(replace(RUN, samples=samples),) * 2, **more)


def results(*cells: CellResult) -> BenchResults:
    return replace(sample_results(), cells=cells)


@pytest.mark.parametrize(
    ("factor", "verdict"),
    [(0.8, "faster"), (1.25, "slower"), (1.0, "no difference found"), (1.001, "no difference found")],
)
def test_verdicts(factor: float, verdict: str) -> None:
    (found,) = compare(results(timed(STEADY)), results(timed(STEADY, factor))).pairs
    assert found.ratio.value == pytest.approx(factor)
    assert found.ratio.low is not None and found.ratio.high is not None
    assert found.ratio.low <= factor <= found.ratio.high
    assert (found.verdict, found.ap_difference, found.bundle_changed) == (verdict, 0, False)
    assert (found.a_flags, found.b_flags) == ((), ())


def test_a_cell_is_compared_with_that_of_its_input_size() -> None:
    own, small = timed(STEADY), timed(STEADY, 0.5, input_size=(256, 384))
    found = compare(results(own, small), results(timed(STEADY, 0.5, input_size=(256, 384)), own))
    assert [(pair.cell.input_size, pair.ratio.value) for pair in found.pairs] == [(None, 1), ((256, 384), 1)]
    with pytest.raises(DataError, match=r"no cell is measured in both files.*input sizes"):
        compare(results(own), results(small))


def test_few_samples_allow_no_verdict() -> None:
    (found,) = compare(results(OK), results(OK)).pairs
    assert found.verdict == "too few samples"


def test_map_that_is_undefined_is_not_compared() -> None:
    assert OK.accuracy is not None
    undefined = altered(OK, accuracy=replace(OK.accuracy, ap=-1.0))
    assert [one.ap for one in rows(results(undefined))] == [None]
    (found,) = compare(results(OK), results(undefined)).pairs
    assert found.ap_difference is None


def test_cells_are_matched_by_what_they_are() -> None:
    base = timed(STEADY)
    others = [
        timed(STEADY, engine="paddle"),
        timed(STEADY, precision="fp32"),
        timed(STEADY, batch_size=4),
        timed(STEADY, scenario="offline"),
        timed(STEADY, threads=2),
    ]
    rebuilt = altered(base, bundle=replace(OK.cell.bundle, directory="elsewhere", digest="cd" * 32), accuracy=None)
    found = compare(results(base, *others[:2]), results(*others[2:], rebuilt))
    (same,) = found.pairs
    assert same.bundle_changed and same.ap_difference is None
    assert [(one.cell.engine, one.cell.precision) for one in found.only_a] == [
        ("paddle", "int8"),
        ("onnxruntime", "fp32"),
    ]
    assert [(one.cell.batch_size, one.cell.scenario, one.cell.threads) for one in found.only_b] == [
        (4, "multi-stream", 1),
        (2, "offline", 1),
        (2, "multi-stream", 2),
    ]


@pytest.mark.parametrize("value", [0, float("nan"), -1.0])
def test_latencies_that_are_no_times_are_one_line(
    value: float, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = results(timed(STEADY)).to_dict()
    data["cells"][0]["runs"][0]["samples"]["latency_ms"][3] = value
    (tmp_path / "a.json").write_text(json.dumps(data))
    results(timed(STEADY)).write(tmp_path / "b.json")
    for pair in (("a.json", "b.json"), ("b.json", "a.json")):
        assert run(*(tmp_path / name for name in pair)) == 2
        error = capsys.readouterr().err
        assert error.startswith("Error: ") and "a.json" in error and error.count("\n") == 1


def test_a_cell_that_failed_in_one_file_says_why() -> None:
    base, other = timed(STEADY), timed(STEADY, batch_size=4)
    failed = replace(other, status="failed", reason="it crashed", runs=())
    (one,) = compare(results(base, other), results(base, failed)).only_a
    assert one.reason == "failed: it crashed"


def test_bundles_of_one_name_are_told_apart_by_directory() -> None:
    one, two = (timed(STEADY, bundle=replace(OK.cell.bundle, directory=name)) for name in ("one", "two"))
    found = compare(results(one, two), results(replace(two, runs=timed(STEADY, 2).runs), one))
    assert [(pair.cell.bundle.directory, pair.verdict) for pair in found.pairs] == [
        ("one", "no difference found"),
        ("two", "slower"),
    ]


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"cpu": "Another"}, "CPU model"),
        ({"threads": 99}, "usable CPUs"),
        ({"flags": ()}, "CPU flags"),
        ({"memory_gb": 1.0}, "memory"),
        ({"gpus": ("H200",)}, "GPUs"),
    ],
)
def test_other_hardware_is_refused_unless_told(change: dict[str, Any], what: str) -> None:
    one = replace(results(timed(STEADY)), machine=replace(sample_results().machine, flags=("avx2",)))
    other = replace(one, machine=replace(one.machine, **change))
    with pytest.raises(DataError, match=f"the machines differ: {what}") as caught:
        compare(one, other)
    assert "--different-machines" in str(caught.value)
    (difference,) = compare(one, other, different_machines=True).hardware
    assert difference.what == what


def test_other_images_are_refused_unless_told() -> None:
    one = results(timed(STEADY))
    other = replace(one, data=replace(one.data, timed_sha256="00" * 32))
    with pytest.raises(DataError, match="timed images"):
        compare(one, other)
    assert [difference.what for difference in compare(one, other, different_data=True).data] == ["timed images"]


def test_other_software_is_told_of() -> None:
    one = results(timed(STEADY))
    other = replace(one, machine=replace(one.machine, packages={**one.machine.packages, "numpy": "0.1"}))
    (difference,) = compare(one, other).software
    assert str(difference) == f"numpy ({one.machine.packages['numpy']}, 0.1)"


def test_nothing_in_common() -> None:
    with pytest.raises(DataError, match="no cell is measured in both"):
        compare(results(timed(STEADY)), results(timed(STEADY, batch_size=4)))
    one = timed(STEADY)
    other = timed(STEADY, precision="fp32", bundle=replace(OK.cell.bundle, directory="other"))
    with pytest.raises(DataError, match=r"both bundles: 1 cell \(.* int8\) in .* \(.* fp32\) .*scenarios of both\."):
        compare(results(one, other), bundles=("tiny_dir", "other"))


def run(*arguments: object) -> int:
    with pytest.raises(SystemExit) as stopped:
        main(["compare", *map(str, arguments)])
    assert isinstance(stopped.value.code, int)
    return stopped.value.code


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one, two = tmp_path / "one.json", tmp_path / "two.json"
    results(timed(STEADY), timed(STEADY, batch_size=4)).write(one)
    results(timed(STEADY, 0.5)).write(two)
    assert run(one, two) == 0
    shown = capsys.readouterr().out
    assert "0.500" in shown and "faster" in shown
    assert "batch 4" in shown
    assert run(two, one, "--json") == 0
    (found,) = json.loads(capsys.readouterr().out)["pairs"]
    assert found["ratio"]["value"] == pytest.approx(2) and found["verdict"] == "slower"


def test_a_file_that_was_cut_off_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one, two = tmp_path / "one.json", tmp_path / "two.json"
    results(timed(STEADY)).write(one)
    text = one.read_text()
    two.write_text(text[: text.index("{", 400) + 1])
    assert run(one, two) == 2
    error = capsys.readouterr().err
    assert error.startswith("Error: ") and "two.json cannot be read: Expecting" in error and error.count("\n") == 1


def test_servers_are_compared_by_what_they_answered_in_time(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def results(in_time: int, bound_ms: float = 50.0, seed: int = 20261126) -> BenchResults:
        samples = Samples((10.0,) * in_time + (60.0,) * (40 - in_time), (), 2, 40, 4.0, True)
        runs = (replace(RUN, samples=samples, serving=Serving(45, 5, (Point(1, (64, 96), 5.0),), 45)),)
        cells = tuple(
            altered(OK, scenario="server", rate=10.0, policy=policy, runs=runs)
            for policy in ("fixed-timeout", "adaptive")
        )
        settings = replace(sample_results().settings, latency_bound_ms=bound_ms, seed=seed)
        return replace(sample_results(), settings=settings, cells=cells)

    found = compare(results(30), results(36))
    assert [(pair.cell.policy, pair.a_in_time_per_s, pair.b_in_time_per_s) for pair in found.pairs] == [
        ("fixed-timeout", 7.5, 9.0),
        ("adaptive", 7.5, 9.0),
    ]
    with pytest.raises(DataError, match="latency bound in ms \\(50, 70\\)"):
        compare(results(30), results(30, bound_ms=70.0))
    with pytest.raises(DataError, match="seed of the arrivals \\(20261126, 20261127\\)"):
        compare(results(30), results(30, seed=20261127))
    for name, one in (("a", results(30)), ("b", results(36))):
        one.write(tmp_path / f"{name}.json")
    with pytest.raises(SystemExit):
        main(["compare", str(tmp_path / "a.json"), str(tmp_path / "b.json")])
    shown = capsys.readouterr().out
    assert "time/s" in shown and shown.count("7.50, 9.00") == 2
