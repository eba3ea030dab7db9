"""Changes to a Q/DQ graph before ONNX Runtime loads it for a CPU, so that more of it runs as its INT8 convolutions do.

Those read and write integers with the channels side by side. What stands between them and works on floats, channel by
channel, costs a conversion and a transposition on either side.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

# A normalisation of fewer values than this saves less than its two dozen small operators cost.
_LEAST_VALUES = 100_000
_LARGEST = 127  # int8 weight
# Of a bias to the factor before it: the product with 127 and with a deviation in integers, up to 128, fits int32.
_MOST_OFFSET = 2.0**15
_SMALLEST_STEM = 5  # the side of its kernel, in pixels
_CHANNELS_LAST, _CHANNELS_FIRST = (0, 2, 3, 1), (0, 3, 1, 2)
_MICROSOFT = "com.microsoft"  # ONNX Runtime's own operators
_OWN = "gfldeploy."  # begins names that are new in the graph
BY_CHANNEL = f"{_OWN}by_channel."  # begins the name of each node inside a normalisation


def rewritten(path: Path, strides: Sequence[int], pixels: int, even: bool) -> bytes | None:
    """The graph in the ONNX file `path` with these changes, or None if it has nothing to change.

    `strides`: of the pyramid levels. `pixels`: of the inputs to expect, height x width. `even`: height and width of
    every input are even.
    """
    import onnx

    model = onnx.load(str(path))
    graph = _QdqGraph(model)
    changed = [
        _pool_integers(graph),
        _add_enlarged(graph),
        _normalize_integers(graph, strides, pixels),
        even and _split_stem(graph),
    ]
    if not any(changed):
        return None
    graph.finish()
    model.opset_import.append(onnx.helper.make_opsetid(_MICROSOFT, 1))
    content: bytes = model.SerializeToString()
    return content


class _QdqGraph:
    """A graph with what refers to what; `finish` writes the changes back."""

    def __init__(self, model: Any) -> None:
        self.graph = model.graph
        self.makers = {name: node for node in self.graph.node for name in node.output}
        self.readers: dict[str, list[Any]] = defaultdict(list)
        for node in self.graph.node:
            for name in node.input:
                self.readers[name].append(node)
        self.constants = {tensor.name: tensor for tensor in self.graph.initializer}
        self._outputs = {value.name for value in self.graph.output}
        self._instead: dict[str, list[Any]] = {}

    def maker(self, name: str, kind: str) -> Any:
        """The node of this kind that gives `name`, or None."""
        node = self.makers.get(name)
        return node if node is not None and node.op_type == kind else None

    def reader(self, node: Any, kind: str) -> Any:
        """The node of this kind that is the only one to read what `node` gives, or None."""
        name = node.output[0]
        readers = self.readers[name]
        alone = len(readers) == 1 and name not in self._outputs
        return readers[0] if alone and readers[0].op_type == kind else None

    def value(self, name: str) -> NDArray[Any] | None:
        """The values of a constant, None if it is not one."""
        from onnx import numpy_helper

        return numpy_helper.to_array(self.constants[name]) if name in self.constants else None

    def scale(self, pair: Any) -> float | None:
        """Of a Q or DQ node of uint8 with one scale for all; None of any other."""
        scale, zero = (self.value(name) for name in pair.input[1:]) if len(pair.input) == 3 else (None, None)
        if scale is None or zero is None or scale.size != 1 or zero.dtype != np.uint8:
            return None
        return float(scale.item())

    def add_constant(self, name: str, value: NDArray[Any]) -> str:
        """Its name; replaces one of the same name."""
        self.constants[name] = _tensor(name, value)
        return name

    def replace(self, node: Any, nodes: Iterable[Any]) -> None:
        """Put `nodes` in the place of `node`; one of them gives what it gave."""
        self._instead[node.output[0]] = list(nodes)

    def finish(self) -> None:
        """Write it all back without what nothing reads any more."""
        nodes = [new for node in self.graph.node for new in self._instead.get(node.output[0], [node])]
        read = set(self._outputs)
        kept = []
        for node in reversed(nodes):
            if any(name in read for name in node.output):
                kept.append(node)
                read |= {*node.input, *(name for one in node.attribute for name in _read_outside(one.g))}
        del self.graph.node[:], self.graph.initializer[:]
        self.graph.node.extend(reversed(kept))
        self.graph.initializer.extend(tensor for name, tensor in self.constants.items() if name in read)


def _pool_integers(graph: _QdqGraph) -> int:
    """Have maxima be taken of integers, which have the scale of the result already before; returns how often.

    That is one rounding less.
    """
    count = 0
    for node in graph.graph.node:
        restore = graph.maker(node.input[0], "DequantizeLinear") if node.op_type == "MaxPool" else None
        if restore is None:
            continue
        before, after = graph.maker(restore.input[0], "QuantizeLinear"), graph.reader(node, "QuantizeLinear")
        if after is None or before is None or graph.scale(restore) is None or graph.scale(after) is None:
            continue
        if graph.reader(restore, "MaxPool") is None or graph.reader(before, "DequantizeLinear") is None:
            continue
        if np.any(graph.value(after.input[2]) != graph.value(restore.input[2])):
            continue  # integers that end elsewhere would clip elsewhere
        for pair in (before, restore):
            pair.input[1:] = after.input[1:]
        count += 1
    return count


def _add_enlarged(graph: _QdqGraph) -> int:
    """Add a map that is enlarged to twice its sides without enlarging it; returns how often.

    Each pixel of the smaller map is broadcast to its four of the larger one, in integers.
    """
    from onnx import helper

    count = 0
    for node in list(graph.graph.node):
        if node.op_type != "Add" or (quantize := graph.reader(node, "QuantizeLinear")) is None:
            continue
        pairs = [(graph.maker(name, "Resize"), other) for name, other in (node.input, reversed(node.input))]
        resize, name = next((pair for pair in pairs if pair[0] is not None), (None, ""))
        small = graph.maker(resize.input[0], "DequantizeLinear") if resize is not None else None
        large = graph.maker(name, "DequantizeLinear")
        if small is None or large is None or not _doubles(graph, resize) or graph.reader(resize, "Add") is None:
            continue
        if any(graph.scale(one) is None for one in (small, large, quantize)):
            continue
        result = quantize.output[0]
        nodes = _Nodes(f"{_OWN}{result}.")
        few, many = (nodes.add("Transpose", pair.input[0], perm=_CHANNELS_LAST) for pair in (small, large))
        sides = [nodes.add("Shape", few, start=start, end=end) for start, end in ((0, 2), (2, 3), (3, 4))]
        two = graph.add_constant(f"{_OWN}twice", np.array([2], np.int64))
        squares = nodes.add("Concat", sides[0], two, sides[1], two, sides[2], axis=0)
        of_square = graph.add_constant(f"{_OWN}square", np.array([2, 4], np.int64))
        inputs = (
            *(nodes.add("Unsqueeze", few, of_square), *small.input[1:]),
            *(nodes.add("Reshape", many, squares), *large.input[1:]),
            *quantize.input[1:],
        )
        added = nodes.add("QLinearAdd", *inputs, domain=_MICROSOFT)
        flat = nodes.add("Reshape", added, nodes.add("Shape", many))
        graph.replace(quantize, [*nodes.made, helper.make_node("Transpose", [flat], [result], perm=_CHANNELS_FIRST)])
        count += 1
    return count


def _doubles(graph: _QdqGraph, resize: Any) -> bool:
    """Whether a Resize repeats each pixel twice in both directions, as paddle2onnx writes it."""
    scales = graph.value(resize.input[2]) if len(resize.input) == 3 else None
    if scales is None or scales.tolist() != [1, 1, 2, 2]:
        return False
    wanted = {"mode": b"nearest", "nearest_mode": b"floor", "coordinate_transformation_mode": b"asymmetric"}
    return all(_attribute(resize, name, None) == value for name, value in wanted.items())


def _normalize_integers(graph: _QdqGraph, strides: Sequence[int], pixels: int) -> int:
    """Write large group normalisations as convolutions of a channel by itself; returns how many.

    Each gets its weight and bias from sums over the integers that the convolution before it gives: what is normalised
    and what that gives stay integers, in the layout of convolutions, and the ReLU between is where they saturate. Each
    image is normalised alone, as its sums are its own, so that images follow one another in a Scan.
    """
    from onnx import TensorProto, helper

    found = [one for node in graph.graph.node if (one := _Normalization.at(graph, node)) is not None]
    uses = Counter(one.factors for one in found)
    levels: Counter[str] = Counter()
    pixel_counts: dict[int, str] = {}
    count = 0
    for one in found:
        level = levels[one.factors]
        levels[one.factors] += 1
        channels = len(one.gamma)
        if uses[one.factors] != len(strides) or channels * pixels / strides[level] ** 2 < _LEAST_VALUES:
            continue
        source, result = one.source.input[0], one.quantize.output[0]
        nodes = _Nodes(f"{_OWN}{result}.")
        if level not in pixel_counts:
            sides = nodes.add("Shape", source, start=2)
            pixel_counts[level] = nodes.add("Cast", nodes.add("ReduceProd", sides, keepdims=0), to=TensorProto.FLOAT)
        body = _Body(f"{BY_CHANNEL}{result}.", one, pixel_counts[level]).graph()
        axis = graph.add_constant(f"{_OWN}image", np.array([1], np.int64))
        each = nodes.add("Unsqueeze", nodes.add("Transpose", source, perm=_CHANNELS_LAST), axis)
        normal = nodes.add("Squeeze", nodes.add("Scan", each, body=body, num_scan_inputs=1), axis)
        graph.replace(
            one.quantize, [*nodes.made, helper.make_node("Transpose", [normal], [result], perm=_CHANNELS_FIRST)]
        )
        count += 1
    return count


@dataclass(frozen=True)
class _Normalization:
    """Group normalisation as paddle2onnx writes it, from a DQ to a Q, with a ReLU before that or not.

    `source`: the DQ of what is normalised; `quantize`: the Q of the result; `factors`: the name of `gamma`, by which
    each channel is multiplied before `beta` is added, float64 [channels]. `step`: the scale of `source`.
    """

    source: Any
    quantize: Any
    groups: int
    epsilon: float
    step: float
    factors: str
    gamma: NDArray[np.float64]
    beta: NDArray[np.float64]

    @classmethod
    def at(cls, graph: _QdqGraph, node: Any) -> _Normalization | None:
        """The one around the InstanceNormalization `node`, or None if it is something else."""
        if node.op_type != "InstanceNormalization":
            return None
        ones, zeros = (graph.value(name) for name in node.input[1:3])
        if ones is None or zeros is None or (ones != 1).any() or (zeros != 0).any():
            return None
        grouped = graph.maker(node.input[0], "Reshape")
        source = graph.maker(grouped.input[0], "DequantizeLinear") if grouped is not None else None
        back = graph.reader(node, "Reshape")
        shape = graph.maker(back.input[1], "Shape") if back is not None else None
        if source is None or shape is None or shape.input[0] != source.output[0]:
            return None
        split = graph.value(grouped.input[1])
        multiply = graph.reader(back, "Mul")
        add = graph.reader(multiply, "Add") if multiply is not None else None
        if add is None or split is None or split.tolist() != [0, ones.size, -1]:
            return None
        relu = graph.reader(add, "Relu")
        quantize = graph.reader(add if relu is None else relu, "QuantizeLinear")
        gamma, beta = graph.value(multiply.input[1]), graph.value(add.input[1])
        step = graph.scale(source)
        if quantize is None or graph.scale(quantize) is None or step is None or gamma is None or beta is None:
            return None
        if gamma.shape != beta.shape or gamma.ndim != 3 or gamma.shape[1:] != (1, 1) or len(gamma) % ones.size:
            return None
        if relu is not None and np.any(graph.value(quantize.input[2]) != 0):
            return None
        flat = (values.reshape(-1).astype(np.float64) for values in (gamma, beta))
        epsilon = _attribute(node, "epsilon", 1e-5)
        return cls(source, quantize, ones.size, epsilon, step, multiply.input[1], *flat)


class _Nodes:
    """Makes nodes, each named after its only output, which begins with `prefix`."""

    def __init__(self, prefix: str) -> None:
        self.prefix = prefix
        self.made: list[Any] = []

    def add(self, kind: str, *inputs: str, domain: str = "", **attributes: object) -> str:
        """The name of what the new node gives."""
        from onnx import helper

        output = f"{self.prefix}{len(self.made)}.{kind}"
        self.made.append(helper.make_node(kind, inputs, [output], name=output, domain=domain, **attributes))
        return output


class _Body(_Nodes):
    """Normalises one image: uint8 [1, H, W, channels] to the same.

    With the integers q, of which a group has mean m and deviation d, the result is gamma * (q - m) / d + beta. As a
    convolution of q: gamma / (127 * d) is the scale, 127 the weight, 127 * (beta / gamma * d - m) the bias, whose
    rounding is a 127th of a step of q. The mean of squares is taken by channel first: shorter sums lose less.
    """

    def __init__(self, prefix: str, norm: _Normalization, pixels: str) -> None:
        super().__init__(prefix)
        self._norm, self._pixels = norm, pixels
        self._constants: list[Any] = []

    def graph(self) -> Any:
        """The body of a Scan over images, for all of which `pixels` is the number of pixels."""
        from onnx import TensorProto, helper

        norm = self._norm
        channels, groups = len(norm.gamma), norm.groups
        by_group = (groups, channels // groups)
        # A channel that only beta reaches has no factor to divide by.
        size = np.maximum(np.abs(norm.gamma), np.maximum(np.abs(norm.beta) / _MOST_OFFSET, np.finfo(np.float32).tiny))
        weight = np.rint(_LARGEST * norm.gamma / size).astype(np.int8)

        image = f"{self.prefix}image"
        first = self.add("Transpose", image, perm=_CHANNELS_FIRST)
        floats = self.add("Cast", first, to=TensorProto.FLOAT)
        mean = self._mean(self._shaped(floats, groups, -1))
        rows = self._shaped(floats, channels, 1, -1)
        squares = self.add("FusedMatMul", rows, rows, domain=_MICROSOFT, transB=1)
        square = self.add("Div", self._mean(self._shaped(squares, *by_group)), self._pixels)
        variance = self.add("Sub", square, self.add("Mul", mean, mean))
        # Rounding must not make it negative where the map is flat.
        epsilon = self._constant("epsilon", np.float32(norm.epsilon / norm.step**2))
        deviation = self.add("Sqrt", self.add("Max", self.add("Add", variance, epsilon), epsilon))

        unit = self._constant("unit", (size / (_LARGEST * norm.step)).astype(np.float32).reshape(by_group))
        scales = self._shaped(self.add("Div", unit, deviation), -1)
        offset = self._constant("offset", (_LARGEST * norm.beta / size).astype(np.float32).reshape(by_group))
        sign = self._constant("sign", weight.astype(np.float32).reshape(by_group))
        moved = self.add("Sub", self.add("Mul", offset, deviation), self.add("Mul", sign, mean))
        bias = self._shaped(self.add("Cast", self.add("Round", moved), to=TensorProto.INT32), -1)
        kernel = self._constant("kernel", weight.reshape(-1, 1, 1, 1))
        zeros = [self._constant(f"zero.{kind.__name__}", np.asarray(0, kind)) for kind in (np.uint8, np.int8)]
        source, after = norm.source.input[1], norm.quantize.input[1:]
        inputs = (image, source, zeros[0], kernel, scales, zeros[1], *after, bias)
        result = self.add(
            "QLinearConv", *inputs, domain=_MICROSOFT, channels_last=1, group=channels, kernel_shape=[1, 1]
        )
        shape = [1, None, None, channels]
        given, made = (helper.make_tensor_value_info(name, TensorProto.UINT8, shape) for name in (image, result))
        return helper.make_graph(self.made, f"{self.prefix}body", [given], [made], self._constants)

    def _mean(self, name: str) -> str:
        """Over the last axis, which stays."""
        return self.add("ReduceMean", name, axes=[-1], keepdims=1)

    def _shaped(self, name: str, *shape: int) -> str:
        text = "x".join(map(str, shape))
        return self.add("Reshape", name, self._constant(f"shape.{text}", np.array(shape, np.int64)))

    def _constant(self, name: str, value: Any) -> str:
        name = self.prefix + name
        if all(tensor.name != name for tensor in self._constants):
            self._constants.append(_tensor(name, np.asarray(value)))
        return name


def _split_stem(graph: _QdqGraph) -> bool:
    """Write a large first convolution of stride 2 as one of stride 1 over squares of 2x2 pixels; whether there is one.

    To gather its input, ONNX Runtime copies a row of the kernel at a time: 7 copies of 21 bytes become 4 of 48. The
    kernel gets a row and a column of zeros, which changes nothing.
    """
    from onnx import helper

    image = graph.graph.input[0].name
    quantize = graph.readers[image][0] if len(graph.readers[image]) == 1 else None
    if quantize is None or quantize.op_type != "QuantizeLinear":
        return False
    restore = graph.reader(quantize, "DequantizeLinear")
    node = graph.reader(restore, "Conv") if restore is not None else None
    weights = graph.maker(node.input[1], "DequantizeLinear") if node is not None else None
    if (
        node is None
        or weights is None
        or graph.scale(restore) is None
        or (kernel := graph.value(weights.input[0])) is None
    ):
        return False
    if len(graph.readers[weights.input[0]]) != 1 or graph.reader(weights, "Conv") is None:
        return False
    outputs, channels, side, other = kernel.shape
    pad = side // 2
    wanted = {"strides": [2, 2], "pads": [pad] * 4, "dilations": [1, 1], "group": 1}
    if side != other or side % 2 == 0 or side < _SMALLEST_STEM:
        return False
    if any(_attribute(node, name, value) != value for name, value in wanted.items()):
        return False
    before = pad % 2  # of zeros, so that each square begins at an even pixel
    half = math.ceil((side + before) / 2)
    wide = np.zeros((outputs, channels, 2 * half, 2 * half), kernel.dtype)
    wide[:, :, before : before + side, before : before + side] = kernel
    # The channels of a square are those of its pixels, one pixel after the other.
    split = wide.reshape(outputs, channels, half, 2, half, 2).transpose(0, 3, 5, 1, 2, 4)
    graph.add_constant(weights.input[0], split.reshape(outputs, 4 * channels, half, half))
    start = (pad + before) // 2
    squares = f"{_OWN}squares"
    convolution = helper.make_node(
        "Conv",
        list(node.input),
        list(node.output),
        name=node.name,
        kernel_shape=[half, half],
        pads=[start, start, half - 1 - start, half - 1 - start],
    )
    graph.replace(node, [convolution])
    split_image = helper.make_node("SpaceToDepth", [quantize.output[0]], [squares], blocksize=2)
    restored = helper.make_node("DequantizeLinear", [squares, *restore.input[1:]], list(restore.output))
    graph.replace(restore, [split_image, restored])
    return True


def _attribute(node: Any, name: str, default: Any) -> Any:
    from onnx import helper

    return next((helper.get_attribute_value(one) for one in node.attribute if one.name == name), default)


def _read_outside(graph: Any) -> set[str]:
    """What the nodes of a graph inside a node read."""
    return {name for node in graph.node for name in node.input}


def _tensor(name: str, value: NDArray[Any]) -> Any:
    from onnx import numpy_helper

    return numpy_helper.from_array(np.ascontiguousarray(value) if value.ndim else value, name)
