"""Compares what a Paddle program (`.pdmodel`) asks for with what oneDNN executed."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from gfldeploy.engines.base import ExecutedConvolution
from gfldeploy.engines.onednn import LoggedConvolution

_CONVOLUTIONS = {"conv2d", "depthwise_conv2d", "fused_conv2d"}
_FRAME = {"feed", "fetch"}
_PADDLE_DIALECT = "1"  # how a PIR file abbreviates "pd_op"
# Those of the network alone. What sums many values (group_norm) stays in FP32, as in the FP16 ONNX file.
_HALF = _CONVOLUTIONS | {"conv2d_transpose", "leaky_relu", "nearest_interp", "bilinear_interp", "pool2d", "relu"}
_SHAPE = re.compile(r"mb\d+_(?:g(\d+))?ic(\d+)oc(\d+)_(?:.*?)kh(\d+)sh(\d+).*?kw(\d+)sw(\d+)")


@dataclass(frozen=True)
class Kind:
    """What oneDNN's log tells of a convolution, but for the size of the image. `inputs`: channels of all groups."""

    groups: int
    inputs: int
    outputs: int
    kernel: tuple[int, int]
    strides: tuple[int, int]

    @classmethod
    def of(cls, shape: str) -> Kind | None:
        """From oneDNN's notation; None where it says something else."""
        match = _SHAPE.match(shape)
        if match is None:
            return None
        groups, inputs, outputs, height, down, width, right = (int(value or 1) for value in match.groups())
        return cls(groups, inputs, outputs, (height, width), (down, right))


@dataclass(frozen=True)
class ProgramConvolution:
    """One convolution of the program. `quantized`: its weight comes from a dequantize_linear operator."""

    weight: str
    quantized: bool
    kind: Kind


def program_convolutions(model: Path) -> tuple[ProgramConvolution, ...]:
    """The convolutions of a `.pdmodel`, in its order."""
    from paddle.base.proto import framework_pb2

    found = []
    for block in framework_pb2.ProgramDesc.FromString(model.read_bytes()).blocks:
        sizes = {variable.name: variable.type.dense_tensor.tensor.dims for variable in block.vars}
        made = {name: operator for operator in block.ops for slot in operator.outputs for name in slot.arguments}
        for operator in block.ops:
            if operator.type not in _CONVOLUTIONS:
                continue
            attributes = {attribute.name: attribute for attribute in operator.attrs}
            (weight,) = _arguments(operator.inputs, "Filter")
            outputs, inputs, *kernel = sizes[weight]
            groups = attributes["groups"].i
            kind = Kind(groups, inputs * groups, outputs, tuple(kernel), tuple(attributes["strides"].ints))
            maker = made.get(weight)
            if maker is not None and maker.type == "dequantize_linear":
                found.append(ProgramConvolution(_arguments(maker.inputs, "X")[0], True, kind))
            else:
                found.append(ProgramConvolution(weight, False, kind))
    return tuple(found)


def decode_outputs(model: Path) -> tuple[str, ...]:
    """What the decode of a `.pdmodel` gives: the outputs of all operators on which no convolution depends."""
    from paddle.base.proto import framework_pb2

    (block, *_) = framework_pb2.ProgramDesc.FromString(model.read_bytes()).blocks
    decode: list[str] = []
    needed: set[str] = set()
    for operator in reversed(block.ops):
        given = [name for slot in operator.outputs for name in slot.arguments]
        if operator.type in _CONVOLUTIONS or not needed.isdisjoint(given):
            needed.update(name for slot in operator.inputs for name in slot.arguments)
        elif operator.type not in _FRAME:
            decode += given
    return tuple(reversed(decode))


def float_operators(model: Path) -> frozenset[str]:
    """The operators of a PIR graph (`.json`) that must not run in FP16, by Paddle's names and without their dialect.

    It goes by kind of operator. Residual additions, which run in FP32 then, are the same kind as those of the decode.
    """
    document = json.loads(model.read_text(encoding="utf-8"))
    operators = document["program"]["regions"][0]["blocks"][0]["ops"]
    kinds = (operator["#"].partition(".") for operator in operators)
    names = {name for dialect, _, name in kinds if dialect == _PADDLE_DIALECT} - _HALF
    return frozenset(names | {f"pd_op.{name}" for name in names})


def explain(ran: Sequence[LoggedConvolution], program: Sequence[ProgramConvolution]) -> tuple[ExecutedConvolution, ...]:
    """Say of each executed convolution of an INT8 program why it ran in float, if it did.

    oneDNN's log names no layers. What it ran is matched with the program by kind: a convolution that the program keeps
    in float cannot have run in INT8, so that where the two counts agree these are the ones.
    """
    kinds = [Kind.of(one.shape) for one in ran]
    floats = Counter(kind for kind, one in zip(kinds, ran, strict=True) if one.precision != "int8")
    found = []
    for kind, one in zip(kinds, ran, strict=True):
        if one.precision == "int8":
            found.append(ExecutedConvolution(one.precision, one.shape))
            continue
        alike = [other for other in program if other.kind == kind]
        kept = [other for other in alike if not other.quantized]
        count = floats[kind]
        weights = {other.weight for other in (alike if count == len(alike) else kept if count == len(kept) else ())}
        what = f"{one.shape} {one.implementation}"
        if len(weights) == 1:
            what = f"{weights.pop()} {what}"
        found.append(ExecutedConvolution(one.precision, what, _why(count, len(kept), len(alike))))
    return tuple(found)


def _why(ran_in_float: int, kept: int, alike: int) -> str:
    """Why one of `ran_in_float` convolutions of a kind did: the program has `alike` of it and keeps `kept` in float."""
    if not alike:
        return "oneDNN ran it in f32"
    if kept == 0:
        return "oneDNN ran it in f32 although the program quantises it"
    if kept >= ran_in_float:
        return "kept in float in the program"
    return f"of {ran_in_float} of its shape that oneDNN ran in f32 the program keeps {kept} in float"


def _arguments(slots: Sequence[object], name: str) -> Sequence[str]:
    return next(slot.arguments for slot in slots if slot.parameter == name)  # type: ignore[attr-defined]
