"""Calibrated ranges as QuantizeLinear / DequantizeLinear pairs in the FP32 ONNX graph.

Weights are int8 per output channel in every form; the rest differs by engine (`QdqForm`):

- ONNX Runtime fuses a convolution into QLinearConv, and OpenVINO into its INT8 convolutions, with uint8 activations, an
  int32 bias with scale = input scale x weight scale, and the output (after its ReLU, if it has one) quantised too.
- TensorRT takes int8 with a zero point of 0 only, and a float bias; it chooses the outputs' type itself.

Everything that is no convolution, the residual additions aside, keeps its float kernel; the DFL integral and the box
decode are never touched. Nor are the uses of convolutions that the calibration keeps in float: they read the float
weight and bias, and the float input, unless an INT8 convolution of ONNX Runtime's makes that: see `_Editor`.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gfldeploy.errors import EngineError
from gfldeploy.quant.calibration import Calibration, ConvUse, OutputRange

# Operators that only pick or average values: their output has their input's sign.
_KEEPS_SIGN = {"MaxPool", "AveragePool", "GlobalAveragePool", "Resize", "Identity", "Reshape", "Transpose"}
_RELU = "Relu"
_REMEDY = "Quantise the FP32 bundle that this graph is from again."
# A tensor within this of zero on every image was never active. Any scale represents its zeros; a tiny one would have
# the biases behind it, whose scale is a multiple of it, overflow.
_LEAST_RANGE = 1e-8
# Half of what int32 holds: the rest is for the sum of products that is added to the bias.
_LARGEST_BIAS = 2**30


@dataclass(frozen=True)
class QdqForm:
    """What an engine wants of the graph.

    `symmetric`: activations are int8 with a zero point of 0, otherwise uint8 with any.
    `integer_bias`: the bias is int32 behind a DequantizeLinear, otherwise float.
    `every_output`: each convolution's output is quantised. Otherwise only the one that an addition takes in besides
    another convolution's output.
    """

    symmetric: bool
    integer_bias: bool
    every_output: bool


ONNX_RUNTIME = QdqForm(symmetric=False, integer_bias=True, every_output=True)
# TensorRT folds an addition into the convolution before it if the other summand is quantised and this convolution's own
# output is not: a pair between the two keeps them apart (NVIDIA's guides to Q/DQ placement and residual connections).
TENSORRT = QdqForm(symmetric=True, integer_bias=False, every_output=False)


@dataclass(frozen=True)
class ActivationScale:
    """8-bit quantisation of one tensor: real = (integer - zero_point) * scale.

    Integers are those of uint8, or of int8 where the form is symmetric; the zero point is then 0.
    """

    scale: float
    zero_point: int

    @classmethod
    def from_threshold(cls, threshold: float, non_negative: bool) -> ActivationScale:
        """From a threshold: 127 steps up to it, as oneDNN runs the same calibration.

        Values that cannot be negative use the integers up to 255 as headroom, to twice the threshold: all 255 steps
        below the threshold would clip more, and cost mAP.
        """
        return cls((threshold if threshold >= _LEAST_RANGE else 1.0) / 127, 0 if non_negative else 128)

    @classmethod
    def from_range(cls, found: OutputRange) -> ActivationScale:
        """From the smallest and largest value; zero is always represented exactly."""
        low, high = min(found.low, 0.0), max(found.high, 0.0)
        if high - low < _LEAST_RANGE:
            low, high = 0.0, 1.0
        scale = (high - low) / 255
        return cls(scale, int(np.clip(round(-low / scale), 0, 255)))

    @classmethod
    def symmetric(cls, threshold: float, non_negative: bool = False) -> ActivationScale:
        """int8, as far as `from_threshold`: to twice the threshold where values cannot be negative.

        int8 takes larger steps for that, which cost less mAP than clipping at the threshold.
        """
        reach = threshold * 2 if non_negative else threshold
        return cls((reach if reach >= _LEAST_RANGE else 1.0) / 127, 0)


def conv_outputs(model: Any) -> list[tuple[str, int, str]]:
    """Weight name, use (0, 1, ... in graph order) and output tensor of every convolution with a constant weight.

    The output tensor is that of the ReLU where the convolution feeds a ReLU and nothing else.
    """
    consumers = _consumers(model)
    found = []
    for (weight, use), node in _convolutions(model).items():
        output = node.output[0]
        users = consumers[output]
        if len(users) == 1 and users[0].op_type == _RELU:
            output = users[0].output[0]
        found.append((weight, use, output))
    return found


def _convolutions(model: Any) -> dict[ConvUse, Any]:
    """Every convolution with a constant weight, in graph order."""
    constants = {tensor.name for tensor in model.graph.initializer}
    uses: dict[str, int] = defaultdict(int)
    found = {}
    for node in model.graph.node:
        if node.op_type == "Conv" and node.input[1] in constants:
            found[ConvUse(node.input[1], uses[node.input[1]])] = node
            uses[node.input[1]] += 1
    return found


def write_qdq_onnx(source: Path, target: Path, calibration: Calibration) -> int:
    """Write ONNX Runtime's INT8 version of the FP32 file `source`; returns how many convolutions are quantised.

    Raises `EngineError` if the calibration does not fit the graph.
    """
    import onnx

    model = onnx.load(str(source))
    count = insert_qdq(model, calibration)
    onnx.checker.check_model(model)
    onnx.save(model, str(target))
    return count


def insert_qdq(model: Any, calibration: Calibration, form: QdqForm = ONNX_RUNTIME) -> int:
    """Quantise every use of a convolution that `calibration` names and does not keep in float; returns how many.

    The model is changed in place. Raises `EngineError` if the calibration does not fit the graph.
    """
    from onnx import numpy_helper

    constants = {tensor.name: tensor for tensor in model.graph.initializer}
    convolutions = _convolutions(model)
    if absent := sorted(set(calibration.convolutions) - {weight for weight, _ in convolutions}):
        raise EngineError(f"the graph has no convolution {absent[0]}, calibration does", _REMEDY)
    quantized = {
        use: node
        for use, node in convolutions.items()
        if use.weight in calibration.convolutions and use not in calibration.kept_float
    }
    in_float = [node for use, node in convolutions.items() if use not in quantized]
    activations = _activation_scales(model, quantized, in_float, calibration, form)
    weight_scales = _weight_scales(quantized, constants, activations, calibration, form)
    made_in_int8 = {tensor for weight, use, tensor in conv_outputs(model) if ConvUse(weight, use) in quantized}
    sources = {use: node.input[0] for use, node in quantized.items()}
    editor = _Editor(model, form)
    float_outputs = {node.output[0] for node in in_float}
    for name, scale in activations.items():
        editor.quantize_activation(name, scale, float_outputs, form.every_output and name in made_in_int8)
    for use, node in quantized.items():
        scales = weight_scales[use.weight]
        weight = numpy_helper.to_array(constants[use.weight])
        node.input[1] = editor.dequantized_weight(use.weight, weight, scales)
        if form.integer_bias and (bias := _bias(node, constants)):
            scales = activations[sources[use]].scale * scales
            node.input[2] = editor.dequantized_bias(f"{node.output[0]}.bias", numpy_helper.to_array(bias), scales)
    editor.finish()
    return len(quantized)


def _bias(node: Any, constants: Mapping[str, Any]) -> Any:
    return constants.get(node.input[2]) if len(node.input) > 2 else None


def _weight_scales(
    quantized: Mapping[ConvUse, Any],
    constants: Mapping[str, Any],
    activations: Mapping[str, ActivationScale],
    calibration: Calibration,
    form: QdqForm,
) -> dict[str, NDArray[np.float64]]:
    """The scale of each output channel, by weight name.

    It follows the channel's largest weight, unless an integer bias would then overflow int32 in any use of the
    convolution: a channel whose weights are all zero, as BatchNorm folding makes them, still has a bias.
    """
    from onnx import numpy_helper

    found: dict[str, NDArray[np.float64]] = {}
    for (name, _), node in quantized.items():
        entry = calibration.convolutions[name]
        channels = constants[name].dims[0]
        if channels != len(entry.weights):
            raise EngineError(
                f"calibration has {len(entry.weights)} weight ranges for {name}, it has {channels} channels", _REMEDY
            )
        scales = found.get(name, np.maximum(np.asarray(entry.weights, np.float64), 1e-12) / 127)
        if form.integer_bias and (bias := _bias(node, constants)):
            size = np.abs(numpy_helper.to_array(bias).astype(np.float64))
            scales = np.maximum(scales, size / (activations[node.input[0]].scale * _LARGEST_BIAS))
        found[name] = scales
    return found


def _activation_scales(
    model: Any, quantized: Mapping[ConvUse, Any], in_float: Collection[Any], calibration: Calibration, form: QdqForm
) -> dict[str, ActivationScale]:
    """The scale of every tensor to quantise: convolution inputs, and outputs not yet covered.

    An INT8 convolution's output that a float convolution also reads follows its output range, which clips nothing.
    """
    makers = {name: node for node in model.graph.node for name in node.output}
    scale_of = ActivationScale.symmetric if form.symmetric else ActivationScale.from_threshold
    inputs: dict[str, ActivationScale] = {}
    for (weight, use), node in quantized.items():
        thresholds = calibration.convolutions[weight].inputs
        if use >= len(thresholds):
            raise EngineError(f"calibration has {len(thresholds)} uses of {weight}, the graph has more", _REMEDY)
        tensor = node.input[0]
        inputs.setdefault(tensor, scale_of(thresholds[use], _non_negative(tensor, makers)))
    outputs = {}
    shortcuts = set() if form.every_output else _shortcuts(model, {node.output[0] for node in quantized.values()})
    for weight, use, tensor in conv_outputs(model):
        ranges = calibration.convolutions[weight].outputs if ConvUse(weight, use) in quantized else ()
        if use < len(ranges) and (form.every_output or tensor in shortcuts):
            low, high = ranges[use].low, ranges[use].high
            symmetric = ActivationScale.symmetric(max(abs(low), abs(high)))
            outputs[tensor] = symmetric if form.symmetric else ActivationScale.from_range(ranges[use])
    read_in_float = {node.input[0] for node in in_float} if form.every_output else set()
    return inputs | {name: scale for name, scale in outputs.items() if name not in inputs or name in read_in_float}


def _shortcuts(model: Any, made_in_int8: Collection[str]) -> set[str]:
    """The first of two INT8 convolutions' outputs that are added: it is kept until the second is computed.

    A shortcut without a convolution is the input of some convolution, and quantised as that.
    """
    order = {name: index for index, node in enumerate(model.graph.node) for name in node.output}
    return {
        min(node.input, key=order.__getitem__)
        for node in model.graph.node
        if node.op_type == "Add" and all(name in made_in_int8 for name in node.input)
    }


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
    """Collects new nodes and constants, then writes the graph anew in topological order.

    ONNX Runtime fuses an INT8 convolution only if every reader of its output reads it quantised. That is why float
    convolutions may read the original of any tensor but that one. It also quantises the float weight of a convolution
    that stands between a DQ and a Q, however little that was asked for: such a convolution reads the DQ's output
    through the maximum of that tensor alone, an operator that changes nothing and that no optimisation removes.
    """

    def __init__(self, model: Any, form: QdqForm) -> None:
        self.graph = model.graph
        self.integer = np.int8 if form.symmetric else np.uint8
        self.consumers = _consumers(model)
        self.after: dict[str, list[Any]] = {}  # nodes to insert behind the maker of a tensor
        self.first: list[Any] = []  # nodes without a maker: weights and biases
        self.constants: dict[str, Any] = {}
        self.dequantized: dict[str, str] = {}

    def quantize_activation(
        self, name: str, scale: ActivationScale, float_outputs: Collection[str], made_in_int8: bool
    ) -> None:
        """Put a Q/DQ pair behind `name`.

        The float convolutions, those with an output in `float_outputs`, read `name` itself as before, or what was
        quantised if an INT8 convolution has made it.
        """
        from onnx import helper

        quantized, restored, unfused = f"{name}.q", f"{name}.dq", f"{name}.dq.float"
        parameters = [
            self._constant(f"{name}.scale", np.float32(scale.scale)),
            self._constant(f"{name}.zero", self.integer(scale.zero_point)),
        ]
        self.after[name] = [
            helper.make_node("QuantizeLinear", [name, *parameters], [quantized], name=f"{name}.Q"),
            helper.make_node("DequantizeLinear", [quantized, *parameters], [restored], name=f"{name}.DQ"),
        ]
        for node in self.consumers[name]:
            target = restored
            if node.output[0] in float_outputs:
                target = unfused if made_in_int8 else name
            for index, value in enumerate(node.input):
                if value == name:
                    node.input[index] = target
        if made_in_int8 and any(node.output[0] in float_outputs for node in self.consumers[name]):
            self.after[name].append(helper.make_node("Max", [restored], [unfused], name=f"{name}.Max"))

    def dequantized_weight(self, name: str, weight: NDArray[Any], scales: NDArray[np.float64]) -> str:
        """The DequantizeLinear output of an int8 weight [out, ...] per output channel; shared weights share it."""
        if name not in self.dequantized:
            shaped = scales.reshape(-1, *[1] * (weight.ndim - 1))
            integers = np.clip(np.rint(weight / shaped), -127, 127).astype(np.int8)
            self.dequantized[name] = self._dequantize(name, integers, scales)
        return self.dequantized[name]

    def dequantized_bias(self, name: str, bias: NDArray[Any], scales: NDArray[np.float64]) -> str:
        """The DequantizeLinear output of an int32 bias [out], which fits: see `_weight_scales`."""
        return self._dequantize(name, np.rint(bias / scales).astype(np.int32), scales)

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
