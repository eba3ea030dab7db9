"""What a graph from elsewhere may hold: pure arithmetic on tensors, all of it in the file, of plausible sizes.

An inference engine runs whatever operators a file names. Paddle's can write files (`save`), call Python (`py_func`) and
load libraries; ONNX's can read other files (external data) and run code of any domain that is registered. So a bundle's
graphs are read here first, by readers of our own that look at the structure alone, and are refused unless every
operator is in a list, which holds arithmetic of all kinds, as any backbone must pass, and nothing else. Export checks
what it has just written in the same way, so that an operator that the list lacks shows there.

ONNX's branches and loops are read like the rest, a few levels deep; functions and Paddle's blocks are refused, since no
detector has any.
"""

from __future__ import annotations

import json
import math
import mmap
import os
import struct
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

from gfldeploy.errors import BundleError, reading

METADATA = "gfldeploy"  # the key under which an ONNX file may say what the detector is, as JSON
_REMEDY = "Do not use this bundle, or export it again from its checkpoint."
_MOST_GRAPH_BYTES = 64 << 20  # of a graph without its weights; GFL-R50's are below 1 MB
_MOST_NODES = 100_000
_MOST_ELEMENTS = 1 << 27  # of a tensor that the graph makes of constants alone: 512 MB of floats
_MOST_SIZE = 1 << 16  # of a kernel, stride, padding, dilation, or a factor by which a node enlarges its input
_MOST_BRANCHES = 3  # within each other
_SHAPE_LENGTH = 16  # constants of more numbers are no shapes


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


