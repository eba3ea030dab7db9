"""Gates: limits that a change has to keep, in Python and as exit codes."""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from demo_bundles import RunHere
from sample_results import OK, RUN, STAGES, altered, sample_results

from gfldeploy.batching.latency import Point
from gfldeploy.bench.compare import compare
from gfldeploy.bench.results import BenchResults, CellResult, Serving
from gfldeploy.bench.timing import Samples, Stages
from gfldeploy.gates import speed_gate

NETWORK = (10.0, 10.2, 9.9, 10.1, 10.0, 9.8)


def timed(network: float = 1, file: float = 1, samples: int = 6, **more: Any) -> CellResult:
    """Two rounds whose latencies are those of the baseline times these factors."""
    latencies = tuple(value * network for value in NETWORK[:samples])
    whole = {"end_to_end_ms": tuple(2 * value * file for value in NETWORK[:samples])}
    stages = Stages(**dict.fromkeys(STAGES, (1.0,) * samples) | whole)
    measured = Samples(latencies, (), 2, 2 * len(latencies), 1.0, True)
    return altered(OK, runs=(replace(RUN, samples=measured, stages=stages),) * 2, **more)


def results(*cells: CellResult, created: str = "2026-01-02T00:00:00+00:00") -> BenchResults:
    return replace(sample_results(), cells=cells, created=created)


BASE = results(timed(), timed(batch_size=4), created="2026-01-01T00:00:00+00:00")
FAILED = replace(timed(batch_size=4), status="failed", reason="it\ncrashed", runs=())


@pytest.mark.parametrize(
    ("cells", "percent", "told"),
    [
        ([timed(), timed(batch_size=4)], 0, None),
        ([timed(0.5), timed(batch_size=4)], 0, None),
        ([timed(1.2), timed(batch_size=4)], 25, None),
        (
            [timed(1.2), timed(batch_size=4)],
            5,
            r"1 cell of 2 slower by more than 5%: .* batch 2 takes 1\.2 times ",
        ),
        ([timed(0.9, 1.2), timed(batch_size=4)], 5, r"1 cell of 2 .* 1\.2 times .* as long from file to boxes"),
        ([timed(1.1), timed(1.3, batch_size=4)], 5, r"2 cells of 2 .* batch 4 takes 1\.3 times .*, and 1 more cell"),
        ([timed()], 5, r"1 cell of A not measured in B: onnxruntime int8, batch 4\. Measure all cells of A"),
        ([timed(), FAILED], 5, r"1 cell of A not measured in B: .* batch 4 \(failed: it\scrashed\)"),
        ([timed(), timed(samples=2, batch_size=4)], 5, r"too few samples to tell of 1 cell: .* batch 4\. Measure long"),
        ([timed(1.2), FAILED], 5, r"1 cell of 2? ?.*slower .*; 1 cell of A not measured"),
    ],
)
def test_speed(cells: list[CellResult], percent: float, told: str | None) -> None:
    gate = speed_gate(compare(BASE, results(*cells)), percent)
    assert gate.passed == (told is None)
    text = told or rf"none of 2 cells is slower by more than {percent}%"
    assert re.match(rf"(?s){text}", gate.text), gate.text


def test_what_was_not_compared_is_said() -> None:
    failed = replace(FAILED, cell=replace(FAILED.cell, engine="paddle"))
    one = replace(BASE, cells=(*BASE.cells, failed))
    other = results(*BASE.cells, failed, timed(batch_size=8))
    machine = replace(other.machine, cpu="Another")
    gate = speed_gate(compare(one, replace(other, machine=machine), different_machines=True))
    assert gate.passed
    assert "; 1 cell of B not in A; 1 cell failed in both; on other hardware" in gate.text


def test_noise_is_no_slowdown_and_hides_one() -> None:
    random = np.random.default_rng(0)

    def noisy(seconds: float) -> CellResult:
        runs = []
        for _ in range(3):
            drift = random.normal(1, 0.05)
            latencies = tuple((seconds * drift * random.normal(1, 0.05, 50)).tolist())
            runs.append(replace(RUN, samples=Samples(latencies, (), 2, 100, 1.0, True), stages=None))
        return altered(OK, runs=tuple(runs))

    gate = speed_gate(compare(results(noisy(10)), results(noisy(10.2), created="later")))
    assert gate.passed
    hidden = float(gate.text.partition("noise may hide up to ")[2].partition("%")[0])
    assert 2 < hidden < 30
    assert not speed_gate(compare(results(noisy(10)), results(noisy(20), created="later"))).passed


