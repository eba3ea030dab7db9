"""What is rewritten for OpenVINO computes what was written, and runs as it is meant to."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from gfldeploy.engines.base import Precision
from gfldeploy.engines.openvino_engine import shared_core
from gfldeploy.engines.openvino_rewrite import rewrite
from gfldeploy.engines.registry import capability

openvino = pytest.importorskip("openvino")
onnx = pytest.importorskip("onnx")
node = onnx.helper.make_node

needs_vnni = pytest.mark.skipif(
    capability("openvino", "int8", "cpu").note is not None, reason="this CPU has no fast INT8"
)

Array = NDArray[np.float32]
GROUPS, CHANNELS = 4, 32
SHAPE = (2, CHANNELS, 9, 13)


def read(nodes: Sequence[Any], constants: Mapping[str, Any], shape: Sequence[int | None], *outputs: str) -> Any:
    """The OpenVINO model of an ONNX graph with one input, "image"."""
    graph = onnx.helper.make_graph(
        nodes,
        "graph",
        [onnx.helper.make_tensor_value_info("image", 1, shape)],
        [onnx.helper.make_tensor_value_info(name, 1, None) for name in outputs],
        [onnx.numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()],
    )
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 13)], ir_version=8)
    return openvino.Core().read_model(model.SerializeToString())


def run(model: Any, image: Array, precision: Precision | None = None) -> tuple[list[Array], Counter[str]]:
    """The outputs, and how many operators of each kind ran in which precision, to which."""
    if precision is not None:
        rewrite(model, precision)
    compiled = shared_core().compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    outputs = compiled([image])
    told = [one.get_rt_info() for one in compiled.get_runtime_model().get_ops()]
    ran = Counter(
        " ".join(str(one[key].astype(str)) for key in ("layerType", "runtimePrecision", "outputPrecisions"))
        for one in told
        if str(one["layerType"].astype(str)) != "Const"
    )
    return [outputs[output].copy() for output in compiled.outputs], ran


def group_norm(source: str, result: str, **attributes: float) -> tuple[list[Any], dict[str, Any]]:
    """As paddle2onnx writes it, but for what is elsewhere a factor and an addend of each channel."""
    constants = {
        "groups": np.array([0, GROUPS, -1], np.int64),
        "ones": np.ones(GROUPS, np.float32),
        "zeros": np.zeros(GROUPS, np.float32),
        "factors": np.random.default_rng(5).normal(1, 0.3, (1, CHANNELS, 1, 1)).astype(np.float32),
    }
    nodes = [
        node("Shape", [source], ["sizes"]),
        node("Reshape", [source, "groups"], ["grouped"]),
        node("InstanceNormalization", ["grouped", "ones", "zeros"], ["normal"], **attributes),
        node("Reshape", ["normal", "sizes"], ["back"]),
        node("Mul", ["back", "factors"], [result]),
    ]
    return nodes, constants


def expected_norm(maps: Array, epsilon: float) -> NDArray[np.float64]:
    """By its definition (Wu and He, Group Normalization, 2018), in FP64."""
    groups = maps.astype(np.float64).reshape(len(maps), GROUPS, -1)
    normal = (groups - groups.mean(2, keepdims=True)) / np.sqrt(groups.var(2, keepdims=True) + epsilon)
    _, constants = group_norm("", "")
    scaled: NDArray[np.float64] = normal.reshape(maps.shape) * constants["factors"]
    return scaled


@pytest.mark.parametrize(
    ("mean", "spread", "epsilon"), [(0.0, 1.0, 1e-5), (3.0, 1.0, 1e-5), (-40.0, 1.0, 1e-5), (0.0, 0.01, 1e-3)]
)
def test_group_normalisation_is_what_it_was(mean: float, spread: float, epsilon: float) -> None:
    random = np.random.default_rng(0)
    apart = random.normal(mean, spread, (1, CHANNELS, 1, 1))  # each channel has a mean of its own
    maps = (apart + random.normal(0, spread, SHAPE)).astype(np.float32)
    nodes, constants = group_norm("image", "normalised", epsilon=epsilon)
    before, ran_before = run(read(nodes, constants, SHAPE, "normalised"), maps)
    after, ran_after = run(read(nodes, constants, SHAPE, "normalised"), maps, "int8")
    assert any(key.startswith("MVN") for key in ran_before)
    assert not any(key.startswith("MVN") for key in ran_after)
    np.testing.assert_allclose(before[0], expected_norm(maps, epsilon), atol=2e-4)
    # Squares of a mean that is forty times the deviation leave FP32 less of it.
    np.testing.assert_allclose(after[0], expected_norm(maps, epsilon), atol=2e-4 if abs(mean) < 10 else 1e-3)


def test_flat_maps_give_no_nan() -> None:
    """The variance of what is the same everywhere is rounding, of either sign."""
    maps = np.full(SHAPE, 1234.567, np.float32)
    maps[1] = np.random.default_rng(0).normal(0, 1, SHAPE[1:])
    nodes, constants = group_norm("image", "normalised", epsilon=1e-5)
    (after,), _ = run(read(nodes, constants, SHAPE, "normalised"), maps, "int8")
    assert np.isfinite(after).all()
    np.testing.assert_allclose(after[1], expected_norm(maps, 1e-5)[1], atol=2e-4)


def test_what_is_no_group_normalisation_stays() -> None:
    nodes, constants = group_norm("image", "normalised", epsilon=1e-5)
    maps = np.random.default_rng(0).standard_normal(SHAPE, np.float32)
    for name, value in (("ones", 2), ("zeros", 1)):
        other = constants | {name: np.full(GROUPS, value, np.float32)}
        before, _ = run(read(nodes, other, SHAPE, "normalised"), maps)
        after, ran = run(read(nodes, other, SHAPE, "normalised"), maps, "int8")
        np.testing.assert_array_equal(after[0], before[0])
        assert any(key.startswith("MVN") for key in ran)


def test_of_any_shape_normalisation_stays_openvinos() -> None:
    nodes, constants = group_norm("image", "normalised", epsilon=1e-5)
    _, ran = run(
        read(nodes, constants, [None, CHANNELS, None, None], "normalised"),
        np.random.default_rng(0).standard_normal(SHAPE, np.float32),
        "int8",
    )
    assert any(key.startswith("MVN") for key in ran)


CELLS = np.array([[59, 0, 7, 50, 7], [1, 2, 3, 48, 47]], np.int64)  # of 48 fine and 12 coarse ones


def taken(channels: int, repeats: Sequence[int], shape: Sequence[int | None], *more: str) -> Any:
    """A model that takes `CELLS` of two convolutions' maps, as paddle2onnx writes it, as rows."""
    random = np.random.default_rng(3)
    weights = random.normal(0, 1, (channels, 3, 1, 1)).astype(np.float32)
    constants = {
        "fine weights": weights,
        "coarse weights": -weights,
        "cells": CELLS,
        "one": np.array([1], np.int64),
        "repeats": np.array(repeats, np.int64),
        "flat": np.array([0, 0, -1], np.int64),
    }
    nodes = [node("AveragePool", ["image"], ["smaller"], kernel_shape=[2, 2], strides=[2, 2])]
    for level, source in (("fine", "image"), ("coarse", "smaller")):
        nodes += [
            node("Conv", [source, f"{level} weights"], [level]),
            node("Reshape", [level, "flat"], [f"{level} plane"]),
        ]
    nodes += [
        node("Concat", ["fine plane", "coarse plane"], ["planes"], axis=2),
        node("Unsqueeze", ["cells", "one"], ["single"]),
        node("Tile", ["single", "repeats"], ["everywhere"]),
        node("GatherElements", ["planes", "everywhere"], ["picked"], axis=2),
        node("Transpose", ["picked"], ["rows"], perm=[0, 2, 1]),
    ]
    return read(nodes, constants, shape, "rows", *more)