# The names that ONNX's standard domain, Paddle's PIR and its older programs give to arithmetic on tensors.
ONNX_OPERATORS = _names(
    """
    Abs Acos Acosh Add And ArgMax ArgMin Asin Asinh Atan Atanh AveragePool BatchNormalization BitShift BitwiseAnd
    BitwiseNot BitwiseOr BitwiseXor Cast CastLike Ceil Celu CenterCropPad Clip Col2Im Compress Concat Constant
    ConstantOfShape Conv ConvInteger ConvTranspose Cos Cosh CumSum DeformConv DepthToSpace DequantizeLinear Det Div
    Dropout DynamicQuantizeLinear Einsum Elu Equal Erf Exp Expand EyeLike Flatten Floor Gather GatherElements GatherND
    Gelu Gemm GlobalAveragePool GlobalLpPool GlobalMaxPool Greater GreaterOrEqual GridSample GroupNormalization
    HardSigmoid HardSwish Hardmax Identity InstanceNormalization IsInf IsNaN LRN LayerNormalization LeakyRelu Less
    LessOrEqual Log LogSoftmax LpNormalization LpPool MatMul MatMulInteger Max MaxPool MaxRoiPool Mean
    MeanVarianceNormalization Min Mish Mod Mul Neg NonMaxSuppression NonZero Not OneHot Or PRelu Pad Pow QLinearConv
    QLinearMatMul QuantizeLinear RMSNormalization Range Reciprocal ReduceL1 ReduceL2 ReduceLogSum ReduceLogSumExp
    ReduceMax ReduceMean ReduceMin ReduceProd ReduceSum ReduceSumSquare Relu Reshape Resize RoiAlign Round
    ScatterElements ScatterND Selu Shape Shrink Sigmoid Sign Sin Sinh Size Slice Softmax Softplus Softsign SpaceToDepth
    Split Sqrt Squeeze Sub Sum Swish Tan Tanh ThresholdedRelu Tile TopK Transpose Trilu Unsqueeze Upsample Where Xor
    """
)
# Functions of the standard that engines write out (CenterCropPad, for Swin) need these; their graphs are read, too.
_WITH_GRAPHS = frozenset(("If", "Loop"))
_ONNX_SEQUENCES = _names(
    "ConcatFromSequence SequenceAt SequenceConstruct SequenceEmpty SequenceErase SequenceInsert SequenceLength "
    "SplitToSequence"
)
_PADDLE_OPERATORS = _names(
    """
    abs acos acosh affine_channel affine_grid argsort asin asinh assign assign_value atan atan2 atanh batch_norm
    batch_norm_ bmm broadcast_tensors cast ceil celu channel_shuffle clip concat conv2d conv2d_transpose conv3d cos cosh
    crop cross cumprod cumsum deformable_conv depthwise_conv2d depthwise_conv2d_transpose dequantize_linear dot dropout
    einsum elu equal equal_all erf exp expm1 eye feed fetch flip floor gather gather_nd gelu greater_equal greater_than
    group_norm huber_loss index_sample index_select instance_norm is_empty kron label_smooth layer_norm leaky_relu lerp
    less_equal less_than linspace log log10 log1p log2 log_softmax logical_and logical_not logical_or logical_xor logit
    logsigmoid logsumexp lrn masked_fill masked_select matmul maxout mean meshgrid mish multiplex mv not_equal norm
    p_norm pad pad3d pixel_shuffle pixel_unshuffle pool2d pow prelu put_along_axis quantize_linear reciprocal relu relu6
    renorm repeat_interleave reverse rms_norm roi_align roll round rsqrt scale scatter scatter_nd_add selu shape shape64
    shuffle_channel sigmoid sign silu sin sinh slice softmax softplus softsign split sqrt square stack stanh
    strided_slice sum swish take_along_axis tan tanh tanh_shrink temporal_shift thresholded_relu tile trunc unbind
    unfold unique unstack where multiclass_nms3 nms matrix_nms
    """
)
PIR_OPERATORS = _PADDLE_OPERATORS | _names(
    """
    add add_n all amax amin any arange argmax argmin bicubic_interp bilinear bilinear_interp bitwise_and bitwise_not
    bitwise_or bitwise_xor data diag divide elementwise_pow embedding expand expand_as flatten floor_divide fmax fmin
    full full_batch_size_like full_int_array full_like full_with_tensor hardshrink hardsigmoid hardswish hardtanh
    isclose isfinite isinf isnan linear_interp matmul_with_flatten max max_pool2d_with_index maximum min minimum
    multiply nearest_interp nonzero numel one_hot ones ones_like prod range_v2 remainder reshape set_value
    set_value_with_tensor shadow_feed shadow_output softshrink split_with_num squared_l2_norm squeeze subtract topk
    transpose tril triu trilinear_interp unsqueeze zeros zeros_like
    """
)
_PIR_BUILTIN = frozenset(("combine", "slice", "split"))  # of lists of tensors
PROGRAM_OPERATORS = _PADDLE_OPERATORS | _names(
    """
    arg_max arg_min bicubic_interp_v2 bilinear_interp bilinear_interp_v2 brelu crop_tensor diag_v2 elementwise_add
    elementwise_div elementwise_floordiv elementwise_fmax elementwise_fmin elementwise_max elementwise_min
    elementwise_mod elementwise_mul elementwise_pow elementwise_sub expand expand_as_v2 expand_v2 fc fill_any_like
    fill_constant fill_constant_batch_size_like flatten2 flatten_contiguous_range hard_shrink hard_sigmoid hard_swish
    isfinite_v2 isinf_v2 isnan_v2 linear_interp_v2 lookup_table_v2 matmul_v2 max_pool2d_with_index mul nearest_interp
    nearest_interp_v2 one_hot_v2 range reduce_all reduce_amax reduce_amin reduce_any reduce_max reduce_mean reduce_min
    reduce_prod reduce_sum reshape reshape2 set_value shadow_output size softshrink squeeze2 top_k top_k_v2 transpose
    transpose2 tril_triu unsqueeze2 where_index
    """
)
# Inputs (by place or by name) and attributes that say how large an output is.
_SHAPES: Mapping[str, tuple[int | str, ...]] = {
    "ConstantOfShape": (0,),
    "Expand": (1,),
    "Resize": (3,),
    "CenterCropPad": (1,),
    "Col2Im": (1,),
    "OneHot": (1,),
    "Range": (0, 1, 2),
    "full": ("shape",),
    "full_with_tensor": (1, "shape"),
    "ones": ("shape",),
    "zeros": ("shape",),
    "expand": (1, "shape"),
    "expand_v2": ("Shape", "shape", "expand_shapes_tensor"),
    "arange": (0, 1, 2),
    "range_v2": (0, 1, 2),
    "range": ("Start", "End", "Step"),
    "linspace": (2, "Num"),
    "eye": (0, 1, "num_rows", "num_columns"),
    "one_hot": (1,),
    "one_hot_v2": ("depth", "depth_tensor"),
    "fill_constant": ("shape",),
    "fill_constant_batch_size_like": ("shape",),
    "full_batch_size_like": ("shape",),
    "assign_value": ("shape",),
}
_FACTORS: Mapping[str, tuple[int | str, ...]] = {
    "Tile": (1,),
    "Loop": (0,),
    "Upsample": (1, "scales"),
    "Resize": (1, 2),  # scales were the second input once
    "Pad": (1, "pads"),
    "tile": (1, "repeat_times", "RepeatTimes"),
    "pad": (1, "paddings"),
    "pad3d": (1, "paddings", "Paddings"),
    "repeat_interleave": ("repeats", "Repeats"),
} | {f"{kind}_interp{version}": ("out_d", "out_h", "out_w", "scale", "OutSize", "Scale", "SizeTensor")
     for kind in ("nearest", "linear", "bilinear", "bicubic", "trilinear") for version in ("", "_v2")}  # fmt: skip
