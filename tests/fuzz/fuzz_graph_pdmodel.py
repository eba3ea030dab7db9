"""A bundle's older Paddle program and its parameters."""

from __future__ import annotations

import importlib.util
import random
import struct
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from mutations import mutate_bytes, mutate_message

from gfldeploy.graph_guard import check_graph


def _messages() -> Any:
    """Paddle's messages, without the seconds that Paddle takes."""
    places = importlib.util.find_spec("paddle")
    assert places is not None
    assert places.origin is not None
    path = Path(places.origin).parent / "base/proto/framework_pb2.py"
    spec = importlib.util.spec_from_file_location("framework_pb2", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


_PROTO = _messages()
_SHAPE = (4, 3, 1, 1)
_MARK = b"PARAMETERS"


def _parameter() -> bytes:
    description: bytes = _PROTO.VarType.TensorDesc(data_type=5, dims=_SHAPE).SerializeToString()
    return struct.pack("<IQIi", 0, 0, 0, len(description)) + description + bytes(4 * 12)


def seeds() -> Iterable[bytes]:
    """Programs of one convolution and one more operator, the parameters behind a mark."""
    for kind in ("relu", "fill_constant", "tile", "nearest_interp_v2", "save", "py_func", "while"):
        program = _PROTO.ProgramDesc()
        block = program.blocks.add(idx=0, parent_idx=-1)
        for name, dims, persistable in (("image", (-1, 3, -1, -1), False), ("weight", _SHAPE, True)):
            variable = block.vars.add(name=name, persistable=persistable)
            variable.type.type = _PROTO.VarType.DENSE_TENSOR
            variable.type.dense_tensor.tensor.data_type = _PROTO.VarType.FP32
            variable.type.dense_tensor.tensor.dims.extend(dims)
        convolution = block.ops.add(type="conv2d")
        convolution.inputs.add(parameter="Input").arguments.append("image")
        convolution.inputs.add(parameter="Filter").arguments.append("weight")
        convolution.outputs.add(parameter="Output").arguments.append("map")
        convolution.attrs.add(name="strides", type=_PROTO.INTS).ints.extend((1, 1))
        more = block.ops.add(type=kind)
        more.inputs.add(parameter="X").arguments.append("map")
        more.attrs.add(name="shape", type=_PROTO.LONGS).longs.extend((2, 3))
        more.attrs.add(name="str_value", type=_PROTO.STRING, s="1.5")
        if kind == "while":
            more.attrs.add(name="sub_block", type=_PROTO.BLOCK, block_idx=1)
            program.blocks.add(idx=1, parent_idx=0)
        yield program.SerializeToString() + _MARK + _parameter()


def mutate(data: bytes, rng: random.Random) -> bytes:
    """The program by its fields, or the parameters by bytes."""
    program, mark, parameters = data.partition(_MARK)
    if rng.random() < 0.3:
        return program + mark + mutate_bytes(parameters, rng)
    try:
        message = _PROTO.ProgramDesc.FromString(program)
        return bytes(mutate_message(message, rng)) + mark + parameters
    except Exception:  # noqa: BLE001, whatever protobuf raises
        return mutate_bytes(program, rng) + mark + parameters


def one(data: bytes, folder: Path) -> None:
    """Both files."""
    program, _, parameters = data.partition(_MARK)
    (folder / "model.pdmodel").write_bytes(program)
    (folder / "model.pdiparams").write_bytes(parameters)
    check_graph("paddle_program", folder / "model.pdmodel", folder / "model.pdiparams")
