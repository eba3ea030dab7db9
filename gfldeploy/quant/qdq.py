"""Calibrated ranges as QuantizeLinear / DequantizeLinear pairs in the FP32 ONNX graph.

The form is the one that ONNX Runtime fuses into QLinearConv and OpenVINO into its INT8 convolutions: uint8
activations, int8 weights per output channel, int32 bias with scale = input scale x weight scale, and a convolution's
output (after its ReLU, if it has one) quantised too. Everything that is no convolution, the residual additions aside,
keeps its float kernel; the DFL integral and the box decode are never touched.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gfldeploy.errors import EngineError
from gfldeploy.quant.calibration import Calibration, OutputRange

__all__ = ["ActivationScale", "conv_outputs", "insert_qdq", "write_qdq_onnx"]

# Operators that only pick or average values: their output has their input's sign.
_KEEPS_SIGN = {"MaxPool", "AveragePool", "GlobalAveragePool", "Resize", "Identity", "Reshape", "Transpose"}
_RELU = "Relu"


@dataclass(frozen=True)
class ActivationScale:
    """uint8 quantisation of one tensor: real = (integer - zero_point) * scale."""

    scale: float
    zero_point: int

    @classmethod
    def from_threshold(cls, threshold: float, non_negative: bool) -> ActivationScale:
        """From a clipping threshold, of which all 256 integers are used when the values cannot be negative."""
        threshold = max(threshold, 1e-8)
        return cls(threshold / 255, 0) if non_negative else cls(threshold / 127, 128)

    @classmethod
    def from_range(cls, found: OutputRange) -> ActivationScale:
        """From the least and greatest value; zero is always one of the integers."""
        low, high = min(found.low, 0.0), max(found.high, 0.0)
        scale = max(high - low, 1e-8) / 255
        return cls(scale, int(np.clip(round(-low / scale), 0, 255)))


def conv_outputs(model: Any) -> list[tuple[str, int, str]]:
    """Weight name, use (0, 1, ... in graph order) and output tensor of every convolution with a constant weight.

    The output tensor is that of the ReLU where the convolution feeds a ReLU and nothing else.
    """
    consumers = _consumers(model)
    constants = {tensor.name for tensor in model.graph.initializer}
    uses: dict[str, int] = defaultdict(int)
    found = []
    for node in model.graph.node:
        if node.op_type != "Conv" or node.input[1] not in constants:
            continue
        output = node.output[0]
        users = consumers[output]
        if len(users) == 1 and users[0].op_type == _RELU:
            output = users[0].output[0]
        found.append((node.input[1], uses[node.input[1]], output))
        uses[node.input[1]] += 1
    return found


def write_qdq_onnx(source: Path, target: Path, calibration: Calibration) -> int:
    """Write the INT8 version of the FP32 file `source`; returns how many convolutions are quantised.

    Raises `EngineError` if the calibration does not fit the graph.
    """
    import onnx

    model = onnx.load(str(source))
    count = insert_qdq(model, calibration)
    onnx.checker.check_model(model)
    onnx.save(model, str(target))
    return count


def insert_qdq(model: Any, calibration: Calibration) -> int:
    """Quantise every convolution that `calibration` names, in place; returns how many."""
    from onnx import numpy_helper

    graph = model.graph
    constants = {tensor.name: tensor for tensor in graph.initializer}
    convolutions = [node for node in graph.node if node.op_type == "Conv" and node.input[1] in constants]
    activations = _activation_scales(model, calibration)
    editor = _Editor(model)
    for name, scale in activations.items():
        editor.quantize_activation(name, scale)
    count = 0
    for node in convolutions:
        entry = calibration.convolutions.get(node.input[1])
        source = editor.source_of(node.input[0])
        if entry is None or source not in activations:
            continue
        weight_scales = np.maximum(np.asarray(entry.weights, np.float64), 1e-12) / 127
        weight_name = node.input[1]
        weight = numpy_helper.to_array(constants[weight_name])
        if weight.shape[0] != weight_scales.size:
            raise EngineError(
                f"calibration has {weight_scales.size} weight ranges for {weight_name}, it has {weight.shape[0]} channels"
            )
        node.input[1] = editor.dequantized_weight(weight_name, weight, weight_scales)
        if len(node.input) > 2:
            bias = numpy_helper.to_array(constants[node.input[2]])
            node.input[2] = editor.dequantized_bias(
                node.input[2], bias, activations[source].scale * weight_scales, unique=f"{node.output[0]}.bias"
            )
        count += 1
    editor.finish()
    return count


def _activation_scales(model: Any, calibration: Calibration) -> dict[str, ActivationScale]:
    """The scale of every tensor to quantise, in graph order: convolution inputs, then outputs not yet covered."""
    makers = {name: node for node in model.graph.node for name in node.output}
    scales: dict[str, ActivationScale] = {}
    outputs = conv_outputs(model)
    inputs = {(node.input[1], node.output[0]): node.input[0] for node in model.graph.node if node.op_type == "Conv"}
    nodes = [node for node in model.graph.node if node.op_type == "Conv"]
    uses: dict[str, int] = defaultdict(int)
    for node in nodes:
        entry = calibration.convolutions.get(node.input[1])
        use = uses[node.input[1]]
        uses[node.input[1]] += 1
        if entry is None:
            continue
        if use >= len(entry.inputs):
            raise EngineError(f"calibration has {len(entry.inputs)} uses of {node.input[1]}, the graph has more")
        tensor = inputs[node.input[1], node.output[0]]
        scales.setdefault(tensor, ActivationScale.from_threshold(entry.inputs[use], _non_negative(tensor, makers)))
    for weight, use, tensor in outputs:
        entry = calibration.convolutions.get(weight)
        if entry is not None and use < len(entry.outputs):
            scales.setdefault(tensor, ActivationScale.from_range(entry.outputs[use]))
    return scales


def _non_negative(tensor: str, makers: Mapping[str, Any]) -> bool:
    node = makers.get(tensor)
    while node is not None and node.op_type in _KEEPS_SIGN:
        node = makers.get(node.input[0])
    return node is not None and node.op_type in (_RELU, "Sigmoid", "Softmax")


def _consumers(model: Any) -> dict[str, list[Any]]:
    consumers: dict[str, list[Any]] = defaultdict(list)
    for node in model.graph.node:
        for name in node.input:
            consumers[name].append(node)
    return consumers


class _Editor:
    """Collects new nodes and constants, then writes the graph anew in topological order."""

    def __init__(self, model: Any) -> None:
        self.graph = model.graph
        self.consumers = _consumers(model)
        self.outputs = {value.name for value in self.graph.output}
        self.after: dict[str, list[Any]] = {}  # nodes to insert behind the maker of a tensor
        self.first: list[Any] = []  # nodes without a maker: weights and biases
        self.constants: dict[str, Any] = {}
        self.sources: dict[str, str] = {}
        self.dequantized: dict[str, str] = {}

    def source_of(self, name: str) -> str:
        """The tensor that a dequantised value came from, or the name itself."""
        return self.sources.get(name, name)

    def quantize_activation(self, name: str, scale: ActivationScale) -> None:
        """Put a Q/DQ pair behind `name`, for the operators that gain from it: convolutions and residual additions."""
        from onnx import helper

        quantized, restored = f"{name}.q", f"{name}.dq"
        parameters = [
            self._constant(f"{name}.scale", np.float32(scale.scale)),
            self._constant(f"{name}.zero", np.uint8(scale.zero_point)),
        ]
        self.after[name] = [
            helper.make_node("QuantizeLinear", [name, *parameters], [quantized], name=f"{name}.Q"),
            helper.make_node("DequantizeLinear", [quantized, *parameters], [restored], name=f"{name}.DQ"),
        ]
        self.sources[restored] = name
        for node in self.consumers[name]:
            for index, value in enumerate(node.input):
                if value == name:
                    node.input[index] = restored

    def dequantized_weight(self, name: str, weight: NDArray[Any], scales: NDArray[np.float64]) -> str:
        """The DequantizeLinear output of an int8 weight [out, ...] per output channel; shared weights share it."""
        if name not in self.dequantized:
            shaped = scales.reshape(-1, *[1] * (weight.ndim - 1))
            integers = np.clip(np.rint(weight / shaped), -127, 127).astype(np.int8)
            self.dequantized[name] = self._dequantize(name, integers, scales)
        return self.dequantized[name]

    def dequantized_bias(self, name: str, bias: NDArray[Any], scales: NDArray[np.float64], unique: str) -> str:
        """The DequantizeLinear output of an int32 bias [out]."""
        limits = np.iinfo(np.int32)
        integers = np.clip(np.rint(bias / scales), limits.min, limits.max).astype(np.int32)
        return self._dequantize(unique, integers, scales)

    def finish(self) -> None:
        """Write nodes and constants back; constants that nothing reads any more are dropped."""
        nodes = list(self.first)
        for value in self.graph.input:
            nodes += self.after.pop(value.name, [])
        for node in self.graph.node:
            nodes.append(node)
            for name in node.output:
                nodes += self.after.pop(name, [])
        del self.graph.node[:]
        self.graph.node.extend(nodes)
        used = {name for node in nodes for name in node.input}
        kept = [tensor for tensor in (*self.graph.initializer, *self.constants.values()) if tensor.name in used]
        del self.graph.initializer[:]
        self.graph.initializer.extend(kept)

    def _dequantize(self, name: str, integers: NDArray[Any], scales: NDArray[np.float64]) -> str:
        from onnx import helper

        zero = np.zeros(scales.size, integers.dtype)
        inputs = [
            self._constant(f"{name}.q", integers),
            self._constant(f"{name}.scale", scales.astype(np.float32)),
            self._constant(f"{name}.zero", zero),
        ]
        restored = f"{name}.dq"
        self.first.append(helper.make_node("DequantizeLinear", inputs, [restored], name=f"{name}.DQ", axis=0))
        return restored

    def _constant(self, name: str, value: Any) -> str:
        from onnx import numpy_helper

        self.constants[name] = numpy_helper.from_array(np.asarray(value), name)
        return name


def names_of(calibration: Calibration) -> Iterable[str]:
    return calibration.convolutions.keys()
