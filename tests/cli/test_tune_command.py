"""`gfldeploy tune` on a tiny detector."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from schema_checks import check_schema

from gfldeploy.bench.results import BenchResults
from gfldeploy.bundle import Bundle
from gfldeploy.cli import main
from gfldeploy.tune.deploy_file import Deploy

pytest.importorskip("onnxruntime")

QUICK = (
    *("--engines", "onnxruntime", "--precisions", "fp32", "--batch-sizes", "1,2", "--threads", "1", "--rounds", 1),
    *("--min-seconds", 0, "--look-seconds", 0, "--min-count", 3),
)


def run(command: str, *arguments: object) -> int:
    with pytest.raises(SystemExit) as stopped:
        main([command, *map(str, arguments)])
    assert isinstance(stopped.value.code, int)
    return stopped.value.code


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.chdir(tmp_path)
    yield


@pytest.mark.slow
def test_a_choice_with_its_evidence(
    tiny_bundle: Path, tiny_coco: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    # At 32x48 the detector's boxes are twice as large as they should be; at 60x90 padding takes what it would gain.
    bounds = ("--max-latency-ms", 5000, "--max-drop", 0.01, "--input-sizes", "60x90,32x48")
    assert run("tune", tiny_bundle, "--data", tiny_coco, *QUICK, *bounds) == 0
    shown, progress = capfd.readouterr()
    path = tmp_path / "deploy.yml"
    deploy = Deploy.read(path)
    assert shown.startswith("Deploy tiny in ONNX Runtime (FP32), ") and deploy.summary in shown
    assert "9 configurations of 3 models" in progress and "next: a first look at each" in progress
    choice, sizes = deploy.choice, deploy.sizes
    assert sizes is not None and (sizes.own_size, sizes.speed, sizes.ap_less) == ((64, 96), None, None)
    (own, nothing), (small, lost) = sizes.drops
    assert (own, nothing, small) == ((64, 96), 0, (32, 48)) and lost > 0.5
    assert f"32x48 would lose {lost:.4f} mAP against FP32." in deploy.summary
    assert (choice.cell.engine, choice.cell.precision, choice.cell.threads) == ("onnxruntime", "fp32", 1)
    assert choice.cell.input_size is None
    assert choice.cell.bundle.digest == Bundle.open(tiny_bundle).digest
    assert deploy.bundle_path(path).resolve() == tiny_bundle
    assert (choice.evidence.ap_drop, choice.evidence.ap_images) == (0, 6) and choice.evidence.ap == pytest.approx(1)
    assert (
        choice.evidence.images_per_s is not None
        and choice.evidence.images_per_s.value > 0
        and choice.evidence.memory_mb > 0
    )
    assert deploy.runner_up is not None and deploy.knee is not None
    assert deploy.bounds.max_latency_ms == 5000
    assert not path.with_name("deploy.yml.unfinished").exists()
    assert str(tmp_path) not in yaml.safe_dump(deploy.to_dict())
    check_schema("deploy", path)
    assert run("tune", "--check", path) == 0
    assert "holds for this machine" in capfd.readouterr().out
    data = yaml.safe_load(path.read_text())
    data["machine"]["cpu"] = "Abacus"
    path.write_text(yaml.safe_dump(data))
    assert run("tune", "--check", path) == 2
    assert "made on another machine: CPU model (Abacus, " in capfd.readouterr().err
    data["choice"]["cell"]["bundle"]["digest"] = "ab" * 32
    path.write_text(yaml.safe_dump(data))
    assert run("tune", "--check", path, tiny_bundle) == 2
    assert "is not the bundle that was tuned" in capfd.readouterr().err


@pytest.mark.slow
def test_bounds_that_nothing_keeps_and_then_others(
    tiny_bundle: Path, tiny_coco: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    arguments = (tiny_bundle, "--data", tiny_coco, *QUICK, "--no-accuracy")
    assert run("tune", *arguments, "--max-latency-ms", 0.0001) == 2
    error = capfd.readouterr().err.splitlines()[-1]
    assert error.startswith("Error: no configuration keeps the bounds: the nearest is tiny in ONNX Runtime (FP32), ")
    assert "% above 0.0001" in error
    assert not (tmp_path / "deploy.yml").exists()
    kept = list((tmp_path / "deploy.yml.unfinished").glob("*.json"))
    assert len(kept) == 1, "larger batches take longer still"
    assert run("tune", *arguments, "--max-latency-ms", 5000) == 0
    first = capfd.readouterr().err.split("next: a first look")[1].splitlines()[1]
    assert "batch 1" not in first, "it is in the journal"


@pytest.mark.slow
def test_results_of_bench_are_reused(
    tiny_bundle: Path, tiny_coco: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    bench = ("--engines", "onnxruntime", "--precisions", "fp32", "--batch-sizes", "1,2", "--threads", 1, "--rounds", 1)
    quick = ("--min-seconds", 0, "--min-count", 3, "--no-peak")
    scenarios = ("--scenarios", "single-stream,multi-stream,offline")
    assert run("bench", tiny_bundle, "--data", tiny_coco, *bench, *quick, *scenarios) == 0
    capfd.readouterr()
    arguments = (tiny_bundle, "--data", tiny_coco, *QUICK, "--results", "results.json")
    assert run("tune", *arguments) == 0
    progress = capfd.readouterr().err
    assert "3 of them known from --results" in progress and "next:" not in progress
    assert "accuracy" not in progress, "it is known too"
    assert Deploy.read(Path("deploy.yml")).search.reused == 3
    content = json.loads(Path("results.json").read_text())
    content["machine"]["cpu"] = "Abacus"
    Path("results.json").write_text(json.dumps(content))
    assert BenchResults.read(Path("results.json")).machine.cpu == "Abacus"
    assert run("tune", *arguments, "--force") == 2
    assert "results.json is measured on another machine: CPU model (Abacus" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("BUNDLE",), "Missing option '--data'"),
        (("--data", "DATA"), "Missing argument 'BUNDLE...'"),
        (("BUNDLE", "--data", "DATA", "--max-drop", "0.01", "--no-accuracy"), "--max-drop needs mAP"),
        (("BUNDLE", "--data", "DATA", "--max-drop", "1.5"), "1.5 is not in the range"),
        (("BUNDLE", "--data", "DATA", "--input-sizes", "32x48"), "--input-sizes needs --max-drop: without it the "),
        (("BUNDLE", "--data", "DATA", "--orders", "random"), "'random' is not one of listed, bucketed"),
        (("BUNDLE", "--data", "DATA", "-o", "."), "is a directory"),
        (("BUNDLE", "--data", "DATA", "--precisions", "int8"), "nothing to run: paddle int8 on cpu: "),
        (("BUNDLE", "--data", "DATA", "--results", "none.json"), "none.json cannot be read"),
        (("nowhere", "--data", "DATA"), "nowhere is not a directory"),
        (("--check", "none.yml"), "none.yml cannot be read"),
    ],
)
def test_mistakes_are_one_line(
    arguments: tuple[str, ...],
    message: str,
    tiny_bundle: Path,
    tiny_coco: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    words = {"BUNDLE": tiny_bundle, "DATA": tiny_coco}
    assert run("tune", *(words.get(word, word) for word in arguments)) == 2
    error = capfd.readouterr().err.splitlines()[-1]
    assert error.startswith("Error:") and message in error
    assert list(tmp_path.iterdir()) == []


def test_an_existing_output_is_not_replaced(tiny_bundle: Path, tiny_coco: Path, tmp_path: Path) -> None:
    (tmp_path / "deploy.yml").write_text("mine")
    assert run("tune", tiny_bundle, "--data", tiny_coco) == 2
    assert (tmp_path / "deploy.yml").read_text() == "mine"
