"""The FP16 file: what becomes half precision and what must not, and how far it is from FP32."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import demo_bundles
import numpy as np
import onnx
import pytest
from demo_bundles import RunHere
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from gfldeploy import demo
from gfldeploy.bundle import Bundle
from gfldeploy.candidates import matched
from gfldeploy.errors import EngineError
from gfldeploy.export import half, parity
from gfldeploy.export.half import convert_to_half, write_half_onnx
from gfldeploy.export.parity import parity_images, parity_shapes

ort = pytest.importorskip("onnxruntime")

Array = NDArray[np.float32]


def detector() -> Any:
    """Two levels in small: convolutions with a normalisation between, scores, a distribution's integral, and cells."""
    random = np.random.default_rng(0)
    constants: dict[str, NDArray[Any]] = {
        "w1": random.normal(0, 0.3, (8, 3, 3, 3)).astype(np.float32),
        "b1": random.normal(0, 0.5, 8).astype(np.float32),
        "w2": random.normal(0, 0.3, (8, 8, 3, 3)).astype(np.float32),
        "ones": np.ones(8, np.float32),
        "zeros": np.zeros(8, np.float32),
        "gain": np.full((8, 1, 1), 0.7, np.float32),
        "rows": np.array([0, 8, -1], np.int64),
        "stride": np.array([8.125], np.float32),
        "flat": np.array([-1], np.int64),
        "projection": np.arange(8, dtype=np.float32).reshape(8, 1),
    }
    nodes = [
        helper.make_node("Conv", ["image", "w1", "b1"], ["a"], pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["a"], ["b"]),
        helper.make_node("InstanceNormalization", ["b", "ones", "zeros"], ["c"]),
        helper.make_node("Mul", ["c", "gain"], ["d"]),
        helper.make_node("Add", ["d", "b"], ["e"]),
        helper.make_node("Conv", ["e", "w2"], ["f"], pads=[1, 1, 1, 1]),
        helper.make_node("Shape", ["f"], ["shape"]),
        helper.make_node("Cast", ["shape"], ["sizes"], to=TensorProto.FLOAT),
        helper.make_node("Mul", ["sizes", "stride"], ["corner"]),
        helper.make_node("Reshape", ["f", "rows"], ["g"]),
        helper.make_node("Transpose", ["g"], ["logits"], perm=[0, 2, 1]),
        helper.make_node("Sigmoid", ["logits"], ["scores"]),
        helper.make_node("Softmax", ["logits"], ["probabilities"], axis=-1),
        helper.make_node("MatMul", ["probabilities", "projection"], ["distance"]),
        helper.make_node("Reshape", ["distance", "flat"], ["line"]),
        helper.make_node("Concat", ["line", "corner"], ["boxes"], axis=0),
    ]
    return model_of(nodes, constants, {"scores": ["N", "A", 8], "boxes": ["B"]})


