"""Paddle programs with other weights, or with INT8 convolutions in the form that PaddleSlim gives them.

Both files are edited as what they are, a protocol buffer and a row of tensors: that needs neither Paddle's process-wide
switch to the old program format nor a process of its own, and takes milliseconds.
"""

from __future__ import annotations

import math
import struct
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gfldeploy.bundle import Bundle
from gfldeploy.engines.paddle_rewrite import OUTPUT_RANGE
from gfldeploy.errors import EngineError
from gfldeploy.files import native_writes
from gfldeploy.quant.calibration import Calibration, ConvUse

_MODEL, _PARAMETERS = "model.pdmodel", "model.pdiparams"
_CONVOLUTIONS = ("conv2d", "depthwise_conv2d")
_ADDITION = "elementwise_add"
# Paddle's oneDNN pass takes these operators out again and keeps their scales by tensor: a convolution whose input has
# one, whoever it is for, would run in INT8, unless it lacks the mark.
_QUANTIZE, _DEQUANTIZE = "quantize_linear", "dequantize_linear"
_MARK = ("quantization_type", "qat_with_weight")
_STEPS = 127  # from 0 to the threshold
_TENSOR = "<IQIi"  # version, number of levels of detail (0 for parameters), version, length of a `TensorDesc`
_REMEDY = "Export the FP32 bundle again."


def old_program_environment(threads: int) -> dict[str, str]:
    """Environment of a process that runs programs of Paddle's old format, on that many CPU threads and quietly."""
    return {
        "FLAGS_enable_pir_api": "0",
        "FLAGS_paddle_num_threads": str(threads),
        "OMP_NUM_THREADS": str(threads),
        "GLOG_minloglevel": "2",
        "PYTHONWARNINGS": "ignore",
    }


def write_program(source: Bundle, calibration: Calibration, output: Path) -> None:
    """Write to `output` the program of the FP32 bundle `source` with its calibrated convolutions in INT8.

    What the calibration keeps in float reads what it reads in FP32; a weight that is needed in both forms is there
    twice. Raises `BundleError`; `EngineError` if the program has no such convolution or the files cannot be read;
    `OutputError`.
    """
    program = _Program.of(source)
    _Quantizer(program, calibration).quantize()
    program.write(output)


def write_parameters(source: Bundle, values: Mapping[str, NDArray[np.float32]], output: Path) -> None:
    """Write to `output` the program of the FP32 bundle `source` with other `values` of the parameters that they name.

    Raises `BundleError`; `EngineError` if a parameter is not there or of another size; `OutputError`.
    """
    program = _Program.of(source)
    for name, value in values.items():
        old = program.tensors.get(name)
        header, size = _sizes(old, 0) if old else (0, 0)
        if not old or size != value.nbytes:
            raise EngineError(f"the FP32 program has no parameter {name} of {value.nbytes} bytes", _REMEDY)
        program.tensors[name] = old[:header] + np.ascontiguousarray(value).tobytes()
    program.write(output)


@dataclass(frozen=True)
class _Program:
    """`description`: the `ProgramDesc`. `tensors`: the parameters by name, each as it lies in the file."""

    description: Any
    tensors: dict[str, bytes]

    @classmethod
    def of(cls, source: Bundle) -> _Program:
        from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

        model, parameters = source.graph("paddle_program")
        assert parameters is not None
        try:
            description = _proto().ProgramDesc.FromString(model.read_bytes())
            named = {one.name for one in description.blocks[0].vars if one.persistable} - {"feed", "fetch"}
            return cls(description, dict(zip(sorted(named), _tensors(parameters.read_bytes()), strict=True)))
        except (DecodeError, IndexError, KeyError, ValueError, struct.error) as error:
            raise EngineError(f"{model} and {parameters.name} are no Paddle program: {error}", _REMEDY) from error

    def write(self, output: Path) -> None:
        with native_writes(output):
            (output / _MODEL).write_bytes(self.description.SerializeToString(deterministic=True))
            (output / _PARAMETERS).write_bytes(b"".join(self.tensors[name] for name in sorted(self.tensors)))


