"""PaddleSlim's INT8 program with single uses of convolutions put back to float.

Both files are edited as what they are, a protocol buffer and a row of tensors: that needs neither Paddle's process-wide
switch to the old program format nor a process of its own, and takes milliseconds.
"""

from __future__ import annotations

import math
import shutil
import struct
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gfldeploy.bundle import Bundle
from gfldeploy.errors import EngineError
from gfldeploy.files import native_writes
from gfldeploy.quant.calibration import ConvUse

__all__ = ["old_program_environment", "write_parameters", "write_program"]

_MODEL, _PARAMETERS = "model.pdmodel", "model.pdiparams"
_CONVOLUTIONS = ("conv2d", "depthwise_conv2d")
_QUANTIZE, _DEQUANTIZE = "quantize_linear", "dequantize_linear"
# PaddleSlim's mark on the operators that it quantised. Paddle's oneDNN pass takes the pairs out again and keeps their
# scales by tensor: a convolution whose input has one, whoever it is for, would run in INT8, unless the mark is missing.
_MARK = "quantization_type"
_REMEDY = "Quantise the FP32 bundle that this program is from again."


def old_program_environment(threads: int) -> dict[str, str]:
    """Environment of a process that runs programs of Paddle's old format, on that many CPU threads and quietly."""
    return {
        "FLAGS_enable_pir_api": "0",
        "FLAGS_paddle_num_threads": str(threads),
        "OMP_NUM_THREADS": str(threads),
        "GLOG_minloglevel": "2",
        "PYTHONWARNINGS": "ignore",
    }


def write_program(quantized: Path, source: Bundle, kept: Collection[ConvUse], output: Path) -> None:
    """Write to `output` the program in `quantized`, with the `kept` uses of convolutions in float.

    Both are directories with `model.pdmodel` and `model.pdiparams`. The float weights are those of `source`, the FP32
    bundle that was quantised; a weight that is needed in both forms is there twice. With nothing kept the files are
    copied. Raises `BundleError`; `EngineError` if the program has no such use or the files cannot be read;
    `OutputError`.
    """
    with native_writes(output):
        if not kept:
            for name in (_MODEL, _PARAMETERS):
                shutil.copyfile(quantized / name, output / name)
            return
        program = _Program.read(quantized / _MODEL, quantized / _PARAMETERS)
        model, parameters = source.graph("paddle_program")
        assert parameters is not None
        program.put_back(kept, _Program.read(model, parameters))
        program.write(output / _MODEL, output / _PARAMETERS)


def write_parameters(source: Bundle, values: Mapping[str, NDArray[np.float32]], output: Path) -> None:
    """Write to `output` the program of the FP32 bundle `source` with other `values` of the parameters that they name.

    Raises `BundleError`; `EngineError` if a parameter is not there or of another size; `OutputError`.
    """
    model, parameters = source.graph("paddle_program")
    assert parameters is not None
    program = _Program.read(model, parameters)
    for name, value in values.items():
        old = program.tensors.get(name)
        header, size = _sizes(old, 0) if old else (0, 0)
        if not old or size != value.nbytes:
            raise EngineError(f"the FP32 program has no parameter {name} of {value.nbytes} bytes", _REMEDY)
        program.tensors[name] = old[:header] + np.ascontiguousarray(value).tobytes()
    with native_writes(output):
        program.write(output / _MODEL, output / _PARAMETERS)


