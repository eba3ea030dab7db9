"""Backbones, necks and heads beyond the model zoo's: what exports, what is left out, and what is refused in a line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import demo_bundles
import onnx
import pytest
import yaml
from demo_bundles import RunHere

from gfldeploy import demo
from gfldeploy.bundle import Bundle
from gfldeploy.errors import EngineError
from gfldeploy.export import onnx_graph, program_mode

pytestmark = [pytest.mark.slow, demo_bundles.needs_export]

NORMALIZE = {"mean": [0.5, 0.5, 0.5], "std": [0.2, 0.2, 0.2], "is_scale": True}
RESIZE = {"target_size": [128, 128], "keep_ratio": True, "interp": 2}
FEAT = {"name": "FCOSFeat", "feat_in": 32, "feat_out": 32, "num_convs": 1, "norm_type": "bn", "use_dcn": False}
NMS = {"name": "MultiClassNMS", "nms_top_k": 1000, "keep_top_k": 100, "score_threshold": 0.025, "nms_threshold": 0.6}
VIT = {
    "patch_size": 16,
    "embed_dim": 48,
    "depth": 3,
    "num_heads": 3,
    "qkv_bias": True,
    "init_values": 0.1,
    "epsilon": 0.000001,
    "out_indices": [0, 1, 2],
    "num_fpn_levels": 3,
}


def settings(backbone: str, of_backbone: dict[str, Any], neck: str, of_neck: dict[str, Any]) -> dict[str, Any]:
    """A config with three levels of 32 channels."""
    return {
        "architecture": "GFL",
        "num_classes": 3,
        backbone: of_backbone,
        neck: of_neck,
        "GFL": {"backbone": backbone, "neck": neck, "head": "GFLHead"},
        "GFLHead": {"conv_feat": FEAT, "feat_in_chan": 32, "fpn_stride": [8, 16, 32], "reg_max": 16, "nms": NMS},
        "TestReader": {
            "sample_transforms": [{"Decode": {}}, {"Resize": RESIZE}, {"NormalizeImage": NORMALIZE}, {"Permute": {}}],
            "batch_transforms": [{"PadBatch": {"pad_to_stride": 32}}],
        },
    }


def write(folder: Path, config: dict[str, Any]) -> Path:
    path = folder / "config.yml"
    path.write_text(yaml.safe_dump(config))
    return path


def export(run_here: RunHere, folder: Path, config: Path, *options: object) -> Bundle:
    done = run_here("export", "-c", config, "--random-weights", 0, "-o", folder / "out", *options)
    assert done.returncode == 0, done.stderr
    return Bundle.open(folder / "out")


def test_attention_and_deformable_convolutions_in_every_engine(tmp_path: Path, run_here: RunHere) -> None:
    config = settings("VisionTransformer", VIT, "BiFPN", {"out_channel": 32, "num_extra_levels": 0, "norm_type": "bn"})
    config["GFLHead"]["conv_feat"] = {**FEAT, "norm_type": "gn", "use_dcn": True}
    bundle = export(run_here, tmp_path, write(tmp_path, config), "--input-shape", "128x160")
    graphs = {"paddle", "paddle_program", "onnx", "onnx_fp16", "end_to_end", "end_to_end_fp16"}
    assert set(bundle.manifest.graphs) == graphs
    parity = json.loads((bundle.directory / "parity.json").read_text())
    compared = {(one["graph"], one["engine"]) for one in parity["comparisons"]}
    engines = {("paddle", "paddle"), ("paddle_program", "paddle"), ("onnx", "onnxruntime"), ("onnx", "openvino")}
    assert compared == engines
    assert {"DeformConv", "MatMul", "Softmax"} <= {
        node.op_type for node in onnx.load(str(bundle.graph("onnx")[0])).graph.node
    }
    sheet = run_here("inspect", bundle.directory, "--json")
    assert json.loads(sheet.stdout)["macs"]["gmac"] > 0, "what attention and deformable convolutions cost is counted"


def test_a_bundle_without_the_graphs_that_cannot_be_had(
    tmp_path: Path, run_here: RunHere, monkeypatch: pytest.MonkeyPatch
) -> None:
    def convert(*arguments: object) -> None:
        raise EngineError("there is no Somersault in ONNX", "None.")

    monkeypatch.setattr(onnx_graph, "convert", convert)
    monkeypatch.setattr(program_mode, "_FORMS", {})
    bundle = export(run_here, tmp_path, demo.config_path(), "--input-shape", "64x64")
    left_out = bundle.manifest.left_out
    assert not [name for name in bundle.manifest.files if name.startswith("onnx/")]
    assert set(bundle.manifest.graphs) == {"paddle"}
    assert set(left_out) == {"paddle_program", "onnx", "onnx_fp16", "end_to_end", "end_to_end_fp16"}
    assert left_out["onnx"] == "there is no Somersault in ONNX"
    assert left_out["paddle_program"].startswith("Paddle cannot trace the model: ")
    sheet = run_here("inspect", bundle.directory).stdout
    assert "MACs unknown without an ONNX graph" in sheet and "there is no Somersault in ONNX" in sheet
    verified = run_here("verify", bundle.directory)
    assert verified.returncode == 0 and "no second engine can run it" in verified.stdout
    (tmp_path / "images").mkdir()
    demo_bundles.write_pictures(tmp_path / "images")
    quantize = ("quantize", bundle.directory, "--data", tmp_path / "images", "--samples", 7, "-o", tmp_path / "int8")
    assert "no Somersault" in demo_bundles.refusal(run_here(*quantize))
    predict = ("predict", bundle.directory, tmp_path / "images", "-o")
    refused = run_here(*predict, tmp_path / "none", "--engine", "onnxruntime")
    assert refused.returncode == 2 and "no onnx graph: there is no Somersault in ONNX" in refused.stderr
    done = run_here(*predict, tmp_path / "found", "--engine", "paddle")
    assert (tmp_path / "found/detections.jsonl").is_file(), done.stderr


def test_levels_that_do_not_match_are_refused_with_the_remedy(tmp_path: Path, run_here: RunHere) -> None:
    resnet = {"depth": 18, "return_idx": [1, 2, 3]}
    right = settings("ResNet", resnet, "FPN", {"out_channel": 32, "extra_stage": 0})
    cases: dict[str, tuple[dict[str, Any], str]] = {
        "fewer": (
            {"GFLHead": {"fpn_stride": [8, 16, 32, 64]}},
            "the neck gives 3 levels, GFLHead's fpn_stride has 4: [8, 16, 32, 64]. Set fpn_stride to [8, 16, 32], or",
        ),
        "strides": (
            {"GFLHead": {"fpn_stride": [8, 16, 64]}},
            "[8, 16, 64], but the level for 64 has 10x8 cells of 320x256 px. Set fpn_stride to [8, 16, 32], the",
        ),
        "channels": ({"FPN": {"out_channel": 48}}, "PaddleDetection itself cannot run this model"),
        "tensor": (
            {"GFL": {"neck": "TTFFPN"}, "ResNet": {"return_idx": [0, 1, 2, 3]}, "GFLHead": {"fpn_stride": [4]}},
            "the neck gives one level as a tensor",
        ),
        "size": (
            {"GFL": {"backbone": "CSPDarkNet"}, "GFLHead": {"fpn_stride": [8, 16, 32, 64]},
             "CSPDarkNet": {"arch": "P6", "depth_mult": 0.1, "width_mult": 0.1, "return_idx": [2, 3, 4, 5]}},
            "It runs at multiples of 64 px: set PadBatch's pad_to_stride to that",
        ),
    }  # fmt: skip
    files = []
    for name, (changes, _) in cases.items():
        config = {
            key: {**right.get(key, {}), **changes[key]} if key in changes else value
            for key, value in {**right, **{key: {} for key in changes if key not in right}}.items()
        }
        files.append(tmp_path / f"{name}.yml")
        files[-1].write_text(yaml.safe_dump(config))
    for (name, (_, expected)), file in zip(cases.items(), files, strict=True):
        done = run_here("export", "-c", file, "--random-weights", 0, "-o", file.with_suffix(""))
        assert expected in demo_bundles.refusal(done), name
    assert sorted(tmp_path.iterdir()) == sorted(files)
