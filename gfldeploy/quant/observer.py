"""The range of every convolution's output over the calibration images.

PaddleSlim gives thresholds of convolution inputs. Outputs are observed here, as plain minimum and maximum: the class
logits of the rare positive cells are their outliers, and clipping those is what makes a quantised detector find
nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gfldeploy.engines.dependencies import require
from gfldeploy.errors import EngineError
from gfldeploy.quant.calibration import OutputRange
from gfldeploy.quant.qdq import conv_outputs

__all__ = ["observe_outputs", "weight_ranges"]


def observe_outputs(
    onnx_file: Path,
    batches: Iterable[NDArray[np.float32]],
    threads: int,
    report: Callable[[int], None] = lambda done: None,
) -> dict[str, tuple[OutputRange, ...]]:
    """Run the FP32 graph over `batches` [N, 3, H, W]; returns the ranges by weight name, one for each use.

    `report`: called with the number of batches done. Raises `EngineError` if the graph gives NaN or infinity, or if
    there is no batch.
    """
    import onnx

    ort = require("onnxruntime", "calibration")
    model = onnx.load(str(onnx_file))
    found = conv_outputs(model)
    tensors = list(dict.fromkeys(tensor for _, _, tensor in found))
    _reduce_in_graph(model, tensors)
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    low = np.full(len(tensors), np.inf)
    high = np.full(len(tensors), -np.inf)
    for done, batch in enumerate(batches, 1):
        values = np.array(session.run(None, {"image": batch}), np.float64).reshape(len(tensors), 2)
        if not np.isfinite(values).all():
            raise EngineError("the FP32 graph gives NaN or infinity on a calibration image", "Check the checkpoint.")
        np.minimum(low, values[:, 0], out=low)
        np.maximum(high, values[:, 1], out=high)
        report(done)
    if not np.isfinite(low).all():
        raise EngineError("there was no calibration image", "Give --data with at least one image.")
    ranges = {tensor: OutputRange(*pair) for tensor, *pair in zip(tensors, low.tolist(), high.tolist(), strict=True)}
    result: dict[str, tuple[OutputRange, ...]] = {}
    for weight, _, tensor in found:
        result[weight] = (*result.get(weight, ()), ranges[tensor])
    return result


def _reduce_in_graph(model: Any, tensors: list[str]) -> None:
    """Replace the graph's outputs by minimum and maximum of each tensor: scalars, not gigabytes of activations."""
    from onnx import TensorProto, helper

    del model.graph.output[:]
    for tensor in tensors:
        for kind in ("ReduceMin", "ReduceMax"):
            name = f"{tensor}.{kind}"
            model.graph.node.append(helper.make_node(kind, [tensor], [name], keepdims=0))
            model.graph.output.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, []))


def weight_ranges(onnx_file: Path) -> dict[str, tuple[float, ...]]:
    """The largest absolute weight of each output channel, by the name of the convolution's weight."""
    import onnx
    from onnx import numpy_helper

    model = onnx.load(str(onnx_file))
    wanted = {weight for weight, _, _ in conv_outputs(model)}
    found = {one.name: numpy_helper.to_array(one) for one in model.graph.initializer if one.name in wanted}
    return {
        name: tuple(np.abs(value).reshape(len(value), -1).max(axis=1).astype(float).tolist())
        for name, value in found.items()
    }