# Attributes of windows, in any operator.
_WINDOW_ATTRIBUTES = (
    *("kernel_shape", "pads", "strides", "dilations", "output_padding", "output_shape", "group", "blocksize"),
    *("paddings", "ksize", "kernel_size", "groups", "output_size", "upscale_factor", "downscale_factor", "block_shape"),
)


@dataclass(frozen=True)
class _Node:
    """One operator: the names of its inputs, by place (int) or slot (str), and its attributes' numbers, by name."""

    kind: str
    inputs: Mapping[int | str, Sequence[object]]
    attributes: Mapping[str, Sequence[float]]


@dataclass
class _Graph:
    """What the checks look at. `constants`: the numbers of short constant tensors, by tensor."""

    nodes: list[_Node] = field(default_factory=list)
    constants: dict[object, Sequence[float]] = field(default_factory=dict)


def check_graph(name: str, model: Path, params: Path | None) -> None:
    """Raise `BundleError` unless this graph's files hold what the module says; `name`: as in a bundle's manifest.

    Weights are not read, and files that do not change are read once.
    """
    with reading(model, BundleError, _REMEDY):
        files = [model] if params is None else [model, params]
        stamps = tuple((status.st_ino, status.st_size, status.st_mtime_ns) for status in (p.stat() for p in files))
        _check(name, model, params, stamps)


@lru_cache(maxsize=64)
def _check(name: str, model: Path, params: Path | None, stamps: object) -> None:
    suffix, read, operators = _READERS.get(name, _READERS["onnx"])
    if model.suffix != suffix or (params is not None and (params.suffix != ".pdiparams" or suffix == ".onnx")):
        raise BundleError(f"{model} is no file of a graph that is called {name}", _REMEDY)
    data = _mapped(model)
    try:
        if suffix != ".onnx" and len(data) > _MOST_GRAPH_BYTES:
            raise _refused(f"it has {len(data):,} bytes, which no detector needs")
        graph, shapes = read(data)
        _check_nodes(graph, operators)
    except BundleError as error:
        raise BundleError(f"{model} is refused: {error.problem}", _REMEDY) from error
    except (ValueError, LookupError, TypeError, AttributeError, struct.error, OverflowError) as error:
        raise BundleError(f"{model} is damaged: {error!s:.100}", "Copy the bundle again, or export it.") from error
    if params is not None:
        with reading(params, BundleError, _REMEDY):
            _check_params(params, _mapped(params), shapes)


