"""Paddle's PIR graph as ONNX, tidied so that every engine can fuse it."""

from __future__ import annotations

import os
import re
from collections import defaultdict
from collections.abc import Sequence
from heapq import heapify, heappop, heappush
from pathlib import Path
from typing import Any

from gfldeploy._quiet import quiet
from gfldeploy.engines.dependencies import require
from gfldeploy.errors import EngineError, GfldeployError, summary
from gfldeploy.files import native_writes

# The newest that TensorRT 10, ONNX Runtime 1.16+ and OpenVINO 2023+ all read, with per-channel QuantizeLinear. A graph
# has a newer one where an operator needs it.
OPSET = 17

_OUTPUTS = ("scores", "boxes", "anchors")
_DIMENSIONS = {
    "image": ("N", None, "H", "W"),
    "scores": ("N", "A", None),
    "boxes": ("N", "A", None),
    "anchors": ("N", "A"),
}


def convert(model: Path, params: Path, output: Path) -> None:
    """Convert a PIR graph to ONNX at `output`.

    Raises `EngineError` if paddle2onnx or ONNX Runtime cannot, `OutputError` if the file cannot be written.

    Convolutions keep Paddle's weight names (`conv2d_7.w_0`): calibration finds them by these.
    """
    import onnx

    paddle2onnx = require("paddle2onnx", "writing ONNX")
    raw = output.with_suffix(".raw.onnx")
    try:
        with native_writes(output.parent), quiet():
            # 'None' is a name here: the default tool sets an environment variable that makes Polygraphy run pip.
            paddle2onnx.export(str(model), str(params), str(raw), opset_version=OPSET, optimize_tool="None")
        with native_writes(output.parent):
            _tidy(raw, output)
        converted = onnx.load(str(raw))
        in_order = [name for node in converted.graph.node for name in node.output]
        # Paddle2ONNX takes a newer one where an operator needs it: DeformConv came with 19.
        opset = max(entry.version for entry in converted.opset_import if not entry.domain)
    except GfldeployError:
        raise
    except Exception as error:
        raise EngineError(
            f"{model.name} cannot be converted to ONNX: {summary(error)}", "Please report this with your config."
        ) from error
    finally:
        os.environ.pop("POLYGRAPHY_AUTOINSTALL_DEPS", None)
        raw.unlink(missing_ok=True)
    graph = onnx.load(str(output))
    if odd := sorted({node.op_type for node in graph.graph.node if re.match("Sequence|Loop|If|Scan", node.op_type)}):
        raise EngineError(
            f"Paddle2ONNX writes it with {', '.join(odd)} (assigning to parts of a tensor), which not all engines read",
            "Use the Paddle graph.",
        )
    _sort(graph.graph, in_order)
    del graph.opset_import[:]
    graph.opset_import.append(onnx.helper.make_opsetid("", opset))
    for value, name in zip(graph.graph.output, _OUTPUTS[: len(graph.graph.output)], strict=True):
        _rename(graph, value.name, name)
    for value in (*graph.graph.input, *graph.graph.output):
        for dimension, symbol in zip(value.type.tensor_type.shape.dim, _DIMENSIONS[value.name], strict=True):
            if symbol and not dimension.dim_value:
                dimension.dim_param = symbol
    # Intermediate shapes carry paddle2onnx's own dimension names, which contradict the ones given above.
    del graph.graph.value_info[:]
    graph.graph.name, graph.producer_name, graph.producer_version = "gfl", "gfldeploy", ""
    onnx.checker.check_model(graph)
    onnx.save(graph, str(output))


def _tidy(source: Path, target: Path) -> None:
    """Let ONNX Runtime apply its "basic" optimisations, which stay within standard ONNX.

    They matter beyond tidiness: paddle2onnx writes a convolution's bias as Reshape + Add, and engines only run a
    convolution in INT8 if the bias is its third input.
    """
    ort = require("onnxruntime", "writing ONNX")
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_BASIC
    options.optimized_model_filepath = str(target)
    options.log_severity_level = 3
    ort.InferenceSession(str(source), options, providers=["CPUExecutionProvider"])


def _sort(graph: Any, tensors: Sequence[str]) -> None:
    """Sort the nodes topologically, as near to the order of `tensors`, their outputs, as that allows.

    ONNX Runtime writes them coarsest pyramid level first. A convolution that the levels share is known by its weight
    and the place of its use in the graph, and that place has to be the same as in the Paddle program.
    """
    place = {name: index for index, name in enumerate(tensors)}
    nodes = list(graph.node)
    makers = {name: index for index, node in enumerate(nodes) for name in node.output}
    missing = [{makers[name] for name in node.input if name in makers} for node in nodes]
    users: dict[int, list[int]] = defaultdict(list)
    for index, before in enumerate(missing):
        for one in before:
            users[one].append(index)
    # A node that is new in the graph goes where it can go first.
    ranks = [min((place[name] for name in node.output if name in place), default=0) for node in nodes]
    ready = [(ranks[index], index) for index, before in enumerate(missing) if not before]
    heapify(ready)
    ordered = []
    while ready:
        _, index = heappop(ready)
        ordered.append(nodes[index])
        for user in users[index]:
            missing[user].discard(index)
            if not missing[user]:
                heappush(ready, (ranks[user], user))
    del graph.node[:]
    graph.node.extend(ordered)


def _rename(model: Any, old: str, new: str) -> None:
    """Rename a value everywhere, in place."""
    for node in model.graph.node:
        for names in (node.input, node.output):
            for index, name in enumerate(names):
                if name == old:
                    names[index] = new
    for value in model.graph.output:
        if value.name == old:
            value.name = new
