"""Which convolutions of an ONNX file OpenVINO runs in which precision, from its runtime model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from gfldeploy.engines.base import NOT_ASKED, ExecutedConvolution, Precision
from gfldeploy.engines.onnx_file import FileConvolution, read_file

# Operators of the decode, besides elementwise arithmetic: they must stay FP32.
_DECODE = {"Softmax", "FullyConnected", "MatMul", "Reduce"}
# OpenVINO fuses their factor into the convolution before them.
_FACTORS = {"Mul", "Div", "Neg"}
_PRECISIONS = {"u8": "int8", "i8": "int8", "bf16": "bf16", "f16": "fp16", "f32": "fp32"}


def convolutions(runtime: Any, source: Any, asked: Precision) -> tuple[ExecutedConvolution, ...]:
    """The convolutions of `runtime`, what OpenVINO made of the ONNX model `source` when asked for this precision."""
    owners = _owners(source)
    found = []
    for node in runtime.get_ordered_ops():
        if _told(node, "layerType") != "Convolution":
            continue
        ran = _told(node, "runtimePrecision")
        precision = _PRECISIONS.get(ran, ran)
        names = _told(node, "originalLayersNames").split(",")
        # The first of the fused operators names the convolution: an addition also lists that of the other summand.
        one = next((owners[name] for name in map(_plain, names) if name in owners), None)
        what = node.get_friendly_name() if one is None else one.what
        found.append(ExecutedConvolution(precision, what, _why(precision, one, asked)))
    return tuple(found)


def in_low_precision(runtime: Any) -> list[str]:
    """The names of the decode's operators that do not run in FP32."""
    return [
        node.get_friendly_name()
        for node in runtime.get_ordered_ops()
        if _told(node, "layerType") in _DECODE and _told(node, "runtimePrecision") not in ("f32", "i32", "i64")
    ]


def _told(node: Any, key: str) -> str:
    return str(node.get_rt_info()[key].astype(str))


def _plain(name: str) -> str:
    """Without what OpenVINO appends."""
    return name.removesuffix("/WithoutBiases").removesuffix("_original")


def _why(precision: str, one: FileConvolution | None, asked: Precision) -> str | None:
    if precision != "fp32":
        return None
    if asked == "fp32":
        return NOT_ASKED
    if asked == "int8" and one is not None and not one.quantized:
        return one.why_float
    return f"OpenVINO ran it in f32 when asked for {asked}"


def _owners(source: Any) -> Mapping[str, FileConvolution]:
    """The convolution that belongs to a node, by the node's name: itself, or the one whose output it multiplies.

    OpenVINO multiplies a factor that follows a convolution into its weights, and names the result after the factor. A
    node without a name is called after its output.
    """
    by_output = {one.outputs[0]: one for one in read_file(source)}
    owners = {}
    for node in source.graph.node:
        if node.op_type == "Conv":
            owners[node.name or node.output[0]] = by_output[node.output[0]]
        elif node.op_type in _FACTORS:
            taken = [by_output[name] for name in node.input if name in by_output]
            if len(taken) == 1:
                owners[node.name or node.output[0]] = taken[0]
    return owners
