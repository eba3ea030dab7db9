"""What oneDNN executed, read from its own log."""

from __future__ import annotations

import ctypes
import os
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from gfldeploy.errors import EngineError
from gfldeploy.system import flush_c_streams

_PRECISION = {"s8": "int8", "u8": "int8", "bf16": "bf16", "f16": "fp16", "f32": "fp32"}


@dataclass(frozen=True)
class LoggedConvolution:
    """One executed convolution.

    `implementation`: oneDNN's name of it, such as "brgconv_1x1:avx512_core". `shape`: such as
    "mb1_ic3oc24_ih256oh128kh3sh2dh0ph1_iw320ow160kw3sw2dw0pw1" (oneDNN's benchdnn notation). `ms`: how long it took.
    """

    precision: str
    implementation: str
    shape: str
    ms: float = field(default=0.0, compare=False)


@dataclass(frozen=True)
class LoggedPrimitive:
    """One executed primitive, such as a reorder.

    `tensors`: their types and layouts, as "src:f32::blocked:acdb::f0 dst:u8::blocked:acdb::f0". `shape`: in oneDNN's
    notation for the kind of primitive. `ms`: how long it took.
    """

    kind: str
    implementation: str
    tensors: str
    shape: str
    ms: float = field(default=0.0, compare=False)


def verbose_log(libraries: Sequence[Path], run: Callable[[], object], log: Path) -> str:
    """Call `run` with oneDNN's verbose mode on; returns what it said.

    `libraries`: the libdnnl file that the engine has loaded. Its log goes to this process's stdout, which is redirected
    to the file `log` meanwhile. Raises `EngineError` if the library has no verbose mode to switch.
    """
    try:
        onednn = ctypes.CDLL(str(next(iter(libraries))))
        set_verbose = onednn.dnnl_set_verbose
    except (StopIteration, OSError, AttributeError) as error:
        raise EngineError("the engine's oneDNN library cannot be asked what it executes") from error
    sys.stdout.flush()
    flush_c_streams()
    saved = os.dup(1)
    try:
        with log.open("wb") as file:
            os.dup2(file.fileno(), 1)
        set_verbose(1)
        run()
    finally:
        set_verbose(0)
        flush_c_streams()
        os.dup2(saved, 1)
        os.close(saved)
    return log.read_text(encoding="utf-8", errors="replace")


def read_primitives(log: str) -> tuple[LoggedPrimitive, ...]:
    """All that a oneDNN verbose log says was executed, in order; `read_convolutions` shows what a line looks like."""
    found = []
    for line in log.splitlines():
        fields = line.split(",")
        if "exec" in fields and len(after := fields[fields.index("exec") + 2 :]) > 6:
            kind, implementation, _, tensors = after[:4]
            found.append(LoggedPrimitive(kind, implementation, tensors, after[-2], _milliseconds(after[-1])))
    return tuple(found)


def read_convolutions(log: str) -> tuple[LoggedConvolution, ...]:
    """The executed convolutions of a oneDNN verbose log; the data type of the weights gives the precision.

    A line reads `onednn_verbose,[v1,primitive,]exec,cpu,convolution,IMPLEMENTATION,PROP,src_u8::... wei_s8::...,
    ATTRIBUTES,AUXILIARY,SHAPE,MILLISECONDS` (oneDNN developer guide, "Verbose Mode"). `src:u8:...` is the newer
    spelling of the same.
    """
    found = []
    for line in log.splitlines():
        fields = line.split(",")
        if "exec" not in fields or "convolution" not in fields:
            continue
        weights = re.search(r"wei[_:]([a-z0-9]+)", line)
        after = fields[fields.index("convolution") + 1 :]
        if weights and len(after) > 2:
            precision = _PRECISION.get(weights[1], weights[1])
            found.append(LoggedConvolution(precision, after[0], after[-2], _milliseconds(after[-1])))
    return tuple(found)


def _milliseconds(text: str) -> float:
    try:
        return float(text)
    except ValueError:  # what other writers of the same stdout put into the line
        return 0.0