def test_the_confidence_is_of_all_cells_together() -> None:
    """Among many cells one looks slower by chance: the bound of each gives way."""
    random = np.random.default_rng(1)
    samples = [tuple(random.lognormal(2, 0.2, 40).tolist()) for _ in range(2)]
    one, other = (
        altered(OK, runs=(replace(RUN, samples=Samples(some, (), 2, 80, 1.0, True), stages=None),)) for some in samples
    )
    alone = compare(results(one), results(other)).pairs[0].slowness[0]
    engines = [f"engine{number}" for number in range(30)]
    many = [results(*(altered(cell, engine=name) for name in engines)) for cell in (one, other)]
    found = [pair.slowness[0] for pair in compare(*many).pairs]
    assert {each.ratio for each in found} == {alone.ratio}
    assert alone.at_least is not None and alone.ratio.low is not None
    assert alone.at_least <= alone.ratio.low
    assert all(each.at_least is not None and each.at_least < alone.at_least for each in found)


def test_two_bundles_of_one_file_are_compared_round_by_round(tmp_path: Path, run_here: RunHere) -> None:
    """A machine that is slower in some rounds hides 10 % between two files, and not between interleaved rounds."""
    random = np.random.default_rng(2)
    drift = (1.0, 1.6, 0.8, 1.3)

    def noisy(directory: str, factor: float) -> CellResult:
        rounds = [tuple((10 * factor * each * random.normal(1, 0.01, 50)).tolist()) for each in drift]
        runs = (replace(RUN, samples=Samples(one, (), 2, 100, 1.0, True), stages=None) for one in rounds)
        bundle = replace(OK.cell.bundle, directory=directory, name=f"name of {directory}")
        return altered(OK, runs=tuple(runs), bundle=bundle)

    both = results(noisy("old", 1), noisy("new", 1.1), noisy("same", 1))
    found = compare(both, bundles=("old", "new"))
    (pair,) = found.pairs
    assert pair.ratio.low is not None and pair.ratio.high is not None
    assert 1.08 < pair.ratio.low < pair.ratio.high < 1.12
    assert not speed_gate(found, 5).passed and speed_gate(compare(both, bundles=("old", "same")), 5).passed
    apart = [replace(both, cells=(cell,)) for cell in both.cells[:2]]
    renamed = replace(apart[1].cells[0], cell=replace(apart[1].cells[0].cell, bundle=OK.cell.bundle))
    first = replace(apart[0].cells[0], cell=renamed.cell)
    (wide,) = compare(results(first), results(renamed)).pairs
    assert wide.verdict == "no difference found"

    both.write(tmp_path / "both.json")
    done = run_here("compare", tmp_path / "both.json", "--bundles", "old,new", "--fail-if-slower", "5")
    assert done.returncode == 1 and "1 cell of 1 slower by more than 5%" in done.stderr
    for wrong in (
        (),
        ("--bundles", "old"),
        ("--bundles", "old,none"),
        (tmp_path / "both.json", "--bundles", "old,new"),
    ):
        assert run_here("compare", tmp_path / "both.json", *wrong).returncode == 2


def served(in_time: int, late: int, latency_ms: float = 10.0) -> BenchResults:
    samples = Samples((latency_ms,) * in_time + (60.0,) * late, (), 2, 400, 4.0, True)
    serving = Serving(401, 401 - in_time - late, (Point(1, (64, 96), 5.0),), 400)
    runs = (replace(RUN, samples=samples, serving=serving),)
    cell = altered(OK, scenario="server", rate=100.0, policy="adaptive", runs=runs)
    return replace(results(cell), settings=replace(sample_results().settings, latency_bound_ms=50.0))


def test_a_server_that_rejects_more_is_slower_though_its_latencies_are_not() -> None:
    found = compare(served(400, 0), served(200, 0, 9.0))
    (pair,) = found.pairs
    latency, answers = pair.slowness
    assert (latency.ratio.value, answers.figure) == (0.9, "answers in time")
    # 400.5 in 4 s to 200.5 in 4 s, and the interval of the logarithm of two counts.
    value, spread = 400.5 / 200.5, math.exp(1.959964 * math.sqrt(1 / 400.5 + 1 / 200.5))
    assert answers.ratio.value == pytest.approx(value)
    assert (answers.ratio.low, answers.ratio.high) == pytest.approx((value / spread, value * spread), rel=1e-6)
    gate = speed_gate(found, 10)
    assert not gate.passed and "as long in answers within the bound" in gate.text
    assert speed_gate(compare(served(400, 0), served(395, 3)), 10).passed