def model_of(nodes: list[Any], constants: dict[str, NDArray[Any]], outputs: dict[str, list[Any]]) -> Any:
    graph = helper.make_graph(
        nodes,
        "small",
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, ["N", 3, "H", "W"])],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in outputs.items()],
        [numpy_helper.from_array(value, name) for name, value in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.checker.check_model(model)
    return model


def converted(model: Any) -> Any:
    copy = onnx.ModelProto.FromString(model.SerializeToString())
    convert_to_half(copy)
    onnx.checker.check_model(copy, full_check=True)  # types included
    return copy


def run(model: Any, image: Array) -> list[Array]:
    options = ort.SessionOptions()
    options.log_severity_level = 3
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    found: list[Array] = session.run(None, {"image": image})
    return found


def rounded(model: Any) -> Any:
    """A converted model in FP32, with every value that would be FP16 rounded to FP16's 11 significant bits.

    ONNX Runtime's CPU provider keeps FP32 from one FP16 operator to the next, so that running the file itself shows the
    rounding of constants and of what is cast, but of no value in between. x * (2^13 + 1) - (x * (2^13 + 1) - x) in FP32
    leaves 24 - 13 = 11 bits (Veltkamp's splitting).
    """
    model = onnx.ModelProto.FromString(model.SerializeToString())
    names = {name for node in model.graph.node for name in node.output if name.endswith(".fp16")}
    nodes = []
    for node in model.graph.node:
        if node.op_type == "Cast" and names & {node.input[0], node.output[0]}:
            node = helper.make_node("Identity", node.input, node.output)
        made = [name for name in node.output if name in names]
        for index, name in enumerate(node.output):
            if name in names:
                node.output[index] = f"{name}.exact"
        nodes.append(node)
        for name in made:
            nodes += [
                helper.make_node("Mul", [f"{name}.exact", "splitter"], [f"{name}.large"]),
                helper.make_node("Sub", [f"{name}.large", f"{name}.exact"], [f"{name}.rest"]),
                helper.make_node("Sub", [f"{name}.large", f"{name}.rest"], [name]),
            ]
    tensors = [numpy_helper.to_array(tensor) for tensor in model.graph.initializer]
    constants = [
        numpy_helper.from_array(value.astype(np.float32) if value.dtype == np.float16 else value, tensor.name)
        for value, tensor in zip(tensors, model.graph.initializer, strict=True)
    ]
    del model.graph.node[:], model.graph.initializer[:]
    model.graph.node.extend(nodes)
    model.graph.initializer.extend([*constants, numpy_helper.from_array(np.float32(2**13 + 1), "splitter")])
    onnx.checker.check_model(model)
    return model


def types_of(model: Any) -> dict[str, int]:
    """Element type of every value, as ONNX infers it."""
    inferred = onnx.shape_inference.infer_shapes(model, strict_mode=True)
    values = (*inferred.graph.value_info, *inferred.graph.input, *inferred.graph.output)
    return {value.name: value.type.tensor_type.elem_type for value in values}


def operators_in(model: Any, kind: int) -> set[str]:
    """Operators whose result is of that type, casts aside."""
    types = types_of(model)
    return {node.op_type for node in model.graph.node if types[node.output[0]] == kind} - {"Cast"}


def test_convolutions_and_what_is_between_become_half_and_nothing_else() -> None:
    model = converted(detector())
    assert operators_in(model, TensorProto.FLOAT16) == {"Conv", "Relu", "Mul", "Add"}
    assert operators_in(model, TensorProto.FLOAT) >= {"InstanceNormalization", "Sigmoid", "Softmax", "MatMul", "Mul"}
    types = types_of(model)
    assert {types[value.name] for value in (*model.graph.input, *model.graph.output)} == {TensorProto.FLOAT}
    kept = {tensor.name: tensor.data_type for tensor in model.graph.initializer}
    assert kept["w1.fp16"] == kept["gain.fp16"] == TensorProto.FLOAT16
    assert kept["projection"] == kept["stride"] == kept["ones"] == TensorProto.FLOAT
    assert not {"w1", "w2", "b1", "gain"} & set(kept), "an FP32 copy that nothing reads"


def test_casts_are_made_once_and_only_where_the_precision_changes() -> None:
    casts = [node for node in converted(detector()).graph.node if node.op_type == "Cast"]
    made = [(node.input[0], node.output[0]) for node in casts]
    # To half: the image and the normalised values. From it: before the normalisation, and the last convolution.
    expected = {("image", "image.fp16"), ("b.fp16", "b"), ("c", "c.fp16"), ("f.fp16", "f"), ("shape", "sizes")}
    assert len(made) == len(expected)
    assert set(made) == expected


@pytest.mark.parametrize("simulated", [False, True])
def test_half_is_close_to_float_and_coordinates_are_exact(simulated: bool) -> None:
    model = detector()
    image = np.random.default_rng(1).uniform(-2, 2, (1, 3, 40, 333)).astype(np.float32)
    half_model = converted(model)
    expected = run(model, image)
    actual = run(rounded(half_model) if simulated else half_model, image)
    assert [value.dtype for value in actual] == [np.float32, np.float32]
    assert 0 < np.abs(expected[0] - actual[0]).max() < 0.01
    assert np.abs(expected[1][:-4] - actual[1][:-4]).max() < 0.02  # of distances up to 7
    np.testing.assert_array_equal(actual[1][-4:], expected[1][-4:])
    assert expected[1][-1] != np.float16(expected[1][-1]), "a coordinate that FP16 would have changed"


def test_a_convolution_may_be_an_output_and_be_read_by_others() -> None:
    weights = np.random.default_rng(0).normal(0, 0.3, (3, 3, 1, 1)).astype(np.float32)
    nodes = [
        helper.make_node("Conv", ["image", "w"], ["first"]),
        helper.make_node("Conv", ["first", "w"], ["second"]),
        helper.make_node("Exp", ["first"], ["grown"]),
        helper.make_node("Mul", ["second", "w2"], ["scaled"]),
    ]
    outputs: dict[str, list[Any]] = {name: ["N", 3, "H", "W"] for name in ("first", "grown", "scaled")}
    constants: dict[str, NDArray[Any]] = {"w": weights, "w2": np.array([2], np.float32)}
    model = model_of(nodes, constants, outputs)
    image = np.random.default_rng(1).uniform(-1, 1, (2, 3, 4, 5)).astype(np.float32)
    half_model = converted(model)
    assert [tensor.name for tensor in half_model.graph.initializer] == ["w2", "w.fp16"]
    for expected, actual in zip(run(model, image), run(half_model, image), strict=True):
        np.testing.assert_allclose(actual, expected, atol=0.01)


def test_a_graph_without_convolutions_stays_as_it_is() -> None:
    model = model_of([helper.make_node("Exp", ["image"], ["grown"])], {}, {"grown": ["N", 3, "H", "W"]})
    before = model.SerializeToString()
    assert convert_to_half(model) == 0
    assert model.SerializeToString() == before


def test_weights_beyond_half_are_refused(tmp_path: Path) -> None:
    weights = np.full((3, 3, 1, 1), 1e5, np.float32)
    nodes = [helper.make_node("Conv", ["image", "conv2d_0.w_0"], ["map"])]
    onnx.save(model_of(nodes, {"conv2d_0.w_0": weights}, {"map": ["N", 3, "H", "W"]}), str(tmp_path / "model.onnx"))
    with pytest.raises(EngineError, match=r"conv2d_0\.w_0 has values up to 1e\+05") as caught:
        write_half_onnx(tmp_path / "model.onnx", tmp_path / "half.onnx")
    assert caught.value.remedy
    assert not (tmp_path / "half.onnx").exists()


@pytest.mark.slow
@demo_bundles.needs_export
def test_the_bundles_fp16_file(tmp_path_factory: pytest.TempPathFactory) -> None:
    bundle = Bundle.open(demo_bundles.exported(tmp_path_factory))
    path, _ = bundle.graph("onnx_fp16")
    source, _ = bundle.graph("onnx")
    assert path.stat().st_size < 0.6 * source.stat().st_size
    record = json.loads((bundle.directory / "parity.json").read_text())["fp16"]
    assert record["tolerance"] == {"score": half.TOLERANCE.score, "box_px": half.TOLERANCE.box_px}
    assert [one["graph"] for one in record["comparisons"]] == ["onnx_fp16"] * 3
    # With every value between rounded, as on a GPU.
    model, half_model = onnx.load(str(source)), onnx.load(str(path))
    simulated = rounded(half_model)
    shape = parity_shapes(bundle.manifest.preprocess, (None, None, None))[-1]
    image = parity_images(shape, bundle.manifest.preprocess, seed=0)
    (scores, boxes, anchors), (half_scores, half_boxes, half_anchors) = run(model, image), run(simulated, image)
    here, there = matched(anchors[0], half_anchors[0])
    assert len(here) > 0.9 * len(anchors[0])
    assert 0 < np.abs(scores[0, here] - half_scores[0, there]).max() < half.TOLERANCE.score
    assert 0 < np.abs(boxes[0, here] - half_boxes[0, there]).max() < half.TOLERANCE.box_px
    # Coordinates in FP16 would be off by 0.1 px and more on average, whatever the stride.
    finest = anchors[0, here] < (shape[1] // 8) * (shape[2] // 8)
    assert finest.sum() > 100
    assert np.abs(boxes[0, here] - half_boxes[0, there])[finest].mean() < 0.05


@pytest.mark.slow
@demo_bundles.needs_export
def test_a_detector_that_fp16_does_not_suit_is_exported_without(
    tmp_path: Path, run_here: RunHere, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(half, "TOLERANCE", parity.Tolerance(0.0, 0.0))
    arguments = ("export", "-c", demo.config_path(), "--random-weights", 0, "--input-shape", "64x96", "-o")
    done = run_here(*arguments, tmp_path / "fp32")
    assert done.returncode == 0, done.stderr
    assert "leaving out the onnx_fp16 graph: the onnx_fp16 graph in onnxruntime differs" in done.stderr
    bundle = Bundle.open(tmp_path / "fp32")
    assert set(bundle.manifest.graphs) == {"paddle", "paddle_program", "onnx", "end_to_end"}
    record = json.loads((bundle.directory / "parity.json").read_text())["fp16"]
    assert "scores by" in record["left_out"]
    assert "comparisons" not in record
