"""Q/DQ insertion on small graphs, checked by running them: close to float, and in INT8 where it was asked for."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from calibration_file import calibration_from
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from gfldeploy.errors import DataError, EngineError
from gfldeploy.quant.calibration import Calibration, ConvRanges, ConvUse, OutputRange
from gfldeploy.quant.observer import observe_outputs
from gfldeploy.quant.qdq import (
    ONNX_RUNTIME,
    TENSORRT,
    ActivationScale,
    QdqForm,
    conv_outputs,
    insert_qdq,
    write_qdq_onnx,
)

ort = pytest.importorskip("onnxruntime")

IMAGE = (1, 4, 12, 12)
Array = NDArray[np.float32]


class Graph:
    """A graph of 3x3 convolutions from 4 to 4 channels and what is between them, from `image` to `result`."""

    def __init__(self) -> None:
        self.nodes: list[Any] = []
        self.constants: dict[str, Array] = {}
        self.random = np.random.default_rng(0)

    def conv(self, source: str, target: str, weight: str, bias: str | None) -> Graph:
        self.constants.setdefault(weight, self.random.normal(0, 0.3, (4, 4, 3, 3)).astype(np.float32))
        if bias:
            self.constants.setdefault(bias, self.random.normal(0, 0.5, 4).astype(np.float32))
        inputs = [source, weight, *([bias] if bias else [])]
        self.nodes.append(helper.make_node("Conv", inputs, [target], pads=[1, 1, 1, 1]))
        return self

    def op(self, kind: str, *names: str) -> Graph:
        *sources, target = names
        self.nodes.append(helper.make_node(kind, sources, [target]))
        return self

    def model(self) -> Any:
        graph = helper.make_graph(
            self.nodes,
            "small",
            [helper.make_tensor_value_info("image", TensorProto.FLOAT, ["N", 4, "H", "W"])],
            [helper.make_tensor_value_info("result", TensorProto.FLOAT, ["N", 4, "H", "W"])],
            [numpy_helper.from_array(value, name) for name, value in self.constants.items()],
        )
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
        onnx.checker.check_model(model)
        return model


def residual() -> Graph:
    graph = Graph().conv("image", "a", "w1", "b1").op("Relu", "a", "b").conv("b", "c", "w2", "b2")
    return (
        graph.op("Add", "c", "image", "d").op("Relu", "d", "e").conv("e", "f", "w3", "b3").op("Sigmoid", "f", "result")
    )


def shared() -> Graph:
    """One convolution on two inputs of very different size, as a detection head on two levels."""
    graph = Graph()
    graph.constants |= {"ten": np.array([[[[10]]]], np.float32), "tenth": np.array([[[[0.1]]]], np.float32)}
    graph.op("Mul", "image", "ten", "large").conv("image", "p", "w", "b").conv("large", "q", "w", "b")
    graph.op("Mul", "q", "tenth", "r").op("Tanh", "p", "s").op("Tanh", "r", "t")
    return graph.op("Add", "s", "t", "result")


def no_bias() -> Graph:
    graph = Graph().conv("image", "a", "w1", None).op("Relu", "a", "b").conv("b", "c", "w2", None)
    return graph.op("Tanh", "c", "result")


def other_activation() -> Graph:
    graph = Graph().conv("image", "a", "w1", "b1").op("Sigmoid", "a", "b").op("Mul", "a", "b", "c")  # Swish
    return graph.conv("c", "d", "w2", "b2").op("Sigmoid", "d", "result")


GRAPHS = {f.__name__: f for f in (residual, shared, no_bias, other_activation)}


def images(count: int = 4) -> list[Array]:
    return [np.random.default_rng(seed).uniform(-1, 1, IMAGE).astype(np.float32) for seed in range(count)]


def run(model: Any, image: Array, *outputs: str) -> list[Array]:
    model = onnx.ModelProto.FromString(model.SerializeToString())
    known = {value.name for value in model.graph.output}
    model.graph.output.extend(
        helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in outputs if name not in known
    )
    options = ort.SessionOptions()
    options.log_severity_level = 3
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    found: list[Array] = session.run(list(outputs), {"image": image})
    return found


def calibrate(model: Any, folder: Path) -> Calibration:
    """What calibration gives: thresholds that clip nothing, ranges as observed, weights' maxima."""
    onnx.save(model, str(folder / "float.onnx"))
    ranges = observe_outputs(folder / "float.onnx", images(), 1)
    weights = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    inputs: dict[str, tuple[float, ...]] = {}
    for node in model.graph.node:
        if node.op_type == "Conv":
            name = node.input[0]
            values = images() if name == "image" else [run(model, image, name)[0] for image in images()]
            largest = max(float(np.abs(value).max()) for value in values)
            inputs[node.input[1]] = (*inputs.get(node.input[1], ()), largest)
    return Calibration(
        "abs_max",
        {},
        {
            name: ConvRanges(inputs[name], ranges[name], tuple(np.abs(weights[name]).max((1, 2, 3)).tolist()))
            for name in inputs
        },
    )


