"""Distillation on the real demo detector: a few steps, and what they leave behind."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
from calibration_file import calibration_from
from demo_bundles import RunHere, needs_quant
from numpy.typing import NDArray
from recorded_progress import RecordedProgress

from gfldeploy.bundle import Bundle, GraphName
from gfldeploy.engines.base import EngineOptions
from gfldeploy.engines.registry import load_graph
from gfldeploy.errors import EngineError
from gfldeploy.files import read_json
from gfldeploy.quant.distill import refine
from gfldeploy.quant.method import MethodOptions
from gfldeploy.quant.program import write_parameters


def infer(bundle: Bundle, engine: str, image: NDArray[np.float32]) -> Mapping[str, NDArray[np.float32]]:
    graph: GraphName = "onnx" if engine == "onnxruntime" else "paddle_program"
    with load_graph(engine, bundle, EngineOptions("fp32", "cpu", 2), graph) as loaded:
        return loaded.infer({"image": image})


@needs_quant
@pytest.mark.slow
def test_a_few_steps_move_the_weights_a_little_and_alike_in_both_graphs(
    trained: Path, calibrated: Path, pictures: Path, tmp_path: Path
) -> None:
    source, images = Bundle.open(trained), sorted(pictures.iterdir())
    calibration = calibration_from(read_json(calibrated / "calibration.json"))
    progress = RecordedProgress()
    options = MethodOptions(steps=3, progress=progress)
    found = refine(source, images, calibration, tmp_path / "new", options)

    assert progress.steps == [("distilling", done, 3) for done in (1, 2, 3)]
    # What INT8 rounding costs a working detector, in nats a detection: not nothing, and not a broken simulation.
    losses = found.record["distillation"]
    assert 0 < losses["loss_before"] < 1
    assert 0 < losses["loss_after"] < 1
    image = np.random.default_rng(0).standard_normal((1, 3, 96, 128)).astype(np.float32)
    old, new = infer(source, "onnxruntime", image), infer(found.bundle, "onnxruntime", image)
    other = infer(found.bundle, "paddle", image)
    for name in ("scores", "boxes"):
        assert not np.array_equal(old[name], new[name])
        np.testing.assert_allclose(new[name], other[name], rtol=1e-4, atol=1e-3)
    np.testing.assert_allclose(new["scores"], old["scores"], atol=0.05)
    assert [path.name for path in tmp_path.iterdir()] == ["new"]


@needs_quant
@pytest.mark.slow
def test_distill_publishes_what_measures_better(
    trained: Path, pictures: Path, tmp_path: Path, run_here: RunHere
) -> None:
    arguments = ("quantize", trained, "--data", pictures, "--samples", 2, "--algo", "abs_max")
    method = ("--method", "distill", "--distill-steps", 1, "--min-agreement", 0)
    done = run_here(*arguments, *method, "-o", tmp_path / "int8")
    assert done.returncode == 0, done.stderr
    record = json.loads((tmp_path / "int8/parity.json").read_text())
    assert record["distillation"]["steps"] == 1
    tried = {one["algorithm"]: one["engines"] for one in record["algorithms"]["tried"]}
    assert set(tried) == {"abs_max", "abs_max, distilled"}
    worst = {
        name: min((one["detections_found"], -one["score_difference"]) for one in engines.values())
        for name, engines in tried.items()
    }
    assert record["algorithms"]["chosen"] == max(worst, key=worst.__getitem__)
    bundle = Bundle.open(tmp_path / "int8")
    bundle.verify_files()
    assert bundle.manifest.provenance["quantized"]["algorithm"] == record["algorithms"]["chosen"]


@pytest.mark.slow
def test_parameters_of_another_size_are_refused(trained: Path, tmp_path: Path) -> None:
    source = Bundle.open(trained)
    for values in ({"conv2d_0.w_0": np.zeros(3, np.float32)}, {"conv2d_x.w_0": np.zeros(3, np.float32)}):
        with pytest.raises(EngineError, match="no parameter conv2d_"):
            write_parameters(source, values, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_steps_without_the_method_are_refused(tiny_bundle: Path, tmp_path: Path, run_here: RunHere) -> None:
    done = run_here("quantize", tiny_bundle, "--data", tmp_path, "-o", tmp_path / "x", "--distill-steps", 3)
    assert done.returncode == 2
    assert "--distill-steps needs --method distill" in done.stderr
    assert not (tmp_path / "x").exists()