class _Quantizer:
    """Inserts quantise and dequantise operators into an FP32 program, in place."""

    def __init__(self, program: _Program, calibration: Calibration) -> None:
        self._block = program.description.blocks[0]
        self._tensors = program.tensors
        self._variables = {variable.name: variable for variable in self._block.vars}
        self._calibration = calibration
        self._dequantized: dict[str, str] = {}  # the float form of rounded tensors, by the original

    def quantize(self) -> None:
        """Have every convolution that has ranges and is not kept in float read rounded inputs and weights.

        An addition that takes in what such a convolution reads as well, which is a residual connection, reads it
        rounded too: TensorRT then folds the addition into the other branch's convolution, and keeps one copy of the
        tensor in INT8 (NVIDIA's guide to residual connections; the ONNX file for TensorRT is written likewise). oneDNN
        gives the same bits either way.
        """
        counts: dict[str, int] = defaultdict(int)
        operators: list[Any] = []
        for op in self._block.ops:
            arguments = {slot.parameter: slot.arguments for slot in op.inputs if slot.arguments}
            weight = arguments["Filter"][0] if op.type in _CONVOLUTIONS else ""
            if ranges := self._calibration.convolutions.get(weight):
                use = ConvUse(weight, counts[weight])
                counts[weight] += 1
                if use not in self._calibration.kept_float and use.use < len(ranges.inputs):
                    operators += self._rounded_weight(weight, np.array(ranges.weights, np.float32))
                    operators += self._rounded_input(arguments["Input"][0], ranges.inputs[use.use])
                    for slot in ("Input", "Filter"):
                        arguments[slot][0] = self._dequantized[arguments[slot][0]]
                    op.attrs.add(name=_MARK[0], type=_proto().AttrType.STRING, s=_MARK[1])
                    if use.use < len(ranges.outputs):
                        floats = (ranges.outputs[use.use].low, ranges.outputs[use.use].high)
                        op.attrs.add(name=OUTPUT_RANGE, type=_proto().AttrType.FLOATS, floats=floats)
            for slot in ("X", "Y") if op.type == _ADDITION else ():
                arguments[slot][0] = self._dequantized.get(arguments[slot][0], arguments[slot][0])
            operators.append(_proto().OpDesc())
            operators[-1].CopyFrom(op)
        if absent := [use for use in self._calibration.uses if use.use >= counts[use.weight]]:
            raise EngineError(f"the FP32 program has no use {absent[0].use} of {absent[0].weight}", _REMEDY)
        del self._block.ops[:]
        self._block.ops.extend(operators)

    def _rounded_weight(self, weight: str, largest: NDArray[np.float32]) -> Iterator[Any]:
        """Integers instead of the weight, or beside it where it is needed in float too, unless there are some."""
        if weight in self._dequantized:
            return
        old = self._tensors[weight]
        values = np.frombuffer(old[_sizes(old, 0)[0] :], np.float32)
        values = values.reshape(self._variables[weight].type.dense_tensor.tensor.dims)
        steps = np.where(largest == 0, np.float32(1e-8), largest).reshape(-1, *[1] * (values.ndim - 1))
        integers = weight
        if any(use.weight == weight for use in self._calibration.kept_float):
            integers = f"{weight}.quantized"
            self._add_variable(integers, weight, persistable=True)
        self._tensors[integers] = _tensor(np.clip(np.round(values / steps * _STEPS), -_STEPS - 1, _STEPS), np.int8)
        self._add_constant(f"{weight}@scale", largest, np.float32)
        yield self._operator(_DEQUANTIZE, integers, f"{weight}.quantized.dequantized", weight, axis=0)

    def _rounded_input(self, source: str, threshold: float) -> Iterator[Any]:
        if source in self._dequantized:
            return
        self._add_constant(f"{source}@scale", np.array([threshold]), np.float32)
        yield self._operator(_QUANTIZE, source, f"{source}.quantized", source)
        yield self._operator(_DEQUANTIZE, f"{source}.quantized", f"{source}.quantized.dequantized", source)

    def _operator(self, kind: str, read: str, result: str, original: str, axis: int = -1) -> Any:
        """Quantises or dequantises by the scale of the `original`; `axis`: of its scales, -1 if it has one."""
        scale, zero = f"{original}@scale", f"{result}@zero_point"
        self._dequantized[original] = result
        self._add_variable(result, original, persistable=False)
        shape = self._variables[scale].type.dense_tensor.tensor.dims
        self._add_constant(zero, np.zeros(shape), np.int32)
        op = _proto().OpDesc(type=kind)
        for slot, name in (("X", read), ("Scale", scale), ("ZeroPoint", zero)):
            op.inputs.add(parameter=slot, arguments=[name])
        op.outputs.add(parameter="Y", arguments=[result])
        for name, value in (("bit_length", 8), ("quant_axis", axis), ("op_role", 0)):
            op.attrs.add(name=name, type=_proto().AttrType.INT, i=value)
        return op

    def _add_variable(self, name: str, like: str, *, persistable: bool) -> Any:
        variable = self._block.vars.add()
        variable.CopyFrom(self._variables[like])
        variable.name, variable.persistable = name, persistable
        self._variables[name] = variable
        return variable

    def _add_constant(self, name: str, value: NDArray[Any], dtype: type) -> None:
        tensor = self._add_variable(name, next(iter(self._calibration.convolutions)), persistable=True)
        tensor.type.dense_tensor.tensor.CopyFrom(_description(value.shape, dtype))
        self._tensors[name] = _tensor(value, dtype)


def _proto() -> Any:
    from paddle.base.proto import framework_pb2

    return framework_pb2


def _types() -> dict[int, Any]:
    """NumPy's types by Paddle's."""
    names = {"FP32": np.float32, "INT8": np.int8, "INT32": np.int32, "INT64": np.int64, "FP64": np.float64}
    return {getattr(_proto().VarType, name): dtype for name, dtype in (names | {"BOOL": np.bool_}).items()}


def _description(shape: Sequence[int], dtype: type) -> Any:
    kind = next(kind for kind, known in _types().items() if known is dtype)
    return _proto().VarType.TensorDesc(data_type=kind, dims=shape)


def _tensor(value: NDArray[Any], dtype: type) -> bytes:
    """A tensor as it lies in a parameter file."""
    description = _description(value.shape, dtype).SerializeToString()
    return b"".join((struct.pack(_TENSOR, 0, 0, 0, len(description)), description, value.astype(dtype).tobytes()))


def _tensors(content: bytes) -> Iterator[bytes]:
    """Cut a `.pdiparams` file into its tensors, which lie in the order of their names."""
    start = 0
    while start < len(content):
        end = start + sum(_sizes(content, start))
        if end > len(content):
            raise ValueError("the parameters are cut short")
        yield content[start:end]
        start = end


def _sizes(content: bytes, start: int) -> tuple[int, int]:
    """Bytes of the header and of the values of the tensor at `start`."""
    version, levels, tensor_version, length = struct.unpack_from(_TENSOR, content, start)
    if version or levels or tensor_version:
        raise ValueError(f"a tensor of version {version}.{tensor_version} with {levels} levels of detail")
    header = struct.calcsize(_TENSOR) + length
    description = _proto().VarType.TensorDesc.FromString(content[start + header - length : start + header])
    return header, math.prod(description.dims) * np.dtype(_types()[description.data_type]).itemsize