def quantized(model: Any, calibration: Calibration) -> Any:
    copy = onnx.ModelProto.FromString(model.SerializeToString())
    insert_qdq(copy, calibration)
    onnx.checker.check_model(copy)
    return copy


def executed(model: Any, folder: Path) -> dict[str, int]:
    """Operators of the graph as ONNX Runtime optimises it for itself."""
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.optimized_model_filepath = str(folder / "optimized.onnx")
    ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    kinds = [node.op_type for node in onnx.load(str(folder / "optimized.onnx")).graph.node]
    return {kind: kinds.count(kind) for kind in kinds}


def scales_of(model: Any) -> dict[str, float]:
    """Scale of every quantised activation."""
    constants = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    return {n.input[0]: float(constants[n.input[1]]) for n in model.graph.node if n.op_type == "QuantizeLinear"}


@pytest.mark.parametrize("name", GRAPHS)
def test_every_convolution_runs_in_int8_and_gives_what_float_gives(name: str, tmp_path: Path) -> None:
    model = GRAPHS[name]().model()
    calibration = calibrate(model, tmp_path)
    int8 = quantized(model, calibration)
    convolutions = [node for node in model.graph.node if node.op_type == "Conv"]
    kinds = executed(int8, tmp_path)
    assert kinds.get("QLinearConv") == len(convolutions)
    assert not {"Conv", "FusedConv", "NhwcFusedConv", "ConvInteger"} & set(kinds)
    for image in images():
        expected, actual = run(model, image, "result")[0], run(int8, image, "result")[0]
        # Of outputs over about a unit: a few steps of 1/127, of two or three layers.
        assert np.abs(expected - actual).max() < 0.05
        assert np.abs(expected - actual).mean() < 0.01


def test_one_convolution_is_off_by_its_rounding_only(tmp_path: Path) -> None:
    """The bound follows from the arithmetic: half a step for each rounded input, weight and output."""
    model = Graph().conv("image", "a", "w", "b").op("Identity", "a", "result").model()
    calibration = calibrate(model, tmp_path)
    int8 = quantized(model, calibration)
    scales = scales_of(int8)
    weight = numpy_helper.to_array(next(t for t in model.graph.initializer if t.name == "w")).astype(np.float64)
    channel_scale = np.abs(weight).max((1, 2, 3)) / 127
    for image in images():
        expected, actual = run(model, image, "result")[0], run(int8, image, "result")[0]
        rounding = (
            np.abs(weight).sum((1, 2, 3)) * scales["image"] / 2  # of the inputs
            + weight[0].size * channel_scale / 2 * 1.01  # of the weights, over inputs of at most 1
            + channel_scale * scales["image"]  # of the bias
            + scales["a"]  # of the output: half a step, and half for its zero point
        )
        assert (np.abs(expected - actual).max((0, 2, 3)) <= rounding).all()


def test_a_shared_convolution_keeps_one_weight_and_gets_a_scale_for_each_use(tmp_path: Path) -> None:
    model = shared().model()
    int8 = quantized(model, calibrate(model, tmp_path))
    assert [
        tensor.name for tensor in int8.graph.initializer if tensor.data_type == TensorProto.INT8 and tensor.dims[1:]
    ] == ["w.q"]
    scales = scales_of(int8)
    assert scales["large"] == pytest.approx(10 * scales["image"], rel=1e-5)
    assert scales["q"] > 5 * scales["p"]
    biases = [tensor for tensor in int8.graph.initializer if tensor.data_type == TensorProto.INT32]
    first, second = (numpy_helper.to_array(b) for b in biases if numpy_helper.to_array(b).any())
    # One float bias, as integers of ten times the scale.
    np.testing.assert_allclose(first, 10 * second.astype(np.float64), atol=5.1)


