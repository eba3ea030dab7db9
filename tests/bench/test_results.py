"""`results.json` there and back, and what it refuses."""

from __future__ import annotations

import copy
import json
import platform
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from sample_results import OK, RUN, SKIPPED, altered, sample_results

from gfldeploy.batching.latency import Point
from gfldeploy.bench.results import BenchResults, CellResult, Serving
from gfldeploy.bench.table import COLUMNS, Served, best_of_each, notes, rows
from gfldeploy.bench.timing import Samples, Settings
from gfldeploy.engines.base import Precision
from gfldeploy.errors import DataError, OutputError
from gfldeploy.machine import describe_machine

SERVING = {"requests": 1, "rejected": 0, "points": [], "most_kept": 1}
NOT_INT8 = "1 of 53 convolutions not in int8: kept in float in the ONNX file (1): stem"


@pytest.fixture
def results() -> BenchResults:
    return sample_results()


def test_there_and_back(results: BenchResults, tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    results.write(path)
    assert BenchResults.read(path) == results
    assert next(iter(json.loads(path.read_text()))) == "schema"


def test_the_host_name_is_not_in_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "node", lambda: pytest.fail("asked for the host name"))
    machine = describe_machine()
    assert machine.cpu and machine.threads >= 1 and machine.memory_gb > 0
    assert machine.packages["numpy"] and "paddlepaddle-gpu" not in {k for k, v in machine.packages.items() if not v}


def change(path: str, value: object) -> Callable[[dict[str, Any]], None]:
    def apply(data: dict[str, Any]) -> None:
        *parents, last = (int(key) if key.isdigit() else key for key in path.split("."))
        target: Any = data
        for key in parents:
            target = target[key]
        target[last] = value

    return apply


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (change("schema", BenchResults.FORMAT.schema + 1), "newer gfldeploy: schema 10"),
        (change("schema", 0), "older gfldeploy: schema 0"),
        (change("schema", None), "no schema number"),
        (change("surprise", 1), "has unknown fields: surprise"),
        (change("cells.0.runs.0.surprise", 1), r"cells\[0\].runs\[0\] has unknown fields: surprise"),
        (lambda data: data["cells"][0]["cell"].pop("engine"), r"cells\[0\].cell lacks engine"),
        (change("cells.0.status", "fine"), "must be one of ok, failed, skipped"),
        (change("cells.0.cell.threads", "2"), "threads must be of type int, not '2'"),
        (change("cells.0.cell.threads", True), "threads must be of type int"),
        (change("cells.0.runs.0.samples.latency_ms", ["fast"]), r"latency_ms\[0\] must be a finite number"),
        (change("cells.0.runs.0.samples.latency_ms", []), "at least one latency"),
        (change("cells.0.runs.0.load_s", float("nan")), "NaN is no number in JSON"),
        (change("cells.0.runs.0.samples.latency_ms", [0.0, 1.0]), "times must be positive"),
        (change("cells.0.runs.0.samples.latency_ms", [-1.0]), "latency_ms must be 0 or more"),
        (change("cells.0.runs.0.samples.warmup_ms", [-1.0]), "warmup_ms must be 0 or more"),
        (change("cells.0.runs.0.load_s", -1.0), "load_s must be 0 or more"),
        (change("cells.0.runs.0.load_s", 1e30), "load_s must be a finite number of a sensible size"),
        (change("cells.0.runs.0.load_s", 10**400), "a number of 401 digits"),
        (change("cells.0.cell.batch_size", 10**18 + 1), "batch_size must be a finite number of a sensible size"),
        (change("cells.0.cell.batch_size", -2), "batch_size must be 0 or more"),
        (change("cells.0.cell.engine", "\ud800"), "engine must be text of a sensible length"),
        (change("cells.0.cell.engine", "x" * 10**6), "engine must be text of a sensible length"),
        (change("machine.packages", {"\udfff": "2"}), "must be text of a sensible length"),
        (change("machine.flags", json.loads("[" * 900 + "]" * 900)), "nested too deeply"),
        (change("cells.0.runs", {}), "runs must be a list"),
        (change("cells.0.runs", []), "needs runs"),
        (change("cells.1.reason", None), "has a reason unless"),
        (change("machine", 3), "machine must be an object"),
        (change("machine.packages", {"numpy": 2}), "packages.numpy must be of type str"),
        (change("settings.rounds", 0), "rounds must be at least 1"),
        (change("settings.max_seconds", 1.0), "max_seconds not less than"),
        (change("cells.0.cell.rate", 5.0), "the server scenario has a rate and a policy"),
        (change("cells.0.runs.0.serving", SERVING), "what became of the requests"),
        (change("cells.0.runs.0.stages.decode_ms", [1.0]), "one value for each batch"),
        (change("cells.0.runs.0.shapes", {"large": 1}), r"runs\[0\]: shapes must be such as 1x3x800x1216"),
        (change("cells.0.runs.0.shapes", {"1x3x64x96": 0}), "each of at least one batch"),
        (change("cells.0.runs.0.shapes", {}), "shapes must be those of the batches whose stages"),
        (change("cells.0.runs.0.monitored.cpu_percent", [[], []]), "at least one CPU in each sample"),
        (change("cells.0.runs.0.samples.wall_s", 1e-320), "wall_s must be a finite number of a sensible size"),
    ],
)
def test_refuses(edit: Callable[[dict[str, Any]], object], message: str, results: BenchResults, tmp_path: Path) -> None:
    data = copy.deepcopy(results.to_dict())
    edit(data)
    path = tmp_path / "results.json"
    path.write_text(json.dumps(data))
    with pytest.raises(DataError, match=message) as caught:
        BenchResults.read(path)
    assert str(path) in str(caught.value) and caught.value.remedy


