"""Multiply-accumulate operations and memory traffic of an ONNX graph at a given input size, by arithmetic on shapes."""

from __future__ import annotations

import math
import tempfile
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gfldeploy.engines.base import Precision
from gfldeploy.engines.dependencies import require
from gfldeploy.errors import BundleError, reading

# Of one number.
BYTES: Mapping[Precision, int] = {"fp32": 4, "fp16": 2, "bf16": 2, "int8": 1}
# Shape inference needs the values of no larger constant: what Reshape, Resize and the like read has a few numbers.
_MOST_INFERRED_BYTES = 1024
# Operators whose output is their input under another name or shape. Q and DQ become part of what they surround.
_ALIASES = frozenset({"DequantizeLinear", "Flatten", "Identity", "QuantizeLinear", "Reshape", "Squeeze", "Unsqueeze"})
_COUNTED = ("Conv", "MatMul", "Gemm")
# Operators that may write over an input that nothing needs any more.
_IN_PLACE = frozenset(
    {"Add", "BatchNormalization", "Clip", "Div", "HardSigmoid", "HardSwish", "LeakyRelu", "Mul", "Relu", "Sigmoid"}
    | {"Softmax", "Sub", "Tanh"}
)


@dataclass(frozen=True)
class GraphWork:
    """What one image costs, in a graph or in an operator.

    `macs`: multiply-accumulates of convolutions and matrix products, nothing else. A convolution costs outputs x (input
    channels / groups) x kernel height x kernel width, a deformable one no more; one MAC is two FLOPs. Of the same
    operators but the DFL projection, in numbers (not bytes): `activations`, the inputs and outputs of one image, and
    `weights`. A convolution that is used more than once counts each time.
    """

    macs: int
    activations: int = 0
    weights: int = 0

    def __add__(self, other: GraphWork) -> GraphWork:
        return GraphWork(self.macs + other.macs, self.activations + other.activations, self.weights + other.weights)

    def traffic_bytes(self, precision: Precision, batch_size: int) -> float:
        """The smallest memory traffic of one image of a batch.

        Every convolution's input and output, and its share of the weights, are read or written once in `precision`.
        What lies between convolutions is taken to be fused with them, and nothing to stay in the cache.
        """
        return (self.activations + self.weights / batch_size) * BYTES[precision]


def convolution_macs(onnx_file: Path, height: int, width: int, strides: Sequence[int]) -> dict[tuple[str, int], int]:
    """MACs of every convolution of an FP32 graph by weight name and use (0, 1, ... in graph order); as `count_work`."""
    with _shapes_of(onnx_file, strides) as graph:
        return {key: one.macs for key, one in graph.convolutions((height, width)).items()}


def count_work(
    onnx_file: Path, sizes: Collection[tuple[int, int]], strides: Sequence[int]
) -> dict[tuple[int, int], GraphWork]:
    """The work of one image of each of the `sizes` (height, width in pixels), by size.

    `strides`: of the pyramid levels, in pixels. An INT8 (Q/DQ) graph counts as the FP32 graph that it was made from.
    The file is read once: a further size takes milliseconds. Raises `BundleError` if shape inference cannot follow the
    graph at a size.
    """
    with _shapes_of(onnx_file, strides) as graph:
        return {
            size: sum((*graph.convolutions(size).values(), *graph.products(size)), GraphWork(0))
            for size in dict.fromkeys(sizes)
        }


def peak_activations(
    onnx_file: Path, sizes: Collection[tuple[int, int]], strides: Sequence[int]
) -> dict[tuple[int, int], int]:
    """How many numbers (not bytes) are needed at once between the layers for one image of each of the `sizes`, by size.

    An estimate from the graph alone: its operators run in their order, every tensor is kept until its last use, and
    element-wise operators write over an input where they can. The image is counted; weights are not, nor what an engine
    adds (workspace, fragments, tensors in a layout of its own). Tensors whose size inference does not know are left
    out: the anchors' coordinates and the decoded boxes, which are small. A Q/DQ graph counts as in FP32. For GFL-R50 at
    800x1216 this gives 152 MB in FP32, where ONNX Runtime, which also fuses additions into convolutions, took 125 MB.
    Sizes are height, width in pixels; `strides` and errors: as `count_work`.
    """
    with _shapes_of(onnx_file, strides) as graph:
        return {size: graph.peak(size) for size in dict.fromkeys(sizes)}


@contextmanager
def _shapes_of(onnx_file: Path, strides: Sequence[int]) -> Iterator[_OnnxShapes]:
    """Whatever a graph of something else than a detector causes is a `BundleError`."""
    what = f"{onnx_file}, which should be the graph of a detector,"
    with reading(what, BundleError, "Export the bundle again."):
        yield _OnnxShapes(onnx_file, strides)


