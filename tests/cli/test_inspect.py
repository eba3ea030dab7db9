"""`gfldeploy inspect` on bundles whose records are written by hand."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from gfldeploy.bundle import Bundle, write_bundle
from gfldeploy.cli import main

COMPARISON = {
    "graph": "onnx_fp16", "engine": "onnxruntime", "batch": 1, "height": 64, "width": 96,
    "max_score_difference": 1e-3, "max_box_difference_px": 0.25,
}  # fmt: skip
FOUND = {"score_difference": 1e-3, "score_difference_max": 0.1, "detections": 10, "detections_found": 0.9}
INT8: dict[str, Any] = {
    "reference": "FP32",
    "engines": {
        "onnxruntime": {**FOUND, "convolutions": {"fp32": 1, "int8": 9}, "not_int8": ["kept in float (1): stem"]},
        "tensorrt, simulated": FOUND,
    },
    "accuracy": {
        "fp32": {"ap": 0.5, "images": 12},
        "engines": {"onnxruntime": {"ap": 0.49}, "tensorrt, simulated": {"ap": 0.48}},
    },
    "speed": {"onnxruntime": {"fp32_ms": 20.0, "int8_ms": 10.0, "ratio": 2.0}},
    "kept_float": [{"name": "stem", "convolutions": 3, "why": "asked for"}],
    "evaluation": {"images": 12},
}
SENSITIVITY = {
    "measure": "one group in INT8",
    "groups": [
        {"name": name, "convolutions": 3, "macs_share": 0.25,
         "score_difference": total / 2, "box_difference": total / 2, "total": total}
        for name, total in (("neck", 0.01), ("head", 0.03))
    ],
}  # fmt: skip


def inspect(
    tiny_bundle: Path, folder: Path, capfd: pytest.CaptureFixture[str], *options: str, **records: dict[str, Any]
) -> str:
    """What the command shows of the tiny bundle with these JSON files; wrapped lines are put together again."""
    source = Bundle.open(tiny_bundle)
    with write_bundle(folder / "bundle") as (directory, manifests):
        shutil.copytree(tiny_bundle / "onnx", directory / "onnx")
        for name, record in records.items():
            (directory / f"{name}.json").write_text(json.dumps(record))
        manifests.append(replace(source.manifest, files={}))
    with pytest.raises(SystemExit) as stopped:
        main(["inspect", str(folder / "bundle"), *options])
    shown, error = capfd.readouterr()
    assert stopped.value.code == 0, error
    return shown if options else " ".join(shown.split())


def test_the_fp16_file(tiny_bundle: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    fp16 = {"tolerance": {"score": 0.01, "box_px": 8.0}, "comparisons": [COMPARISON]}
    shown = inspect(tiny_bundle, tmp_path, capfd, parity={"comparisons": [], "fp16": fp16})
    assert "onnx_fp16 onnxruntime 1x3x64x96 1.0e-03 2.5e-01 Allowed: score 1e-02, box 8 px." in shown


def test_why_there_is_no_fp16_file(tiny_bundle: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    shown = inspect(tiny_bundle, tmp_path, capfd, parity={"comparisons": [], "fp16": {"left_out": "boxes [too] far"}})
    assert "There is no FP16 ONNX file: boxes [too] far" in shown


def test_what_quantisation_recorded(tiny_bundle: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    shown = inspect(tiny_bundle, tmp_path, capfd, parity=INT8, sensitivity=SENSITIVITY)
    assert (
        "onnxruntime: 9 of 10 convolutions in int8, 90.0% of 10 FP32 detections found again, mAP 0.4900 (FP32 0.5000) "
        "on 12 images, 2.00 times as fast as FP32 (10.0 ms, FP32 20.0 ms)"
    ) in shown
    assert "onnxruntime not in int8: kept in float (1): stem" in shown
    assert "tensorrt, simulated: 90.0% of 10 FP32 detections found again, mAP 0.4800" in shown
    assert "kept in float: stem (3 convolutions), asked for" in shown
    assert "evaluated on 12 images" in shown
    assert shown.index("head 3 25.0% 1.5e-02 1.5e-02 3.0e-02") < shown.index("neck 3 25.0% 5.0e-03 5.0e-03 1.0e-02")


def test_json_has_every_record(tiny_bundle: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    facts = json.loads(inspect(tiny_bundle, tmp_path, capfd, "--json", parity=INT8, sensitivity=SENSITIVITY))
    assert (facts["parity"], facts["sensitivity"]) == (INT8, SENSITIVITY)


def test_a_bundle_without_records(tiny_bundle: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    shown = inspect(tiny_bundle, tmp_path, capfd)
    assert "tiny, FP32" in shown and "Sensitivity" not in shown and "FP16" not in shown
