"""A bundle says what one picture has to become: verify, other engines and programs without gfldeploy are held to it."""

from __future__ import annotations

import json
import runpy
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import cv2
import demo_bundles
import numpy as np
import pytest

from gfldeploy.bundle import GOLDEN, Bundle
from gfldeploy.engines.base import EngineOptions
from gfldeploy.engines.registry import load_graph, open_engine
from gfldeploy.errors import ParityError
from gfldeploy.export.golden import PICTURE, compare_golden, golden_picture, read_golden, write_golden
from gfldeploy.export.parity import TOLERANCE
from gfldeploy.inspection import verify
from gfldeploy.nms import pairwise_iou

pytest.importorskip("onnxruntime")

EXAMPLE = demo_bundles.ROOT / "examples/python/detect.py"
# What a machine without gfldeploy and its packages lacks.
ALONE = """
import runpy, sys
for name in ("gfldeploy", "cv2", "onnx", "paddle", "openvino"):
    sys.modules[name] = None
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def example(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-I", "-c", ALONE, *map(str, (EXAMPLE, *arguments))],
        capture_output=True,
        text=True,
        check=False,
    )


def printed_by_the_example(bundle: Path, least_score: float) -> list[tuple[str, float, list[float]]]:
    """Class, score and box of each line."""
    ended = example(bundle / "onnx/end_to_end.onnx", bundle / PICTURE, least_score)
    assert ended.returncode == 0, ended.stderr
    rows = [line.split() for line in ended.stdout.splitlines()]
    return [(name, float(score), [float(one) for one in box]) for name, score, *box in rows]


def check_example(bundle: Path, least_score: float) -> None:
    """It prints the golden detections, with 4 and 2 digits."""
    golden = json.loads((bundle / GOLDEN).read_text())["detections"]
    expected = [one for one in golden if one["score"] >= least_score + 0.01]
    found = printed_by_the_example(bundle, least_score)
    assert expected
    for one in expected:
        same = [row for row in found if row[0] == one["class"] and abs(row[1] - one["score"]) < 1e-3]
        boxes = np.array([row[2] for row in same], np.float32).reshape(-1, 4)
        assert pairwise_iou(np.array([one["box"]], np.float32), boxes).max(initial=0) > 0.995


def test_verify_compares_the_file_and_the_engines_with_what_was_expected(tiny_whole: Path) -> None:
    pytest.importorskip("openvino")
    lines = verify(tiny_whole, threads=1)
    assert f"{PICTURE} becomes the tensor that it became where the bundle was made" in lines
    for line in ("onnxruntime finds", "openvino finds", "end_to_end: onnxruntime finds", "end_to_end: openvino finds"):
        (found,) = (one for one in lines if one.startswith(line))
        assert "1 of 1 expected detections" in found


def test_the_example_needs_nothing_of_gfldeploy(tiny_whole: Path) -> None:
    check_example(tiny_whole, 0.5)


def test_the_example_reads_16_bit_grey(tiny_whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main = runpy.run_path(str(EXAMPLE))["main"]
    grey = cv2.imread(str(tiny_whole / PICTURE), cv2.IMREAD_GRAYSCALE)
    assert grey is not None
    printed = []
    for pixels in (grey, grey.astype(np.uint16) * 256 + 77):
        cv2.imwrite(str(tmp_path / "grey.png"), pixels)
        main(tiny_whole / "onnx/end_to_end.onnx", tmp_path / "grey.png", 0.0)
        printed.append(capsys.readouterr().out)
    assert printed[0] == printed[1] != ""


def test_the_example_says_what_it_needs(tiny_whole: Path) -> None:
    assert len(EXAMPLE.read_text().splitlines()) < 65
    for arguments in ((), (tiny_whole / "onnx/model.onnx", tiny_whole / PICTURE)):
        ended = example(*arguments)
        assert (ended.returncode, ended.stdout) == (1, "")
        (line,) = ended.stderr.splitlines()
        assert line.startswith("Error: give ") and "end_to_end.onnx" in line


def test_a_port_may_differ_by_what_verify_allows(tiny_whole: Path, tmp_path: Path) -> None:
    """What golden.json says is what `compare_golden` goes by, in FP32 and in INT8."""
    bundle = Bundle.open(shutil.copytree(tiny_whole, tmp_path / "moved"))
    picture, _ = read_golden(bundle)
    for precision in ("fp32", "int8"):
        rounding = replace(bundle, manifest=replace(bundle.manifest, precision=precision))
        with open_engine("onnxruntime", bundle, EngineOptions()) as engine:
            write_golden(rounding, picture, engine, TOLERANCE)
            record = json.loads((bundle.directory / GOLDEN).read_text())
            box, allowed = record["detections"][0]["box"], record["tolerance"]["box_px"]
            for factor, holds in ((0.9, True), (1.1, False)):
                record["detections"][0]["box"] = [corner + factor * allowed for corner in box]
                (bundle.directory / GOLDEN).write_text(json.dumps(record))
                if holds:
                    assert "1 of 1 expected" in compare_golden(rounding, picture, engine)
                else:
                    with pytest.raises(ParityError, match="does not give 1 of the 1"):
                        compare_golden(rounding, picture, engine)


def test_another_detection_than_expected(tiny_whole: Path, tmp_path: Path) -> None:
    bundle = Bundle.open(shutil.copytree(tiny_whole, tmp_path / "spoilt"))
    record = json.loads((bundle.directory / GOLDEN).read_text())
    record["detections"][0]["box"][2] += 5
    (bundle.directory / GOLDEN).write_text(json.dumps(record))
    picture, _ = read_golden(bundle)
    with (
        load_graph("onnxruntime", bundle, EngineOptions(), "end_to_end") as engine,
        pytest.raises(ParityError, match="does not give 1 of the 1 detections that onnxruntime gave"),
    ):
        compare_golden(bundle, picture, engine)


def test_numbers_that_another_version_would_give(tiny_whole: Path, tmp_path: Path) -> None:
    bundle = Bundle.open(shutil.copytree(tiny_whole, tmp_path / "spoilt"))
    record = json.loads((bundle.directory / GOLDEN).read_text())
    record["resized"]["sha256"] = "0" * 64
    (bundle.directory / GOLDEN).write_text(json.dumps(record))
    assert "is resized otherwise" in read_golden(bundle)[1]


def test_a_picture_of_the_users_is_made_small() -> None:
    given = np.random.default_rng(0).integers(0, 256, (600, 1024, 3)).astype(np.uint8)
    assert golden_picture(given).shape == (300, 512, 3)
    assert golden_picture(given[:300, :400]) is not None and golden_picture(given[:300, :400]).shape == (300, 400, 3)


@pytest.mark.slow
def test_the_example_prints_the_golden_detections_of_the_demo(trained: Path) -> None:
    check_example(trained, 0.1)


@pytest.mark.slow
def test_the_example_prints_int8_within_the_tolerance(calibrated: Path) -> None:
    record = json.loads((calibrated / GOLDEN).read_text())
    expected, allowed = record["detections"], record["tolerance"]
    found = printed_by_the_example(calibrated, 0.0)
    missing = [
        one
        for one in expected
        if not any(
            name == one["class"]
            and abs(score - one["score"]) <= allowed["score"]
            and max(abs(ours - corner) for ours, corner in zip(box, one["box"], strict=True)) <= allowed["box_px"]
            for name, score, box in found
        )
    ]
    assert expected and len(missing) <= allowed["missing"] * len(expected), missing
