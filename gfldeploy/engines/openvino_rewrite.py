"""Changes to a graph before OpenVINO compiles it, so that it runs at all, runs faster, or rounds less."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gfldeploy.engines.base import Precision

# Rows of up to so many floats are gathered by a kernel that crashes for some numbers of them (2026.4: six).
_SHORT_ROW = 16
# OpenVINO fuses these into the weights of the convolution before them.
_FACTORS = {"Multiply", "Divide", "Negative"}


@cache
def add_operators(core: Any) -> None:
    """Teach a core's reader of ONNX an operator that OpenVINO has, but cannot read: DeformConv. Once for a core."""
    from openvino.frontend.onnx import ConversionExtension

    core.add_extension(ConversionExtension("DeformConv", _deformable_convolution))


def _deformable_convolution(node: Any) -> list[Any]:
    """The outputs of an ONNX DeformConv with offsets, and a bias and a mask or without."""
    from openvino import opset13 as ops

    image, weight, offset, *more = (node.get_input(index) for index in range(node.get_input_size()))
    pads = node.get_attribute("pads", [0, 0, 0, 0])
    convolution = ops.deformable_convolution(
        image,
        offset,
        weight,
        node.get_attribute("strides", [1, 1]),
        pads[:2],
        pads[2:],
        node.get_attribute("dilations", [1, 1]),
        mask=more[1] if len(more) > 1 else None,
        group=node.get_attribute("group", 1),
        deformable_group=node.get_attribute("offset_group", 1),
        bilinear_interpolation_pad=True,  # a cell outside counts as 0, and is mixed with its neighbours inside
    )
    if not more:
        return list(convolution.outputs())
    bias = ops.reshape(more[0], np.array([1, -1, 1, 1]), special_zero=False)
    return list(ops.add(convolution, bias).outputs())


def rewrite(model: Any, precision: Precision) -> None:
    """Change a model that will run in `precision`, in place; its input shape must have been set."""
    _take_rows(model)
    if precision == "bf16":
        _spell_out_products(model)
    if precision == "int8":
        _keep_last_outputs_float(model)
        # Its dozen small operators cost more than they save where each is prepared anew for every other shape.
        if not any(value.get_partial_shape().is_dynamic for value in model.inputs):
            _normalize_by_channel(model)


def _take_rows(model: Any) -> None:
    """Take the side distributions of the chosen anchors as rows, the channels of an anchor side by side.

    As written, each channel is a plane of all anchors, from which its values are picked one by one, and what was picked
    is turned into rows. Convolutions give the channels of a cell side by side: a row is one copy. Only places change,
    so that the values have the same bits.
    """
    from openvino import opset13 as ops

    for node in model.get_ordered_ops():
        if (found := _Taken.at(node)) is None:
            continue
        rows = []
        for level in found.levels:
            maps, to_rows = level, [0, 2, 1]
            if _kind(level.get_node()) == "Reshape" and level.get_node().input_value(0).get_partial_shape().rank == 4:
                maps, to_rows = level.get_node().input_value(0), [0, 2, 3, 1]
            turned = ops.transpose(maps, np.array(to_rows))
            rows.append(ops.reshape(turned, np.array([0, -1, found.channels]), special_zero=True))
        taken = ops.gather(ops.concat(rows, 1), found.anchors, np.int64(1), batch_dims=1)
        for target in node.output(0).get_target_inputs():
            target.replace_source_output(taken.output(0))


def _spell_out_products(model: Any) -> None:
    """Replace products with a constant column by a multiplication and a sum.

    OpenVINO keeps what follows the last convolution or matrix product in FP32. The DFL integral is such a product: it
    and the softmax before it would run in BF16.
    """
    from openvino import opset13 as ops

    for node in model.get_ordered_ops():
        if _kind(node) != "MatMul" or any(node.get_attributes()[key] for key in ("transpose_a", "transpose_b")):
            continue
        column = node.input_value(1).get_node()
        if _kind(column) != "Constant" or list(column.shape)[1:] != [1]:
            continue
        row = ops.constant(column.data.reshape(-1), dtype=np.float32)
        total = ops.reduce_sum(
            ops.multiply(node.input_value(0), row), ops.constant([-1], dtype=np.int64), keep_dims=True
        )
        for target in node.output(0).get_target_inputs():
            target.replace_source_output(total.output(0))


def _normalize_by_channel(model: Any) -> None:
    """Write group normalisation as sums over each channel's map, of the floats that the convolution before it gives.

    OpenVINO's own needs the channels of a group side by side in memory, so that every map is copied from the layout of
    INT8 convolutions and back. Here the variance of a group is the mean of its channels' variances plus the variance of
    their means (the law of total variance), all in FP32. The Q/DQ pair behind the convolution, without which ONNX
    Runtime would run that in float, goes: one rounding less.
    """
    for node in model.get_ordered_ops():
        if (found := _GroupNorm.at(node)) is None:
            continue
        pair = _Pair.ending_at(found.source.get_node())
        source = found.source if pair is None else pair.quantize.input_value(0)
        normalized = _normalized(source, found)
        for target in found.result.output(0).get_target_inputs():
            target.replace_source_output(normalized.output(0))