def test_convolutions_that_are_not_named_stay_float(tmp_path: Path) -> None:
    model = residual().model()
    full = calibrate(model, tmp_path)
    part = Calibration(full.algorithm, {}, {name: full.convolutions[name] for name in ("w1", "w3")})
    assert write_qdq_onnx(tmp_path / "float.onnx", tmp_path / "int8.onnx", part) == 2
    int8 = onnx.load(str(tmp_path / "int8.onnx"))
    (kept,) = (node for node in int8.graph.node if node.op_type == "Conv" and node.input[1] == "w2")
    assert kept.input[2] == "b2"
    kinds = executed(int8, tmp_path)
    assert kinds["QLinearConv"] == 2
    assert sum(kinds.get(kind, 0) for kind in ("Conv", "FusedConv")) == 1
    assert "w1" not in {tensor.name for tensor in int8.graph.initializer}, "the float copy of a quantised weight"
    assert insert_qdq(residual().model(), Calibration("hist", {}, {})) == 0


def forked() -> Graph:
    """`image` and then `b`, which a convolution makes, are each read by two convolutions."""
    graph = Graph().conv("image", "a", "w1", "b1").op("Relu", "a", "b").conv("image", "s", "w2", "b2")
    graph.conv("b", "c", "w3", "b3").conv("b", "d", "w4", "b4")
    return graph.op("Add", "s", "c", "e").op("Add", "e", "d", "f").op("Tanh", "f", "result")


KEPT = {
    "first": (forked, {("w1", 0)}),
    "one of two on the image": (forked, {("w2", 0)}),
    "one of two behind an INT8 one": (forked, {("w4", 0)}),
    "both behind an INT8 one": (forked, {("w3", 0), ("w4", 0)}),
    "one of two behind a float one": (forked, {("w1", 0), ("w3", 0)}),
    "before the addition": (residual, {("w2", 0)}),
    "around": (residual, {("w1", 0), ("w3", 0)}),
    "one use": (shared, {("w", 1)}),
    "without bias": (no_bias, {("w1", 0)}),
}


@pytest.mark.parametrize("name", KEPT)
def test_kept_uses_run_in_float_and_all_others_in_int8(name: str, tmp_path: Path) -> None:
    make, kept = KEPT[name]
    model = make().model()
    calibration = calibrate(model, tmp_path).keeping(ConvUse(*one) for one in kept)
    int8 = quantized(model, calibration)
    kinds = executed(int8, tmp_path)
    assert kinds["QLinearConv"] == len(calibration.uses) - len(kept)
    assert sum(kinds.get(kind, 0) for kind in ("Conv", "FusedConv", "NhwcFusedConv")) == len(kept)
    for image in images():
        expected, actual = run(model, image, "result")[0], run(int8, image, "result")[0]
        # `forked` adds up three branches, each off by what one convolution after another is off by elsewhere.
        assert np.abs(expected - actual).max() < (0.1 if make is forked else 0.05)
        assert np.abs(expected - actual).mean() < 0.01


@pytest.mark.parametrize("form", [ONNX_RUNTIME, TENSORRT])
@pytest.mark.parametrize(
    ("make", "kept", "output"), [(forked, ("w2", 0), "s"), (shared, ("w", 0), "p"), (no_bias, ("w1", 0), "b")]
)
def test_a_kept_use_gives_what_float_gives(
    make: Callable[[], Graph], kept: tuple[str, int], output: str, form: QdqForm, tmp_path: Path
) -> None:
    """Although what it reads, or its weight, is quantised for another."""
    model = make().model()
    int8 = onnx.ModelProto.FromString(model.SerializeToString())
    calibration = calibrate(model, tmp_path).keeping([ConvUse(*kept)])
    assert insert_qdq(int8, calibration, form) == len(calibration.uses) - 1
    for image in images():
        np.testing.assert_array_equal(run(int8, image, output)[0], run(model, image, output)[0])
    for _, use, other in conv_outputs(model):
        if other != output:
            found, expected = run(int8, images()[0], other)[0], run(model, images()[0], other)[0]
            assert np.abs(found - expected).max() > 1e-4, use