def _check_nodes(graph: _Graph, operators: Collection[str]) -> None:
    if len(graph.nodes) > _MOST_NODES:
        raise _refused(f"it has {len(graph.nodes):,} operators")
    for node in graph.nodes:
        if node.kind not in operators:
            raise _refused(f"it has the operator {node.kind!r:.60}, which no export writes")
        for table, most in ((_SHAPES, _MOST_ELEMENTS), (_FACTORS, _MOST_SIZE)):
            for where in table.get(node.kind, ()):
                sizes = [size for name in node.inputs.get(where, ()) for size in graph.constants.get(name, ())]
                sizes += node.attributes.get(where, ()) if isinstance(where, str) else ()
                if not all(map(math.isfinite, sizes)):
                    raise _refused(f"a {node.kind} makes a tensor of a size that is no number")
                # Numbers below 1 are no sizes.
                if (product := math.prod(max(1, int(abs(size))) for size in sizes)) > most:
                    problem = f"a {node.kind} makes a tensor of {product:.3g} times the size, or as many numbers"
                    raise _refused(problem)
        if "conv" in node.kind.lower() or "pool" in node.kind.lower():
            for where in ("strides", "dilations", "group", "groups"):
                if any(value < 1 for value in node.attributes.get(where, ())):
                    raise _refused(f"a {node.kind} has {where} of {min(node.attributes[where]):,}")
        for where in _WINDOW_ATTRIBUTES:
            if any(abs(value) > _MOST_SIZE for value in node.attributes.get(where, ())):
                raise _refused(f"a {node.kind} has {where} of {max(node.attributes[where], key=abs):,}")


def _refused(problem: str) -> BundleError:
    return BundleError(problem, _REMEDY)


def _mapped(path: Path) -> memoryview:
    """A file's bytes, which are not read before they are looked at."""
    with path.open("rb") as file:
        if not os.fstat(file.fileno()).st_size:
            return memoryview(b"")
        return memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))


# --- protobuf ---------------------------------------------------------------------------------------------------------

_VARINT, _BYTES = 0, 2  # kinds of fields
_FIXED = {1: 8, 5: 4}  # and those of so many bytes


class _Message:
    """The fields of one protobuf message by number, each as often as it occurs; refuses those not in `known`."""

    def __init__(self, data: memoryview, known: Collection[int], what: str) -> None:
        self._fields: dict[int, list[Any]] = {}
        at, end = 0, len(data)
        while at < end:
            key, at = _varint(data, at)
            number, kind = key >> 3, key & 7
            value: Any
            if kind == _VARINT:
                value, at = _varint(data, at)
            else:
                if kind == _BYTES:
                    length, at = _varint(data, at)
                elif kind in _FIXED:
                    length = _FIXED[kind]
                else:
                    raise ValueError("it is no protobuf message")
                value, at = data[at : at + length], at + length
            if at > end:
                raise ValueError("it is cut off")
            if number not in known:
                raise _refused(f"a {what} has the field {number}, which no export writes")
            self._fields.setdefault(number, []).append(value)

    def all(self, number: int) -> Sequence[Any]:
        """The values as they are: numbers, or the bytes of texts and messages."""
        return self._fields.get(number, ())

    def messages(self, number: int, known: Collection[int], what: str) -> Iterator[_Message]:
        return (_Message(value, known, what) for value in self.all(number))

    def texts(self, number: int) -> list[str]:
        return [bytes(value).decode("utf-8", "backslashreplace") for value in self.all(number)]

    def text(self, number: int) -> str:
        """Of a field that occurs once: of several, readers take the last, and one is meant."""
        if len(self.all(number)) > 1:
            raise _refused("a field occurs twice")
        return "".join(self.texts(number))

    def integers(self, number: int) -> list[int]:
        """Of a repeated field, packed or not."""
        found = []
        for value in self.all(number):
            if isinstance(value, int):
                found.append(_signed(value))
                continue
            at = 0
            while at < len(value):
                one, at = _varint(value, at)
                found.append(_signed(one))
        return found

    def floats(self, number: int, code: str = "f") -> list[float]:
        """Of a repeated field of floats (or, with `code`, of what `struct` calls so), packed or not."""
        size = struct.calcsize(code)
        return [one for value in self.all(number) for one in struct.unpack(f"<{len(value) // size}{code}", value)]


