"""The file that deploys by itself gives the detections of preprocessing, network and NMS one after the other."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import cv2
import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import numpy_helper, parser

from gfldeploy.bundle import Graph, Manifest, TensorSpec
from gfldeploy.detections import Detections
from gfldeploy.engines.openvino_engine import shared_core
from gfldeploy.export.end_to_end import obstacle, wrap
from gfldeploy.graph_guard import METADATA
from gfldeploy.images.preprocess import Preprocess
from gfldeploy.nms import NmsParams, postprocess

ort = pytest.importorskip("onnxruntime")
ov = pytest.importorskip("openvino")

CLASSES = ("box", "ball")
NMS = NmsParams(score_threshold=0.3, nms_threshold=0.5, nms_top_k=-1, keep_top_k=20)
Arrays = Mapping[str, NDArray[Any]]
# A box for each cell of 8 px, somewhere, and scores of 16 levels, so that many are equal.
NETWORK = """
<ir_version: 8, opset_import: ["" : 17]>
cells (float[N,3,H,W] image) => (float[N,A,C] scores, float[N,A,4] boxes)
<float levels = {16}, float middle = {60}, float reach = {20}, int64[3] rows = {0, 0, -1}, float least = {1}>
{
    map = Conv <kernel_shape = [8, 8], strides = [8, 8]> (image, weight)
    flat = Reshape (map, rows)
    cells = Transpose <perm = [0, 2, 1]> (flat)
    logits, places, sides = Split <axis = 2> (cells, parts)
    probabilities = Sigmoid (logits)
    steps = Mul (probabilities, levels)
    step = Round (steps)
    scores = Div (step, levels)
    far = Mul (places, reach)
    centres = Add (far, middle)
    side = Abs (sides)
    more = Mul (side, reach)
    wide = Add (more, least)
    first = Sub (centres, wide)
    second = Add (centres, wide)
    boxes = Concat <axis = 2> (first, second)
}
"""


def network(channels: int) -> Any:
    model = parser.parse_model(NETWORK)
    weight = np.random.default_rng(0).normal(0, 0.08, (channels + 4, 3, 8, 8)).astype(np.float32)
    parts = np.array([channels, 2, 2], np.int64)
    model.graph.initializer.extend([numpy_helper.from_array(weight, "weight"), numpy_helper.from_array(parts, "parts")])
    return model


def manifest(
    nms: NmsParams = NMS, channels: int = 2, size: tuple[int | None, int | None] = (None, None), **more: Any
) -> Manifest:
    return Manifest(
        name="cells",
        precision="fp32",
        graphs={"onnx": Graph("onnx/model.onnx")},
        inputs=(TensorSpec("image", "float32", (None, 3, *size)),),
        outputs=(
            TensorSpec("scores", "float32", (None, None, channels)),
            TensorSpec("boxes", "float32", (None, None, 4)),
        ),
        preprocess=replace(Preprocess((96, 128), pad_stride=32), **more),
        nms=nms,
        classes=CLASSES,
        score_channels=channels,
        strides=(8,),
        reg_max=16,
        parameters=1,
        provenance={},
    )


def in_onnx_runtime(model: Any) -> Callable[[Arrays], Arrays]:
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    names = [value.name for value in session.get_outputs()]
    return lambda inputs: dict(zip(names, session.run(names, dict(inputs)), strict=True))


def in_openvino(model: Any) -> Callable[[Arrays], Arrays]:
    core = shared_core()
    compiled = core.compile_model(
        core.read_model(model.SerializeToString()), "CPU", {"INFERENCE_PRECISION_HINT": "f32"}
    )
    names = [value.name for value in model.graph.output]

    def infer(inputs: Arrays) -> Arrays:
        results = compiled(dict(inputs))
        return {name: np.array(results[name]) for name in names}

    return infer


ENGINES = (in_onnx_runtime, in_openvino)


def pictures(*sizes: tuple[int, int]) -> list[NDArray[np.uint8]]:
    random = np.random.default_rng(1)
    return [random.integers(0, 256, (*size, 3)).astype(np.uint8) for size in sizes]


def pixels(images: list[NDArray[np.uint8]], preprocess: Preprocess, size: tuple[int, int] | None = None) -> Arrays:
    """What a user of the file gives it: resized images in one array, with noise beside and below them."""
    scales = [preprocess.scales(*image.shape[:2]) for image in images]
    resized = [
        cv2.resize(image, None, None, fx=x, fy=y, interpolation=preprocess.interp)
        for image, (y, x) in zip(images, scales, strict=True)
    ]
    sizes = np.array([one.shape[:2] for one in resized], np.int32)
    noise = np.random.default_rng(2).integers(0, 256, (len(images), *(size or sizes.max(axis=0)), 3))
    batch = noise.astype(np.uint8)
    for row, one in zip(batch, resized, strict=True):
        row[: one.shape[0], : one.shape[1]] = one
    return {"image": batch, "im_shape": sizes, "scale_factor": np.array(scales, np.float32)}


def check(found: Arrays, expected: list[Detections]) -> None:
    """Exactly these detections in this order, and nothing behind them; boxes to the last bits."""
    assert found["count"].tolist() == [len(one) for one in expected]
    assert found["count"].dtype == found["classes"].dtype == np.int32
    for image, one in enumerate(expected):
        assert found["classes"][image, : len(one)].tolist() == one.classes.tolist()
        assert found["scores"][image, : len(one)].tolist() == one.scores.tolist()
        np.testing.assert_allclose(found["boxes"][image, : len(one)], one.boxes, rtol=1e-6, atol=1e-4)
        assert not found["boxes"][image, len(one) :].any() and not found["scores"][image, len(one) :].any()
        assert (found["classes"][image, len(one) :] == -1).all()


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize(
    "what",
    [
        manifest(),
        manifest(replace(NMS, nms_top_k=7, nms_threshold=0.9), norm_type="none"),
        manifest(replace(NMS, keep_top_k=900), size=(96, 128), fixed=True),  # more than there are
        manifest(replace(NMS, score_threshold=1e-5), channels=3, keep_ratio=False, pad_stride=0),  # one is no class
    ],
    ids=["usual", "nms_top_k", "fixed", "GFLv2"],
)
def test_detections_are_those_of_preprocess_network_and_nms(
    what: Manifest, engine: Callable[[Any], Callable[[Arrays], Arrays]]
) -> None:
    model = network(what.score_channels)
    alone = engine(model)
    wrap(model, what)
    onnx.checker.check_model(model, full_check=True)
    whole = engine(model)
    for sizes in (((90, 120),), ((60, 100), (100, 60), (96, 128)), ((33, 40),)):
        images = pictures(*sizes)
        batch, scales = what.preprocess.batch_of(images)
        outputs = alone({"image": batch})
        expected = postprocess(outputs["scores"], outputs["boxes"], scales, what.nms)
        size = what.preprocess.target_size if what.preprocess.fixed else None
        check(whole(pixels(images, what.preprocess, size)), [one.named(CLASSES) for one in expected])
        assert sum(map(len, expected)) > 10
        ties = [len(one) - len(np.unique(one.scores)) for one in expected]
        assert sum(ties) > 5  # their order was seen to hold


def test_the_file_says_what_it_detects_and_how_images_are_resized() -> None:
    model = network(2)
    wrap(model, manifest())
    (entry,) = model.metadata_props
    about = json.loads(entry.value)
    assert entry.key == METADATA and about["classes"] == list(CLASSES)
    assert about["preprocess"]["target_size"] == [96, 128] and about["preprocess"]["keep_ratio"] is True


@pytest.mark.parametrize("change", [{"normalized": False}, {"nms_eta": 0.9}, {"keep_top_k": -1}])
def test_what_standard_onnx_cannot_say(change: dict[str, Any]) -> None:
    assert obstacle(manifest()) is None
    assert next(iter(change)) in str(obstacle(manifest(replace(NMS, **change))))