class _OnnxShapes:
    """A detector's graph, loaded without the values of its weights. Sizes are (height, width) in pixels."""

    def __init__(self, onnx_file: Path, strides: Sequence[int]) -> None:
        import onnx

        self._file, self._strides = onnx_file, strides
        self._model = onnx.load(str(onnx_file), load_external_data=False)
        graph = self._model.graph
        weights = {tensor.name: tuple(tensor.dims) for tensor in graph.initializer}
        if len(graph.input[0].type.tensor_type.shape.dim) != 4:
            raise ValueError("its input is no batch of images")
        # By the name under which nodes read them.
        self._weights = weights | _through_dequantize(self._model, weights)
        # How many cells are decoded, 0 for all.
        chosen = [value for value in graph.output if value.name == "anchors"]
        self._candidates = chosen[0].type.tensor_type.shape.dim[1].dim_value if chosen else 0
        self._deformable = _plain_convolutions(self._model)
        # The outputs' symbolic sizes would contradict the sizes inferred from the input's.
        del graph.output[:]
        _drop_values(graph)
        self._inferred: tuple[tuple[int, int], dict[str, list[int]]] = ((0, 0), {})

    def convolutions(self, size: tuple[int, int]) -> dict[tuple[str, int], GraphWork]:
        """By weight name and use."""
        shapes = self._shapes(size)
        uses: Counter[str] = Counter()
        found = {}
        for node in self._model.graph.node:
            name = node.input[1] if node.op_type == "Conv" else ""
            if name in self._weights and node.output[0] not in self._deformable:
                found[name, uses[name]] = self._convolution(node, shapes)
                uses[name] += 1
        return found

    def products(self, size: tuple[int, int]) -> list[GraphWork]:
        """Everything else that multiplies: matrix products, and the deformable convolutions."""
        found = []
        for node in self._model.graph.node:
            if self._projects(node):
                # Inference may not follow the reshapes before it, but its size is known without.
                height, width = size
                cells = self._candidates or sum(-(-height // one) * -(-width // one) for one in self._strides)
                found.append(GraphWork(cells * 4 * self._product(self._weights[node.input[1]])))
            elif node.output and node.output[0] in self._deformable:
                found.append(self._convolution(node, self._shapes(size)))
            elif node.op_type in ("MatMul", "Gemm"):
                found.append(self._matrix_product(node, self._shapes(size)))
        return found

    def _convolution(self, node: Any, shapes: Mapping[str, list[int]]) -> GraphWork:
        weights = self._weights[node.input[1]]
        inputs, outputs = (self._product(shapes.get(name, [])) for name in (node.input[0], node.output[0]))
        return GraphWork(outputs * self._product(weights[1:]), inputs + outputs, self._product(weights))

    def _matrix_product(self, node: Any, shapes: Mapping[str, list[int]]) -> GraphWork:
        first, second = (self._weights.get(name) or shapes.get(name, []) for name in node.input[:2])
        outputs = self._product(shapes.get(node.output[0], []))
        # K of [.., M, K] x [.., K, N], or of [.., N, K] where Gemm transposes it.
        inner = self._product(second[-2:]) // shapes[node.output[0]][-1]
        constant = self._product(second) if node.input[1] in self._weights else 0
        inputs = self._product(first) + (0 if constant else self._product(second))
        return GraphWork(outputs * inner, inputs + outputs, constant)

    def _projects(self, node: Any) -> bool:
        """Whether this is the DFL projection: a constant column."""
        return node.op_type == "MatMul" and self._weights.get(node.input[1], ())[1:] == (1,)

    def peak(self, size: tuple[int, int]) -> int:
        """As `peak_activations`."""
        shapes = self._shapes(size)
        nodes = self._model.graph.node
        image = self._model.graph.input[0].name
        # The tensor whose memory a tensor takes, and how often each memory is yet to be read.
        memory: dict[str, str] = {}
        for node in nodes:
            if node.op_type in _ALIASES and node.input[0] not in self._weights:
                memory[node.output[0]] = memory.get(node.input[0], node.input[0])
        reads = Counter(memory.get(name, name) for node in nodes if node.output[0] not in memory for name in node.input)
        reads[image] += 1  # the caller's: never freed
        numbers = {name: math.prod(shape) for name, shape in shapes.items() if name not in self._weights}
        live = {image: numbers[image]}
        most = live[image]
        for node in nodes:
            if node.output[0] in memory:
                continue
            inputs = [memory.get(name, name) for name in node.input]
            over = None  # the input that the output takes the memory of
            if node.op_type in _IN_PLACE:
                needed = numbers.get(node.output[0], 0)
                free = (name for name in inputs if live.get(name) == needed and reads[name] == inputs.count(name))
                over = next(free, None)
            live |= {name: numbers[name] for name in node.output if numbers.get(name, 0) > 0}
            if over is not None:
                del live[over]
            most = max(most, sum(live.values()))
            reads.subtract(inputs)
            for name in inputs:
                if reads[name] == 0:
                    live.pop(name, None)
        return most

    def _shapes(self, size: tuple[int, int]) -> dict[str, list[int]]:
        """The shapes of all tensors for one image, 0 for a size that is not known."""
        import onnx

        if size != self._inferred[0]:
            dimensions = self._model.graph.input[0].type.tensor_type.shape.dim
            for dimension, value in zip(dimensions, (1, 3, *size), strict=True):
                dimension.dim_value = value
            counted = [node for node in self._model.graph.node if node.op_type in _COUNTED and not self._projects(node)]
            try:
                shapes = _inferred_shapes(self._model)
                if not all(math.prod(shapes.get(node.output[0], [0])) for node in counted):
                    shapes |= _inferred_shapes(_constants_folded(self._model))
            except onnx.shape_inference.InferenceError as error:
                problem = f"{self._file}: its shapes cannot be inferred at {size[0]}x{size[1]}: {error}"
                remedy = f"Give a --size of multiples of {max(self._strides)} px; if that fails too, export again."
                raise BundleError(problem, remedy) from error
            self._inferred = (size, shapes)
        return self._inferred[1]

    def _product(self, sizes: Sequence[int]) -> int:
        result = math.prod(sizes)
        if not sizes or result <= 0:
            raise BundleError(f"{self._file}: the sizes of a convolution are unknown", "Export the bundle again.")
        return result


def _inferred_shapes(model: Any) -> dict[str, list[int]]:
    """Of the tensors that ONNX's shape inference can follow; 0 for a size that it does not know."""
    import onnx

    inferred = onnx.shape_inference.infer_shapes(model, data_prop=True).graph
    return {
        value.name: [dimension.dim_value for dimension in value.type.tensor_type.shape.dim]
        for value in (*inferred.value_info, *inferred.input)
    }


def _constants_folded(model: Any) -> Any:
    """The model, whose input has one size, with all that follows from sizes computed by ONNX Runtime.

    ONNX's own inference loses sizes that a graph computes in many steps, such as those of attention.
    """
    import onnx

    ort = require("onnxruntime", "counting the operations of this detector")
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_BASIC
    options.log_severity_level = 4
    with_outputs = onnx.ModelProto.FromString(model.SerializeToString())
    produced = [name for node in model.graph.node if node.op_type in _COUNTED for name in node.output]
    with_outputs.graph.output.extend(onnx.ValueInfoProto(name=name) for name in produced)
    with tempfile.TemporaryDirectory() as folder:
        options.optimized_model_filepath = str(Path(folder) / "folded.onnx")
        try:
            ort.InferenceSession(with_outputs.SerializeToString(), options, providers=["CPUExecutionProvider"])
            folded = onnx.load(options.optimized_model_filepath)
        except Exception:  # noqa: BLE001 - its sizes stay unknown, and are reported if needed
            return model
    del folded.graph.output[:]
    return folded


def _plain_convolutions(model: Any) -> frozenset[str]:
    """Turn deformable convolutions into plain ones of the same sizes, which shape inference knows; their outputs."""
    from onnx import helper

    found = []
    for node in model.graph.node:
        if node.op_type == "DeformConv":
            attributes = {one.name: helper.get_attribute_value(one) for one in node.attribute}
            attributes.pop("offset_group", None)
            node.CopyFrom(helper.make_node("Conv", node.input[:2], node.output, node.name, **attributes))
            found.append(node.output[0])
    return frozenset(found)


def _drop_values(graph: Any) -> None:
    """Turn large constants into inputs, of which inference knows type and shape too: it copies the whole model."""
    from onnx import TensorProto, helper

    kept = []
    for tensor in graph.initializer:
        if tensor.ByteSize() > _MOST_INFERRED_BYTES:
            graph.input.append(helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims))
        else:
            kept.append(TensorProto.FromString(tensor.SerializeToString()))  # the list that holds it is emptied next
    del graph.initializer[:]
    graph.initializer.extend(kept)


def _through_dequantize(model: Any, weights: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    return {
        node.output[0]: weights[node.input[0]]
        for node in model.graph.node
        if node.op_type == "DequantizeLinear" and node.input[0] in weights
    }