@pytest.mark.parametrize("shape", [(2, 3, 6, 8), (None, 3, None, None)])
def test_values_of_chosen_cells_are_taken_as_rows_with_the_same_bits(shape: tuple[int | None, ...]) -> None:
    image = np.random.default_rng(4).standard_normal((2, 3, 6, 8), np.float32)
    (before,), ran_before = run(taken(68, (1, 68, 1), shape), image)
    (after,), ran_after = run(taken(68, (1, 68, 1), shape), image, "fp32")
    np.testing.assert_array_equal(after, before)
    assert after.shape == (2, 5, 68)
    assert any(key.startswith("GatherElements") for key in ran_before)
    assert not any(key.startswith("GatherElements") for key in ran_after)


@pytest.mark.parametrize(
    ("channels", "repeats", "more"),
    [
        (16, (1, 16, 1), ()),  # rows so short that OpenVINO crashed
        (68, (1, 68, 2), ()),  # cells that are taken twice
        (68, (1, 68, 1), ("planes",)),
    ],
)
def test_cells_are_picked_one_by_one_where_rows_would_not_do(
    channels: int, repeats: tuple[int, ...], more: tuple[str, ...]
) -> None:
    image = np.random.default_rng(4).standard_normal((2, 3, 6, 8), np.float32)
    before, _ = run(taken(channels, repeats, image.shape, *more), image)
    after, ran = run(taken(channels, repeats, image.shape, *more), image, "fp32")
    for one, other in zip(before, after, strict=True):
        np.testing.assert_array_equal(one, other)
    assert any(key.startswith("GatherElements") for key in ran)


