"""Multiply-accumulate operations of an ONNX graph at a given input size."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from gfldeploy.errors import BundleError

__all__ = ["convolution_macs", "count_macs"]


def count_macs(onnx_file: Path, height: int, width: int, strides: Sequence[int]) -> int:
    """MACs of one image of `height` x `width` pixels: convolutions and the DFL projection, nothing else.

    `strides`: of the pyramid levels, in pixels.
    A convolution costs outputs x (input channels / groups) x kernel height x kernel width; one MAC is two FLOPs.
    Raises `BundleError` if ONNX's shape inference cannot follow the graph at that size.
    """
    model, weights = _load(onnx_file)
    total = sum(_convolutions(model, weights, onnx_file, height, width, strides).values())
    # The DFL projection: inference may not follow the reshapes before it, but its size is known without.
    cells = sum(-(-height // stride) * -(-width // stride) for stride in strides)
    for node in model.graph.node:
        if node.op_type == "MatMul" and node.input[1] in weights:
            total += cells * 4 * _product(list(weights[node.input[1]]), onnx_file)
    return total


def convolution_macs(onnx_file: Path, height: int, width: int, strides: Sequence[int]) -> dict[tuple[str, int], int]:
    """MACs of every convolution of an FP32 graph by weight name and use (0, 1, ... in graph order); as `count_macs`."""
    model, weights = _load(onnx_file)
    return _convolutions(model, weights, onnx_file, height, width, strides)


def _load(onnx_file: Path) -> tuple[Any, dict[str, tuple[int, ...]]]:
    """The model, and the shapes of its weights by the name under which nodes read them."""
    import onnx

    try:
        model = onnx.load(str(onnx_file))
        weights = {tensor.name: tuple(tensor.dims) for tensor in model.graph.initializer}
        if len(model.graph.input[0].type.tensor_type.shape.dim) != 4:
            raise ValueError("its input is no batch of images")
    except Exception as error:  # protobuf's own error for damaged bytes, and what a graph of something else causes
        raise BundleError(
            f"{onnx_file} is not the ONNX graph of a detector: {error}", "Export the bundle again."
        ) from error
    return model, weights | _through_dequantize(model, weights)


def _convolutions(
    model: Any,
    weights: Mapping[str, tuple[int, ...]],
    onnx_file: Path,
    height: int,
    width: int,
    strides: Sequence[int],
) -> dict[tuple[str, int], int]:
    """MACs by weight name and use. Fixes the input's size in `model` and takes its outputs away."""
    import onnx

    for dimension, value in zip(model.graph.input[0].type.tensor_type.shape.dim, (1, 3, height, width), strict=True):
        dimension.dim_value = value
    # The outputs' symbolic sizes would contradict the sizes inferred from the input's.
    del model.graph.output[:]
    try:
        inferred = onnx.shape_inference.infer_shapes(model, data_prop=True)
    except onnx.shape_inference.InferenceError as error:
        raise BundleError(
            f"{onnx_file}: its shapes cannot be inferred at {height}x{width}: {error}",
            f"Give a --size of multiples of {max(strides)} px; if that fails too, export the bundle again.",
        ) from error
    shapes = {
        value.name: [dimension.dim_value for dimension in value.type.tensor_type.shape.dim]
        for value in (*inferred.graph.value_info, *inferred.graph.input)
    }
    uses: Counter[str] = Counter()
    found = {}
    for node in model.graph.node:
        if node.op_type == "Conv" and node.input[1] in weights:
            name = node.input[1]
            _, channels, *kernel = weights[name]
            size = _product(shapes.get(node.output[0], []), onnx_file)
            found[name, uses[name]] = size * channels * _product(kernel, onnx_file)
            uses[name] += 1
    return found


def _through_dequantize(model: Any, weights: dict[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    return {
        node.output[0]: weights[node.input[0]]
        for node in model.graph.node
        if node.op_type == "DequantizeLinear" and node.input[0] in weights
    }


def _product(sizes: list[int], onnx_file: Path) -> int:
    result = 1
    for size in sizes:
        result *= size
    if not sizes or result <= 0:
        raise BundleError(f"{onnx_file}: a convolution's output size is unknown", "Export the bundle again.")
    return result