def test_a_float_reader_does_not_get_what_another_threshold_clips(tmp_path: Path) -> None:
    """What an INT8 convolution makes reaches a float one through its own output range."""
    model = forked().model()
    full = calibrate(model, tmp_path)
    clipping = replace(full.convolutions["w3"], inputs=(full.convolutions["w3"].inputs[0] / 10,))
    calibration = replace(full, convolutions={**full.convolutions, "w3": clipping})
    int8 = quantized(model, calibration.keeping([ConvUse("w4", 0)]))
    for image in images():
        assert np.abs(run(int8, image, "d")[0] - run(model, image, "d")[0]).max() < 0.1


def test_tensorrt_quantizes_no_shortcut_of_a_kept_convolution(tmp_path: Path) -> None:
    model = forked().model()
    full = calibrate(model, tmp_path)
    for kept, shortcuts in (([], {"s"}), ([ConvUse("w2", 0)], set()), ([ConvUse("w3", 0)], set())):
        int8 = onnx.ModelProto.FromString(model.SerializeToString())
        insert_qdq(int8, full.keeping(kept), TENSORRT)
        assert set(scales_of(int8)) - {"image", "b"} == shortcuts


def test_with_every_use_kept_the_graph_stays_as_it_is(tmp_path: Path) -> None:
    for make in (residual, shared, forked):
        model = make().model()
        full = calibrate(model, tmp_path)
        copy = onnx.ModelProto.FromString(model.SerializeToString())
        assert insert_qdq(copy, full.keeping(full.uses)) == 0
        assert copy == model


@pytest.mark.parametrize("dead", ["weights", "input"])
def test_a_bias_survives_where_nothing_else_is(dead: str, tmp_path: Path) -> None:
    """Folding BatchNorm leaves channels whose weights are zero and whose bias is not; a ReLU can be dead for good."""
    graph = Graph().conv("image", "a", "w1", "b1").op("Relu", "a", "b").conv("b", "c", "w2", "b2")
    graph.op("Tanh", "c", "result")
    if dead == "weights":
        graph.constants["w1"][1] = 0
        graph.constants["w2"][2] = 0
    else:
        graph.constants["b1"][:] = -100  # every value behind the ReLU is 0
    graph.constants["b2"] = np.array([0.9, -0.8, 0.7, -0.6], np.float32)
    model = graph.model()
    int8 = quantized(model, calibrate(model, tmp_path))
    for image in images():
        expected, actual = run(model, image, "result")[0], run(int8, image, "result")[0]
        assert np.abs(expected - actual).max() < 0.05


def test_an_empty_optional_bias_is_no_bias(tmp_path: Path) -> None:
    model = no_bias().model()
    calibration = calibrate(model, tmp_path)
    for node in model.graph.node:
        if node.op_type == "Conv":
            node.input.append("")
    assert insert_qdq(model, calibration) == 2


def test_outputs_are_those_behind_the_relu() -> None:
    found = conv_outputs(residual().model())
    assert found == [("w1", 0, "b"), ("w2", 0, "c"), ("w3", 0, "f")]
    assert conv_outputs(shared().model()) == [("w", 0, "p"), ("w", 1, "q")]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: {**c, "w9": c["w1"]}, "has no convolution w9"),
        (lambda c: {**c, "w1": ConvRanges((), c["w1"].outputs, c["w1"].weights)}, "has 0 uses of w1"),
        (
            lambda c: {**c, "w1": ConvRanges(c["w1"].inputs, c["w1"].outputs, (1.0,))},
            "1 weight ranges for w1, it has 4",
        ),
    ],
)
def test_a_calibration_of_another_graph(change: Any, message: str, tmp_path: Path) -> None:
    model = residual().model()
    calibration = calibrate(model, tmp_path)
    other = Calibration("hist", {}, change(calibration.convolutions))
    with pytest.raises(EngineError, match=message) as caught:
        insert_qdq(model, other)
    assert caught.value.remedy


def test_what_becomes_a_score_has_room_for_scores_that_no_image_shows(tmp_path: Path) -> None:
    onnx.save(shared().model(), str(tmp_path / "float.onnx"))
    pale = [image * np.float32(0.001) for image in images()]
    seen = observe_outputs(tmp_path / "float.onnx", pale, 1)
    name = min(seen, key=lambda one: max(found.high for found in seen[one]))
    assert all(one.high < 4.6 for one in seen[name]), "otherwise this tests nothing"
    found = observe_outputs(tmp_path / "float.onnx", pale, 1, [name])
    assert found == {**seen, name: tuple(replace(one, high=4.6) for one in seen[name])}