class Head:
    """image -> Q/DQ -> Conv, normalised in groups -> ReLU -> Q/DQ -> twice Conv s -> Q/DQ -> ... -> left, right.

    Behind the second use of s is `factor`. Steps of what is quantised are coarse where only rounding could tell.
    """

    step = 0.5  # of the pairs that are to go

    def __init__(self, factor: float | None = 0.25, kind: str = "Mul") -> None:
        random = np.random.default_rng(1)
        self.factor = factor if factor is not None else 1.0
        self.weights = {
            "c": random.integers(-127, 127, (CHANNELS, 3, 3, 3)),
            "s": random.integers(-127, 127, (16, CHANNELS, 3, 3)),
        }
        self.constants: dict[str, Any] = {
            "fine": np.float32(0.02),
            "coarse": np.float32(self.step),
            "middle": np.uint8(128),
            "least": np.uint8(0),
            "weight scale": np.float32(0.002),
            "bias scale": np.float32(0.00004),
            "factor": np.array([self.factor], np.float32),
            "rows": np.array([0, 0, -1], np.int64),
        }
        self.nodes: list[Any] = []
        for name, weights in self.weights.items():
            self.constants |= {
                f"{name}.q": weights.astype(np.int8),
                f"b{name}.q": np.arange(len(weights), dtype=np.int32),
            }
            self.nodes += [
                node("DequantizeLinear", [f"{name}.q", "weight scale"], [f"{name}.dq"]),
                node("DequantizeLinear", [f"b{name}.q", "bias scale"], [f"b{name}.dq"]),
            ]
        self.pair("image", "fine", "middle")
        self.convolution("image", "c", "map")
        self.pair("map", "coarse", "middle")
        normalisation, more = group_norm("map.dq", "normalised", epsilon=1e-5)
        self.nodes += [*normalisation, node("Relu", ["normalised"], ["active"])]
        self.constants |= more
        self.pair("active", "fine", "least")
        for side in ("left", "right"):
            self.convolution("active", "s", f"{side} map")
            self.pair(f"{side} map", "coarse", "middle")
        self.nodes.append(node("Reshape", ["left map.dq", "rows"], ["left"]))
        last = "right map.dq"
        if factor is not None:
            self.nodes.append(node(kind, [last, "factor"], ["scaled"]))
            last = "scaled"
        self.nodes.append(node("Reshape", [last, "rows"], ["right"]))

    def pair(self, name: str, scale: str, zero: str) -> None:
        self.nodes += [
            node("QuantizeLinear", [name, scale, zero], [f"{name}.q8"]),
            node("DequantizeLinear", [f"{name}.q8", scale, zero], [f"{name}.dq"]),
        ]

    def convolution(self, source: str, name: str, result: str) -> None:
        inputs = [f"{source}.dq", f"{name}.dq", f"b{name}.dq"]
        self.nodes.append(node("Conv", inputs, [result], pads=[1, 1, 1, 1]))

    def model(self, *more: str) -> Any:
        return read(self.nodes, self.constants, (1, 3, 16, 24), "left", "right", *more)

    def without_coarse_pairs(self, *more: str) -> Any:
        """The same in float, where the pairs that are to go have never been."""
        nodes = []
        for one in self.nodes:
            if one.op_type in ("QuantizeLinear", "DequantizeLinear") and "coarse" in one.input:
                continue
            copy = onnx.NodeProto.FromString(one.SerializeToString())
            for index, name in enumerate(copy.input):
                if name in ("map.dq", "left map.dq", "right map.dq"):
                    copy.input[index] = name.removesuffix(".dq")
            nodes.append(copy)
        return read(nodes, self.constants, (1, 3, 16, 24), "left", "right", *more)


