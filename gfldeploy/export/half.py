"""The FP16 ONNX file for GPU engines: convolutions in half precision, everything about coordinates in FP32.

FP16 has 11 significant bits: between 1024 and 2048 it holds whole numbers only, so that a coordinate of 1344 is off by
up to half a pixel. Converters that go by operator put a cast to FP16 behind every operator that they leave in FP32,
cell centres and box corners included; here the operators between convolutions are converted and nothing else.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from gfldeploy.errors import EngineError
from gfldeploy.export.parity import Tolerance
from gfldeploy.files import native_writes

# On random weights, whose logits spread, ONNX Runtime's CPU kernels move scores by up to 0.003 and boxes by up to 2.2
# px (six detectors at 800x1344). Rounding all values between FP16 operators, as GPUs do (`rounded` in the tests), gives
# 0.006 and 5.3 px, at the stride of 128 px; 0.001 and 0.3 px on the trained demo detector.
TOLERANCE = Tolerance(score=0.01, box_px=8.0)

# Operators that may run in FP16 between convolutions, and which of their inputs are then FP16 (None: all). What sums
# many values or divides by what it summed (InstanceNormalization, Softmax, ReduceMean) is not among them: how a GPU
# accumulates is up to its engine, and its overflow cannot be seen here.
_HALF: dict[str, tuple[int, ...] | None] = {
    "Add": None,
    "AveragePool": None,
    "Clip": None,
    "Concat": None,
    "LeakyRelu": None,
    "MaxPool": None,
    "Mul": None,
    "Relu": None,
    "Reshape": (0,),
    "Resize": (0,),
    "Sigmoid": None,
    "Split": (0,),
    "Transpose": None,
}
_SUFFIX = ".fp16"
_LARGEST = 65504.0


def write_half_onnx(source: Path, target: Path) -> None:
    """Write the FP16 version of the FP32 file `source`; inputs and outputs stay float32.

    Raises `EngineError` if a constant does not fit FP16, `OutputError` if the file cannot be written.
    """
    import onnx

    model = onnx.load(str(source))
    convert_to_half(model)
    onnx.checker.check_model(model)
    with native_writes(target.parent):
        onnx.save(model, str(target))


def convert_to_half(model: Any) -> int:
    """Convert the convolutions and what lies between them to FP16, in place; returns how many nodes were converted.

    Raises `EngineError` if a constant does not fit FP16.
    """
    graph = model.graph
    half = _half_nodes(graph.node)
    writer = _Writer(graph, half)
    for index, node in enumerate(graph.node):
        writer.add(node, index in half)
    writer.finish()
    return len(half)


def _half_nodes(nodes: Iterable[Any]) -> set[int]:
    """Indices of the convolutions, and of the nodes that feed them, back to the first that must stay FP32."""
    nodes = list(nodes)
    makers = {name: index for index, node in enumerate(nodes) for name in node.output}
    half: set[int] = set()
    pending = [index for index, node in enumerate(nodes) if node.op_type == "Conv"]
    while pending:
        index = pending.pop()
        if index in half:
            continue
        half.add(index)
        for position in _half_inputs(nodes[index]):
            maker = makers.get(nodes[index].input[position])
            if maker is not None and nodes[maker].op_type in _HALF:
                pending.append(maker)
    return half


def _half_inputs(node: Any) -> list[int]:
    chosen = _HALF.get(node.op_type)
    return [index for index, name in enumerate(node.input) if name and (chosen is None or index in chosen)]


class _Writer:
    """Rebuilds the graph. `name.fp16` is the half version of the FP32 value `name`, made where it is first needed."""

    def __init__(self, graph: Any, half: set[int]) -> None:
        self.graph = graph
        self.nodes: list[Any] = []
        self.constants = {tensor.name: tensor for tensor in graph.initializer}
        self.half_constants: dict[str, Any] = {}
        # Values there are in FP32 already, and those that only exist in FP16 so far.
        self.cast: set[str] = set()
        self.only_half = {name for index, node in enumerate(graph.node) if index in half for name in node.output}

    def add(self, node: Any, half: bool) -> None:
        """Append a node, and before it the casts that it is the first to need."""
        wanted = set(_half_inputs(node)) if half else set()
        for index, name in enumerate(node.input):
            if not name:
                continue
            if index in wanted:
                node.input[index] = self._in_half(name)
            elif name in self.only_half:
                # The shape is the same in either precision.
                node.input[index] = name + _SUFFIX if node.op_type == "Shape" else self._in_float(name)
        if half:
            for index, name in enumerate(node.output):
                node.output[index] = name + _SUFFIX
        self.nodes.append(node)

    def finish(self) -> None:
        """Write nodes and constants back; FP32 constants that nothing reads any more are dropped."""
        for value in self.graph.output:
            if value.name in self.only_half:
                self._in_float(value.name)
        nodes = [copied(node) for node in self.nodes]
        del self.graph.node[:]
        self.graph.node.extend(nodes)
        used = {name for node in nodes for name in node.input}
        tensors = [*self.constants.values(), *self.half_constants.values()]
        kept = [copied(tensor) for tensor in tensors if tensor.name in used]
        del self.graph.initializer[:]
        self.graph.initializer.extend(kept)

    def _in_half(self, name: str) -> str:
        from onnx import TensorProto

        if name in self.constants:
            self._half_constant(name)
        elif name not in self.only_half and name + _SUFFIX not in self.cast:
            self._cast(name, name + _SUFFIX, TensorProto.FLOAT16)
        return name + _SUFFIX

    def _in_float(self, name: str) -> str:
        from onnx import TensorProto

        if name not in self.cast:
            self._cast(name + _SUFFIX, name, TensorProto.FLOAT)
        return name

    def _cast(self, source: str, target: str, kind: int) -> None:
        from onnx import helper

        self.cast.add(target)
        self.nodes.append(helper.make_node("Cast", [source], [target], name=f"{target}.Cast", to=kind))

    def _half_constant(self, name: str) -> None:
        import numpy as np
        from onnx import numpy_helper

        if name in self.half_constants:
            return
        value = numpy_helper.to_array(self.constants[name])
        if np.abs(value).max(initial=0) > _LARGEST:
            raise EngineError(
                f"{name} has values up to {np.abs(value).max():.3g}, FP16 holds {_LARGEST:.0f}", "Use the FP32 file."
            )
        self.half_constants[name] = numpy_helper.from_array(value.astype(np.float16), name + _SUFFIX)


def copied(message: Any) -> Any:
    """A copy that does not belong to the graph, whose own lists are about to be emptied."""
    copy = type(message)()
    copy.CopyFrom(message)
    return copy
