"""A tiny real detector and a tiny COCO dataset, made with onnx and OpenCV alone: no Paddle, no download."""

from __future__ import annotations

import json
from pathlib import Path

import cv2
import numpy as np
import pytest

from gfldeploy.bundle import Graph, Manifest, TensorSpec, write_bundle
from gfldeploy.detections import NmsParams
from gfldeploy.images.preprocess import Preprocess

CLASSES = ("box", "ball")
SIZES = ((48, 80), (80, 48), (48, 80), (64, 64), (80, 48), (48, 72))  # height, width: landscape, portrait, square


def write_tiny_onnx(path: Path) -> None:
    """One convolution of stride 8, whose 6 channels are 2 class scores and the 4 corners of a box.

    The box is 0, 0, 48, 48 (network-input pixels) everywhere, class "box" scores about 0.88 and "ball" about 0.02.
    """
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    weights = np.zeros((6, 3, 3, 3), np.float32)
    weights[:2] = np.random.default_rng(0).normal(0, 0.001, (2, 3, 3, 3))
    constants = {
        "weights": weights,
        "bias": np.float32([2, -4, 0, 0, 48, 48]),
        "flat": np.int64([0, 6, -1]),
        "split": np.int64([2, 4]),
    }
    nodes = [
        helper.make_node("Conv", ["image", "weights", "bias"], ["map"], strides=[8, 8], pads=[1, 1, 1, 1]),
        helper.make_node("Reshape", ["map", "flat"], ["rows"]),
        helper.make_node("Transpose", ["rows"], ["anchors"], perm=[0, 2, 1]),
        helper.make_node("Split", ["anchors", "split"], ["logits", "boxes"], axis=2),
        helper.make_node("Sigmoid", ["logits"], ["scores"]),
    ]
    graph = helper.make_graph(
        nodes,
        "tiny",
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, ["N", 3, "H", "W"])],
        [
            helper.make_tensor_value_info("scores", TensorProto.FLOAT, ["N", "A", 2]),
            helper.make_tensor_value_info("boxes", TensorProto.FLOAT, ["N", "A", 4]),
        ],
        [numpy_helper.from_array(value, name) for name, value in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)
    onnx.checker.check_model(model)
    path.parent.mkdir(parents=True)
    onnx.save(model, str(path))


def write_tiny_bundle(target: Path) -> Path:
    """Write an FP32 bundle with an ONNX graph only; returns its directory."""
    with write_bundle(target) as (directory, manifests):
        write_tiny_onnx(directory / "onnx" / "model.onnx")
        manifests.append(
            Manifest(
                name="tiny",
                precision="fp32",
                graphs={"onnx": Graph("onnx/model.onnx")},
                inputs=(TensorSpec("image", "float32", (None, 3, None, None)),),
                outputs=(
                    TensorSpec("scores", "float32", (None, None, 2)),
                    TensorSpec("boxes", "float32", (None, None, 4)),
                ),
                preprocess=Preprocess(target_size=(64, 96), pad_stride=32),
                nms=NmsParams(score_threshold=0.05, nms_threshold=0.6, nms_top_k=100, keep_top_k=100),
                classes=CLASSES,
                score_channels=2,
                strides=(8,),
                reg_max=16,
                parameters=168,
                provenance={},
            )
        )
    return target


@pytest.fixture(scope="session")
def tiny_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of an FP32 bundle with an ONNX graph only. Read it, do not change it."""
    return write_tiny_bundle(tmp_path_factory.mktemp("bundles") / "tiny")


@pytest.fixture(scope="session")
def tiny_coco(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A COCO annotation file with six JPEG images in `images/` beside it. Read it, do not change it.

    Each has one "box" exactly where the detector of `tiny_bundle` finds one, so that its mAP is 1.
    """
    directory = tmp_path_factory.mktemp("coco")
    (directory / "images").mkdir()
    preprocess = Preprocess(target_size=(64, 96), pad_stride=32)
    random = np.random.default_rng(1)
    images, annotations = [], []
    for number, (height, width) in enumerate(SIZES, start=1):
        picture = random.integers(0, 256, (height, width, 3), np.uint8)
        assert cv2.imwrite(str(directory / "images" / f"{number}.jpg"), picture)
        images.append({"id": number, "file_name": f"{number}.jpg", "height": height, "width": width})
        side = 48 / preprocess.scales(height, width)[0]
        annotations.append(
            {"id": number, "image_id": number, "category_id": 1, "bbox": [0, 0, side, side], "iscrowd": 0}
        )
    categories = [{"id": number, "name": name} for number, name in enumerate(CLASSES, start=1)]
    path = directory / "annotations.json"
    path.write_text(json.dumps({"images": images, "annotations": annotations, "categories": categories}))
    return path
