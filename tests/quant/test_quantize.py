"""`gfldeploy quantize` on the demo detector, from images of every kind."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import sys
from pathlib import Path

import demo_bundles
import numpy as np
import onnx
import pytest
from calibration_file import calibration_from
from demo_bundles import RunHere
from schema_checks import check_schema

from gfldeploy import demo
from gfldeploy.bundle import Bundle
from gfldeploy.demo.dataset import CLASSES
from gfldeploy.files import sha256
from gfldeploy.inspection import int8_lines
from gfldeploy.quant.measurement import int8_engines

pytestmark = [pytest.mark.slow, demo_bundles.needs_quant]


@pytest.fixture(scope="session")
def fp32(exported: Path) -> Path:
    """Read it, do not change it."""
    return exported


@pytest.fixture(scope="session")
def int8(quantized: Path) -> Path:
    """Read it, do not change it."""
    return quantized


def test_every_convolution_is_calibrated_and_runs_in_int8(fp32: Path, int8: Path) -> None:
    calibration = calibration_from(json.loads((int8 / "calibration.json").read_text()))
    uses = [node.input[1] for node in onnx.load(str(fp32 / "onnx/model.onnx")).graph.node if node.op_type == "Conv"]
    assert set(calibration.convolutions) == set(uses)
    for name, ranges in calibration.convolutions.items():
        assert len(ranges.inputs) == len(ranges.outputs) == uses.count(name)
    assert max(uses.count(name) for name in uses) == 5, "the head's convolutions, shared by five levels"
    (scores,) = (name for name, path in Bundle.open(fp32).layers().items() if path == "head.gfl_head_cls")
    assert all(one.high >= 4.6 for one in calibration.convolutions[scores].outputs), "scores up to 0.99 on every level"
    engines = json.loads((int8 / "parity.json").read_text())["engines"]
    for engine in int8_engines():
        assert engines[engine]["convolutions"] == {"int8": len(uses)}


def test_the_bundle_says_what_it_was_made_from(fp32: Path, int8: Path, pictures: Path) -> None:
    for name in ("manifest", "calibration", "parity", "layers"):
        check_schema(name, int8 / f"{name}.json")
    images = json.loads((int8 / "calibration.json").read_text())["images"]
    assert images == {sha256(path): path.name for path in pictures.iterdir()}
    manifest = Bundle.open(int8).manifest
    assert manifest.precision == "int8"
    assert manifest.provenance["quantized"]["from"] == Bundle.open(fp32).digest
    for name, content in demo_bundles.snapshot(int8).items():
        for path in (int8.parent, fp32, pictures, Path(demo.__file__).parents[2], Path(sys.prefix), "site-packages"):
            assert content is None or os.fsencode(path) not in content, (name, path)


def test_verify_inspect_and_eval(int8: Path, tiny_coco: Path, tmp_path: Path, run_here: RunHere) -> None:
    done = run_here("verify", int8)
    assert done.returncode == 0, done.stderr
    assert "paddle and onnxruntime in INT8" in done.stdout
    sheet = run_here("inspect", int8).stdout
    for line in int8_lines(json.loads((int8 / "parity.json").read_text())):
        assert " convolutions in int8, " in line or line.startswith("tensorrt, simulated: ") or ", plain: " in line
        assert line in " ".join(sheet.split())  # the table wraps it
    assert "quantized: from" in sheet
    data = json.loads(tiny_coco.read_text())
    data["categories"] = [{"id": number, "name": name} for number, name in enumerate(CLASSES, start=1)]
    (tmp_path / "annotations.json").write_text(json.dumps(data))
    shutil.copytree(tiny_coco.parent / "images", tmp_path / "images")
    arguments = ("eval", int8, "--data", tmp_path / "annotations.json", "--json")
    for engine in int8_engines():
        done = run_here(*arguments, "--engine", engine)
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout)["images"] == len(data["images"])


# --- what stays in float ----------------------------------------------------------------------------------------------


def write_lopsided(path: Path) -> None:
    """The demo detector's checkpoint with one block that computes the same, but not in eight bits.

    Four channels between its convolutions are 300 times as large and their weights behind 300 times smaller, so that
    the one threshold of that tensor leaves nothing of the others. `backbone.stage4` is where.
    """
    state = pickle.loads(demo.weights_path().read_bytes(), encoding="latin1")
    block = "backbone.stage4.1"
    for name, axis, factor in (
        ("conv1.norm.weight", 0, 300),
        ("conv1.norm.bias", 0, 300),
        ("conv2.conv.weight", 1, 1 / 300),
    ):
        array = state[f"{block}.{name}"] = np.array(state[f"{block}.{name}"])
        np.moveaxis(array, axis, 0)[:4] *= factor
    path.write_bytes(pickle.dumps(state, protocol=2))


@pytest.fixture(scope="module")
def lopsided(needs_ppdet: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("lopsided")
    write_lopsided(folder / "weights.pdparams")
    demo_bundles.export_here(folder / "weights.pdparams", folder / "fp32")
    return folder / "fp32"


def test_what_breaks_in_int8_goes_back_to_float(
    lopsided: Path, labelled: Path, tmp_path: Path, run_here: RunHere
) -> None:
    arguments = ("quantize", lopsided, "--data", labelled / "calib/annotations.json", "--samples", 4)
    # Few images make a coarse measure: what is wanted here is that the broken part is found.
    measured = ("--eval-data", labelled / "val/annotations.json", "--max-drop", 0.03)
    done = run_here(*arguments, "--algo", "abs_max", *measured, "-o", tmp_path / "int8")
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{tmp_path / 'int8'}\n"
    assert "more than the 0.03 of --max-drop" in done.stderr
    assert "kept in float to hold the gate: backbone.stage4" in done.stderr
    parity = json.loads((tmp_path / "int8/parity.json").read_text())
    assert parity["fallback"]["before"]["worst_ap"] < parity["accuracy"]["fp32"]["ap"] - 0.1
    for one in parity["accuracy"]["engines"].values():
        assert one["ap"] >= parity["accuracy"]["fp32"]["ap"] - 0.03
    plain = {f"{name}, plain" for name in int8_engines() if name != "paddle"}
    assert set(parity["accuracy"]["engines"]) == {*int8_engines(), *plain, "tensorrt, simulated"}
    assert parity["kept_float"] == [{"name": "backbone.stage4", "convolutions": 5, "why": "to hold the gate"}]
    for name in int8_engines():
        ran = parity["engines"][name]["convolutions"]
        assert 5 <= ran["fp32"] <= 6, (name, "what was kept, and at most one that it took along")
        assert parity["speed"][name].keys() >= {"fp32_ms", "int8_ms", "ratio", "all_int8_ms"}
    ranking = json.loads((tmp_path / "int8/sensitivity.json").read_text())["groups"]
    check_schema("sensitivity", tmp_path / "int8/sensitivity.json")
    assert ranking[0]["name"] == "backbone.stage4"
    assert ranking[0]["total"] > 5 * ranking[1]["total"]
    calibrated = calibration_from(json.loads((tmp_path / "int8/calibration.json").read_text()))
    layers = Bundle.open(tmp_path / "int8").layers()
    assert layers == Bundle.open(lopsided).layers()
    assert {".".join(layers[use.weight].split(".")[:2]) for use in calibrated.kept_float} == {"backbone.stage4"}


def test_keep_float_and_sensitivity_without_labels(
    lopsided: Path, labelled: Path, tmp_path: Path, run_here: RunHere
) -> None:
    data = ("--data", labelled / "calib/annotations.json", "--samples", 4)
    arguments = ("quantize", lopsided, *data, "--algo", "abs_max", "--sensitivity")
    keep = ("--keep-float", "backbone.stage4.1.*", "--keep-float", "backbone.stem*")
    done = run_here(*arguments, *keep, "-o", tmp_path / "int8")
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{tmp_path / 'int8'}\n"
    parity = json.loads((tmp_path / "int8/parity.json").read_text())
    assert {(one["name"], one["why"]) for one in parity["kept_float"]} == {
        ("backbone.stem.conv", "asked for"),
        ("backbone.stage4.1.conv1.conv", "asked for"),
        ("backbone.stage4.1.conv2.conv", "asked for"),
    }
    assert "fallback" not in parity
    ranking = {one["name"]: one for one in json.loads((tmp_path / "int8/sensitivity.json").read_text())["groups"]}
    assert "backbone.stem" not in ranking
    assert ranking["backbone.stage4"]["convolutions"] == 3
    assert all(f" {name} " in done.stderr for name in ranking), "each has its row"
    shown = demo_bundles.refusal(run_here(*arguments, "--keep-float", "backbone.stage9", "-o", tmp_path / "out"))
    assert "no layer and no group is called backbone.stage9" in shown
    shown = demo_bundles.refusal(run_here(*arguments, "--keep-float", "*", "-o", tmp_path / "out"))
    assert "--keep-float leaves no convolution to run in INT8" in shown