@dataclass(frozen=True)
class _Program:
    """`description`: the `ProgramDesc`. `tensors`: the parameters by name, each as it lies in the file."""

    description: Any
    tensors: dict[str, bytes]

    @classmethod
    def read(cls, model: Path, parameters: Path) -> _Program:
        from google.protobuf.message import DecodeError  # type: ignore[import-untyped]
        from paddle.base.proto import framework_pb2

        try:
            description = framework_pb2.ProgramDesc.FromString(model.read_bytes())
            named = {one.name for one in description.blocks[0].vars if one.persistable} - {"feed", "fetch"}
            return cls(description, dict(zip(sorted(named), _tensors(parameters.read_bytes()), strict=True)))
        except (DecodeError, IndexError, KeyError, ValueError, struct.error) as error:
            raise EngineError(f"{model} and {parameters.name} are no Paddle program: {error}", _REMEDY) from error

    def write(self, model: Path, parameters: Path) -> None:
        model.write_bytes(self.description.SerializeToString(deterministic=True))
        parameters.write_bytes(b"".join(self.tensors[name] for name in sorted(self.tensors)))

    def put_back(self, kept: Collection[ConvUse], original: _Program) -> None:
        """Let the `kept` uses read what `original`, the FP32 program, has them read."""
        operators = self.description.blocks[0].ops
        makers = {name: op for op in operators for name in _names(op.outputs)}
        quantized = self._quantized_uses(makers)
        if absent := sorted(set(kept) - set(quantized)):
            raise EngineError(f"the INT8 program has no use {absent[0].use} of {absent[0].weight}", _REMEDY)
        restored = {}  # what makes the weight from integers
        for use in sorted(set(kept)):
            op = quantized[use]
            inputs = {slot.parameter: slot.arguments for slot in op.inputs}
            restored[use.weight] = makers[inputs["Filter"][0]]
            pair = makers[inputs["Input"][0]]
            inputs["Input"][0] = _source(makers[_source(pair)])
            inputs["Filter"][0] = use.weight
            attributes = [attribute for attribute in op.attrs if attribute.name != _MARK]
            del op.attrs[:]
            op.attrs.extend(attributes)
        variables = self._variables()
        for weight, dequantize in restored.items():
            if weight not in original.tensors:
                raise EngineError(f"the FP32 program has no parameter {weight}, the INT8 program does", _REMEDY)
            # The float weight takes its own name back, and the integers another.
            integers = self.description.blocks[0].vars.add()
            integers.CopyFrom(variables[weight])
            integers.name = f"{weight}.quantized"
            next(slot for slot in dequantize.inputs if slot.parameter == "X").arguments[0] = integers.name
            variables[weight].CopyFrom(original._variables()[weight])
            self.tensors[integers.name] = self.tensors[weight]
            self.tensors[weight] = original.tensors[weight]
        self._remove_dead()

    def _quantized_uses(self, makers: dict[str, Any]) -> dict[ConvUse, Any]:
        """The quantised convolutions, numbered as calibration does."""
        counts: dict[str, int] = defaultdict(int)
        found = {}
        for op in self.description.blocks[0].ops:
            if op.type not in _CONVOLUTIONS:
                continue
            inputs = {slot.parameter: slot.arguments[0] for slot in op.inputs if slot.arguments}
            data, weight = (makers.get(inputs[name]) for name in ("Input", "Filter"))
            if data is None or weight is None or {data.type, weight.type} != {_DEQUANTIZE}:
                continue
            name = _source(weight)
            found[ConvUse(name, counts[name])] = op
            counts[name] += 1
        return found

    def _variables(self) -> dict[str, Any]:
        return {variable.name: variable for variable in self.description.blocks[0].vars}

    def _remove_dead(self) -> None:
        """Drop pairs that nothing reads any more, and the variables and tensors that nothing names then."""
        block = self.description.blocks[0]
        read: set[str] = set()
        alive = []
        for op in reversed(block.ops):
            if op.type in (_QUANTIZE, _DEQUANTIZE) and read.isdisjoint(_names(op.outputs)):
                continue
            read.update(_names(op.inputs))
            alive.append(op)
        alive.reverse()
        named = {name for op in alive for name in (*_names(op.inputs), *_names(op.outputs))}
        variables = [variable for variable in block.vars if variable.name in named]
        del block.ops[:], block.vars[:]
        block.ops.extend(alive)
        block.vars.extend(variables)
        for name in self.tensors.keys() - named:
            del self.tensors[name]


def _names(slots: Iterable[Any]) -> Iterator[str]:
    return (name for slot in slots for name in slot.arguments)


def _source(pair: Any) -> str:
    """The tensor that a quantize_linear or dequantize_linear operator reads."""
    name: str = next(slot.arguments[0] for slot in pair.inputs if slot.parameter == "X")
    return name


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
    """Bytes of the header and of the values of the tensor at `start`.

    The header is: uint32 version, uint64 number of levels of detail (0 for parameters), uint32 version, int32 length of
    a `TensorDesc`, the `TensorDesc`.
    """
    from paddle.base.proto import framework_pb2

    kinds = framework_pb2.VarType
    sizes = {kinds.FP32: 4, kinds.INT8: 1, kinds.INT32: 4, kinds.INT64: 8, kinds.FP64: 8, kinds.BOOL: 1}
    version, levels, tensor_version, length = struct.unpack_from("<IQIi", content, start)
    if version or levels or tensor_version:
        raise ValueError(f"a tensor of version {version}.{tensor_version} with {levels} levels of detail")
    header = struct.calcsize("<IQIi") + length
    description = kinds.TensorDesc.FromString(content[start + header - length : start + header])
    return header, math.prod(description.dims) * sizes[description.data_type]
