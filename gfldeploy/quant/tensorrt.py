"""The INT8 ONNX file for TensorRT, and the rules that it keeps, also as ONNX Runtime hands it on.

TensorRT's libraries are not needed to write the file, so its parser's rules are checked here instead. They are NVIDIA's
guide to explicit quantisation (TensorRT 10 and 11; 11 dropped every other way to INT8), the support matrix of its ONNX
parser, `docs/operators.md` of the onnx-tensorrt project, and what the parser of TensorRT for RTX 1.7.1 refused.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gfldeploy.candidates import MOST_CANDIDATES
from gfldeploy.engines.dependencies import require
from gfldeploy.engines.ort_tensorrt import tensorrt_session_options
from gfldeploy.errors import EngineError
from gfldeploy.files import native_writes, scratch_directory
from gfldeploy.quant.calibration import Calibration
from gfldeploy.quant.qdq import TENSORRT, insert_qdq

# Standard operators that the matrix marks as supported both for TensorRT 8.4 and for 10.15, hence in between; 11 refers
# to the same matrix. Left out although supported: control flow, random numbers, and operators whose output shape
# depends on values, but for NonMaxSuppression: no detector here needs them, and each has restrictions of its own.
_NAMES = """
    Abs Acos Acosh Add And ArgMax ArgMin Asin Asinh Atan Atanh AveragePool BatchNormalization Cast Ceil Celu Clip Concat
    Constant ConstantOfShape Conv ConvTranspose Cos Cosh CumSum DepthToSpace DequantizeLinear Div Dropout Einsum Elu
    Equal Erf Exp Expand Flatten Floor Gather GatherElements GatherND Gemm GlobalAveragePool GlobalLpPool GlobalMaxPool
    Greater GreaterOrEqual HardSigmoid Identity InstanceNormalization IsNaN LRN LeakyRelu Less LessOrEqual Log
    LogSoftmax LpNormalization LpPool MatMul Max MaxPool Mean Min Mul Neg NonMaxSuppression Not Or PRelu Pad Pow
    QuantizeLinear Range ReduceL1 ReduceL2 ReduceLogSum ReduceLogSumExp ReduceMax ReduceMean ReduceMin ReduceProd
    ReduceSum ReduceSumSquare Relu Reshape Resize Round ScatterElements ScatterND Selu Shape Sigmoid Sign Sin Sinh Size
    Slice Softmax Softplus Softsign SpaceToDepth Split Sqrt Squeeze Sub Sum Tan Tanh ThresholdedRelu Tile TopK Transpose
    Unsqueeze Where Xor
