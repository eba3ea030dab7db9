"""What is rewritten for ONNX Runtime computes what was written, and runs as it is meant to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from gfldeploy.engines.ort_rewrite import rewritten

ort = pytest.importorskip("onnxruntime")
onnx = pytest.importorskip("onnx")
node = onnx.helper.make_node

Array = NDArray[np.float32]
GROUPS, CHANNELS = 4, 32
LARGE = 10**6  # pixels, of which every map is worth it
STEP, ZERO = np.float32(0.05), np.uint8(117)
SCALES: dict[str, Any] = {"step": STEP, "zero": ZERO, "after": np.float32(0.02), "none": np.uint8(0)}


def pair(name: str, scale: str, zero: str) -> list[Any]:
    """Quantises `name`, and restores it as `name`.dq."""
    return [
        node("QuantizeLinear", [name, scale, zero], [f"{name}.q"]),
        node("DequantizeLinear", [f"{name}.q", scale, zero], [f"{name}.dq"]),
    ]


def write(path: Path, nodes: Sequence[Any], constants: Mapping[str, Any], channels: int, output: str) -> Path:
    graph = onnx.helper.make_graph(
        nodes,
        "graph",
        [onnx.helper.make_tensor_value_info("image", 1, ["N", channels, "H", "W"])],
        [onnx.helper.make_tensor_value_info(output, 1, None)],
        [onnx.numpy_helper.from_array(np.asarray(value), name) for name, value in {**SCALES, **constants}.items()],
    )
    opset = onnx.helper.make_opsetid("", 17)
    onnx.save(onnx.helper.make_model(graph, opset_imports=[opset], ir_version=8), str(path))
    return path


def run(model: str | bytes, image: Array, optimized: Path | None = None) -> Array:
    options = ort.SessionOptions()
    options.log_severity_level = 3
    if optimized is not None:
        options.optimized_model_filepath = str(optimized)
    (output,) = ort.InferenceSession(model, options, providers=["CPUExecutionProvider"]).run(None, {"image": image})
    found: Array = output
    return found


def kinds(model: bytes) -> list[str]:
    return [one.op_type for one in onnx.load_from_string(model).graph.node]


def normalisation(tmp_path: Path, relu: bool = True, epsilon: float = 1e-5, **changed: Any) -> Path:
    """Group normalisation as paddle2onnx writes it, between Q/DQ pairs."""
    constants: dict[str, Any] = {
        "groups": np.array([0, GROUPS, -1], np.int64),
        "ones": np.ones(GROUPS, np.float32),
        "zeros": np.zeros(GROUPS, np.float32),
        "gamma": FACTORS.reshape(-1, 1, 1),
        "beta": ADDENDS.reshape(-1, 1, 1),
        **changed,
    }
    made, zero = ("positive", "none") if relu else ("result", "zero")
    nodes = [
        *pair("image", "step", "zero"),
        node("Shape", ["image.dq"], ["sizes"]),
        node("Reshape", ["image.dq", "groups"], ["grouped"]),
        node("InstanceNormalization", ["grouped", "ones", "zeros"], ["normal"], epsilon=epsilon),
        node("Reshape", ["normal", "sizes"], ["back"]),
        node("Mul", ["back", "gamma"], ["scaled"]),
        node("Add", ["scaled", "beta"], ["result"]),
        *([node("Relu", ["result"], ["positive"])] if relu else []),
        *pair(made, "after", zero),
    ]
    return write(tmp_path / "norm.onnx", nodes, constants, CHANNELS, f"{made}.dq")


# Factors of either sign, one that is next to nothing and one that is nothing.
FACTORS = np.random.default_rng(5).normal(0.5, 0.5, CHANNELS).astype(np.float32)
FACTORS[3], FACTORS[4] = 1e-9, 0
ADDENDS = np.random.default_rng(6).normal(0.3, 0.5, CHANNELS).astype(np.float32)


def expected(maps: Array, relu: bool, epsilon: float) -> NDArray[np.float64]:
    """By its definition (Wu and He, Group Normalization, 2018) in FP64, of what the first Q gives."""
    integers = np.clip(np.rint(maps / STEP) + ZERO, 0, 255)
    groups = ((integers - ZERO) * np.float64(STEP)).reshape(len(maps), GROUPS, -1)
    normal = (groups - groups.mean(2, keepdims=True)) / np.sqrt(groups.var(2, keepdims=True) + epsilon)
    result: NDArray[np.float64] = normal.reshape(maps.shape) * FACTORS.reshape(-1, 1, 1) + ADDENDS.reshape(-1, 1, 1)
    low = 0 if relu else -int(ZERO)
    return np.clip(result, low * SCALES["after"], (low + 255) * SCALES["after"])


@pytest.mark.parametrize("relu", [True, False])
@pytest.mark.parametrize("epsilon", [1e-5, 0.5])
def test_normalisation_is_its_definition_for_each_image_of_a_batch(tmp_path: Path, relu: bool, epsilon: float) -> None:
    path = normalisation(tmp_path, relu, epsilon)
    model = rewritten(path, (8,), LARGE, True)
    assert model is not None
    assert "InstanceNormalization" not in kinds(model)
    random = np.random.default_rng(0)
    for shape in ((1, CHANNELS, 9, 13), (3, CHANNELS, 20, 7)):
        apart = random.normal(0, 1, (*shape[:2], 1, 1))  # each channel of each image has a mean of its own
        maps = (apart + random.normal(0, 1, shape)).astype(np.float32)
        maps[-1, :, shape[2] // 2 :] = 0  # as the padding of a batch is
        after = run(model, maps)
        exact = expected(maps, relu, epsilon)
        # To the nearest integer of the result; half of 1/127 of a step of the source is the bias's own rounding.
        np.testing.assert_allclose(after, exact, atol=0.51 * float(SCALES["after"]))
        np.testing.assert_allclose(after, run(str(path), maps), atol=1.01 * float(SCALES["after"]))


def test_flat_maps_are_what_is_added(tmp_path: Path) -> None:
    """The variance of what is the same everywhere is rounding, of either sign.

    The deviation is then that of epsilon alone, here a 16th of a step of the source: what the bias rounds, half
    a 127th of a step, is a 16th of a deviation.
    """
    model = rewritten(normalisation(tmp_path), (8,), LARGE, True)
    assert model is not None
    for value in (0.0, 3.3, -20.0):
        maps = np.full((1, CHANNELS, 30, 31), value, np.float32)
        rounded = np.abs(FACTORS).max() / 16 + float(SCALES["after"])
        np.testing.assert_allclose(run(model, maps), expected(maps, True, 1e-5), atol=rounded)


def test_what_is_small_or_no_group_normalisation_stays(tmp_path: Path) -> None:
    assert rewritten(normalisation(tmp_path), (8,), 4096, True) is None
    assert rewritten(normalisation(tmp_path), (8, 16), LARGE, True) is None  # used at fewer levels than there are
    for changed in (
        {"ones": np.full(GROUPS, 2, np.float32)},
        {"zeros": np.ones(GROUPS, np.float32)},
        {"groups": np.array([1, GROUPS, -1], np.int64)},
        {"none": np.uint8(3)},  # where the ReLU is not where integers end
        {"step": np.full(CHANNELS, 0.05, np.float32), "zero": np.full(CHANNELS, 117, np.uint8)},
        {"zero": np.int8(0)},
    ):
        assert rewritten(normalisation(tmp_path, **changed), (8,), LARGE, True) is None


@pytest.mark.parametrize("side", [5, 7, 9])
def test_a_large_first_convolution_gives_the_same_bits(tmp_path: Path, side: int) -> None:
    random = np.random.default_rng(0)
    constants = {
        "w.q": random.integers(-127, 128, (8, 3, side, side)).astype(np.int8),
        "w.scale": np.full(8, 0.01, np.float32),
        "b.q": random.integers(-999, 999, 8).astype(np.int32),
        "b.scale": STEP * np.float32(0.01),
    }
    nodes = [
        node("DequantizeLinear", ["w.q", "w.scale"], ["w"], axis=0),
        node("DequantizeLinear", ["b.q", "b.scale"], ["b"]),
        *pair("image", "step", "zero"),
        node("Conv", ["image.dq", "w", "b"], ["made"], strides=[2, 2], pads=[side // 2] * 4),
        *pair("made", "after", "zero"),
    ]
    path = write(tmp_path / "stem.onnx", nodes, constants, 3, "made.dq")
    model = rewritten(path, (8,), LARGE, True)
    assert model is not None
    assert "SpaceToDepth" in kinds(model)
    for shape in ((1, 3, 32, 64), (2, 3, 34, 30)):
        image = random.normal(0, 1, shape).astype(np.float32)
        np.testing.assert_array_equal(run(model, image), run(str(path), image))
    assert rewritten(path, (8,), LARGE, False) is None


def pooling(tmp_path: Path, pooled_zero: str) -> Path:
    nodes = [
        *pair("image", "step", "none"),
        node("MaxPool", ["image.dq"], ["pooled"], kernel_shape=[3, 3], strides=[2, 2], pads=[1, 1, 1, 1]),
        *pair("pooled", "after", pooled_zero),
        node("Neg", ["pooled.dq"], ["result"]),
    ]
    return write(tmp_path / "pool.onnx", nodes, {}, 8, "result")


def test_maxima_are_of_integers(tmp_path: Path) -> None:
    path = pooling(tmp_path, "none")
    model = rewritten(path, (8,), LARGE, True)
    assert model is not None
    image = np.random.default_rng(0).normal(0, 1, (2, 8, 12, 20)).astype(np.float32)
    after = run(model, image, tmp_path / "optimized.onnx")
    # Rounded once instead of twice, the first time in steps of 0.05.
    np.testing.assert_allclose(after, run(str(path), image), atol=0.5 * float(STEP) + 1.01 * float(SCALES["after"]))
    ran = onnx.load(str(tmp_path / "optimized.onnx")).graph.node
    restored = {name for one in ran if one.op_type == "DequantizeLinear" for name in one.output}
    assert not any(name in restored for one in ran if "MaxPool" in one.op_type for name in one.input)


def test_what_the_first_of_two_roundings_clips_stays_clipped(tmp_path: Path) -> None:
    """The integers before the maximum end at 0, those after it do not."""
    assert rewritten(pooling(tmp_path, "zero"), (8,), LARGE, True) is None


@pytest.mark.parametrize("swapped", [False, True])
def test_a_map_is_added_to_one_of_twice_its_sides(tmp_path: Path, swapped: bool) -> None:
    def path(**changed: Any) -> Path:
        attributes = {"mode": "nearest", "nearest_mode": "floor", "coordinate_transformation_mode": "asymmetric"}
        nodes = [
            node("AveragePool", ["image"], ["small"], kernel_shape=[2, 2], strides=[2, 2]),
            *pair("image", "step", "zero"),
            *pair("small", "after", "zero"),
            node("Resize", ["small.dq", "", "scales"], ["twice"], **(attributes | changed)),
            node("Add", ["image.dq", "twice"][:: -1 if swapped else 1], ["sum"]),
            *pair("sum", "step", "zero"),
        ]
        scales = np.array([1, 1, 2, 2], np.float32)
        return write(tmp_path / "add.onnx", nodes, {"scales": scales}, 8, "sum.dq")

    model = rewritten(path(), (8,), LARGE, True)
    assert model is not None
    assert "Resize" not in kinds(model)
    for shape in ((1, 8, 12, 20), (3, 8, 6, 10)):
        image = np.random.default_rng(0).normal(0, 1, shape).astype(np.float32)
        after, before = run(model, image), run(str(path()), image)
        # Halves may round to either side.
        np.testing.assert_allclose(after, before, atol=1.01 * float(STEP))
        assert (after != before).mean() < 0.02
    assert rewritten(path(mode="linear"), (8,), LARGE, True) is None