def test_nothing_to_observe(tmp_path: Path) -> None:
    onnx.save(residual().model(), str(tmp_path / "float.onnx"))
    with pytest.raises(EngineError, match="no calibration image"):
        observe_outputs(tmp_path / "float.onnx", [], 1)
    with pytest.raises(EngineError, match="NaN or infinity"):
        observe_outputs(tmp_path / "float.onnx", [np.full(IMAGE, np.nan, np.float32)], 1)


# --- scales -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("low", "high", "scale", "zero"),
    [
        (0.0, 255.0, 1.0, 0),
        (-255.0, 0.0, 1.0, 255),
        (-1.0, 254.0, 1.0, 1),
        (10.0, 51.0, 0.2, 0),  # zero is always one of the integers: padding needs it
        (-51.0, -10.0, 0.2, 255),
    ],
)
def test_scales_from_ranges(low: float, high: float, scale: float, zero: int) -> None:
    found = ActivationScale.from_range(OutputRange(low, high))
    assert found.scale == pytest.approx(scale)
    assert found.zero_point == zero


@pytest.mark.parametrize("low", [0.0, -1e-12])
def test_a_range_of_nothing_has_an_ordinary_scale(low: float) -> None:
    for found in (
        ActivationScale.from_range(OutputRange(low, 0.0)),
        ActivationScale.from_threshold(-low, non_negative=True),
        ActivationScale.from_threshold(-low, non_negative=False),
    ):
        assert 1e-3 < found.scale < 1
        assert 0 <= found.zero_point <= 255


def test_scales_from_thresholds() -> None:
    assert ActivationScale.from_threshold(127.0, non_negative=False) == ActivationScale(1.0, 128)
    assert ActivationScale.from_threshold(127.0, non_negative=True) == ActivationScale(1.0, 0)


# --- calibration.json -------------------------------------------------------------------------------------------------


def calibration_data() -> dict[str, Any]:
    ranges = ConvRanges((1.5, 2.0), (OutputRange(-1.0, 2.0), OutputRange(0.0, 0.0)), (0.1, 0.0))
    return Calibration("hist", {"a.jpg": "00ff"}, {"conv2d_7.w_0": ranges}).to_dict()


def test_calibration_round_trip() -> None:
    data = json.loads(json.dumps(calibration_data()))
    calibration = calibration_from(data)
    assert calibration.convolutions["conv2d_7.w_0"].outputs[0] == OutputRange(-1.0, 2.0)
    assert json.loads(json.dumps(calibration.to_dict())) == data


@pytest.mark.parametrize("value", [None, [], "text", 3, {}, {"algorithm": "hist"}])
def test_what_is_no_calibration(value: Any) -> None:
    with pytest.raises(DataError, match=r"calibration\.json"):
        calibration_from(value)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("inputs", "12"),
        ("inputs", [True]),
        ("inputs", [-1.0]),
        ("inputs", [float("nan")]),
        ("inputs", None),
        ("outputs", [{"low": 0.0}]),
        ("outputs", [{"low": 0.0, "high": 1.0, "middle": 0.5}]),
        ("outputs", [{"low": 2.0, "high": 1.0}]),
        ("outputs", [{"low": "0", "high": 1.0}]),
        ("weights", [float("inf")]),
        ("weights", {"a": 1}),
    ],
)
def test_malformed_calibration(key: str, value: Any) -> None:
    data = calibration_data()
    data["convolutions"]["conv2d_7.w_0"][key] = value
    with pytest.raises(DataError, match=r"calibration\.json") as caught:
        calibration_from(data)
    assert caught.value.remedy


@pytest.mark.parametrize("kept", [[["conv2d_7.w_0", "0"]], [1], 1, [[]]])
def test_malformed_kept_uses(kept: Any) -> None:
    assert calibration_from(calibration_data() | {"kept_float": [["conv2d_7.w_0", 1]]}).kept_float == {
        ConvUse("conv2d_7.w_0", 1)
    }
    with pytest.raises(DataError, match=r"calibration\.json"):
        calibration_from(calibration_data() | {"kept_float": kept})


def test_malformed_calibration_of_images() -> None:
    for change in ({"images": {"a.jpg": 3}}, {"images": [1]}, {"algorithm": 3}):
        with pytest.raises(DataError, match=r"calibration\.json"):
            calibration_from(calibration_data() | change)
