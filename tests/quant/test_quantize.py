"""`gfldeploy quantize` on the demo detector, from images of every kind."""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path

import demo_bundles
import onnx
import pytest

from gfldeploy import demo
from gfldeploy.bundle import Bundle
from gfldeploy.demo.dataset import CLASSES
from gfldeploy.files import sha256
from gfldeploy.inspection import int8_lines
from gfldeploy.quant.calibration import Calibration

pytestmark = [pytest.mark.slow, demo_bundles.needs_quant]


@pytest.fixture(scope="session")
def fp32(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Read it, do not change it."""
    return demo_bundles.exported(tmp_path_factory)


@pytest.fixture(scope="session")
def int8(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Read it, do not change it."""
    return demo_bundles.quantized(tmp_path_factory)


def test_every_convolution_is_calibrated_and_runs_in_int8(fp32: Path, int8: Path) -> None:
    calibration = Calibration.from_dict(json.loads((int8 / "calibration.json").read_text()))
    uses = [node.input[1] for node in onnx.load(str(fp32 / "onnx/model.onnx")).graph.node if node.op_type == "Conv"]
    assert set(calibration.convolutions) == set(uses)
    for name, ranges in calibration.convolutions.items():
        assert len(ranges.inputs) == len(ranges.outputs) == uses.count(name)
    assert max(uses.count(name) for name in uses) == 5, "the head's convolutions, shared by five levels"
    engines = json.loads((int8 / "parity.json").read_text())["engines"]
    for engine in ("onnxruntime", "paddle"):
        assert engines[engine]["convolutions"] == {"int8": len(uses)}


def test_the_bundle_says_what_it_was_made_from(
    fp32: Path, int8: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    pictures = demo_bundles.pictures(tmp_path_factory)
    images = json.loads((int8 / "calibration.json").read_text())["images"]
    assert images == {sha256(path): path.name for path in pictures.iterdir()}
    manifest = Bundle.open(int8).manifest
    assert manifest.precision == "int8"
    assert manifest.provenance["quantized"]["from"] == Bundle.open(fp32).digest
    for name, content in demo_bundles.snapshot(int8).items():
        for path in (int8.parent, fp32, pictures, Path(demo.__file__).parents[2], Path(sys.prefix), "site-packages"):
            assert content is None or os.fsencode(path) not in content, (name, path)


def test_verify_inspect_and_eval(int8: Path, tiny_coco: Path, tmp_path: Path) -> None:
    done = demo_bundles.run("verify", int8, folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "ONNX and Paddle INT8" in done.stdout
    sheet = demo_bundles.run("inspect", int8, folder=tmp_path).stdout
    for line in int8_lines(json.loads((int8 / "parity.json").read_text())):
        assert " convolutions in int8, " in line
        assert line in " ".join(sheet.split())  # the table wraps it
    assert "quantized: from" in sheet
    data = json.loads(tiny_coco.read_text())
    data["categories"] = [{"id": number, "name": name} for number, name in enumerate(CLASSES, start=1)]
    (tmp_path / "annotations.json").write_text(json.dumps(data))
    shutil.copytree(tiny_coco.parent / "images", tmp_path / "images")
    arguments = ("eval", int8, "--data", tmp_path / "annotations.json", "--json")
    for engine in ("onnxruntime", "paddle"):
        done = demo_bundles.run(*arguments, "--engine", engine, folder=tmp_path)
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout)["images"] == len(data["images"])
