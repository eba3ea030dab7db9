"""Changes to an INT8 program before Paddle loads it for oneDNN, so that its convolutions fuse what comes after them.

Paddle's own passes fuse a bias only in the form that Paddle 2 traced, and an addition without asking whether oneDNN
gives the sum a sign: it takes the type of the addend, so that with a signed addend everything above half of the
threshold would be lost. Here each convolution gets its bias, its addition and its ReLU where the result is right.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

# A convolution's smallest and largest output, as `quant.program` notes them.
OUTPUT_RANGE = "output_range"
_CONVOLUTIONS = ("conv2d", "depthwise_conv2d")
_ADDITION = "elementwise_add"
_RELU = "relu"
_RESIZING = ("nearest_interp_v2", "bilinear_interp_v2")
# Of a map to normalise: with fewer, the operators in the place of one take longer than they save.
_LEAST_VALUES = 200_000
_MARK = "quantization_type"  # what only convolutions in INT8 have


def rewrite_for_onednn(description: Any, pixels: int) -> None:
    """Change a `ProgramDesc`, in place: the arithmetic is the same, but for additions, which take in rounded values.

    `pixels`: of an image as the network gets it, about; it runs images of other sizes too.
    """
    _Rewriting(description, pixels).rewrite()


@dataclass
class _Fusion:
    """A convolution in INT8 and what it can take in.

    `gone`: the operators that it replaces, the last of them where it must stand. `residual`: what is added to it.
    """

    op: Any
    bias: str | None
    result: str
    gone: list[Any]
    residual: str | None = None
    relu: bool = False
    shift: float = 0.0
    threshold: float | None = None


class _Rewriting:
    def __init__(self, description: Any, pixels: int) -> None:
        self._pixels = pixels
        self._block = description.blocks[0]
        self._ops = list(self._block.ops)  # kept: protobuf makes new objects of them, with other ids, otherwise
        self._variables = {variable.name: variable for variable in self._block.vars}
        self._makers: dict[str, Any] = {}
        self._readers: dict[str, list[Any]] = defaultdict(list)
        for op in self._ops:
            for slot in op.outputs:
                self._makers.update(dict.fromkeys(slot.arguments, op))
            for slot in op.inputs:
                for name in slot.arguments:
                    self._readers[name].append(op)
        self._order = {id(op): place for place, op in enumerate(self._ops)}
        self._scaled = {_argument(op.inputs, "X") for op in self._ops if op.type == "quantize_linear"}
        self._fused: dict[str, _Fusion] = {}  # by the sum with their bias

    def rewrite(self) -> None:
        for op in self._ops:
            if op.type in _CONVOLUTIONS:
                self._take_in_bias(op)
        for found in self._fused.values():
            self._take_in_addition(found)
        for found in self._fused.values():
            self._take_in_relu(found)
        self._write()

    def _take_in_bias(self, op: Any) -> None:
        output = _argument(op.outputs, "Output")
        addition = self._only_reader(output, _ADDITION)
        bias = None if addition is None else self._bias(addition, output)
        in_int8 = any(attribute.name == _MARK for attribute in op.attrs)
        if in_int8 and addition is not None and bias is not None:
            result = _argument(addition.outputs, "Out")
            self._fused[result] = _Fusion(op, bias, result, [op, addition])
        elif in_int8:
            self._fused[output] = _Fusion(op, None, output, [op])
        elif addition is not None and bias is not None:  # Paddle's pass fuses it in this form
            _slot(addition.inputs, "Y").arguments[0] = bias
            _set(addition, "axis", 1)

    def _bias(self, addition: Any, output: str) -> str | None:
        """The parameter that is added to each channel of `output`."""
        name = _argument(addition.inputs, "Y")
        maker = self._makers.get(name)
        if _argument(addition.inputs, "X") != output:
            return None
        if maker is not None and maker.type == "reshape2":
            name = _argument(maker.inputs, "X")
            if list(self._sizes(_argument(addition.inputs, "Y")))[2:] != [1, 1]:
                return None
        variable = self._variables[name]
        return name if variable.persistable and len(self._sizes(name)) == 1 else None

    def _take_in_addition(self, found: _Fusion) -> None:
        addition = self._only_reader(found.result, _ADDITION)
        if addition is None:
            return
        names = [self._original(_argument(addition.inputs, slot)) for slot in ("X", "Y")]
        other = names[names[0] == found.result]
        total = _argument(addition.outputs, "Out")
        relu = self._only_reader(total, _RELU)
        result = total if relu is None else _argument(relu.outputs, "Out")
        if result not in self._scaled:
            return
        if other in self._scaled and self._is_relu(other) == (relu is not None):
            found.residual = other
        elif relu is not None and (shortcut := self._fused.get(other)) is not None:
            # Only an addend without a sign will do: it is stored from its smallest value on.
            ranges = _floats(shortcut.op, OUTPUT_RANGE)
            mine = _floats(found.op, OUTPUT_RANGE)
            if len(ranges) != 2 or self._only_reader(other, _ADDITION) is None or shortcut.residual or shortcut.relu:
                return
            if len(mine) == 2 and mine[1] - mine[0] < ranges[1] - ranges[0] and found.bias is not None:
                return  # better the other way round
            low, high = min(ranges[0], 0.0), max(ranges[1], 0.0)
            if low == high or shortcut.bias is None or found.bias is None:
                return
            shortcut.relu, shortcut.shift, shortcut.threshold = True, -low, high - low
            found.residual, found.shift = other, low
        else:
            return
        found.gone.append(addition)
        found.result = total

    def _take_in_relu(self, found: _Fusion) -> None:
        relu = self._only_reader(found.result, _RELU)
        if relu is not None and not found.relu:
            found.relu = True
            found.gone.append(relu)
            found.result = _argument(relu.outputs, "Out")

    def _write(self) -> None:
        last = {id(max(found.gone, key=lambda op: self._order[id(op)])): found for found in self._fused.values()}
        reductions = self._reductions()
        gone = {id(op) for found in self._fused.values() for op in found.gone}
        written: list[Any] = []
        for op in self._ops:
            if id(op) in last:
                written += self._convolution(last[id(op)])
            elif op.type == "group_norm" and self._pays(op, reductions):
                written += self._normalization(op)
            elif id(op) not in gone:
                written.append(_copy(op))
        read = {name for op in written for slot in op.inputs for name in slot.arguments}
        kept = [op for op in written if op.type != "reshape2" or read & set(_slot(op.outputs, "Out").arguments)]
        del self._block.ops[:]
        self._block.ops.extend(kept)

    def _convolution(self, found: _Fusion) -> list[Any]:
        """The operators in its place."""
        steps = _Steps(self._block, self._variables, found.result)
        op = _copy(found.op)
        op.type = "fused_conv2d"
        bias = found.bias
        if bias is not None and found.shift:  # Paddle computes it as it loads the program
            bias = steps.add("scale", {"X": bias}, {"scale": 1.0, "bias": found.shift, "bias_after_scale": True})
        for slot, name in (("Bias", bias), ("ResidualData", found.residual)):
            if name is not None:
                _set_slot(op.inputs, slot, name)
        _set_slot(op.outputs, "Output", found.result)
        _set(op, "fuse_activation", _RELU if found.relu else "")
        _set(op, "fuse_residual_connection", found.residual is not None)
        if found.threshold is not None:
            _set(op, "out_threshold", found.threshold)
        return [*steps.operators, op]

    def _normalization(self, op: Any) -> list[Any]:
        """Operators in the place of a group normalisation, all of which oneDNN has.

        Paddle's own is the work of one thread, in another layout than that of INT8 convolutions. Here the means of each
        map and of its squares are pools over all of it, in FP32 like the rest.
        """
        source, result = _argument(op.inputs, "X"), _argument(op.outputs, "Y")
        attributes = {attribute.name: attribute for attribute in op.attrs}
        channels, groups = self._sizes(source)[1], attributes["groups"].i
        together = channels // groups
        steps = _Steps(self._block, self._variables, result)
        pool = {"pooling_type": "avg", "ksize": [1, 1], "strides": [1, 1], "paddings": [0, 0], "global_pooling": True}

        def mean(of: str) -> str:
            each = steps.add("pool2d", {"X": of}, pool | {"padding_algorithm": "EXPLICIT"})
            in_groups = steps.add("reshape2", {"X": each}, {"shape": [0, groups, together]})
            return steps.add("reduce_mean", {"X": in_groups}, {"dim": [2], "keep_dim": True, "reduce_all": False})

        def elementwise(kind: str, x: str, y: str, out: str | None = None) -> str:
            return steps.add(f"elementwise_{kind}", {"X": x, "Y": y}, {"axis": -1}, out)

        def by_group(name: str) -> str:
            return steps.add("reshape2", {"X": name}, {"shape": [1, groups, together]})

        average = mean(source)
        squares = mean(elementwise("mul", source, source))
        # Rounding must not make it negative where the map is flat.
        variance = steps.add("relu", {"X": elementwise("sub", squares, elementwise("mul", average, average))}, {})
        epsilon = {"scale": 1.0, "bias": attributes["epsilon"].f, "bias_after_scale": True}
        factor = steps.add("rsqrt", {"X": steps.add("scale", {"X": variance}, epsilon)}, {})
        factor = elementwise("mul", by_group(_argument(op.inputs, "Scale")), factor)
        addend = elementwise("sub", by_group(_argument(op.inputs, "Bias")), elementwise("mul", factor, average))
        factor, addend = (
            steps.add("reshape2", {"X": one}, {"shape": [-1, channels, 1, 1]}) for one in (factor, addend)
        )
        elementwise("add", elementwise("mul", source, factor), addend, result)
        return steps.operators

    def _only_reader(self, name: str, kind: str) -> Any:
        """The operator of that kind that reads `name`, unless something else does too."""
        readers = self._readers[name]
        return readers[0] if len(readers) == 1 and readers[0].type == kind else None

    def _original(self, name: str) -> str:
        """What was rounded to `name`, or `name`."""
        maker = self._makers.get(name)
        if maker is None or maker.type != "dequantize_linear":
            return name
        quantize = self._makers.get(_argument(maker.inputs, "X"))
        return name if quantize is None else _argument(quantize.inputs, "X")

    def _pays(self, op: Any, reductions: Mapping[str, float]) -> bool:
        """Whether a group normalisation is of what a convolution in INT8 gives, and of so large a map."""
        source = _argument(op.inputs, "X")
        slots = {slot.parameter for slot in op.inputs if slot.arguments}
        if source not in self._fused or source not in reductions or slots != {"X", "Scale", "Bias"}:
            return False
        return self._sizes(source)[1] * self._pixels / reductions[source] >= _LEAST_VALUES

    def _reductions(self) -> dict[str, float]:
        """How many pixels of the image there are for each of a map, by the name of what convolutions give."""
        found: dict[str, float] = {}
        for op in self._ops:
            read = [name for slot in op.inputs for name in slot.arguments]
            before = 1.0 if op.type == "feed" else next((found[name] for name in read if name in found), None)
            if before is None:
                continue
            if op.type in (*_CONVOLUTIONS, "pool2d"):
                before *= math.prod(next(one.ints for one in op.attrs if one.name == "strides"))
            elif op.type in _RESIZING:
                before /= math.prod(_floats(op, "scale")) or 1
            found |= dict.fromkeys((name for slot in op.outputs for name in slot.arguments), before)
        return found

    def _is_relu(self, name: str) -> bool:
        return name in self._makers and self._makers[name].type == _RELU

    def _sizes(self, name: str) -> Sequence[int]:
        sizes: Sequence[int] = self._variables[name].type.dense_tensor.tensor.dims
        return sizes


def _slot(slots: Any, name: str) -> Any:
    return next(slot for slot in slots if slot.parameter == name)


def _argument(slots: Any, name: str) -> str:
    argument: str = _slot(slots, name).arguments[0]
    return argument


def _set_slot(slots: Any, name: str, argument: str) -> None:
    slot = next((slot for slot in slots if slot.parameter == name), None) or slots.add(parameter=name)
    slot.arguments[:] = [argument]


def _floats(op: Any, name: str) -> Sequence[float]:
    return next((list(attribute.floats) for attribute in op.attrs if attribute.name == name), [])


def _set(op: Any, name: str, value: str | float | list[int]) -> None:
    from paddle.base.proto import framework_pb2

    kinds = framework_pb2.AttrType
    for attribute in op.attrs:
        if attribute.name == name:
            op.attrs.remove(attribute)
            break
    attribute = op.attrs.add(name=name)
    if isinstance(value, list):
        attribute.type, attribute.ints[:] = kinds.INTS, value
    elif isinstance(value, bool):
        attribute.type, attribute.b = kinds.BOOLEAN, value
    elif isinstance(value, str):
        attribute.type, attribute.s = kinds.STRING, value
    elif isinstance(value, int):
        attribute.type, attribute.i = kinds.INT, value
    else:
        attribute.type, attribute.f = kinds.FLOAT, value


class _Steps:
    """Operators in the place of one whose result is `result`, with names of their own for what is between them."""

    def __init__(self, block: Any, variables: dict[str, Any], result: str) -> None:
        self.operators: list[Any] = []
        self._block, self._variables, self._result = block, variables, result

    def add(self, kind: str, inputs: dict[str, str], attributes: dict[str, Any], result: str | None = None) -> str:
        """Append an operator; returns the name of its result."""
        from paddle.base.proto import framework_pb2

        op = framework_pb2.OpDesc(type=kind)
        for slot, name in inputs.items():
            _set_slot(op.inputs, slot, name)
        name = result or self._variable()
        _set_slot(op.outputs, "Out", name)
        if kind == "reshape2":
            _set_slot(op.outputs, "XShape", self._variable())
        for attribute, value in attributes.items():
            _set(op, attribute, value)
        self.operators.append(op)
        return name

    def _variable(self) -> str:
        variable = self._block.vars.add()
        variable.CopyFrom(self._variables[self._result])
        variable.name, variable.persistable = f"{self._result}@{len(self._block.vars)}", False
        return str(variable.name)


def _copy(op: Any) -> Any:
    copied = type(op)()
    copied.CopyFrom(op)
    return copied