@pytest.mark.parametrize("content", [None, "", "[]", "{"])
def test_refuses_what_is_no_result_at_all(content: str | None, tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(DataError, match=r"results\.json"):
        BenchResults.read(path)


def test_an_output_that_cannot_be_written(results: BenchResults, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError):
        results.write(tmp_path / "file" / "results.json")


def test_rows(results: BenchResults) -> None:
    ok, failed, skipped = rows(results)
    assert (found := ok.latency_ms()) is not None and found.value == 13.0  # of 10, 12, 20 and 14: both rounds
    assert ok.latency_ms(90) is None, "four samples say nothing of it"
    assert ok.images_per_s == pytest.approx(8 / 0.08)
    # Two rounds with batches of two images that take 12 and 24 ms from file to boxes.
    assert (whole := ok.file_ms()) is not None and (whole.value, whole.n) == (18.0, 4)
    assert ok.file_images_per_s == pytest.approx(8 / 0.072) and ok.file_ms(99) is None
    assert (ok.ap, ok.low_precision, ok.memory_mb, ok.note) == (0.5, "52 of 53", 290.0, NOT_INT8)
    # 100 images a second of 10^9 MACs each, of a peak of 200 10^9.
    assert ok.gmac_per_s == pytest.approx(100) and ok.percent_of_peak == pytest.approx(50)
    assert ok.flags == ()
    assert (failed.latency_ms(), failed.note) == (None, "failed: it crashed")
    assert skipped.note == "skipped: it cannot; Try x"
    (no_accuracy,) = rows(replace(results, cells=(altered(OK, accuracy=None, accuracy_reason="no boxes"),)))
    assert no_accuracy.note == f"{NOT_INT8}; no mAP: no boxes"
    assert {one.key: one.value(no_accuracy) for one in COLUMNS}["ap"] == "unknown"


def test_an_undefined_map_is_no_number(results: BenchResults) -> None:
    assert OK.accuracy is not None
    (row,) = rows(replace(results, cells=(altered(OK, accuracy=replace(OK.accuracy, ap=-1.0)),)))
    assert row.ap is None and row.note is not None and "no mAP: it is undefined" in row.note


def test_each_note_is_there_once_whatever_it_holds_for(results: BenchResults) -> None:
    def cell(size: int, line: str) -> CellResult:
        run = replace(RUN, convolutions={"fp32": 1, "int8": 52}, not_low_precision=(line,))
        return altered(OK, batch_size=size, runs=(run,))

    shapes = [f"left in f32 (1): mb{size}_ic128oc64_ih{size}oh28kh1 brgconv" for size in (1, 2, 4)]
    cells = [cell(size, line) for size, line in zip((1, 2, 4), shapes, strict=True)]
    other = altered(SKIPPED, engine="paddle")
    some = [*cells, altered(OK, batch_size=8, runs=(replace(RUN, convolutions={"int8": 53}),)), SKIPPED, other]
    found = notes(rows(replace(results, cells=tuple(some))))
    assert found == [
        ("1 of 53 convolutions not in int8: left in f32 (1): ic128oc64 brgconv", "onnxruntime int8, batch 1, 2, 4"),
        ("skipped: it cannot; Try x", "onnxruntime bf16; paddle bf16"),
    ]


def schema_4(results: BenchResults) -> dict[str, Any]:
    """As it was written until the axes of a cell had a record of their own: null is what a reason holds for all of."""
    data = results.to_dict()
    data["schema"] = 4
    peaks: list[dict[str, Any]] = []
    for one in data["cells"]:
        axes, peak = one.pop("cell"), one.pop("peak")
        for axis in ("order", "tf32", "streams", "input_size", "end_to_end", "clients", "tiling"):
            del axes[axis]
        if peak is not None and not peaks:
            peaks.append({**{key: axes[key] for key in ("engine", "precision", "device", "threads")}, **peak})
        if one["status"] == "skipped":
            axes |= dict.fromkeys(("bundle", "batch_size", "scenario"))
        one["work"] = one.pop("cost")
        one |= axes
    return {**data, "peaks": peaks}


def schema_3(results: BenchResults) -> dict[str, Any]:
    """As the version before that wrote it."""
    data = schema_4(results)
    data["schema"] = 3
    del data["settings"]["tail_count"]
    for cell in data["cells"]:
        for run in cell["runs"]:
            del run["mixed_batches"]
    return data


def test_schema_4_is_read(results: BenchResults) -> None:
    others = (altered(OK, batch_size=1), altered(OK, scenario="offline", order="bucketed"))
    results = replace(results, cells=(*results.cells[:2], *others, SKIPPED))
    read = BenchResults.from_dict(schema_4(results))
    assert read.cells[:4] == results.cells[:4]
    # What held for all batch sizes and scenarios is now said of each that the file has.
    assert [(one.cell.batch_size, one.cell.scenario, one.cell.order) for one in read.cells[4:]] == [
        (2, "multi-stream", "listed"),
        (1, "single-stream", "listed"),
        (2, "offline", "bucketed"),
    ]
    assert {(one.cell.bundle, one.cell.precision, one.reason) for one in read.cells[4:]} == {
        (OK.cell.bundle, "bf16", "it cannot")
    }


def test_schema_3_is_read(results: BenchResults) -> None:
    read = BenchResults.from_dict(schema_3(results))
    runs = [run for cell in read.cells for run in cell.runs]
    assert all(run.mixed_batches is None and run.stages for run in runs) and read.settings.tail_count == 0
    data = schema_3(results)
    for cell in data["cells"]:
        cell["scenario"] = cell["scenario"] and "offline"  # it timed other batches from file to boxes there
    (row, *_) = rows(BenchResults.from_dict(data))
    assert row.file_ms() is None and row.file_images_per_s is None and row.images_per_s
    assert {one.key: one.value(row) for one in COLUMNS}["file_to_boxes_images_per_s"] == "not measured"
    for key in ("settings", "cells"):
        with pytest.raises(DataError, match=key):
            BenchResults.from_dict({**schema_3(results), key: 3})
    for cell in data["cells"]:
        cell["runs"] = [3]
    with pytest.raises(DataError, match=r"schema 3 cannot be read: .* is not a mapping"):
        BenchResults.from_dict(data)


def test_times_of_0_are_no_speed(results: BenchResults) -> None:
    assert RUN.stages is not None
    zero = replace(RUN, stages=replace(RUN.stages, end_to_end_ms=(0.0, 0.0)))
    (row,) = rows(replace(results, cells=(altered(OK, runs=(zero,)),)))
    assert row.file_images_per_s is None and (found := row.file_ms()) is not None and found.value == 0


def test_the_best_batch_of_each(results: BenchResults) -> None:
    def cell(size: int, ms: float, precision: Precision = "int8") -> CellResult:
        assert RUN.stages is not None
        run = replace(RUN, stages=replace(RUN.stages, end_to_end_ms=(ms, ms)))
        return altered(OK, precision=precision, batch_size=size, runs=(run,))

    old = altered(OK, precision="bf16", runs=(replace(RUN, stages=None),))
    cells = (cell(2, 20.0), cell(4, 32.0), cell(8, 100.0), cell(2, 10.0, "fp32"), old)
    best = best_of_each(rows(replace(results, cells=cells)))
    assert [(row.cell.precision, row.cell.batch_size) for row in best] == [("fp32", 2), ("int8", 4), ("bf16", 2)]


def test_flags(results: BenchResults) -> None:
    assert RUN.monitored is not None and RUN.idle is not None
    careful = replace(
        RUN,
        samples=replace(RUN.samples, stable=False),
        idle=replace(RUN.idle, cpu_percent=60.0),
        monitored=replace(RUN.monitored, throttled=("heat of CPU 0",)),
    )
    quick = replace(results.settings, rounds=1)
    (row,) = rows(replace(results, settings=quick, cells=(altered(OK, runs=(RUN, careful)),)))
    assert row.flags == ("quick", "unstable", "busy", "throttled")
    (row,) = rows(replace(results, cells=(altered(OK, runs=(RUN, replace(RUN, mixed_batches=1))),)))
    assert row.flags == ("padded",)
    # Where that was not recorded, by the padding of single images.
    unknown = altered(OK, runs=(replace(RUN, mixed_batches=None, padding_ratio=1.5),))
    single = altered(OK, batch_size=1, scenario="single-stream", runs=(replace(RUN, mixed_batches=None),))
    flags = [row.flags for row in rows(replace(results, cells=(unknown, single)))]
    assert flags == [("padded",), ()]


def server(latency_ms: Sequence[float], rejected: int, most_kept: int) -> CellResult:
    """A round of 10 s in which half of the batches held two images."""
    served = len(latency_ms)
    run = replace(
        RUN,
        samples=Samples(tuple(latency_ms), (), 2, served, 10.0, True),
        shapes={"1x3x64x96": served // 3, "2x3x64x96": served // 3},
        serving=Serving(served + rejected, rejected, (Point(1, (64, 96), 5.0),), most_kept),
    )
    return altered(OK, scenario="server", rate=10.0, policy="adaptive", runs=(run,))


def served(cell: CellResult, bound_ms: float) -> Served:
    (row,) = rows(replace(sample_results(), settings=Settings(2, 10, 10, latency_bound_ms=bound_ms), cells=(cell,)))
    assert row.cell.policy == "adaptive" and row.padding == 1.25 and row.served is not None
    return row.served


def test_what_a_server_did_with_what_arrived() -> None:
    cell = server([float(number) for number in range(1, 91)], rejected=10, most_kept=80)
    found = served(cell, 60.0)
    assert found.in_time_per_s == 6.0 and found.rejected == 0.1
    assert found.mean_batch == pytest.approx(1.5) and found.percent_of_possible == 75.0
    four = replace(found, in_time=4 * found.in_time, seconds=4 * found.seconds, percent=99)
    assert served(altered(cell, runs=cell.runs * 4), 60.0) == four
    assert served(server([5.0] * 3, 0, most_kept=0), 60.0).percent_of_possible is None


def test_the_servers_bound_is_judged_by_the_highest_percentile_that_what_arrived_supports() -> None:
    cell = server([float(number) for number in range(1, 101)], rejected=0, most_kept=100)
    # A hundred images support the 95th percentile, not the 99th.
    assert served(cell, 95.0).bound_held == "yes (p95)"
    assert served(cell, 94.0).bound_held == "no (p95)"
    # What was rejected was not answered in time.
    rejected = served(server([1.0] * 90, rejected=10, most_kept=100), 95.0)
    assert rejected.bound_held == "no (p95)"
    assert served(server([1.0] * 3, 0, most_kept=3), 95.0).bound_held is None


@pytest.mark.parametrize(
    ("precision", "convolutions", "lines", "note"),
    [
        ("int8", {"int8": 53}, (), None),
        ("int8", None, None, None),
        ("fp32", {"fp32": 53}, (), None),
        ("int8", {"fp32": 2, "int8": 51}, None, "2 of 53 convolutions not in int8"),
        (
            "bf16",
            {"bf16": 50, "fp32": 3},
            ("a (2): x", "b (1): y"),
            "3 of 53 convolutions not in bf16: a (2): x, and 1 ",
        ),
        ("int8", {"fp32": 9}, (f"a (9): {'weight ' * 99}",), "9 of 9 convolutions not in int8: a (9): weight weight "),
    ],
)
def test_the_note_on_what_did_not_run_in_low_precision(
    precision: Precision,
    convolutions: dict[str, int] | None,
    lines: tuple[str, ...] | None,
    note: str | None,
    results: BenchResults,
) -> None:
    run = replace(RUN, convolutions=convolutions, not_low_precision=lines)
    (row,) = rows(replace(results, cells=(altered(OK, precision=precision, runs=(run,)),)))
    if note is None:
        assert row.note is None
    else:
        assert row.note is not None and row.note.startswith(note) and len(row.note) < 200


COMMITTED = [  # those of `gfldeploy bench`, not the records of recipes; of older schemas those that were committed
    path
    for folder in (Path(__file__).parents[2] / "benchmarks/results", Path(__file__).parent / "results_files")
    for path in sorted(folder.rglob("*.json"))
    if "schema" in json.loads(path.read_text())
]


@pytest.mark.parametrize("path", COMMITTED, ids=lambda path: "/".join(path.parts[-2:]))
def test_the_committed_results_are_read(path: Path) -> None:
    results = BenchResults.read(path)
    assert any(row.latency_ms() is not None for row in rows(results))
    assert all(isinstance(column.text(row), str) for column in COLUMNS for row in rows(results))
    assert BenchResults.from_dict(results.to_dict()) == results
