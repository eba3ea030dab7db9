"""The recipe for a GPU, proven on the CPU: what it plans, when it stops, what it writes."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from demo_bundles import ROOT, imported
from sample_results import OK, altered, sample_results

from gfldeploy.bench.cell import Cell
from gfldeploy.bench.journal import Journal
from gfldeploy.bench.results import BenchResults, CellResult, Parity
from gfldeploy.bench.runner import Data
from gfldeploy.bench.table import rows
from gfldeploy.bundle import Bundle
from gfldeploy.engines.base import Obstacle
from gfldeploy.images.coco import CocoDataset
from gfldeploy.progress import SILENT

RECIPE = ROOT / "benchmarks" / "gpu.py"


@pytest.fixture
def recipe() -> Iterator[ModuleType]:
    with imported(RECIPE) as module:
        yield module


def test_the_curve_is_seen_early(recipe: ModuleType) -> None:
    assert recipe.breadth_first([1, 2, 4, 8, 16, 32]) == [1, 32, 8, 4, 16, 2]
    assert recipe.breadth_first([1]) == [1] and recipe.breadth_first([1, 2]) == [1, 2]
    assert sorted(recipe.breadth_first(range(50))) == list(range(50))


def test_what_is_measured_on_a_gpu_and_in_which_order(
    recipe: ModuleType, tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gfldeploy.engines.registry._unavailable", lambda *_: None)
    bundles = [Bundle.open(tiny_bundle)]
    planned = recipe.plan_cells(bundles, ["onnxruntime"], [1, 4, 2], "gpu", recipe.MIXED)
    cells = [(one.batch_size, one.scenario, one.setup()) for one in planned.cells if one.precision == "fp32"]
    both = ("onnxruntime fp32", "onnxruntime fp32 in TF32")
    single = [(1, "single-stream", setup) for setup in both]
    larger = [(size, load, setup) for size in (4, 2) for setup in both for load in ("offline", "multi-stream")]
    assert cells[:2] == single and sorted(cells[2:]) == sorted(larger)
    assert [size for size, *_ in cells] == [1, 1, 4, 4, 4, 4, 2, 2, 2, 2]
    assert not any(one.tf32 for one in planned.cells if one.precision != "fp32")
    assert {one.cell.precision for one in planned.skipped} <= {"fp16", "int8"}
    every = recipe.plan_cells(bundles, None, [1, 2], "gpu", recipe.UNIFORM)
    assert "paddle-plain" not in {one.engine for one in every.cells}
    assert {one.order for one in every.cells} == {"listed"}


def test_without_a_gpu_nothing_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with imported(RECIPE, "--materials", tmp_path / "none") as module:
        monkeypatch.setattr(module, "nvidia_driver", lambda: None)
        with pytest.raises(SystemExit, match="Error: no NVIDIA driver is loaded"):
            module.main()
    assert not (tmp_path / "none").exists()


def test_a_gpu_without_a_library_has_its_reasons(
    tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("gfldeploy.engines.registry._unavailable", lambda *_: Obstacle("it is not there", "get it"))
    given = ["--bundles", tiny_bundle, "--materials", tmp_path, "--output", tmp_path / "out", "--images", 2]
    with imported(RECIPE, *given) as module:
        monkeypatch.setattr(module, "nvidia_driver", lambda: "1.2")
        monkeypatch.setattr(module, "SCORED_IMAGES", 4)
        with pytest.raises(SystemExit, match="it is not there") as stopped:
            module.main()
    assert "\n" not in str(stopped.value)
    assert "onnxruntime runs nothing; not fp32, fp16, int8: it is not there (get it)" in capsys.readouterr().err
    assert json.loads((tmp_path / "out/checks/demo_doctor.json").read_text())["capabilities"]


def test_images_of_one_size_and_of_both_orientations(recipe: ModuleType, tmp_path: Path) -> None:
    val = recipe.generate(tmp_path, "val", 12)
    uniform, mixed = (
        [(one.height, one.width) for one in CocoDataset.load(file).images]
        for file in recipe.write_photos(val, tmp_path / "photos", 5)
    )
    assert uniform == [(384, 640)] * 3
    assert mixed == [(384, 640), (640, 384), (384, 640), (640, 384), (384, 640)]


def test_a_model_that_nobody_makes_is_refused(tmp_path: Path) -> None:
    with (
        imported(RECIPE, "--model", "mine", "--materials", tmp_path, "--prepare") as module,
        pytest.raises(SystemExit) as stopped,
    ):
        module.main()
    assert "no bundles of mine" in str(stopped.value) and "--bundles" in str(stopped.value)


def test_the_folder_of_a_gpu(recipe: ModuleType) -> None:
    assert recipe.machine_name(["NVIDIA H100 80GB HBM3"]) == "nvidia-h100-80gb-hbm3"
    assert recipe.machine_name([]) == "gpu"


def session(recipe: ModuleType, tmp_path: Path, seconds: float, *cells: Cell, mixed: tuple[Cell, ...] = ()) -> Any:
    """What is planned, with so much time for it."""
    made = sample_results()
    data = Data((), made.data, tmp_path)
    parts = [
        recipe.Part(recipe.Plan(some, (), {}), data, made.settings, made.machine, tmp_path / name)
        for name, some in (("x.json", cells), ("x_mixed.json", mixed))
    ]
    return recipe.Session(*parts, time.monotonic() + seconds, SILENT)


def sized(size: int, **more: Any) -> Cell:
    return replace(OK.cell, batch_size=size, scenario="single-stream" if size == 1 else "multi-stream", **more)


def results(*cells: CellResult) -> BenchResults:
    return replace(sample_results(), cells=cells)


def test_what_there_was_no_time_for_is_told(recipe: ModuleType, tmp_path: Path) -> None:
    stopped = session(recipe, tmp_path, 5, OK.cell, sized(8), mixed=(sized(8),))
    stopped.uniform.known[OK.cell] = OK
    stopped.seconds["onnxruntime"] = 10.0
    with pytest.raises(recipe.TimeIsUpError):
        stopped.run([Journal(tmp_path)] * 2, tmp_path, accuracy=False)
    stopped.write()
    told = (tmp_path / "x_summary.md").read_text()
    assert "1 of 3 cells measured (the time was up: run the same command again, which resumes)" in told
    assert [one.status for one in BenchResults.read(tmp_path / "x.json").cells] == ["ok", "skipped"]
    assert [one.status for one in BenchResults.read(tmp_path / "x_mixed.json").cells] == ["skipped"]


def test_ends_first_then_peaks_then_the_rest(recipe: ModuleType, tmp_path: Path) -> None:
    one = session(recipe, tmp_path, 0, *map(sized, (1, 8, 4, 2)), mixed=tuple(map(sized, (1, 8, 4))))
    jobs = [
        ("mAP" if job.accuracy else "peak" if job.peak else "mixed" if job.mixed else "", job.cell.batch_size)
        for job in one.jobs(accuracy=True)
    ]
    ends = [("", 1), ("", 8), ("peak", 1), ("mixed", 1), ("mixed", 8)]
    assert jobs == [*ends, ("", 4), ("", 2), ("mixed", 4), ("mAP", 1)]


def test_what_fails_alone_is_not_tried_in_batches(recipe: ModuleType, tmp_path: Path) -> None:
    one = session(recipe, tmp_path, 1e6, sized(1), sized(2), mixed=(sized(2),))
    failed = CellResult(sized(1), "failed", f"no kernel{' for' * 200}")
    one.uniform.known[sized(1)] = failed
    one.run([Journal(tmp_path)] * 2, tmp_path, accuracy=True)
    not_tried = CellResult(sized(2), "skipped", "one image at a time failed")
    uniform, mixed = one.results()
    assert uniform.cells == (failed, not_tried) and mixed.cells == (not_tried,)
    told = recipe.summary([uniform, mixed])
    assert "0 of 1 cells measured" in told and "one image at a time failed" in told
    assert max(map(len, told.splitlines())) < 400


def test_the_summary_of_results(recipe: ModuleType) -> None:
    bucketed = altered(OK, scenario="offline", order="bucketed")
    padded = altered(OK, runs=tuple(replace(run, mixed_batches=1, padding_ratio=2.0) for run in OK.runs))
    told = recipe.summary([results(OK, *sample_results().cells[2:]), results(bucketed, padded)])
    # 6 and 2 images in 0.05 and 0.03 s.
    assert "| onnxruntime int8 | one size | 100.0 |\n|  | both orientations, bucketed | 100.0 |\n" in told
    assert "- onnxruntime int8: 100 images/s at batch 2, the one batch size measured." in told
    assert "onnxruntime int8: Batches of several sizes have 1.60 times the pixels; those of one size are 1.00 " in told
    assert "52 of 53 convolutions in less than FP32" in told and "mAP 0.5000" in told
    assert "onnxruntime bf16: skipped: it cannot; Try x" in told


def test_what_differs_from_the_cpu_has_no_speed(recipe: ModuleType) -> None:
    near = Parity("onnxruntime fp32 on the CPU", 3, 40, 1, 1e-4, 2e-3, 0.1, 0.7)
    runs = tuple(replace(run, parity=near) for run in OK.runs)
    far = altered(OK, batch_size=8, status="failed", reason="differs from the CPU: scores by up to 0.5", runs=())
    crashed = altered(far, batch_size=4, reason="it crashed")
    told = recipe.summary([results(replace(OK, runs=runs), far, crashed), results()])
    assert "| onnxruntime int8 | one size | 100.0 | failed | differs |" in told
    assert "| onnxruntime int8 | 3 | onnxruntime fp32 on the CPU | 0.002 | 0.7 | 1 of 40 |" in told
    assert "batch 8: failed: differs from the CPU: scores by up to 0.5" in told


@pytest.mark.slow
def test_everything_on_the_cpu(
    tiny_bundle: Path, tiny_coco: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("onnxruntime")
    given = ["--dry-run", "--bundles", tiny_bundle, "--data", tiny_coco, "--materials", tmp_path, "--model", "tiny"]
    output = tmp_path / "dry-run" / "tiny.json"
    with imported(RECIPE, *given, "--minutes", 0) as module:
        module.main()
    none = BenchResults.read(output)
    assert {one.reason for one in none.cells if one.cell.precision == "fp32"} == {"the time was up"}
    with imported(RECIPE, *given, "--minutes", 10) as module:
        module.main()
    shown = capsys.readouterr().out
    found = BenchResults.read(output)
    measured = [one for one in found.cells if one.status == "ok"]
    assert [(one.cell.batch_size, one.cell.order) for one in measured] == [(1, "listed"), (2, "listed")]
    both = [one for one in BenchResults.read(output.with_name("tiny_mixed.json")).cells if one.status == "ok"]
    assert [(one.cell.batch_size, one.cell.order) for one in both] == [(1, "listed"), (2, "listed"), (2, "bucketed")]
    assert all(one.peak and one.accuracy for one in (*measured, *both))
    assert [one.runs[0].mixed_batches for one in (*measured, *both)] == [0, 0, 0, 2, 0]
    for section in (
        "the network alone",
        "gains no more",
        "What mixed orientations cost",
        "Stages from file to boxes",
        "The hardware meanwhile",
    ):
        assert section in shown
    assert str(tmp_path) not in output.read_text()
    assert {path.name for path in output.parent.iterdir()} == {
        *("checks", "tiny_summary.md"),
        *(f"tiny{kind}.{suffix}" for kind in ("", "_mixed") for suffix in ("json", "csv", "html")),
    }
    assert (output.parent / "tiny_summary.md").read_text() in shown


@pytest.mark.gpu
@pytest.mark.slow
def test_everything_on_a_gpu(tiny_bundle: Path, tmp_path: Path) -> None:
    given = ["--bundles", tiny_bundle, "--materials", tmp_path, "--model", "tiny", "--output", tmp_path / "out"]
    quick = [
        "--batch-sizes",
        1,
        2,
        "--images",
        4,
        "--seconds",
        1.5,
        "--minutes",
        8,
        "--engine-cache",
        tmp_path / "built",
    ]
    with imported(RECIPE, *given, *quick) as module:
        module.main()
    measured = [row for row in rows(BenchResults.read(tmp_path / "out" / "tiny.json")) if row.ok]
    assert measured, (tmp_path / "out" / "tiny_summary.md").read_text()
    for row in measured:
        assert row.parity and row.gpu_memory_mb and row.gpu_memory_mb > 0, row.cell
        assert row.gpu_power_w and row.gpu_clock_mhz and row.joules_per_image, row.cell
        assert row.result.peak and row.result.peak.memory_gb_per_s, row.cell