def test_compare_as_a_command(tmp_path: Path, run_here: RunHere) -> None:
    files = [tmp_path / name for name in ("a.json", "b.json", "slow.json")]
    same = results(*BASE.cells)
    for file, one in zip(files, (BASE, same, results(timed(1.2), timed(batch_size=4))), strict=True):
        one.write(file)
    a, b, slow = files
    option = "--fail-if-slower"
    for words, code, told in (
        ((a, b, option), 0, "none of 2 cells is slower by more than 10%"),
        ((option, a, slow), 1, "1 cell of 2 slower by more than 10%"),
        ((option, "30", a, slow), 0, "none of 2 cells is slower by more than 30%"),
        ((a, slow, f"{option}=30"), 0, "slower by more than 30%"),
        ((a, slow, option, "2.5", "--json"), 1, "slower by more than 2.5%"),
        ((a, a, option), 1, "A and B are the same run"),
    ):
        done = run_here("compare", *words)
        assert done.returncode == code, done.stderr
        assert done.stderr.startswith("Gate failed: " if code else "Gate passed: ") and told in done.stderr
        assert done.stderr.count("\n") == 1
        assert json.loads(done.stdout)["pairs"] if "--json" in words else done.stdout
    assert run_here("compare", a, slow).returncode == 0
    for wrong in ((a, b, option, "many"), (a, b, option, "-1"), (a, b, f"{option}=nan"), (option, "5")):
        done = run_here("compare", *wrong)
        assert (done.returncode, done.stdout) == (2, "") and done.stderr.startswith("Error: ")


def test_eval_as_a_command(tiny_bundle: Path, tiny_coco: Path, run_here: RunHere) -> None:
    """The detector finds every box and nothing else: its mAP is 1; at a quarter of the size boxes are elsewhere."""
    command = ("eval", tiny_bundle, "--data", tiny_coco, "--engine", "onnxruntime", "--min-map")
    done = run_here(*command, "0.95")
    assert (done.returncode, done.stderr) == (
        0,
        "Gate passed: mAP 1.0000 in onnxruntime fp32, 6 images is not below 0.95\n",
    )
    done = run_here(*command, "0.95", "--input-sizes", "64x96,32x64", "--json")
    found = json.loads(done.stdout)["input_sizes"]
    low = found["32x64"]["ap"]
    assert done.returncode == 1 and found["64x96"]["ap"] > 0.95 > low
    assert f"Gate failed: mAP {low:.4f} at 32x64 in onnxruntime fp32, 6 images is below 0.95. Measure " in done.stderr
    done = run_here(*command, f"{math.nextafter(low, 1)!r}", "--input-sizes", "32x64")
    assert done.returncode == 1 and f"mAP {low:.16f} at 32x64" in done.stderr
    for value in ("85", "nan", "-0.1"):
        assert run_here(*command, value).returncode == 2


def pictures(folder: Path, *sizes: tuple[int, int]) -> Path:
    for number, size in enumerate(sizes):
        assert cv2.imwrite(str(folder / f"{number}.png"), np.zeros((*size, 3), np.uint8))
    return folder


def gate_line(text: str) -> str:
    (line,) = (line for line in text.splitlines() if line.startswith("Gate "))
    return line


def test_audit_as_a_command(tiny_bundle: Path, tmp_path: Path, run_here: RunHere) -> None:
    """48x80 is resized to 58x96 and rounded up to 64x96, 80x48 the other way; both in one batch are 96x96."""
    data = pictures(tmp_path, (48, 80), (80, 48))
    command = ("audit", "--data", data, "--config-or-bundle", tiny_bundle, "--batch-sizes", "1,2", "--max-padding")
    by_size, by_neighbours = 64 * 96 / (58 * 96), 96 * 96 / (64 * 96)
    done = run_here(*command, "1.2")
    worst = by_size * by_neighbours
    assert done.returncode == 1 and "Bucketed: 1.00x" in done.stdout
    assert gate_line(done.stderr) == (
        f"Gate failed: batches of 2, listed, have {worst:.2f}x the pixels of the images ({by_size:.2f}x by the input "
        f"size, {by_neighbours:.2f}x by neighbours), more than 1.2x. Run batches of images of one size (--order "
        "bucketed), smaller batches, or a higher limit."
    )
    done = run_here(*command, "1.2", "--buckets", "2", "--json")
    assert done.returncode == 0 and json.loads(done.stdout)["images"] == 2
    assert f", bucketed, have {by_size:.2f}x the pixels" in gate_line(done.stderr)
    assert run_here(*command, "1.2", "--buckets", "1").returncode == 1
    assert run_here(*command, f"{worst + 1e-9!r}").returncode == 0
    (data / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    done = run_here(*command, "1.7", "--input-sizes", "64x64")
    assert done.returncode == 0 and "; 1 image could not be used" in gate_line(done.stderr)
    assert run_here(*command, "0.9").returncode == 2
    (data / "broken.png").unlink()
    # Tiles of 40x40 are resized to 64x64, a multiple of the stride; the whole image is one of them.
    done = run_here(*command, "1.2", "--tile", "40x40")
    assert done.returncode == 0 and ", bucketed, have " in done.stderr and "x the pixels of the tiles" in done.stderr
