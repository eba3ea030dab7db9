"""`gfldeploy bench` from end to end, over ONNX Runtime and the tiny detector."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from gfldeploy.bench.results import BenchResults
from gfldeploy.cli import main

pytest.importorskip("onnxruntime")


def run(*arguments: object) -> int:
    with pytest.raises(SystemExit) as stopped:
        main(["bench", *map(str, arguments)])
    assert isinstance(stopped.value.code, int)
    return stopped.value.code


def test_everything(tiny_bundle: Path, tiny_coco: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "new" / "results.json"
    quick = ("--min-seconds", 0, "--min-count", 3, "--threads", 1, "--batch-sizes", "1,2", "--rounds", 2)
    assert run(tiny_bundle, "--data", tiny_coco, "-o", output, *quick) == 0
    shown, progress = capfd.readouterr()
    assert "1.000" in shown and "images/s" in shown and "0/1" in shown
    assert "onnxruntime int8: skipped: no INT8 bundle was given; make an INT8 bundle" in shown
    assert progress.index("skip  onnxruntime  fp16") < progress.index("1/5 tiny: onnxruntime fp32 on cpu, batch 1\n")
    assert re.search(r"3/5 tiny: onnxruntime fp32 on cpu, batch 1 \(about \d+ s left\)\n", progress)
    assert re.search(r"5/5 tiny: onnxruntime fp32 on cpu, accuracy \(about \d+ s left\)\n", progress)
    results = BenchResults.read(output)
    assert (results.data.timed_images, results.data.accuracy_images) == (6, 6)
    one, two = (cell for cell in results.cells if cell.status == "ok")
    assert (one.batch_size, two.batch_size) == (1, 2)
    assert one.accuracy == two.accuracy and one.accuracy is not None and one.accuracy.ap == pytest.approx(1)
    assert results.settings.rounds == len(one.runs) == len(two.runs) == 2
    run_one, run_two = one.runs[0], two.runs[0]
    assert len(run_one.samples.latency_ms) >= 3
    assert run_one.convolutions == {"fp32": 1} and run_one.not_low_precision == ()
    # Prepared: 58x96, 96x58, 64x64 and 64x96, padded to multiples of 32; in twos, landscape meets portrait.
    assert 1 < run_one.padding_ratio < run_two.padding_ratio
    assert len(run_one.samples.warmup_ms) == 2 * 3  # three distinct shapes
    assert len(run_one.decode_ms) == len(run_one.preprocess_ms) == len(run_one.postprocess_ms) == 6
    assert str(tiny_bundle.parent) not in output.read_text()


def test_an_existing_output_is_refused_before_anything_else(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "results.json"
    output.write_text("mine")
    assert run(tmp_path / "no bundle", "--data", tmp_path / "no data", "-o", output) == 2
    error = capfd.readouterr().err
    assert error.startswith("Error:") and "--force" in error and error.count("\n") == 1
    assert output.read_text() == "mine"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--engines", "onnxruntime,tensorflow"), "'tensorflow' is not one of paddle, onnxruntime"),
        (("--precisions", "int4"), "'int4' is not one of fp32, fp16, bf16, int8"),
        (("--batch-sizes", "1,0"), "'0' is not a whole number from 1"),
        (("--batch-sizes", "1;2"), "'1;2' is not a whole number from 1"),
        (("--batch-sizes", ""), "'' is not a whole number from 1"),
        (
            ("--precisions", "int8", "--engines", "onnxruntime"),
            "nothing to run: onnxruntime int8 on cpu: no INT8",
        ),
        (("--threads", "0"), "0 is not in the range"),
        (("--output", "."), "is a directory"),
        (("--images", "nowhere"), "nowhere is not a directory"),
    ],
)
def test_bad_values_are_one_line(
    arguments: tuple[str, ...],
    message: str,
    tiny_bundle: Path,
    tiny_coco: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run(tiny_bundle, "--data", tiny_coco, *arguments) == 2
    error = capfd.readouterr().err.splitlines()[-1]
    assert error.startswith("Error:") and message in error
    assert list(tmp_path.iterdir()) == []


def test_classes_that_do_not_fit_are_found_before_measuring(
    tiny_bundle: Path, tiny_coco: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    source = json.loads(tiny_coco.read_text())
    source["categories"] = [*source["categories"][:1], {"id": 8, "name": "cat"}, {"id": 9, "name": "dog"}]
    other = tmp_path / "other.json"
    other.write_text(json.dumps(source))
    arguments = (tiny_bundle, "--data", other, "--images", tiny_coco.parent / "images", "-o", tmp_path / "r.json")
    assert run(*arguments) == 2
    error = capfd.readouterr().err
    assert "ball" in error and "--no-accuracy" in error


def test_no_cell_measured(
    tiny_bundle: Path, tiny_coco: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "results.json"
    arguments = ("--engines", "onnxruntime", "--precisions", "fp32", "--batch-sizes", 1, "--cell-timeout", 0.001)
    assert run(tiny_bundle, "--data", tiny_coco, *arguments, "-o", output) == 2
    shown, error = capfd.readouterr()
    assert "onnxruntime fp32 batch 1: failed: it took longer than 0.001 s" in shown
    assert error.splitlines()[-1].startswith("Error: no cell could be measured; onnxruntime fp32: it took longer")
    assert [cell.status for cell in BenchResults.read(output).cells] == ["failed"]
