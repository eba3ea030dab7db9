"""Multiply-accumulate operations and memory traffic of an ONNX graph at a given input size."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gfldeploy.errors import BundleError

__all__ = ["GraphCost", "convolution_macs", "count_macs", "graph_cost"]


@dataclass(frozen=True)
class GraphCost:
    """Of one image: `macs` as `count_macs`; `activations`: values that its convolutions read and write; and `weights`:
    values of the convolutions' weights, those that several uses share counted for each use.
    """

    macs: int
    activations: int
    weights: int


def count_macs(onnx_file: Path, height: int, width: int, strides: Sequence[int]) -> int:
    """MACs of one image of `height` x `width` pixels: convolutions and the DFL projection, nothing else.

    `strides`: of the pyramid levels, in pixels.
    A convolution costs outputs x (input channels / groups) x kernel height x kernel width; one MAC is two FLOPs.
    Raises `BundleError` if ONNX's shape inference cannot follow the graph at that size.
    """
    return graph_cost(onnx_file, height, width, strides).macs


def graph_cost(onnx_file: Path, height: int, width: int, strides: Sequence[int]) -> GraphCost:
    """`count_macs` and the values that the convolutions move, at the same terms."""
    model, weights = _load(onnx_file)
    found = _convolutions(model, weights, onnx_file, height, width, strides).values()
    macs = sum(one.macs for one in found)
    # The DFL projection: inference may not follow the reshapes before it, but its size is known without.
    cells = sum(-(-height // stride) * -(-width // stride) for stride in strides)
    for node in model.graph.node:
        if node.op_type == "MatMul" and node.input[1] in weights:
            macs += cells * 4 * _product(list(weights[node.input[1]]), onnx_file)
    return GraphCost(macs, sum(one.activations for one in found), sum(one.weights for one in found))


def convolution_macs(onnx_file: Path, height: int, width: int, strides: Sequence[int]) -> dict[tuple[str, int], int]:
    """MACs of every convolution of an FP32 graph by weight name and use (0, 1, ... in graph order); as `count_macs`."""
    model, weights = _load(onnx_file)
    found = _convolutions(model, weights, onnx_file, height, width, strides)
    return {use: cost.macs for use, cost in found.items()}


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
) -> dict[tuple[str, int], GraphCost]:
    """What each convolution costs, by weight name and use. Fixes the input's size in `model` and takes its outputs away."""
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
            read, written = (_product(shapes.get(tensor, []), onnx_file) for tensor in (node.input[0], node.output[0]))
            window = channels * _product(kernel, onnx_file)
            found[name, uses[name]] = GraphCost(
                written * window, read + written, _product(list(weights[name]), onnx_file)
            )
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
