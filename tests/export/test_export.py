"""`gfldeploy export` on the demo detector: what it publishes is right, says nothing of this machine, and runs."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import cv2
import demo_bundles
import numpy as np
import onnx
import pytest
from demo_bundles import RunHere
from onnx import numpy_helper
from schema_checks import check_schema

from gfldeploy import demo
from gfldeploy.bundle import Bundle
from gfldeploy.demo.dataset import CLASSES
from gfldeploy.engines.base import EngineOptions
from gfldeploy.engines.dependencies import require
from gfldeploy.engines.registry import open_engine
from gfldeploy.export import parity
from gfldeploy.export.config import load_detector_config
from gfldeploy.export.model_builder import build_model
from gfldeploy.export.weights import set_random_weights

pytestmark = [pytest.mark.slow, demo_bundles.needs_export]


@pytest.fixture(scope="session")
def bundle(exported: Path) -> Path:
    """Read it, do not change it."""
    return exported


def rehash(directory: Path) -> None:
    """Let the manifest agree with the files again, as somebody who tampers with them would."""
    manifest = json.loads((directory / "manifest.json").read_text())
    for name, record in manifest["files"].items():
        content = (directory / name).read_bytes()
        record |= {"sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content)}
    (directory / "manifest.json").write_text(json.dumps(manifest))


def test_the_bundle_is_described_and_verified(bundle: Path, run_here: RunHere) -> None:
    described = run_here("inspect", bundle, "--json", "--size", "64x128")
    facts = json.loads(described.stdout)
    check_schema("inspect", facts)
    for name in ("manifest", "parity", "layers", "golden"):
        check_schema(name, bundle / ("golden/golden.json" if name == "golden" else f"{name}.json"))
    assert facts["classes"] == list(CLASSES)
    assert facts["inputs"] == ["image float32 [?, 3, ?, ?]"]
    onnx_files = {"onnx", "onnx_fp16", "end_to_end", "end_to_end_fp16"}
    assert set(facts["size_on_disk_mb"]) == {"paddle", "paddle_program", "paddledetection"} | onnx_files
    by_itself = {(one["graph"], one["engine"], one["reference"], one["batch"]) for one in facts["parity"]["end_to_end"]}
    eager = {one for one in by_itself if one[2].startswith("PaddleDetection")}
    assert {one[:2] for one in eager} == {("end_to_end", "onnxruntime"), ("end_to_end", "openvino")}
    assert {(one[0], one[3]) for one in by_itself - eager} == {
        (graph, batch) for graph in ("end_to_end", "end_to_end_fp16") for batch in (1, 3)
    }
    assert all(one["missing"] == 0 for one in facts["parity"]["end_to_end"])
    assert facts["parameters"] < 1_900_000  # as gfl_demo.yml promises
    assert facts["macs"]["at"] == "64x128"
    compared = {(one["graph"], one["batch"], one["width"]) for one in facts["parity"]["comparisons"]}
    graphs, sizes = ("paddle", "paddle_program", "onnx"), ((1, 256), (3, 416), (1, 1344))
    assert compared == {(graph, *size) for graph in graphs for size in sizes}
    sheet = run_here("inspect", bundle).stdout
    assert max(map(len, sheet.splitlines())) <= 120
    for text in (
        "resize to 320x512 keeping the aspect ratio",
        "6: disc, ring",
        "weights: random_seed 0",
        "3x3x256x416",
    ):
        assert text in sheet
    verified = run_here("verify", bundle)
    assert verified.returncode == 0, verified.stderr
    assert "files are as they were made" in verified.stdout


def test_every_convolution_is_named_by_its_layer(bundle: Path) -> None:
    layers = Bundle.open(bundle).layers()
    nodes = onnx.load(str(bundle / "onnx/model.onnx")).graph.node
    assert list(layers) == list(dict.fromkeys(node.input[1] for node in nodes if node.op_type == "Conv"))
    paths = list(layers.values())
    assert len(set(paths)) == len(paths)
    assert paths[0] == "backbone.stem.conv"
    assert paths[-1] == "head.gfl_head_reg"
    assert "head.conv_feat.fcos_head_reg_tower_conv_1.conv" in paths


def test_nothing_in_the_bundle_names_this_machine(bundle: Path) -> None:
    checkout, environment = Path(demo.__file__).parents[2], Path(sys.prefix)
    for name, content in demo_bundles.snapshot(bundle).items():
        for path in (bundle.parent, checkout, environment, "site-packages"):
            assert content is None or os.fsencode(path) not in content, (name, path)
    provenance = Bundle.open(bundle).manifest.provenance
    assert provenance["weights"] == {"random_seed": demo_bundles.SEED}
    assert provenance["command"].startswith("gfldeploy export -c gfl_demo.yml --random-weights 0")


def test_fixed_input_size_takes_both_orientations_with_other_nms(
    tiny_coco: Path, tmp_path: Path, run_here: RunHere
) -> None:
    output = tmp_path / "fixed"
    arguments = ("export", "-c", demo.config_path(), "--random-weights", 1, "--input-shape", "192x256", "-o", output)
    done = run_here(*arguments, "--keep-top-k", 7, "--score-threshold", 0.01, "--nms-threshold", 0.4)
    assert done.returncode == 0, done.stderr
    manifest = Bundle.open(output).manifest
    assert manifest.inputs[0].shape == (None, 3, 192, 256)
    assert (manifest.nms.keep_top_k, manifest.nms.score_threshold, manifest.nms.nms_threshold) == (7, 0.01, 0.4)
    assert any("keep_top_k 7 (config: 100)" in note for note in manifest.notes)
    boxes = next(one for one in onnx.load(str(output / "onnx/end_to_end.onnx")).graph.output if one.name == "boxes")
    assert boxes.type.tensor_type.shape.dim[1].dim_value == 7
    data = json.loads(tiny_coco.read_text())
    data["categories"] = [{"id": number, "name": name} for number, name in enumerate(CLASSES, start=1)]
    (tmp_path / "annotations.json").write_text(json.dumps(data))
    shutil.copytree(tiny_coco.parent / "images", tmp_path / "images")
    assert {image["height"] > image["width"] for image in data["images"]} == {True, False}
    for engine, *more in (("onnxruntime",), ("paddle",), ("onnxruntime", "--end-to-end")):
        data_here = ("--data", tmp_path / "annotations.json", "--batch-size", 4)
        done = run_here("eval", output, *data_here, "--engine", engine, "--json", *more)
        assert done.returncode == 0, done.stderr
        result = json.loads(done.stdout)
        assert result["images"] == len(data["images"])
        assert 0 < result["detections"] <= 7 * len(data["images"])


_RUN_NMS_GRAPH = """
import json, sys
import numpy as np
from paddle import inference
config = inference.Config(sys.argv[1] + "/model.json", sys.argv[1] + "/model.pdiparams")
config.disable_gpu()
config.disable_glog_info()
predictor = inference.create_predictor(config)
image = np.load(sys.argv[2])
feeds = {"im_shape": np.float32([[192, 256]] * 2), "image": image, "scale_factor": np.float32([[0.5, 0.5]] * 2)}
assert sorted(predictor.get_input_names()) == sorted(feeds)
for name, value in feeds.items():
    predictor.get_input_handle(name).copy_from_cpu(value)
