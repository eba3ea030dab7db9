"""Paddle graphs on disk: the PIR graph, the older program beside it, and PaddleDetection's graph with NMS."""

from __future__ import annotations

import filecmp
import tempfile
from pathlib import Path
from typing import Any

from gfldeploy.errors import ParityError
from gfldeploy.files import native_writes

__all__ = ["InputShape", "save_paddle_graphs", "save_paddledetection_graph", "strip_call_stacks"]

InputShape = tuple[int | None, int | None, int | None]


def save_paddle_graphs(layer: Any, directory: Path, shape: InputShape) -> None:
    """Write `model.json` (PIR), `model.pdmodel` (program) and the `model.pdiparams` that both share.

    `shape`: batch, height, width; None is free. Raises `ParityError` if the two formats would need different
    parameters, `OutputError` if they cannot be written.
    """
    import paddle

    from gfldeploy.export.gfl_graph import GflGraph
    from gfldeploy.export.program_mode import program_mode

    batch, height, width = shape
    spec = [paddle.static.InputSpec([batch, 3, height, width], "float32", name="image")]
    _save(layer, spec, directory / "model")
    # A layer already traced for PIR cannot be traced again: a second one over the same sublayers can.
    program_layer = GflGraph(layer, layer.candidates)
    program_layer.half_projection = layer.half_projection
    program_layer.eval()
    with tempfile.TemporaryDirectory(dir=directory) as temporary:
        with program_mode():
            _save(program_layer, spec, Path(temporary) / "model")
        if not filecmp.cmp(Path(temporary) / "model.pdiparams", directory / "model.pdiparams", shallow=False):
            raise ParityError("the PIR graph and the program have different parameters", "Please report this.")
        (Path(temporary) / "model.pdmodel").rename(directory / "model.pdmodel")
    strip_call_stacks(directory / "model.pdmodel")


def strip_call_stacks(program: Path) -> None:
    """Drop, in place, the Python call stack that Paddle keeps with every operator of a `.pdmodel`.

    They name the paths of the machine that made the file, and are two thirds of it.
    """
    from paddle.base.proto import framework_pb2

    description = framework_pb2.ProgramDesc.FromString(program.read_bytes())
    for block in description.blocks:
        for operator in block.ops:
            kept = [attribute for attribute in operator.attrs if attribute.name != "op_callstack"]
            del operator.attrs[:]
            operator.attrs.extend(kept)
    program.write_bytes(description.SerializeToString(deterministic=True))


def save_paddledetection_graph(layer: Any, directory: Path, shape: InputShape) -> None:
    """Write PaddleDetection's graph, NMS included, as `model.json` and `model.pdiparams`."""
    import paddle

    from gfldeploy.export.gfl_graph import GflGraph, GflNmsGraph

    batch, height, width = shape
    graph = GflGraph(layer)
    nms_layer = GflNmsGraph(graph)
    nms_layer.eval()
    spec = [
        paddle.static.InputSpec([batch, 2], "float32", name="im_shape"),
        paddle.static.InputSpec([batch, 3, height, width], "float32", name="image"),
        paddle.static.InputSpec([batch, 2], "float32", name="scale_factor"),
    ]
    _save(nms_layer, spec, directory / "model")


def _save(layer: Any, spec: list[Any], prefix: Path) -> None:
    import paddle

    static = paddle.jit.to_static(layer, input_spec=spec, full_graph=True)
    with native_writes(prefix.parent):
        paddle.jit.save(static, str(prefix))
    prefix.with_suffix(".pdiparams.info").unlink(missing_ok=True)
