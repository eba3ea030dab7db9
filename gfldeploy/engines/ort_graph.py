"""Which convolutions of an ONNX file ONNX Runtime runs in INT8, from the graph that it optimised for itself."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from gfldeploy.engines.base import ExecutedConvolution

__all__ = ["FileConvolution", "convolutions", "read_file"]

_INT8 = {"QLinearConv", "ConvInteger"}
_FLOAT = {"Conv", "FusedConv", "NhwcFusedConv", "NhwcConv"}
# Activations that ONNX Runtime draws into the convolution before them.
_ACTIVATIONS = {"Relu", "LeakyRelu", "Clip", "Sigmoid", "Tanh", "HardSigmoid", "HardSwish"}
# What ONNX Runtime appends to names: a node in its blocked layout is called after its output tensor.
_UNIQUE = re.compile(r"_token_\d+$")
_BLOCKED = "_nchwc"
_INTEGERS = ".q"  # what gfldeploy appends to the name of a weight that it quantises
_INT32, _FLOAT16 = 6, 10  # of onnx.TensorProto
_FLOAT_BIAS = "its bias is not int32 in the ONNX file"
_NOT_FUSED = "quantised in the ONNX file, but not fused by ONNX Runtime"


@dataclass(frozen=True)
class FileConvolution:
    """One of the file's.

    `weight`: the tensor that it takes; `integers`: the one that this is dequantised from, or None. `outputs`: its
    output, and that of its activation. `label`: the name of its weight in FP32; `use`: which one of those that share
    it, or None. `why_float`: the reason, should ONNX Runtime run it in float. `quantized`: its weight and input are.
    """

    name: str
    weight: str
    integers: str | None
    outputs: tuple[str, ...]
    label: str
    use: int | None
    why_float: str
    quantized: bool


def convolutions(optimized: Any, source: Any) -> tuple[ExecutedConvolution, ...]:
    """The convolutions of the ONNX model `optimized`, which ONNX Runtime made of `source`, in its order."""
    known = read_file(source)
    makers = {name: node for node in optimized.graph.node for name in node.output}
    halves = {tensor.name for tensor in optimized.graph.initializer if tensor.data_type == _FLOAT16}
    found = []
    for node in optimized.graph.node:
        if node.op_type not in _INT8 | _FLOAT:
            continue
        int8 = node.op_type in _INT8
        candidates = _candidates(node, int8, known)
        reasons = {one.why_float for one in candidates}
        why = reasons.pop() if len(reasons) == 1 else "ONNX Runtime runs it in float"
        if why == _FLOAT_BIAS and _dequantized(node.input[2], makers):
            why = _NOT_FUSED  # newer versions quantise the bias themselves
        what = _what(node, candidates)
        if int8 or halves & {*node.input}:
            found.append(ExecutedConvolution("int8" if int8 else "fp16", what))
        else:
            found.append(ExecutedConvolution("fp32", what, why))
    return tuple(found)


def _what(node: Any, candidates: Sequence[FileConvolution]) -> str:
    labels = {one.label for one in candidates}
    if len(labels) != 1:
        return str(node.name or node.output[0])
    # Uses of one weight that cannot be told apart still have its name.
    use = candidates[0].use if len(candidates) == 1 else None
    return labels.pop() if use is None else f"{labels.pop()} use {use}"


def _candidates(node: Any, int8: bool, known: Sequence[FileConvolution]) -> list[FileConvolution]:
    """Those of the file's convolutions that `node` may be: one, unless ONNX Runtime dropped the names."""
    same_weight = [one for one in known if (one.integers if int8 else one.weight) in node.input]
    name = _UNIQUE.sub("", node.name)
    exact = []
    for one in same_weight or known:
        if not int8 and name.endswith(_BLOCKED):
            same = name.removesuffix(_BLOCKED) in one.outputs
        else:
            same = (not int8 and node.output[0] in one.outputs) or (bool(name) and name == one.name)
        if same:
            exact.append(one)
    return exact or same_weight


def read_file(model: Any) -> list[FileConvolution]:
    """The convolutions of an ONNX file, in its order."""
    graph = model.graph
    makers = {name: node for node in graph.node for name in node.output}
    consumers: dict[str, list[Any]] = defaultdict(list)
    for node in graph.node:
        for name in node.input:
            consumers[name].append(node)
    results = {value.name for value in graph.output}
    int32 = {tensor.name for tensor in graph.initializer if tensor.data_type == _INT32}
    nodes = [node for node in graph.node if node.op_type == "Conv"]
    integers = [_dequantized(node.input[1], makers) for node in nodes]
    names = [
        node.input[1] if values is None else values.removesuffix(_INTEGERS)
        for node, values in zip(nodes, integers, strict=True)
    ]
    uses: Counter[str] = Counter()
    found = []
    for node, values, name in zip(nodes, integers, names, strict=True):
        outputs = [node.output[0]]
        users = consumers[node.output[0]]
        if len(users) == 1 and users[0].op_type in _ACTIVATIONS:
            outputs.append(users[0].output[0])
        read_by = [user.op_type for user in consumers[outputs[-1]]]
        use = uses[name] if names.count(name) > 1 else None
        uses[name] += 1
        why = _why_float(node, makers, read_by, outputs[-1] in results, int32)
        quantized = values is not None and _dequantized(node.input[0], makers) is not None
        found.append(FileConvolution(node.name, node.input[1], values, tuple(outputs), name, use, why, quantized))
    return found


def _why_float(node: Any, makers: Mapping[str, Any], read_by: Sequence[str], is_result: bool, int32: set[str]) -> str:
    """Which condition of QLinearConv the file does not meet, as far as it shows."""
    if _dequantized(node.input[1], makers) is None:
        return "kept in float in the ONNX file"
    if _dequantized(node.input[0], makers) is None:
        return "its input is not quantised in the ONNX file"
    if "QuantizeLinear" not in read_by:
        return "its output is not quantised in the ONNX file"
    if is_result or len(read_by) > 1:
        return "its output is also read in float in the ONNX file"
    if len(node.input) > 2 and _dequantized(node.input[2], makers) not in int32:
        return _FLOAT_BIAS
    return _NOT_FUSED


def _dequantized(name: str, makers: Mapping[str, Any]) -> str | None:
    """The integer tensor that `name` is dequantised from, or None."""
    maker = makers.get(name)
    return str(maker.input[0]) if maker is not None and maker.op_type == "DequantizeLinear" else None
