"""Paddle graphs on disk: the PIR graph, the older program beside it, and PaddleDetection's graph with NMS."""

from __future__ import annotations

import filecmp
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from gfldeploy.errors import EngineError, ParityError, summary
from gfldeploy.files import native_writes

InputShape = tuple[int | None, int | None, int | None]


def save_paddle_graph(layer: Any, directory: Path, shape: InputShape) -> None:
    """Write `model.json` (PIR) and its `model.pdiparams`. `shape`: batch, height, width; None is free.

    Raises `EngineError` if Paddle cannot trace the layer, `OutputError` if the files cannot be written.
    """
    _save(layer, _image(shape), directory / "model")


def save_paddle_program(layer: Any, directory: Path, shape: InputShape) -> None:
    """Write `model.pdmodel`, the older program, beside a PIR graph: the `model.pdiparams` there serves both.

    Raises `EngineError` if Paddle cannot trace the layer, `ParityError` if the program would need other parameters,
    `OutputError` if it cannot be written.
    """
    from gfldeploy.export.program_mode import program_mode

    # A layer already traced for PIR cannot be traced again: a second one over the same sublayers can.
    program_layer = type(layer)(layer, layer.candidates)
    program_layer.half_projection = layer.half_projection
    program_layer.eval()
    with tempfile.TemporaryDirectory(dir=directory) as temporary:
        with program_mode():
            _save(program_layer, _image(shape), Path(temporary) / "model")
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

    from gfldeploy.export.gfl_graph import GflNmsGraph

    batch, height, width = shape
    nms_layer = GflNmsGraph(type(layer)(layer))
    nms_layer.eval()
    spec = [
        paddle.static.InputSpec([batch, 2], "float32", name="im_shape"),
        paddle.static.InputSpec([batch, 3, height, width], "float32", name="image"),
        paddle.static.InputSpec([batch, 2], "float32", name="scale_factor"),
    ]
    _save(nms_layer, spec, directory / "model")


def _image(shape: InputShape) -> list[Any]:
    import paddle

    batch, height, width = shape
    return [paddle.static.InputSpec([batch, 3, height, width], "float32", name="image")]


def _save(layer: Any, spec: list[Any], prefix: Path) -> None:
    import paddle

    static = paddle.jit.to_static(layer, input_spec=spec, full_graph=True)
    padding = paddle.nn.functional.pad
    paddle.nn.functional.pad = _zeros_joined_on(padding)
    try:
        static.forward.concrete_program  # noqa: B018 - a property that traces
    except Exception as error:  # a model's own code may raise anything under tracing
        raise EngineError(f"Paddle cannot trace the model: {summary(error)}", "Please report this.") from error
    finally:
        paddle.nn.functional.pad = padding
    with native_writes(prefix.parent):
        paddle.jit.save(static, str(prefix))
    prefix.with_suffix(".pdiparams.info").unlink(missing_ok=True)


def _zeros_joined_on(original: Callable[..., Any]) -> Callable[..., Any]:
    """`paddle.nn.functional.pad` where zeros around all dimensions are joined on.

    oneDNN's kernel for that takes the dimensions of tensors with channels last for others and writes where it must not
    (Paddle 3.2.2).
    """
    import paddle

    def pad(x: Any, pad: Any, mode: str = "constant", value: float = 0.0, *more: Any, **names: Any) -> Any:
        dimensions = range(len(x.shape))
        counts = list(pad) if isinstance(pad, list | tuple) else []
        whole = len(counts) == 2 * len(dimensions) and all(isinstance(count, int) for count in counts)
        if mode != "constant" or value != 0 or not whole:
            return original(x, pad, mode, value, *more, **names)
        for axis in dimensions:
            line = paddle.zeros_like(paddle.slice(x, [axis], [0], [1]))
            zeros = [
                paddle.tile(line, [count if dimension == axis else 1 for dimension in dimensions])
                for count in counts[2 * axis : 2 * axis + 2]
                if count
            ]
            if len(zeros) == 2:
                x = paddle.concat([zeros[0], x, zeros[1]], axis)
            elif zeros:
                x = paddle.concat([zeros[0], x] if counts[2 * axis] else [x, zeros[0]], axis)
        return x

    return paddle.jit.not_to_static(pad)  # type: ignore[no-any-return]