predictor.run()
outputs = [predictor.get_output_handle(name).copy_to_cpu() for name in predictor.get_output_names()]
np.savez(sys.argv[3], detections=outputs[0], counts=outputs[1])
"""


def test_paddledetections_graph_runs_as_its_deploy_tools_run_it(bundle: Path, tmp_path: Path) -> None:
    directory = bundle / "paddledetection"
    assert {path.name for path in directory.iterdir()} == {"infer_cfg.yml", "model.json", "model.pdiparams"}
    image = cv2.resize(np.random.default_rng(0).random((24, 32, 3), np.float32) * 4 - 2, (256, 192))
    np.save(tmp_path / "image.npy", np.stack([image.transpose(2, 0, 1)] * 2))
    arguments = [sys.executable, "-c", _RUN_NMS_GRAPH, directory, tmp_path / "image.npy", tmp_path / "out.npz"]
    done = subprocess.run(list(map(str, arguments)), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    outputs = np.load(tmp_path / "out.npz")
    detections, counts = outputs["detections"], outputs["counts"]
    assert counts.shape == (2,) and counts[0] == counts[1] > 0
    assert detections.shape == (counts.sum(), 6)
    nms = Bundle.open(bundle).manifest.nms
    assert counts[0] <= nms.keep_top_k
    assert set(detections[:, 0]) <= set(range(len(CLASSES)))
    assert (detections[:, 1] > nms.score_threshold).all() and (detections[:, 1] <= 1).all()
    np.testing.assert_allclose(detections[: counts[0]], detections[counts[0] :], atol=1e-3)


def test_another_input_size_gives_what_paddledetection_gives(bundle: Path) -> None:
    """Down to a size with fewer anchors than the graph chooses."""
    from paddle.utils import unique_name

    with unique_name.guard():
        config = load_detector_config(demo.config_path())
        detector = build_model(config)
        set_random_weights(detector, 0)
    own = Bundle.open(bundle)
    picture = np.random.default_rng(0).integers(0, 256, (300, 400, 3), np.uint8)
    with open_engine("onnxruntime", own, EngineOptions(threads=1)) as engine:
        for size, shape in (((256, 384), (256, 352)), ((96, 128), (96, 128))):
            preprocess = own.at_size(size).manifest.preprocess
            images, _ = preprocess.batch_of([picture])
            assert images.shape[2:] == shape
            reference = parity.eager_outputs(detector, images)
            parity.check([parity.compare("onnx", engine, images, reference)], parity.tolerance(detector, [images]))
    assert own.manifest.candidates is not None and reference["scores"].shape[1] < own.manifest.candidates


# --- sabotage ---------------------------------------------------------------------------------------------------------


def test_verify_catches_one_percent(bundle: Path, tmp_path: Path, run_here: RunHere) -> None:
    copy = Path(shutil.copytree(bundle, tmp_path / "copy"))
    path = copy / "onnx" / "model.onnx"
    model = onnx.load(str(path))
    weights = {node.input[1] for node in model.graph.node if node.op_type == "Conv"}
    tensor = next(tensor for tensor in model.graph.initializer if tensor.name in weights)
    tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor) * np.float32(1.01), tensor.name))
    onnx.save(model, str(path))
    assert "has changed" in demo_bundles.refusal(run_here("verify", copy))
    rehash(copy)
    message = demo_bundles.refusal(run_here("verify", copy))
    assert "the onnx graph in onnxruntime differs from the reference" in message


def test_export_catches_a_wrong_stride(tmp_path: Path, run_here: RunHere, monkeypatch: pytest.MonkeyPatch) -> None:
    paddle = require("paddle", "this test")
    from gfldeploy.export import gfl_graph

    class Wrong(gfl_graph.GflGraph):
        def decode(self, distributions: Any, cells: Any) -> Any:
            wrong = paddle.concat([cells[..., :2], cells[..., 2:] * 1.01], -1)
            return super().decode(distributions, wrong)

    monkeypatch.setattr(gfl_graph, "GflGraph", Wrong)
    output = tmp_path / "new" / "out"
    small = ("--random-weights", 0, "--input-shape", "64x96")
    message = demo_bundles.refusal(run_here("export", "-c", demo.config_path(), *small, "-o", output))
    assert "graph in paddle differs from the reference" in message
    assert list(tmp_path.iterdir()) == []