def _keep_last_outputs_float(model: Any) -> None:
    """Take out the Q/DQ pairs that no convolution comes after.

    Without them ONNX Runtime would run the last convolutions in float; OpenVINO's INT8 convolutions can give floats. A
    factor behind such a convolution goes to its weights' scales and its bias: OpenVINO would multiply it into the
    weights themselves, and run the convolution in float.
    """
    before = _before_convolutions(model)
    for node in model.get_ordered_ops():
        pair = _Pair.ending_at(node)
        if pair is None or pair.quantize.get_friendly_name() in before:
            continue
        result = pair.quantize.input_value(0)
        last, readers = pair.dequantize, _readers(pair.dequantize)
        if any(_kind(reader) in _FACTORS for reader in readers):
            factor = _factor(readers[0]) if len(readers) == 1 else None
            if factor is None or not _scale(result.get_node(), factor):
                continue
            last = readers[0]
        for target in last.output(0).get_target_inputs():
            target.replace_source_output(result)


@dataclass(frozen=True)
class _Pair:
    """A Q/DQ pair as OpenVINO imports it: FakeQuantize, two Converts, Subtract (none if the zero point is 0), Multiply.

    `quantize` is the first of them, `dequantize` the last.
    """

    quantize: Any
    dequantize: Any

    @classmethod
    def ending_at(cls, node: Any) -> _Pair | None:
        """The one whose last operator is `node`, None if there is none."""
        if _factor(node) is None:
            return None
        before = node.input_value(0).get_node()
        restored = before.input_value(0).get_node() if _kind(before) == "Subtract" else before
        if _kind(restored) != "Convert" or _kind(stored := restored.input_value(0).get_node()) != "Convert":
            return None
        quantize = stored.input_value(0).get_node()
        return cls(quantize, node) if _kind(quantize) == "FakeQuantize" else None


@dataclass(frozen=True)
class _Taken:
    """Values of the same anchors of every channel, as paddle2onnx writes it, turned into rows [N, K, channels].

    Concat of `levels` [N, channels, anchors], GatherElements by `anchors` [N, K] repeated for each channel, Transpose.
    """

    levels: list[Any]
    anchors: Any
    channels: int

    @classmethod
    def at(cls, node: Any) -> _Taken | None:
        """The one that ends with the Transpose `node`, or None if it is something else."""
        if _kind(node) != "Transpose" or node.input_value(1).get_partial_shape() != [3]:
            return None
        order, gather = _constant(node.input_value(1).get_node()), node.input_value(0).get_node()
        if order is None or order.tolist() != [0, 2, 1] or _kind(gather) != "GatherElements":
            return None
        planes, repeated = (value.get_node() for value in gather.input_values())
        if gather.get_attributes()["axis"] != 2 or _kind(planes) != "Concat" or planes.get_attributes()["axis"] != 2:
            return None
        # What else reads the planes would have them made all the same.
        if len(_readers(gather)) != 1 or len(_readers(planes)) != 1 or _kind(repeated) != "Tile":
            return None
        single, times = (value.get_node() for value in repeated.input_values())
        if _kind(single) != "Unsqueeze" or not _is_all(single.input_value(1).get_node(), 1):
            return None
        repeats = _constant(times.input_value(0).get_node() if _kind(times) == "Convert" else times)
        if repeats is None or repeats.shape != (3,) or repeats[[0, 2]].tolist() != [1, 1]:
            return None
        anchors, channels = single.input_value(0), int(repeats[1])
        if anchors.get_partial_shape().rank != 2 or planes.output(0).get_partial_shape()[1] != channels:
            return None
        return cls(planes.input_values(), anchors, channels) if channels > _SHORT_ROW else None


@dataclass(frozen=True)
class _GroupNorm:
    """Group normalisation as paddle2onnx writes it: Reshape to groups, MVN, a factor of 1, an addend of 0, Reshape.

    `source`: what is normalised [N, channels, H, W]; `result`: the second Reshape.
    """

    source: Any
    result: Any
    channels: int
    groups: int
    epsilon: float

    @classmethod
    def at(cls, node: Any) -> _GroupNorm | None:
        """The one around the MVN `node`, or None if it is something else."""
        if _kind(node) != "MVN" or not _is_all(node.input_value(1).get_node(), 2):
            return None
        attributes, to_groups = node.get_attributes(), node.input_value(0).get_node()
        if attributes["eps_mode"] != "INSIDE_SQRT" or not attributes["normalize_variance"]:
            return None
        if _kind(to_groups) != "Reshape":
            return None
        source = to_groups.input_value(0)
        for kind, neutral in (("Multiply", 1), ("Add", 0), ("Reshape", None)):
            after = _readers(node)
            if len(after) != 1 or _kind(after[0]) != kind:
                return None
            node = after[0]
            if neutral is not None and not _is_all(node.input_value(1).get_node(), neutral):
                return None
        before, grouped, result = (list(of.get_shape()) for of in (source, to_groups.output(0), node.output(0)))
        if (len(before), len(grouped)) != (4, 3) or grouped[0] != before[0] or before[1] % grouped[1]:
            return None
        return cls(source, node, before[1], grouped[1], attributes["eps"]) if result == before else None


