"""Which convolutions of an ONNX file ONNX Runtime runs in INT8, from the graph that it optimised for itself."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from gfldeploy.engines.base import ExecutedConvolution
from gfldeploy.engines.onnx_file import FLOAT_BIAS, NOT_FUSED, FileConvolution, dequantized, read_file

_INT8 = {"QLinearConv", "ConvInteger"}
_FLOAT = {"Conv", "FusedConv", "NhwcFusedConv", "NhwcConv"}
# What ONNX Runtime appends to names: a node in its blocked layout is called after its output tensor.
_UNIQUE = re.compile(r"_token_\d+$")
_BLOCKED = "_nchwc"
_FLOAT16 = 10  # of onnx.TensorProto


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
        if why == FLOAT_BIAS and dequantized(node.input[2], makers):
            why = NOT_FUSED  # newer versions quantise the bias themselves
        precision = "int8" if int8 else "fp16" if halves & {*node.input} else "fp32"
        found.append(ExecutedConvolution(precision, _what(node, candidates), why if precision == "fp32" else None))
    return tuple(found)


def _what(node: Any, candidates: Sequence[FileConvolution]) -> str:
    if len(candidates) == 1:
        return candidates[0].what
    # Uses of one weight that cannot be told apart still have its name.
    labels = {one.label for one in candidates}
    return labels.pop() if len(labels) == 1 else str(node.name or node.output[0])


def _candidates(node: Any, int8: bool, known: Sequence[FileConvolution]) -> list[FileConvolution]:
    """Those of the file's convolutions that `node` may be: one, unless ONNX Runtime dropped the names."""
    same_weight = [one for one in known if (one.integers if int8 else one.weight) in node.input]
    name = _UNIQUE.sub("", node.name)

    def is_node(one: FileConvolution) -> bool:
        if not int8 and name.endswith(_BLOCKED):
            return name.removesuffix(_BLOCKED) in one.outputs
        return (not int8 and node.output[0] in one.outputs) or (bool(name) and name == one.name)

    return [one for one in same_weight or known if is_node(one)] or same_weight