IMAGE: Array = np.random.default_rng(2).normal(0, 1, (1, 3, 16, 24)).astype(np.float32)


@needs_vnni
@pytest.mark.parametrize("factor", [None, 0.25, 3.0])
def test_convolutions_give_floats_where_no_convolution_reads_them(factor: float | None) -> None:
    head = Head(factor)
    expected, _ = run(head.without_coarse_pairs(), IMAGE)
    before, ran_before = run(head.model(), IMAGE)
    after, ran_after = run(head.model(), IMAGE, "int8")
    assert {key for key in ran_before if key.startswith("Convolution")} == {"Convolution u8 u8"}
    assert {key for key in ran_after if key.startswith("Convolution")} == {"Convolution u8 f32"}
    for index, size in ((0, 1.0), (1, head.factor)):
        # What is left to differ is the rounding of the activation, whose steps a change in the last bit can cross.
        assert np.abs(after[index] - expected[index]).mean() < 0.01 * head.step * size
        assert np.abs(before[index] - expected[index]).mean() > 0.1 * head.step * size


@needs_vnni
@pytest.mark.parametrize(("factor", "kind"), [(-2.0, "Mul"), (2.0, "Div")])
def test_a_factor_that_is_not_known_to_fit_leaves_the_pair(factor: float, kind: str) -> None:
    head = Head(factor, kind)
    before, _ = run(head.model(), IMAGE)
    after, ran = run(head.model(), IMAGE, "int8")
    assert not any(key.startswith("Convolution f32") for key in ran)
    steps = after[1] / (head.step * factor if kind == "Mul" else head.step / factor)
    np.testing.assert_allclose(steps, np.rint(steps), atol=1e-3)
    assert np.abs(after[1] - before[1]).mean() < head.step * abs(factor)


@needs_vnni
def test_a_factor_is_not_for_another_reader() -> None:
    head = Head(3.0)
    (_, _, expected), _ = run(head.without_coarse_pairs("right map"), IMAGE)
    (_, right, found), _ = run(head.model("right map"), IMAGE, "int8")
    assert np.abs(found - expected).mean() < 0.01 * head.step
    np.testing.assert_allclose(right / (head.step * 3), np.rint(right / (head.step * 3)), atol=1e-3)
