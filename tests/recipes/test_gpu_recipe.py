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

from gfldeploy.bench.journal import Journal
from gfldeploy.bench.results import BenchResults, CellResult, Parity
from gfldeploy.bench.runner import Data
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
    planned = recipe.plan_cells([Bundle.open(tiny_bundle)], ["onnxruntime"], [4, 1, 2], "gpu")
    cells = [(one.batch_size, one.scenario, one.setup()) for one in planned.cells if one.precision == "fp32"]
    both = ("onnxruntime fp32", "onnxruntime fp32 in TF32")
    single = [(1, "single-stream", setup) for setup in both]
    larger = [(size, load, setup) for size in (4, 2) for setup in both for load in ("offline", "multi-stream")]
    assert cells[:2] == single and sorted(cells[2:]) == sorted(larger)
    assert [size for size, *_ in cells] == [1, 1, 4, 4, 4, 4, 2, 2, 2, 2]
    assert not any(one.tf32 for one in planned.cells if one.precision != "fp32")
    assert {one.cell.precision for one in planned.skipped} <= {"fp16", "int8"}
    assert "paddle-plain" not in {one.engine for one in recipe.plan_cells([], None, [1], "gpu").cells}


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


def test_images_of_both_orientations_in_turn(recipe: ModuleType, tmp_path: Path) -> None:
    val = recipe.generate(tmp_path, "val", 12)
    found = CocoDataset.load(recipe.write_photos(val, tmp_path / "photos", 5)).images
    assert [(one.height, one.width) for one in found] == [(384, 640), (640, 384), (384, 640), (640, 384), (384, 640)]


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


def session(recipe: ModuleType, tmp_path: Path, deadline: float, *cells: CellResult) -> Any:
    made = sample_results()
    planned = recipe.Plan(tuple(one.cell for one in cells), (), {})
    data = Data((), made.data, tmp_path)
    return recipe.Session(planned, made.settings, data, made.machine, tmp_path / "x.json", deadline, SILENT)


def test_what_there_was_no_time_for_is_told(recipe: ModuleType, tmp_path: Path) -> None:
    other = replace(OK, cell=replace(OK.cell, batch_size=8))
    stopped = session(recipe, tmp_path, time.monotonic() + 5, OK, other)
    stopped.known[OK.cell] = OK
    stopped.seconds["onnxruntime"] = 10.0
    with pytest.raises(recipe.TimeIsUpError):
        stopped.run(Journal(tmp_path), tmp_path, accuracy=False)
    stopped.write()
    told = (tmp_path / "x_summary.md").read_text()
    assert "1 of 2 cells measured (the time was up: run the same command again, which resumes)" in told
    assert [one.status for one in BenchResults.read(tmp_path / "x.json").cells] == ["ok", "skipped"]


def test_ends_first_then_peaks_then_the_rest(recipe: ModuleType, tmp_path: Path) -> None:
    sizes = {
        size: replace(OK.cell, batch_size=size, scenario="single-stream" if size == 1 else "multi-stream")
        for size in (1, 8, 4)
    }
    one = session(recipe, tmp_path, 0.0, *(replace(OK, cell=cell) for cell in sizes.values()))
    jobs = [(job.cell.batch_size, job.accuracy, job.peak) for job in one.jobs(accuracy=True)]
    assert jobs == [(1, False, False), (8, False, False), (1, False, True), (4, False, False), (1, True, True)]


def test_what_fails_alone_is_not_tried_in_batches(recipe: ModuleType, tmp_path: Path) -> None:
    single = replace(OK.cell, batch_size=1, scenario="single-stream")
    one = session(recipe, tmp_path, time.monotonic() + 1e6, replace(OK, cell=single), OK)
    failed = CellResult(single, "failed", f"no kernel{' for' * 200}")
    one.known[single] = failed
    one.run(Journal(tmp_path), tmp_path, accuracy=True)
    assert one.results().cells == (failed, CellResult(OK.cell, "skipped", "one image at a time failed"))
    told = recipe.summary(one.results())
    assert "0 of 1 cells measured" in told and "one image at a time failed" in told
    assert max(map(len, told.splitlines())) < 400


def test_the_summary_of_results(recipe: ModuleType) -> None:
    made = sample_results()
    told = recipe.summary(replace(made, cells=(OK, *made.cells[2:])))
    # 6 and 2 images in 0.05 and 0.03 s, listed.
    assert "| onnxruntime int8 | one orientation |  |\n|  | both, padded | 100.0 |" in told
    assert "- onnxruntime int8: 100 images/s at batch 2, the one batch size measured." in told
    assert "52 of 53 convolutions in less than FP32" in told and "mAP 0.5000" in told
    assert "onnxruntime bf16: skipped: it cannot; Try x" in told


def test_what_differs_from_the_cpu_has_no_speed(recipe: ModuleType) -> None:
    near = Parity("onnxruntime fp32 on the CPU", 3, 40, 1, 1e-4, 2e-3, 0.1, 0.7)
    runs = tuple(replace(run, parity=near) for run in OK.runs)
    far = altered(OK, batch_size=8, status="failed", reason="differs from the CPU: scores by up to 0.5", runs=())
    crashed = altered(far, batch_size=4, reason="it crashed")
    told = recipe.summary(replace(sample_results(), cells=(replace(OK, runs=runs), far, crashed)))
    assert "|  | both, padded | 100.0 | failed | differs |" in told
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
    assert [(one.cell.batch_size, one.cell.order) for one in measured] == [
        (1, "listed"),
        (2, "bucketed"),
        (2, "listed"),
    ]
    assert all(one.peak and one.accuracy for one in measured)
    mixed, uniform = measured[2].runs[0], measured[1].runs[0]
    assert mixed.mixed_batches == sum(mixed.shapes.values()) and not uniform.mixed_batches
    for section in ("the network alone", "gains no more", "Stages from file to boxes", "The hardware meanwhile"):
        assert section in shown
    assert str(tmp_path) not in output.read_text()
    assert {path.name for path in output.parent.iterdir()} == {
        *("checks", "tiny.json", "tiny.csv", "tiny.html", "tiny_summary.md")
    }
    assert (output.parent / "tiny_summary.md").read_text() in shown
