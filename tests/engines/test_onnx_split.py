"""The FP16 graph in two parts: together they give the same bits, and nothing of the decode is in the first."""

from __future__ import annotations

from typing import Any

import demo_bundles
import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from gfldeploy.bundle import Bundle
from gfldeploy.engines.onnx_split import split_decode
from gfldeploy.errors import EngineError
from gfldeploy.export.half import convert_to_half

ort = pytest.importorskip("onnxruntime")

node = helper.make_node


def detector(quality: bool = False, shape_of: str = "logits") -> Any:
    """A head of two convolutions, an integral of a distribution, and boxes in pixels, from a convolution in FP16.

    `quality`: the scores are multiplied by what a convolution makes of that distribution, as in GFLv2. `shape_of`: the
    tensor whose shape says where the boxes are.
    """
    random = np.random.default_rng(0)
    constants: dict[str, NDArray[Any]] = {
        "w": random.normal(0, 0.5, (4, 3, 3, 3)).astype(np.float32),
        "w.score": random.normal(0, 0.5, (2, 4, 1, 1)).astype(np.float32),
        "w.box": random.normal(0, 0.5, (5, 4, 1, 1)).astype(np.float32),
        "w.quality": random.normal(0, 0.5, (2, 5, 1, 1)).astype(np.float32),
        "bins": np.arange(5, dtype=np.float32).reshape(1, 5, 1, 1),
        "flat": np.array([0, 0, -1], np.int64),
        "stride": np.array(1000.7, np.float32),
        "width": np.array(3, np.int64),
        "zero": np.array(0, np.int64),
        "one": np.array(1, np.int64),
        "axis": np.array([1], np.int64),
    }
    nodes = [
        node("Conv", ["image", "w"], ["a"], pads=[1, 1, 1, 1]),
        node("Relu", ["a"], ["b"]),
        node("Conv", ["b", "w.score"], ["logits"]),
        node("Conv", ["b", "w.box"], ["distribution"]),
        node("Softmax", ["distribution"], ["p"], axis=1),
        *([node("Conv", ["p", "w.quality"], ["q"]), node("Mul", ["logits", "q"], ["scored"])] if quality else ()),
        node("Sigmoid", ["scored" if quality else "logits"], ["s"]),
        node("Reshape", ["s", "flat"], ["s.flat"]),
        node("Transpose", ["s.flat"], ["scores"], perm=[0, 2, 1]),
        node("Mul", ["p", "bins"], ["weighted"]),
        node("ReduceSum", ["weighted", "axis"], ["integral"]),
        node("Shape", [shape_of], ["shape"]),
        node("Gather", ["shape", "width"], ["columns"]),
        node("Range", ["zero", "columns", "one"], ["x"]),
        node("Cast", ["x"], ["x.float"], to=TensorProto.FLOAT),
        node("Mul", ["x.float", "stride"], ["centre"]),
        node("Sub", ["centre", "integral"], ["boxes"]),
    ]
    used = {name for one in nodes for name in one.input}
    graph = helper.make_graph(
        nodes,
        "detector",
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, ["N", 3, "H", "W"])],
        [
            helper.make_tensor_value_info("scores", TensorProto.FLOAT, ["N", "A", 2]),
            helper.make_tensor_value_info("boxes", TensorProto.FLOAT, ["N", 1, "H", "W"]),
        ],
        [numpy_helper.from_array(value, name) for name, value in constants.items() if name in used],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    convert_to_half(model)
    onnx.checker.check_model(model)
    return model


def run(model: Any, given: dict[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
    options = ort.SessionOptions()
    options.log_severity_level = 3
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    names = [one.name for one in session.get_outputs()]
    found = session.run(names, {one.name: given[one.name] for one in session.get_inputs()})
    return dict(zip(names, found, strict=True))


def check_parts(model: Any, image: NDArray[Any]) -> tuple[Any, Any]:
    before = model.SerializeToString()
    network, decode = split_decode(model)
    assert model.SerializeToString() == before
    for part in (network, decode):
        onnx.checker.check_model(part, full_check=True)
    whole, first = run(model, {"image": image}), run(network, {"image": image})
    found = run(decode, {"image": image, **first})
    assert list(found) == list(whole)
    assert all(np.array_equal(found[name], whole[name]) for name in whole), "not the same bits"
    # Each node is in one of them, and what goes from one to the other is FP32.
    of = [{name for one in part.graph.node for name in one.output} for part in (network, decode)]
    assert of[0] | of[1] == {name for one in model.graph.node for name in one.output} and not of[0] & of[1]
    assert {value.name for value in decode.graph.input} <= {value.name for value in network.graph.output} | {"image"}
    computed = {name for one in decode.graph.node if one.op_type != "Shape" for name in one.input}
    between = {value.name: value.type.tensor_type.elem_type for value in network.graph.output}
    assert {kind for name, kind in between.items() if name in computed} == {TensorProto.FLOAT}
    assert not any(one.op_type == "Conv" for one in decode.graph.node)
    assert not any(tensor.data_type == TensorProto.FLOAT16 for tensor in decode.graph.initializer)
    return network, decode


def kinds(part: Any) -> set[str]:
    return {one.op_type for one in part.graph.node}


IMAGE = np.random.default_rng(1).normal(0, 1, (2, 3, 5, 7)).astype(np.float32)


def test_the_parts_give_the_bits_of_the_whole() -> None:
    network, decode = check_parts(detector(), IMAGE)
    assert kinds(network) == {"Cast", "Conv", "Relu"}
    assert kinds(decode) >= {"Softmax", "Sub", "Range", "Sigmoid", "Transpose"}


def test_a_convolution_of_the_distribution_belongs_to_the_network() -> None:
    network, decode = check_parts(detector(quality=True), IMAGE)
    assert kinds(network) == {"Cast", "Conv", "Relu", "Softmax"}
    assert kinds(decode) >= {"Sub", "ReduceSum", "Sigmoid"}


def test_the_shape_of_a_tensor_that_stays_fp16() -> None:
    network, _ = check_parts(detector(shape_of="b"), IMAGE)
    assert {value.name for value in network.graph.output} == {"logits", "distribution", "b.fp16"}


def test_a_graph_that_cannot_be_cut() -> None:
    model = detector()
    (sigmoid,) = (one for one in model.graph.node if one.op_type == "Sigmoid")
    sigmoid.input[0] = "logits.fp16"
    with pytest.raises(EngineError, match=r"cannot be cut where its decode begins: logits.fp16 is FP16\. Export"):
        split_decode(model)
    del model.graph.node[:]
    with pytest.raises(EngineError, match="nothing follows its convolutions"):
        split_decode(model)


@pytest.mark.slow
@demo_bundles.needs_export
def test_the_demo_detector(tmp_path_factory: pytest.TempPathFactory) -> None:
    path, _ = Bundle.open(demo_bundles.exported(tmp_path_factory)).graph("onnx_fp16")
    image = np.random.default_rng(0).normal(0, 1, (2, 3, 160, 192)).astype(np.float32)
    network, decode = check_parts(onnx.load(str(path)), image)
    assert not kinds(network) & {"Softmax", "TopK", "GatherElements", "Sigmoid", "MatMul", "Range", "Transpose"}
    assert kinds(decode) >= {"Softmax", "TopK", "GatherElements", "Sigmoid", "MatMul", "Range"}
