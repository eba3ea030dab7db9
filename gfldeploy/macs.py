"""Multiply-accumulate operations of an ONNX graph at a given input size."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gfldeploy.errors import BundleError

__all__ = ["count_macs"]


def count_macs(onnx_file: Path, height: int, width: int, strides: Sequence[int]) -> int:
    """MACs of one image of `height` x `width` pixels: convolutions and the DFL projection, nothing else.

    `strides`: of the pyramid levels, in pixels.
    A convolution costs outputs x (input channels / groups) x kernel height x kernel width; one MAC is two FLOPs.
    Raises `BundleError` if ONNX's shape inference cannot follow the graph at that size.
    """
    import onnx

    try:
        model = onnx.load(str(onnx_file))
        dimensions = model.graph.input[0].type.tensor_type.shape.dim
        for dimension, value in zip(dimensions, (1, 3, height, width), strict=True):
            dimension.dim_value = value
    except Exception as error:  # protobuf's own error for damaged bytes, and what a graph of something else causes
        raise BundleError(
            f"{onnx_file} is not the ONNX graph of a detector: {error}", "Export the bundle again."
        ) from error
    # The outputs' symbolic sizes would contradict the sizes inferred from the input's.
    del model.graph.output[:]
    weights = {tensor.name: tuple(tensor.dims) for tensor in model.graph.initializer}
    weights |= _through_dequantize(model, weights)
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
    total = 0
    for node in model.graph.node:
        if node.op_type == "Conv" and node.input[1] in weights:
            _, channels, *kernel = weights[node.input[1]]
            total += _product(shapes.get(node.output[0], []), onnx_file) * channels * _product(kernel, onnx_file)
        elif node.op_type == "MatMul" and node.input[1] in weights:
            # The DFL projection: inference may not follow the reshapes before it, but its size is known without.
            cells = sum(-(-height // stride) * -(-width // stride) for stride in strides)
            total += cells * 4 * _product(list(weights[node.input[1]]), onnx_file)
    return total


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
