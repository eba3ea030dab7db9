"""Multiply-accumulates and traffic: by hand, in Q/DQ graphs, and against the layers of the eager model."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gfldeploy.errors import BundleError
from gfldeploy.macs import GraphWork, convolution_macs, count_work, peak_activations
from gfldeploy.quant.calibration import Calibration, ConvRanges, OutputRange
from gfldeploy.quant.qdq import write_qdq_onnx

onnx = pytest.importorskip("onnx")

CONFIGS = Path(__file__).parents[1] / "configs" / "gfl"
STRIDES = (2,)
# By hand, at 16x24. The stem gives 8 channels of 8x12 from 3 x 3x3 inputs each. The shared convolution, of two groups,
# gives as many from 4 x 3x3 each, twice. The DFL projection takes 3 bins for each of the 4 sides of 8x12 cells.
STEM, SHARED, PROJECTION = 8 * 96 * 27, 8 * 96 * 36, 96 * 4 * 3
MACS = STEM + 2 * SHARED + PROJECTION
ACTIVATIONS = (3 * 16 * 24 + 8 * 96) + 2 * (8 * 96 + 8 * 96)
WEIGHTS = 8 * 27 + 2 * 8 * 36


def write_graph(path: Path) -> Path:
    """image -> Conv stem -> ReLU -> Conv shared -> Conv shared, of two groups; then a projection of its first rows."""
    random = np.random.default_rng(0)
    constants = {
        "stem": random.normal(0, 1, (8, 3, 3, 3)).astype(np.float32),
        "shared": random.normal(0, 1, (8, 4, 3, 3)).astype(np.float32),
        "bias": np.zeros(8, np.float32),
        "rows": np.array([0, -1, 3], np.int64),
        "project": np.array([[0], [1], [2]], np.float32),
    }
    node = onnx.helper.make_node
    nodes = [
        node("Conv", ["image", "stem", "bias"], ["a"], strides=[2, 2], pads=[1, 1, 1, 1]),
        node("Relu", ["a"], ["b"]),
        node("Conv", ["b", "shared", "bias"], ["c"], group=2, pads=[1, 1, 1, 1]),
        node("Conv", ["c", "shared", "bias"], ["scores"], group=2, pads=[1, 1, 1, 1]),
        node("Reshape", ["scores", "rows"], ["bins"]),
        node("MatMul", ["bins", "project"], ["boxes"]),
    ]
    graph = onnx.helper.make_graph(
        nodes,
        "two",
        [onnx.helper.make_tensor_value_info("image", 1, ["N", 3, "H", "W"])],
        [
            onnx.helper.make_tensor_value_info("scores", 1, ["N", 8, "A", "B"]),
            onnx.helper.make_tensor_value_info("boxes", 1, ["N", "C", 1]),
        ],
        [onnx.numpy_helper.from_array(value, name) for name, value in constants.items()],
    )
    onnx.save(onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 13)], ir_version=8), str(path))
    return path


def ranges(uses: int) -> ConvRanges:
    return ConvRanges((1.0,) * uses, (OutputRange(-1.0, 1.0),) * uses, (1.0,) * 8)


@pytest.fixture
def graph(tmp_path: Path) -> Path:
    return write_graph(tmp_path / "model.onnx")


def test_by_hand(graph: Path) -> None:
    found = count_work(graph, [(16, 24), (24, 16), (32, 24)], STRIDES)
    assert found[16, 24] == found[24, 16] == GraphWork(MACS, ACTIVATIONS, WEIGHTS)
    assert found[32, 24] == GraphWork(2 * MACS, 2 * ACTIVATIONS, WEIGHTS), "twice the area, the same weights"
    assert count_work(graph, [(16, 24)], STRIDES)[16, 24].macs == MACS
    assert convolution_macs(graph, 16, 24, STRIDES) == {("stem", 0): STEM, ("shared", 0): SHARED, ("shared", 1): SHARED}


@pytest.mark.parametrize(("precision", "size"), [("fp32", 4), ("fp16", 2), ("bf16", 2), ("int8", 1)])
def test_traffic(precision: Any, size: int) -> None:
    assert GraphWork(0, 100, 60).traffic_bytes(precision, 1) == 160 * size
    assert GraphWork(0, 100, 60).traffic_bytes(precision, 4) == (100 + 15) * size, "a batch shares the weights"


@pytest.mark.parametrize("stem_in_float", [False, True])
def test_a_quantised_graph_counts_as_the_one_that_it_was_made_from(graph: Path, stem_in_float: bool) -> None:
    calibration = Calibration("abs_max", {}, {"shared": ranges(2)} | ({} if stem_in_float else {"stem": ranges(1)}))
    quantized = graph.with_name("quantized.onnx")
    assert write_qdq_onnx(graph, quantized, calibration) == (2 if stem_in_float else 3)
    sizes = [(16, 24), (64, 64)]
    assert count_work(quantized, sizes, STRIDES) == count_work(graph, sizes, STRIDES)
    assert peak_activations(quantized, sizes, STRIDES) == peak_activations(graph, sizes, STRIDES)


def test_the_most_that_is_needed_at_once(graph: Path) -> None:
    # The image, and the input and output of either shared convolution: the ReLU writes over the stem's output.
    assert peak_activations(graph, [(16, 24), (32, 24)], STRIDES) == {
        (16, 24): 3 * 16 * 24 + 2 * 8 * 96,
        (32, 24): 2 * (3 * 16 * 24 + 2 * 8 * 96),
    }


def test_what_is_read_again_later_is_kept(graph: Path) -> None:
    model = onnx.load(str(graph))
    nodes = model.graph.node
    nodes[3].output[0] = "d"
    nodes.insert(4, onnx.helper.make_node("Add", ["d", "b"], ["scores"]))  # over d, as nothing else reads it
    onnx.save(model, str(graph))
    assert peak_activations(graph, [(16, 24)], STRIDES) == {(16, 24): 3 * 16 * 24 + 3 * 8 * 96}


def test_the_projection_of_candidates_is_that_of_as_many(graph: Path) -> None:
    model = onnx.load(str(graph))
    model.graph.output.append(onnx.helper.make_tensor_value_info("anchors", 6, ["N", 50]))
    onnx.save(model, str(graph))
    assert count_work(graph, [(16, 24)], STRIDES)[16, 24].macs == MACS - PROJECTION + 50 * 4 * 3


def test_a_size_that_the_graph_cannot_take(graph: Path) -> None:
    model = onnx.load(str(graph))
    model.graph.node.insert(2, onnx.helper.make_node("Add", ["b", "fixed"], ["b8x12"]))
    model.graph.node[3].input[0] = "b8x12"
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.zeros((1, 8, 8, 12), np.float32), "fixed"))
    onnx.save(model, str(graph))
    assert count_work(graph, [(16, 24)], STRIDES)[16, 24].macs == MACS
    with pytest.raises(BundleError, match="sizes of a convolution are unknown") as caught:
        count_work(graph, [(20, 24)], STRIDES)
    assert caught.value.remedy


@pytest.mark.slow
@pytest.mark.needs_ppdet
def test_gfl_r50_against_the_layers_of_the_eager_model(tmp_path: Path) -> None:
    """The output of every convolution layer is seen, whatever the ONNX graph says of it."""
    paddle = pytest.importorskip("paddle")
    pytest.importorskip("paddle2onnx")
    from gfldeploy._quiet import quiet
    from gfldeploy.export.config import load_detector_config
    from gfldeploy.export.gfl_graph import GflGraph, fold_batch_norm
    from gfldeploy.export.model_builder import build_model
    from gfldeploy.export.onnx_graph import convert
    from gfldeploy.export.static_graph import save_paddle_graph

    config = load_detector_config(CONFIGS / "gfl_r50_fpn_1x_coco.yml")
    detector = build_model(config)
    seen: list[int] = []

    def count(layer: Any, inputs: object, output: Any) -> None:
        _, *products = layer.weight.shape  # input channels by groups, kernel height, kernel width
        seen.append(math.prod(output.shape) * math.prod(products))

    hooks = [
        layer.register_forward_post_hook(count) for layer in detector.sublayers() if isinstance(layer, paddle.nn.Conv2D)
    ]
    sizes = ((128, 256), (256, 128))
    expected = []
    for height, width in sizes:
        seen.clear()
        with paddle.no_grad(), quiet():
            detector.head(detector.neck(detector.backbone({"image": paddle.zeros([1, 3, height, width])})))
        expected.append(sum(seen))
    for hook in hooks:
        hook.remove()
    with quiet():
        fold_batch_norm(detector, paddle.zeros([1, 3, 64, 64]))
        layer = GflGraph(detector)
        layer.eval()
        save_paddle_graph(layer, tmp_path, (None, None, None))
    onnx_file = tmp_path / "model.onnx"
    convert(tmp_path / "model.json", tmp_path / "model.pdiparams", onnx_file)
    for (height, width), convolutions in zip(sizes, expected, strict=True):
        assert sum(convolution_macs(onnx_file, height, width, config.strides).values()) == convolutions
        assert count_work(onnx_file, [(height, width)], config.strides)[height, width].macs == pytest.approx(
            convolutions, rel=0.01
        )