def _normalized(source: Any, norm: _GroupNorm) -> Any:
    """The node that normalises `source` [N, channels, H, W] in groups of channels, the same shape."""
    from openvino import opset13 as ops

    together = norm.channels // norm.groups

    def in_groups(node: Any) -> Any:
        return ops.reshape(node, np.array([-1, norm.groups, together]), special_zero=False)

    def for_channels(node: Any) -> Any:
        every = ops.tile(node, np.array([1, 1, together]))
        return ops.reshape(every, np.array([-1, norm.channels, 1, 1]), special_zero=False)

    sides = ops.gather(ops.shape_of(source), np.array([2, 3]), np.int64(0))
    pixels = ops.convert(ops.reduce_prod(sides, np.array([0])), "f32")
    mean = in_groups(ops.reduce_mean(source, np.array([2, 3])))
    # One operator that makes no squares of the whole map: the root of their sum.
    length = in_groups(ops.reduce_l2(source, np.array([2, 3])))
    mean_square = ops.divide(ops.multiply(length, length), pixels)
    # Rounding must not make it negative where the map is flat.
    variance = ops.relu(ops.subtract(mean_square, ops.multiply(mean, mean)))
    group_mean = ops.reduce_mean(mean, np.array([2]), keep_dims=True)
    group_variance = ops.reduce_mean(
        ops.add(variance, ops.squared_difference(mean, group_mean)), np.array([2]), keep_dims=True
    )
    deviation = ops.sqrt(ops.add(group_variance, np.float32(norm.epsilon)))
    factor = ops.divide(np.float32(1), deviation)
    return ops.multiply(ops.subtract(source, for_channels(group_mean)), for_channels(factor))


def _scale(addition: Any, factor: float) -> bool:
    """Multiply what an INT8 convolution with a bias gives, `addition` being that of the bias.

    False, and nothing done, if it is something else or has another reader, whom the factor is not meant for.
    """
    from openvino import opset13 as ops

    if factor <= 0 or _kind(addition) != "Add" or len(_readers(addition)) != 1:
        return False
    convolution, bias = (value.get_node() for value in addition.input_values())
    weights = convolution.input_value(1).get_node() if _kind(convolution) == "Convolution" else convolution
    if _kind(weights) != "Multiply" or len(_readers(convolution)) != 1:
        return False
    scales = weights.input_value(1).get_node()
    if (values := _constant(scales)) is None:
        return False
    # Shared weights stay one array of integers. They are taken for INT8 only behind a Convert and in front of a
    # constant that no other convolution has.
    integers = weights.input_value(0)
    if _kind(integers.get_node()) == "Convert":
        integers = ops.convert(integers.get_node().input_value(0), "f32")
    shaped = (values * np.float32(factor)).reshape(list(scales.output(0).get_shape()))
    scaled = ops.multiply(integers, ops.constant(shaped))
    convolution.input(1).replace_source_output(scaled.output(0))
    addition.input(1).replace_source_output(ops.multiply(bias, np.float32(factor)).output(0))
    return True


def _factor(node: Any) -> float | None:
    """The constant that `node` multiplies by, if that is all it does."""
    if _kind(node) != "Multiply":
        return None
    constant = node.input_value(1).get_node()
    return float(constant.data.item()) if _kind(constant) == "Constant" and constant.data.size == 1 else None


def _before_convolutions(model: Any) -> set[str]:
    """The names of the nodes that some convolution comes after."""
    found: set[str] = set()
    for node in reversed(model.get_ordered_ops()):
        if "Convolution" in _kind(node) or node.get_friendly_name() in found:
            found |= {value.get_node().get_friendly_name() for value in node.input_values()}
    return found


def _readers(node: Any) -> list[Any]:
    """The nodes that take in the values of `node`, not only its shape."""
    return [one.get_node() for one in node.output(0).get_target_inputs() if _kind(one.get_node()) != "ShapeOf"]


def _is_all(node: Any, value: float) -> bool:
    """Whether `node` is a constant that has only this value."""
    values = _constant(node)
    return values is not None and bool(np.all(values == value))


def _constant(node: Any) -> NDArray[Any] | None:
    """The values of a constant, whose shape another may have been made of; None if `node` is not one."""
    while _kind(node) == "Reshape":
        node = node.input_value(0).get_node()
    return np.array(node.data) if _kind(node) == "Constant" else None


def _kind(node: Any) -> str:
    kind: str = node.get_type_name()
    return kind
