"""The convolutions of an ONNX file, and which of them are written so that an engine can run them in INT8."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

# Activations that engines fuse into the convolution before them.
_ACTIVATIONS = {"Relu", "LeakyRelu", "Clip", "Sigmoid", "Tanh", "HardSigmoid", "HardSwish"}
_INTEGERS = ".q"  # gfldeploy appends it to the name of a weight that it quantises
_INT32 = 6  # of onnx.TensorProto
FLOAT_BIAS = "its bias is not int32 in the ONNX file"
NOT_FUSED = "quantised in the ONNX file, but not fused by ONNX Runtime"


@dataclass(frozen=True)
class FileConvolution:
    """One convolution of the file.

    `weight`: the tensor that it reads; `integers`: the one that this is dequantised from, or None. `outputs`: its
    output, and that of its activation. `label`: the name of its weight in FP32; `use`: its number among those that
    share this weight, or None. `why_float`: the reason, should ONNX Runtime run it in float. `quantized`: whether its
    weight and its input are.
    """

    name: str
    weight: str
    integers: str | None
    outputs: tuple[str, ...]
    label: str
    use: int | None
    why_float: str
    quantized: bool

    @property
    def what(self) -> str:
        """Its weight's name, with "use N" where several share it."""
        return self.label if self.use is None else f"{self.label} use {self.use}"


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
    integers = [dequantized(node.input[1], makers) for node in nodes]
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
        quantized = values is not None and dequantized(node.input[0], makers) is not None
        found.append(FileConvolution(node.name, node.input[1], values, tuple(outputs), name, use, why, quantized))
    return found


def _why_float(node: Any, makers: Mapping[str, Any], read_by: Sequence[str], is_result: bool, int32: set[str]) -> str:
    """Which condition of QLinearConv the file does not meet, as far as it shows."""
    if dequantized(node.input[1], makers) is None:
        return "kept in float in the ONNX file"
    if dequantized(node.input[0], makers) is None:
        return "its input is not quantised in the ONNX file"
    if "QuantizeLinear" not in read_by:
        return "its output is not quantised in the ONNX file"
    if is_result or len(read_by) > 1:
        return "its output is also read in float in the ONNX file"
    if len(node.input) > 2 and dequantized(node.input[2], makers) not in int32:
        return FLOAT_BIAS
    return NOT_FUSED


def dequantized(name: str, makers: Mapping[str, Any]) -> str | None:
    """The integer tensor that `name` is dequantised from, or None."""
    maker = makers.get(name)
    return str(maker.input[0]) if maker is not None and maker.op_type == "DequantizeLinear" else None
