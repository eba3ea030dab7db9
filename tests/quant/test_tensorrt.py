"""TensorRT's form of the INT8 graph, and its rules: each is broken by a graph made for it, and named."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import demo_bundles
import numpy as np
import onnx
import pytest
from calibration_file import calibration_from
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from gfldeploy.bundle import Bundle, GraphName
from gfldeploy.engines.onnx_split import split_decode
from gfldeploy.engines.ort_engine import session_options
from gfldeploy.errors import EngineError
from gfldeploy.quant.calibration import Calibration, ConvRanges, OutputRange
from gfldeploy.quant.qdq import ONNX_RUNTIME, TENSORRT, ActivationScale, insert_qdq
from gfldeploy.quant.tensorrt import OPERATORS, check_tensorrt, handed_on, write_tensorrt_onnx

ort = pytest.importorskip("onnxruntime")

Array = NDArray[np.float32]
IMAGE = (1, 3, 12, 12)
OUTPUTS = {"result": ["N", 3, "H", "W"]}


def conv(source: str, target: str, weight: str) -> Any:
    return helper.make_node("Conv", [source, weight, f"{weight}.bias"], [target], pads=[1, 1, 1, 1])


def op(kind: str, *names: str, **attributes: Any) -> Any:
    *sources, target = names
    return helper.make_node(kind, sources, [target], **attributes)


def model_of(nodes: list[Any], constants: dict[str, NDArray[Any]], image: list[Any] | None = None) -> Any:
    graph = helper.make_graph(
        nodes,
        "small",
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, image or ["N", 3, "H", "W"])],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in OUTPUTS.items()],
        [numpy_helper.from_array(value, name) for name, value in constants.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def weights(*names: str) -> dict[str, NDArray[Any]]:
    random = np.random.default_rng(0)
    found: dict[str, NDArray[Any]] = {}
    for name in names:
        found[name] = random.normal(0, 0.3, (3, 3, 3, 3)).astype(np.float32)
        found[f"{name}.bias"] = random.normal(0, 0.5, 3).astype(np.float32)
    return found


def residual() -> Any:
    """Two blocks as in a ResNet: one with a convolution in its shortcut, one without."""
    nodes = [
        conv("image", "a", "w1"),
        op("Relu", "a", "b"),
        conv("b", "shortcut", "w2"),
        conv("b", "c", "w3"),
        op("Add", "c", "shortcut", "d"),
        op("Relu", "d", "e"),
        conv("e", "f", "w4"),
        op("Add", "f", "e", "g"),
        op("Sigmoid", "g", "result"),
    ]
    return model_of(nodes, weights("w1", "w2", "w3", "w4"))


def images() -> list[Array]:
    return [np.random.default_rng(seed).uniform(-1, 1, IMAGE).astype(np.float32) for seed in range(4)]


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


def calibrate(model: Any) -> Calibration:
    """Thresholds and ranges that clip nothing."""
    constants = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    found = {}
    for node in model.graph.node:
        if node.op_type != "Conv":
            continue
        source, output = node.input[0], node.output[0]
        inputs = [image if source == "image" else run(model, image, source)[0] for image in images()]
        outputs = [run(model, image, output)[0] for image in images()]
        found[node.input[1]] = ConvRanges(
            (max(float(np.abs(value).max()) for value in inputs),),
            (OutputRange(min(float(v.min()) for v in outputs), max(float(v.max()) for v in outputs)),),
            tuple(np.abs(constants[node.input[1]]).max((1, 2, 3)).tolist()),
        )
    return Calibration("abs_max", {}, found)


def quantized(model: Any, calibration: Calibration | None = None) -> Any:
    copy = onnx.ModelProto.FromString(model.SerializeToString())
    insert_qdq(copy, calibration or calibrate(model), TENSORRT)
    onnx.checker.check_model(copy)
    return copy


def constant(model: Any, name: str) -> NDArray[Any]:
    return np.asarray(numpy_helper.to_array(next(one for one in model.graph.initializer if one.name == name)))


def replace(model: Any, name: str, value: Any) -> Any:
    """Give a constant another value."""
    (tensor,) = (tensor for tensor in model.graph.initializer if tensor.name == name)
    tensor.CopyFrom(numpy_helper.from_array(np.asarray(value), name))
    return model


# --- the form ---------------------------------------------------------------------------------------------------------


def test_inputs_and_weights_are_quantised_and_the_bias_is_float() -> None:
    model = quantized(residual())
    assert check_tensorrt(model) == []
    makers = {name: node for node in model.graph.node for name in node.output}
    for node in model.graph.node:
        if node.op_type == "Conv":
            assert makers[node.input[0]].op_type == makers[node.input[1]].op_type == "DequantizeLinear"
            assert constant(model, node.input[2]).dtype == np.float32
    threshold = calibrate(residual()).convolutions["w1"].inputs[0]
    assert constant(model, "image.scale") == np.float32(threshold / 127)
    weight = constant(residual(), "w3").astype(np.float64)
    np.testing.assert_allclose(constant(model, "w3.scale"), np.abs(weight).max((1, 2, 3)) / 127, rtol=1e-6)
    assert constant(model, "w3.q").dtype == np.int8
    assert not {"w1", "w2", "w3", "w4"} & {tensor.name for tensor in model.graph.initializer}


def test_only_shortcuts_are_quantised_besides_inputs() -> None:
    model = quantized(residual())
    pairs = {node.input[0] for node in model.graph.node if node.op_type == "QuantizeLinear"}
    assert pairs == {"image", "b", "e", "shortcut"}
    additions = [list(node.input) for node in model.graph.node if node.op_type == "Add"]
    assert additions == [["c", "shortcut.dq"], ["f", "e.dq"]], "a convolution's output goes straight into the addition"
    found = calibrate(residual()).convolutions["w2"].outputs[0]
    assert constant(model, "shortcut.scale") == np.float32(max(-found.low, found.high) / 127)


def test_what_a_relu_gives_reaches_as_far_as_in_the_other_form() -> None:
    calibration = calibrate(residual())
    calibrated = onnx.ModelProto.FromString(residual().SerializeToString())
    insert_qdq(calibrated, calibration, ONNX_RUNTIME)
    for name in ("b", "e"):
        reach = 255 * float(constant(calibrated, f"{name}.scale"))
        np.testing.assert_allclose(127 * float(constant(quantized(residual()), f"{name}.scale")), reach, rtol=0.01)


def test_the_form_gives_what_float_gives() -> None:
    model = residual()
    int8 = quantized(model)
    for image in images():
        expected, actual = run(model, image, "result")[0], run(int8, image, "result")[0]
        assert 0 < np.abs(expected - actual).max() < 0.04


def test_one_convolution_is_off_by_its_rounding_only() -> None:
    """Half a step for each rounded input and weight; bias and output are not rounded."""
    model = model_of([conv("image", "a", "w"), op("Identity", "a", "result")], weights("w"))
    int8 = quantized(model)
    weight = constant(model, "w").astype(np.float64)
    channel_scale, scale = np.abs(weight).max((1, 2, 3)) / 127, float(constant(int8, "image.scale"))
    rounding = np.abs(weight).sum((1, 2, 3)) * scale / 2 + weight[0].size * channel_scale / 2 * (1 + scale)
    for image in images():
        expected, actual = run(model, image, "result")[0], run(int8, image, "result")[0]
        assert (np.abs(expected - actual).max((0, 2, 3)) <= rounding).all()


def test_what_is_beyond_the_threshold_is_clipped() -> None:
    assert ActivationScale.symmetric(127.0) == ActivationScale(1.0, 0)
    assert 1e-3 < ActivationScale.symmetric(1e-12).scale < 1
    model = model_of([conv("image", "a", "w"), op("Identity", "a", "result")], weights("w"))
    int8 = quantized(model, Calibration("hist", {}, {"w": ConvRanges((0.5,), (), (1.0, 1.0, 1.0))}))
    large, limit = (run(int8, np.full(IMAGE, value, np.float32), "result")[0] for value in (50.0, 0.5))
    np.testing.assert_array_equal(large, limit)


def test_a_bias_that_int32_could_not_hold_leaves_the_weights_alone() -> None:
    constants = weights("w")
    constants["w.bias"] = np.array([1e9, 0, 0], np.float32)
    constants["w"][0] *= 1e-9
    model = model_of([conv("image", "a", "w"), op("Identity", "a", "result")], constants)
    np.testing.assert_allclose(
        constant(quantized(model), "w.scale"), np.abs(constants["w"]).max((1, 2, 3)) / 127, rtol=1e-6
    )


def test_writing_checks_first(tmp_path: Path) -> None:
    model = residual()
    onnx.save(model, str(tmp_path / "model.onnx"))
    assert write_tensorrt_onnx(tmp_path / "model.onnx", tmp_path / "int8.onnx", calibrate(model)) == 4
    assert check_tensorrt(onnx.load(str(tmp_path / "int8.onnx"))) == []
    calibration = calibrate(model)
    next(node for node in model.graph.node if node.op_type == "Sigmoid").op_type = "Hardmax"
    onnx.save(model, str(tmp_path / "model.onnx"))
    with pytest.raises(EngineError, match="the ONNX parser has no operator Hardmax") as caught:
        write_tensorrt_onnx(tmp_path / "model.onnx", tmp_path / "other.onnx", calibration)
    assert caught.value.remedy
    assert not (tmp_path / "other.onnx").exists()


# --- the rules --------------------------------------------------------------------------------------------------------


def test_operators_are_standard_ones_of_the_graphs_opset() -> None:
    known = {schema.name for schema in onnx.defs.get_all_schemas_with_history() if schema.since_version <= 17}
    assert known >= OPERATORS


def bias_in_int32(model: Any) -> Any:
    """What the form for ONNX Runtime has."""
    ranges = calibrate(residual())
    model = residual()
    insert_qdq(model, ranges)
    return model


def without_zero_point(model: Any) -> Any:
    for node in model.graph.node:
        if node.op_type == "QuantizeLinear":
            del node.input[2]
    return model


def axis_one(model: Any) -> Any:
    for node in model.graph.node:
        for attribute in node.attribute:
            if attribute.name == "axis":
                attribute.i = 1
    return model


def computed(index: int, name: str) -> Callable[[Any], Any]:
    """Make an input of the first QuantizeLinear something that the graph computes."""

    def change(model: Any) -> Any:
        first = next(index for index, node in enumerate(model.graph.node) if node.op_type == "QuantizeLinear")
        node = model.graph.node[first]
        model.graph.node.insert(first, op("Identity", node.input[index], name))
        model.graph.node[first + 1].input[index] = name
        return model

    return change


def float_input(model: Any) -> Any:
    next(node for node in model.graph.node if node.op_type == "Conv").input[0] = "image"
    return model


def opset(version: int) -> Callable[[Any], Any]:
    def change(model: Any) -> Any:
        model.opset_import[0].version = version
        return model

    return change


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (bias_in_int32, "DequantizeLinear a.bias.DQ dequantises int32: a bias has to be float"),
        (bias_in_int32, "QuantizeLinear image.Q is of uint8, not int8"),
        (without_zero_point, "QuantizeLinear image.Q is of uint8, not int8"),
        (lambda m: replace(m, "image.zero", np.int8(1)), "QuantizeLinear image.Q has a zero point other than 0"),
        (
            lambda m: replace(m, "w1.zero", np.array([0, 0, 3], np.int8)),
            "DequantizeLinear w1.DQ has a zero point other than 0",
        ),
        (lambda m: replace(m, "image.scale", np.float32(0)), "image.Q has a scale that is not positive and finite"),
        (
            lambda m: replace(m, "w1.scale", np.array([1, -1, 1], np.float32)),
            "w1.DQ has a scale that is not positive and finite",
        ),
        (lambda m: replace(m, "image.scale", np.float32("nan")), "image.Q has a scale that is not positive and finite"),
        (lambda m: replace(m, "image.scale", np.float32("inf")), "image.Q has a scale that is not positive and finite"),
        (computed(1, "made"), "QuantizeLinear image.Q has a scale that is not constant"),
        (computed(2, "made"), "QuantizeLinear image.Q has a zero point that is not constant"),
        (axis_one, "DequantizeLinear w1.DQ has scales along axis 1, weights have them along axis 0"),
        (lambda m: replace(m, "w1.scale", np.array([1, 1], np.float32)), "w1.DQ has 2 scales for 3 output channels"),
        (
            lambda m: replace(m, "image.scale", np.array([1, 1, 1], np.float32)),
            "image.Q has 3 scales: an activation has one",
        ),
        (float_input, "Conv a has quantised weights and a float input"),
        (opset(8), "opset 8 is outside 9 to 20"),
        (opset(21), "opset 21 is outside 9 to 20"),
    ],
)
def test_a_quantisation_that_tensorrt_refuses(change: Callable[[Any], Any], problem: str) -> None:
    found = check_tensorrt(change(quantized(residual())))
    assert any(problem in line for line in found), found
    assert not any("\n" in line for line in found)


def test_one_scale_for_all_weights_is_allowed() -> None:
    model = quantized(residual())
    replace(model, "w1.scale", np.float32(0.1))
    assert check_tensorrt(replace(model, "w1.zero", np.int8(0))) == []


@pytest.mark.parametrize(
    ("node", "problem"),
    [
        *((op(kind, "image", "result"), f"{kind} result is control flow") for kind in ("If", "Loop", "Scan")),
        *(
            (op(kind, "image", "result"), f"{kind} result is an integer kernel")
            for kind in ("QLinearConv", "QLinearMatMul", "ConvInteger", "MatMulInteger", "DynamicQuantizeLinear")
        ),
        *(
            (op(kind, "image", "result"), f"the shape that {kind} result gives depends on values")
            for kind in ("NonZero", "Compress", "Unique")
        ),
        (op("BitShift", "image", "result"), "the ONNX parser has no operator BitShift (BitShift result)"),
        (op("FusedConv", "image", "result", domain="com.microsoft"), "is not standard ONNX but of com.microsoft"),
        (op("Resize", "image", "", "half", "result", mode="cubic"), "Resize result has mode cubic"),
        (
            op("Resize", "image", "", "half", "result", coordinate_transformation_mode="tf_crop_and_resize"),
            "Resize result has coordinate_transformation_mode tf_crop_and_resize",
        ),
        (op("TopK", "image", "one", "result", sorted=0), "TopK result must sort"),
        (op("TopK", "image", "many", "result"), "TopK result chooses 3840, more than 3839"),
        (op("TopK", "image", "image", "result"), "TopK result has a number to choose that is not constant"),
        (
            op("NonMaxSuppression", "image", "image", "image", "result"),
            "NonMaxSuppression result has a number or a threshold that is not constant",
        ),
        (op("Unsqueeze", "image", "image", "result"), "Unsqueeze result needs constant axes"),
        (op("Conv", "image", "image", "result"), "Conv result has weights that are not constant"),
        (op("Conv", "image", "w", "image", "result"), "Conv result has a bias that is not constant"),
    ],
)
def test_an_operator_that_tensorrt_refuses(node: Any, problem: str) -> None:
    constants: dict[str, Any] = {"one": np.array([1], np.int64), "many": np.array([3840], np.int64)}
    constants |= {"half": np.array([1, 1, 0.5, 0.5], np.float32), "w": np.zeros((3, 3, 1, 1), np.float32)}
    (found,) = check_tensorrt(model_of([node], constants))
    assert problem in found


@pytest.mark.parametrize(
    ("image", "problem"),
    [
        (["N", 3, "H", "W"], None),
        ([2, 3, 320, 320], None),
        (["N", "C", "H", "W"], "dimension 1 of input image is free: only batch, height and width may be"),
        ([2, 0, 320, 320], "dimension 1 of input image is free: only batch, height and width may be"),
        (["N", 3, "L"], "input image has 3 dimensions, an image has 4"),
    ],
)
def test_free_dimensions(image: list[Any], problem: str | None) -> None:
    assert check_tensorrt(model_of([op("Relu", "image", "result")], {}, image)) == ([problem] if problem else [])


# --- as ONNX Runtime hands it on --------------------------------------------------------------------------------------


def plain_options() -> Any:
    """Those that the engine had before it kept the biases, and that every other session has."""
    return session_options(ort, 1)


def folded_options() -> Any:
    options = session_options(ort, 1)
    options.add_session_config_entry("session.disable_quant_qdq", "1")
    return options


def kinds(model: Any) -> Counter[str]:
    """Operators, without Casts, and without the copies of a DequantizeLinear that each reader gets."""
    found = Counter(node.op_type for node in model.graph.node if node.op_type not in ("Cast", "DequantizeLinear"))
    found["DequantizeLinear"] = len({node.input[0] for node in model.graph.node if node.op_type == "DequantizeLinear"})
    return found


def test_onnx_runtime_hands_on_what_keeps_the_rules() -> None:
    model = quantized(residual())
    found = handed_on(model)
    assert check_tensorrt(found) == []
    assert kinds(found) == kinds(model)
    biases = {name: constant(residual(), name) for name in ("w1.bias", "w2.bias", "w3.bias", "w4.bias")}
    assert all(np.array_equal(constant(found, name), value) for name, value in biases.items()), "the same floats"


def test_the_options_of_other_sessions_do_not() -> None:
    model = quantized(residual())
    refused = check_tensorrt(handed_on(model, plain_options()))
    assert any("dequantises int32: a bias has to be float" in line for line in refused)
    # Nor does the other option that keeps biases in float: the weights are then float, too.
    refused = check_tensorrt(handed_on(model, folded_options()))
    assert any("has float weights and a quantised input" in line for line in refused)


# --- the bundle -------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@demo_bundles.needs_export
@demo_bundles.needs_quant
def test_the_bundles_file_keeps_the_rules_and_agrees_with_float(tmp_path_factory: pytest.TempPathFactory) -> None:
    int8, fp32 = (Bundle.open(make(tmp_path_factory)) for make in (demo_bundles.quantized, demo_bundles.exported))
    path, _ = int8.graph("onnx_tensorrt")
    source, _ = fp32.graph("onnx")
    assert path.stat().st_size <= 0.3 * source.stat().st_size
    model = onnx.load(str(path))
    assert check_tensorrt(model) == []
    calibration = calibration_from(json.loads((int8.directory / "calibration.json").read_text()))
    makers = {name: node.op_type for node in model.graph.node for name in node.output}
    convolutions = [node for node in model.graph.node if node.op_type == "Conv"]
    named = {f"{name}.dq" for name in calibration.convolutions}
    assert {node.input[1] for node in convolutions if makers.get(node.input[1]) == "DequantizeLinear"} == named
    image = np.random.default_rng(0).normal(0, 1, (1, 3, 160, 192)).astype(np.float32)
    (scores, boxes), (int8_scores, int8_boxes) = (run(m, image, "scores", "boxes") for m in (onnx.load(source), model))
    assert 0 < np.abs(scores - int8_scores).mean() < 0.02
    assert 0 < np.abs(boxes - int8_boxes).mean() < 4


@pytest.mark.slow
@demo_bundles.needs_export
@demo_bundles.needs_quant
@pytest.mark.parametrize(
    ("make", "graph", "spoilt"),
    [
        (demo_bundles.exported, "onnx", False),
        (demo_bundles.exported, "onnx_fp16", False),
        (demo_bundles.exported, "end_to_end", False),
        (demo_bundles.exported, "end_to_end_fp16", False),
        (demo_bundles.quantized, "onnx_tensorrt", True),
        (demo_bundles.quantized, "end_to_end_tensorrt", True),
    ],
)
def test_every_precision_of_the_demo_as_onnx_runtime_hands_it_on(
    make: Callable[[pytest.TempPathFactory], Path],
    graph: GraphName,
    spoilt: bool,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    path, _ = Bundle.open(make(tmp_path_factory)).graph(graph)
    model = onnx.load(str(path))
    whole_and_part = (model, split_decode(model)[0]) if graph == "onnx_fp16" else (model,)
    for one in whole_and_part:
        found = handed_on(one)
        assert check_tensorrt(found) == []
        assert kinds(found) == kinds(one) or graph.startswith("end_to_end")  # of which some is constant
    refused = check_tensorrt(handed_on(model, plain_options()))
    assert any("dequantises int32" in line for line in refused) == spoilt