def _varint(data: memoryview, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
        shift += 7
        if shift > 63:
            raise ValueError("it has a number of too many bytes")


def _signed(value: int) -> int:
    return value - (1 << 64) if value >= 1 << 63 else value


# --- ONNX -------------------------------------------------------------------------------------------------------------

_ITEM_BYTES = {1: 4, 2: 1, 3: 1, 4: 2, 5: 2, 6: 4, 7: 8, 9: 1, 10: 2, 11: 8, 12: 4, 13: 8, 16: 2}
_ONNX_CODES = {1: "f", 6: "i", 7: "q", 11: "d"}


def _read_onnx(data: memoryview) -> tuple[_Graph, None]:
    model = _Message(data, {1, 2, 3, 4, 5, 6, 7, 8, 14}, "model")
    for entry in model.messages(14, {1, 2}, "metadata"):
        if (key := entry.text(1)) != METADATA:  # ONNX Runtime takes options of a session from one of another key
            raise _refused(f"it has the metadata {key!r:.60}")
    for opset in model.messages(8, {1, 2}, "opset"):
        if (domain := opset.text(1)) not in ("", "ai.onnx"):
            raise _refused(f"it uses operators of the domain {domain!r:.60}")
    if len(model.all(7)) != 1:
        raise ValueError("it holds no graph, or several")
    graph = _Graph()
    _add_onnx(graph, model.all(7)[0], _MOST_BRANCHES)
    return graph, None


def _add_onnx(graph: _Graph, data: memoryview, branches: int) -> None:
    """Add a graph's nodes and constants, and those of its branches, at most so many within each other."""
    message = _Message(data, {1, 2, 5, 10, 11, 12, 13, 16}, "graph")
    graph.constants.update(_tensor(tensor) for tensor in message.all(5))
    for node in message.messages(1, {1, 2, 3, 4, 5, 6, 7, 9}, "operator"):
        if (domain := node.text(7)) not in ("", "ai.onnx"):
            raise _refused(f"it uses an operator of the domain {domain!r:.60}")
        kind, attributes = node.text(4), {}
        # No types, sparse tensors or references to a function's attributes.
        for one in node.messages(5, {1, 2, 3, 4, 5, 6, 7, 8, 9, 13, 20}, "attribute"):
            values = [*one.integers(3), *one.integers(8), *one.floats(2), *one.floats(7)]
            attributes[one.text(1)] = values + [number for tensor in one.all(5) for number in _tensor(tensor)[1]]
            for branch in one.all(6):
                if kind not in _WITH_GRAPHS or not branches:
                    raise _refused(f"an operator {kind!r:.60} has a graph of its own")
                _add_onnx(graph, branch, branches - 1)
        graph.nodes.append(_Node(kind, {place: [name] for place, name in enumerate(node.texts(1))}, attributes))
        if kind == "Constant" and attributes:
            graph.constants.update(dict.fromkeys(node.texts(2), next(iter(attributes.values()))))


def _tensor(data: memoryview) -> tuple[str, Sequence[float]]:
    """Name and numbers (of short ones) of a tensor that is all in the file."""
    tensor = _Message(data, {1, 2, 4, 5, 7, 8, 9, 10, 11, 12, 14, 16}, "tensor")
    if any(tensor.all(14)):
        raise _refused("a tensor's values are in another file")
    dims = tensor.integers(1)
    kind = (tensor.all(2) or [0])[-1]
    if kind not in _ITEM_BYTES:
        raise _refused(f"a tensor has the data type {kind}")
    count = _count(dims)
    raw = sum(len(value) for value in tensor.all(9))
    typed = sum(
        len(value) if isinstance(value, memoryview) else 8 for key in (4, 5, 7, 10, 11) for value in tensor.all(key)
    )
    if (raw and raw != count * _ITEM_BYTES[kind]) or (not raw and count > typed):
        raise ValueError(f"a tensor of shape {dims} has {raw or typed} bytes of values")
    values: Sequence[float] = ()
    if count <= _SHAPE_LENGTH:
        if raw and kind in _ONNX_CODES:
            values = tensor.floats(9, _ONNX_CODES[kind])
        else:
            values = [*tensor.floats(4), *tensor.integers(5), *tensor.integers(7)]
    return tensor.text(8), values


def _count(dims: Sequence[int]) -> int:
    if len(dims) > 16 or not all(0 <= size < 1 << 40 for size in dims):
        raise ValueError(f"a tensor has the shape {list(dims)[:16]}")
    return math.prod(dims)


# --- Paddle's older programs ------------------------------------------------------------------------------------------

_TENSOR, _FEED, _FETCH = 7, 9, 10
_BLOCK_ATTRIBUTES = (8, 10)
_ATTRIBUTE_FIELDS = set(range(1, 22)) - {9, 12, 14}
_Shapes = dict[str, list[int]]


def _read_program(data: memoryview) -> tuple[_Graph, _Shapes]:
    program = _Message(data, {1, 4, 5}, "program")
    if len(program.all(1)) != 1:
        raise _refused("it has blocks besides the main one")
    (block,) = program.messages(1, {1, 2, 3, 4, 5}, "block")
    shapes: _Shapes = {}
    for variable in block.messages(3, {1, 2, 3, 4, 5, 6, 7}, "variable"):
        kind, dims = _variable_type(variable)
        if kind == _TENSOR and any(variable.all(3)):
            shapes[variable.text(1)] = dims
    graph = _Graph()
    for operator in block.messages(4, {1, 2, 3, 4, 5}, "operator"):
        attributes = dict(map(_program_attribute, operator.messages(4, _ATTRIBUTE_FIELDS, "attribute")))
        node = _Node(operator.text(3), dict(_slots(operator, 1)), attributes)
        graph.nodes.append(node)
        if node.kind in ("fill_constant", "assign_value"):
            values = [v for key, numbers in attributes.items() if "value" in key for v in numbers]
            graph.constants.update((name, values) for _, names in _slots(operator, 2) for name in names)
    return graph, shapes


def _variable_type(variable: _Message) -> tuple[int, list[int]]:
    (description,) = variable.messages(2, {1, 3}, "variable's type")
    kind = description.all(1)[-1]
    if kind not in (_TENSOR, _FEED, _FETCH):
        raise _refused(f"a variable has the type {kind}")
    dims: list[int] = []
    for dense in description.messages(3, {1, 2}, "tensor"):
        for tensor in dense.messages(1, {1, 2}, "tensor"):
            dims = tensor.integers(2)
    return kind, dims


def _slots(operator: _Message, number: int) -> Iterator[tuple[int | str, list[str]]]:
    return ((slot.text(1), slot.texts(2)) for slot in operator.messages(number, {1, 2}, "slot"))


def _program_attribute(attribute: _Message) -> tuple[str, Sequence[float]]:
    if attribute.all(2)[-1] in _BLOCK_ATTRIBUTES:
        raise _refused("an operator has a block of its own")
    integers = [value for number in (3, 6, 13, 15) for value in attribute.integers(number)]
    values: list[float] = [value - (1 << 32) if 1 << 31 <= value < 1 << 32 else value for value in integers]
    values += [value for number in (4, 7) for value in attribute.floats(number)]
    values += [value for number in (16, 19) for value in attribute.floats(number, "d")]
    name = attribute.text(1)
    if name == "str_value" and (text := attribute.text(5)):
        values.append(float(text))
    return name, values


# --- PIR --------------------------------------------------------------------------------------------------------------


def _read_pir(data: memoryview) -> tuple[_Graph, _Shapes]:
    document = json.loads(bytes(data), object_pairs_hook=_once)
    if set(document) != {"base_code", "program"} or set(document["program"]) != {"regions"}:
        raise _refused("it has unknown parts")
    (region,) = document["program"]["regions"]
    (block,) = region["blocks"]
    if set(region) - {"#", "blocks"} or set(block) - {"#", "args", "ops"} or block.get("args"):
        raise _refused("it has unknown parts")
    graph, shapes = _Graph(), {}
    for one in block["ops"]:
        if one["#"] == "p":
            shapes[_pir_text(one["A"][3])] = [int(size) for size in one["O"]["TT"]["D"][1]]
            continue
        if set(one) - {"#", "A", "DA", "I", "O", "OA", "QA"}:
            raise _refused("an operator has a block of its own")
        dialect, _, kind = _pir_text(one["#"]).partition(".")
        if dialect == "0" and kind in _PIR_BUILTIN:
            continue
        if dialect != "1":
            raise _refused(f"it has the operator {one['#']!r:.60}, which no export writes")
        attributes = {_pir_text(attribute["N"]): list(_pir_numbers(attribute["AT"])) for attribute in one["A"]}
        inputs: dict[int | str, Sequence[object]] = {place: [value["%"]] for place, value in enumerate(one["I"])}
        # A trailing underscore: the same in place.
        graph.nodes.append(_Node(kind.removesuffix("_"), inputs, attributes))
        if kind in ("full", "full_int_array", "assign_value"):
            values = [number for key, numbers in attributes.items() if "value" in key for number in numbers]
            graph.constants.update((result["%"], values) for result in one["O"])
    return graph, shapes


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object whose keys occur once: of several, readers take one or another."""
    found = dict(pairs)
    if len(found) != len(pairs):
        raise _refused("a key occurs twice")
    return found


def _pir_text(value: object) -> str:
    if not isinstance(value, str):
        raise TypeError("a name is no text")
    return value


def _pir_numbers(attribute: object) -> Iterator[float]:
    """The numbers in an attribute: alone, in a list, or in a list of attributes."""
    value = attribute.get("D") if isinstance(attribute, dict) else attribute
    if isinstance(value, list):
        for item in value:
            yield from _pir_numbers(item)
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield value


# --- parameters -------------------------------------------------------------------------------------------------------

_PARAMETER_BYTES = {0: 1, 1: 2, 2: 4, 3: 8, 4: 2, 5: 4, 6: 8, 20: 1, 21: 1, 22: 2}


def _check_params(path: Path, data: memoryview, shapes: _Shapes) -> None:
    """Parameters one after the other in the order of their names, each as the graph has it, up to the file's end.

    One is: version (4 bytes), no levels of detail (8), version (4), size of a description (4), the description (a
    message of data type and shape), the numbers.
    """
    at = 0
    for name in sorted(shapes):
        if len(data) - at < 20:
            raise BundleError(f"{path} is cut off before the parameter {name!r:.60}", "Copy the bundle again.")
        version, levels, again, length = struct.unpack("<IQIi", data[at : at + 20])
        if version or levels or again or not 0 <= length <= 1 << 12:
            raise BundleError(f"{path} does not hold the parameters of its graph", _REMEDY)
        description = _Message(data[at + 20 : at + 20 + length], {1, 2}, "parameter")
        kind, dims = description.all(1)[-1], description.integers(2)
        # PaddleSlim's scales have a dimension of one more than its program says.
        same = [size for size in dims if size != 1] == [size for size in shapes[name] if size != 1]
        if kind not in _PARAMETER_BYTES or not same:
            raise BundleError(
                f"{path} has another parameter than {name!r:.60} of shape {shapes[name]}, which its graph reads",
                _REMEDY,
            )
        at += 20 + length + _count(dims) * _PARAMETER_BYTES[kind]
    if at != len(data):
        raise BundleError(f"{path} has {len(data):,} bytes, its graph's parameters {at:,}", "Copy the bundle again.")


_Reader = Callable[[memoryview], tuple[_Graph, Any]]
_READERS: Mapping[str, tuple[str, _Reader, frozenset[str]]] = {
    "paddle": (".json", _read_pir, PIR_OPERATORS),
    "paddledetection": (".json", _read_pir, PIR_OPERATORS),
    "paddle_program": (".pdmodel", _read_program, PROGRAM_OPERATORS),
    "onnx": (".onnx", _read_onnx, ONNX_OPERATORS | _ONNX_SEQUENCES | _WITH_GRAPHS),
}