"""
OPERATORS = frozenset(_NAMES.split())
_CONTROL_FLOW = {"If", "Loop", "Scan"}
_VALUE_DEPENDENT = {"Compress", "NonZero", "Unique"}
_INTEGER_KERNELS = {"ConvInteger", "DynamicQuantizeLinear", "MatMulInteger", "QLinearConv", "QLinearMatMul"}
# What the matrix says of Resize.
_RESIZE = {
    "mode": {"nearest", "linear"},
    "coordinate_transformation_mode": {
        "half_pixel",
        "pytorch_half_pixel",
        "tf_half_pixel_for_nn",
        "asymmetric",
        "align_corners",
    },
    "nearest_mode": {"floor", "ceil", "round_prefer_floor", "round_prefer_ceil"},
}
_OPSETS = range(9, 21)  # of TensorRT 10.0; later ones read newer opsets as well
_FREE_DIMENSIONS = {0, 2, 3}  # of an image [N, 3, H, W]
_FREE_OF_PIXELS = {0, 1, 2}  # of [N, H, W, 3], uint8
_NUMBERS = ("im_shape", "scale_factor")  # of each image, beside its pixels
_UINT8 = 2  # of onnx.TensorProto
_INSERTED = "InsertedPrecisionFreeCast_"  # how ONNX Runtime begins the names of Casts that its CPU kernels need


def write_tensorrt_onnx(source: Path, target: Path, calibration: Calibration) -> int:
    """Write TensorRT's INT8 version of the FP32 file `source`; returns how many convolutions are quantised.

    Raises `EngineError` if the calibration does not fit the graph or the result breaks one of TensorRT's rules,
    `OutputError` if the file cannot be written.
    """
    import onnx

    model = onnx.load(str(source))
    count = insert_qdq(model, calibration, TENSORRT)
    onnx.checker.check_model(model)
    if problems := check_tensorrt(model):
        remedy = "Deploy this detector in float: INT8 bundles are only written for what TensorRT runs, too."
        raise EngineError(f"TensorRT would refuse the INT8 graph: {problems[0]}", remedy)
    with native_writes(target.parent):
        onnx.save(model, str(target))
    return count


def handed_on(model: Any, session_options: Any = None) -> Any:
    """What ONNX Runtime makes of an ONNX model before TensorRT is asked which nodes it takes.

    That is after its optimisations of level 1, which are the same for every provider, and before those of levels 2 and
    3, which change only what is left over (`InferenceSession::TransformGraph` in its source). So this is a session on
    the CPU that stops after level 1. `session_options`: those of the TensorRT engine unless given.

    A session on the CPU then puts Casts around operators without FP16 kernels. They are taken out again; as ONNX
    Runtime drops Casts that undo each other, some of the file's own go with them, so the types of an FP16 graph do not
    fit afterwards. onnxruntime-gpu, which needs no such Casts, left every node of the demo's FP16 file as it was.
    Raises `MissingDependencyError`, or what ONNX Runtime raises.
    """
    import onnx

    ort = require("onnxruntime", "the graph that TensorRT gets")
    options = session_options or tensorrt_session_options(ort, 1)
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_BASIC
    with scratch_directory() as directory:
        path = directory / "handed_on.onnx"
        options.optimized_model_filepath = str(path)
        ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
        found = onnx.load(str(path))
    inserted = {
        node.output[0]: node.input[0]
        for node in found.graph.node
        if node.op_type == "Cast" and node.name.startswith(_INSERTED)
    }
    kept = [node for node in found.graph.node if node.output[0] not in inserted]
    for node in kept:
        for index, name in enumerate(node.input):
            while name in inserted:
                name = inserted[name]
            node.input[index] = name
    result = onnx.ModelProto()
    result.CopyFrom(found)
    del result.graph.node[:]
    result.graph.node.extend(kept)
    return result


def check_tensorrt(model: Any) -> list[str]:
    """What TensorRT 10 or 11 would refuse in an ONNX model or take for something else, one line each, in graph order.

    An empty list says that no rule known here is broken, not that an engine was built.
    """
    from onnx import numpy_helper

    constants = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    makers = {name: node for node in model.graph.node for name in node.output}
    problems = list(_model_problems(model, constants))
    for node in model.graph.node:
        problems += _QdqNode(node, constants, makers).problems()
    return problems


def _model_problems(model: Any, constants: Mapping[str, Any]) -> Iterator[str]:
    for opset in model.opset_import:
        if opset.domain in ("", "ai.onnx") and opset.version not in _OPSETS:
            yield f"opset {opset.version} is outside {_OPSETS[0]} to {_OPSETS[-1]}"
    for value in model.graph.input:
        if value.name in constants:
            continue
        sizes = value.type.tensor_type.shape.dim
        pixels = value.type.tensor_type.elem_type == _UINT8
        free = _FREE_OF_PIXELS if pixels else _FREE_DIMENSIONS
        if len(sizes) != 4 and value.name not in _NUMBERS:
            yield f"input {value.name} has {len(sizes)} dimensions, an image has 4"
        readers = {node.op_type for node in model.graph.node if value.name in node.input}
        if pixels and not readers <= {"Cast", "Shape"}:
            yield f"input {value.name} is uint8, which is for inputs alone: a Cast must come next"
        for index, size in enumerate(sizes):
            if size.dim_value <= 0 and index not in free:
                yield f"dimension {index} of input {value.name} is free: only batch, height and width may be"


class _QdqNode:
    """One node and what it reads."""

    def __init__(self, node: Any, constants: Mapping[str, NDArray[Any]], makers: Mapping[str, Any]) -> None:
        self.node = node
        self.name = f"{node.op_type} {node.name or node.output[0]}"
        self.inputs = [constants.get(name) for name in node.input] + [None] * 3  # None: absent or computed
        self.makers = [makers.get(name) for name in node.input]

    def problems(self) -> Iterator[str]:
        kind = self.node.op_type
        if self.node.domain not in ("", "ai.onnx"):
            yield f"{self.name} is not standard ONNX but of {self.node.domain}"
        elif kind in _CONTROL_FLOW:
            yield f"{self.name} is control flow"
        elif kind in _VALUE_DEPENDENT:
            yield f"the shape that {self.name} gives depends on values"
        elif kind in _INTEGER_KERNELS:
            yield f"{self.name} is an integer kernel: INT8 is expressed by QuantizeLinear and DequantizeLinear only"
        elif kind not in OPERATORS:
            yield f"the ONNX parser has no operator {kind} ({self.name})"
        elif kind in ("QuantizeLinear", "DequantizeLinear"):
            yield from self._quantization()
        elif kind == "Conv":
            yield from self._convolution()
        elif kind == "Resize":
            yield from self._resize()
        elif kind == "TopK":
            yield from self._topk()
        elif kind == "NonMaxSuppression" and any(value is None for value in self.inputs[2 : len(self.node.input)]):
            yield f"{self.name} has a number or a threshold that is not constant"
        elif kind in ("Squeeze", "Unsqueeze") and len(self.node.input) > 1 and self.inputs[1] is None:
            yield f"{self.name} needs constant axes"

    def _quantization(self) -> Iterator[str]:
        scale, zero = self.inputs[1], self.inputs[2]
        source = self.inputs[0] if self.node.op_type == "DequantizeLinear" else None
        integer = next((value.dtype for value in (zero, source) if value is not None), np.dtype(np.uint8))
        if integer == np.int32:
            yield f"{self.name} dequantises int32: a bias has to be float"
        elif integer != np.int8:
            yield f"{self.name} is of {integer}, not int8"
        if zero is not None and zero.any():
            yield f"{self.name} has a zero point other than 0"
        elif zero is None and self._has(2):
            yield f"{self.name} has a zero point that is not constant"
        if scale is None:
            yield f"{self.name} has a scale that is not constant"
            return
        if not (np.isfinite(scale) & (scale > 0)).all():
            yield f"{self.name} has a scale that is not positive and finite"
        if scale.ndim and scale.size > 1:
            axis = self._attribute("axis", 1)
            if source is None:
                yield f"{self.name} has {scale.size} scales: an activation has one"
            elif axis != 0:
                yield f"{self.name} has scales along axis {axis}, weights have them along axis 0"
            elif scale.shape != source.shape[:1]:
                yield f"{self.name} has {scale.size} scales for {source.shape[0]} output channels"

    def _convolution(self) -> Iterator[str]:
        data, weight = self.makers[0], self.makers[1]
        quantized = weight is not None and weight.op_type == "DequantizeLinear"
        if not quantized and self.inputs[1] is None:
            yield f"{self.name} has weights that are not constant"
        if quantized and (data is None or data.op_type != "DequantizeLinear"):
            yield f"{self.name} has quantised weights and a float input: it has no kernel for that"
        if not quantized and data is not None and data.op_type == "DequantizeLinear":
            yield f"{self.name} has float weights and a quantised input: it would run in float"
        if self._has(2) and self.inputs[2] is None:
            yield f"{self.name} has a bias that is not constant"

    def _resize(self) -> Iterator[str]:
        for name, allowed in _RESIZE.items():
            value = self._attribute(name, b"").decode()
            if value and value not in allowed:  # ONNX's defaults are among them
                yield f"{self.name} has {name} {value}"

    def _topk(self) -> Iterator[str]:
        if self._attribute("sorted", 1) != 1:
            yield f"{self.name} must sort"
        count = self.inputs[1]
        if count is None:
            yield f"{self.name} has a number to choose that is not constant"
        elif count.max() > MOST_CANDIDATES:
            yield f"{self.name} chooses {count.max()}, more than {MOST_CANDIDATES}"

    def _has(self, index: int) -> bool:
        return len(self.node.input) > index and bool(self.node.input[index])

    def _attribute(self, name: str, default: Any) -> Any:
        from onnx import helper

        found = (helper.get_attribute_value(one) for one in self.node.attribute if one.name == name)
        return next(found, default)
