"""What oneDNN really executed, read from its own log."""

from __future__ import annotations

import ctypes
import os
import re
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

from gfldeploy.errors import EngineError

__all__ = ["convolutions_by_precision", "count_convolutions"]

_PRECISION = {"s8": "int8", "u8": "int8", "bf16": "bf16", "f16": "fp16", "f32": "fp32"}


def convolutions_by_precision(libraries: Sequence[Path], run: Callable[[], object], log: Path) -> dict[str, int]:
    """Call `run` with oneDNN's verbose mode on and count the convolutions executed, by precision.

    `libraries`: the libdnnl file that the engine has loaded. Its log goes to this process's stdout, which is redirected
    to the file `log` meanwhile. Raises `EngineError` if the library has no verbose mode to switch.
    """
    try:
        onednn = ctypes.CDLL(str(next(iter(libraries))))
        set_verbose = onednn.dnnl_set_verbose
    except (StopIteration, OSError, AttributeError) as error:
        raise EngineError("the engine's oneDNN library cannot be asked what it executes") from error
    libc = ctypes.CDLL(None)
    sys.stdout.flush()
    libc.fflush(None)
    saved = os.dup(1)
    try:
        with log.open("wb") as file:
            os.dup2(file.fileno(), 1)
            set_verbose(1)
            try:
                run()
            finally:
                set_verbose(0)
                libc.fflush(None)
                os.dup2(saved, 1)
    finally:
        os.close(saved)
    return count_convolutions(log.read_text(errors="replace"))


def count_convolutions(log: str) -> dict[str, int]:
    """Count the executed convolutions in a oneDNN verbose log by the data type of their source (and weights).

    A line reads `onednn_verbose,[v1,]primitive,exec,cpu,convolution,IMPLEMENTATION,PROP,src_u8::... wei_s8::...,...`
    (oneDNN developer guide, "Verbose Mode"). `src:u8:...` is the newer spelling of the same.
    """
    counts: Counter[str] = Counter()
    for line in log.splitlines():
        if "exec" not in line or ",convolution," not in line:
            continue
        weights = re.search(r"wei[_:](\w+?)(?::|_)", line.replace("wei_", "wei:"))
        if weights:
            counts[_PRECISION.get(weights.group(1), weights.group(1))] += 1
    return dict(sorted(counts.items()))
