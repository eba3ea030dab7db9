"""The range of every convolution's output over the calibration images.

PaddleSlim gives thresholds of convolution inputs. Outputs are observed here, as plain minimum and maximum: the class
logits of the rare positive cells are their outliers, and clipping those is what makes a quantised detector find
nothing. Few images, or images without large objects, show no such cell of a level: what is squashed to a score has room
for all scores all the same.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from gfldeploy.engines.dependencies import require
from gfldeploy.errors import EngineError
from gfldeploy.export.heads import HEADS
from gfldeploy.quant.calibration import OutputRange
from gfldeploy.quant.qdq import conv_outputs

_LARGEST_LOGIT = 4.6  # of a score of 0.99
# Layers whose outputs become scores: of classes, and of GFLv2's quality.
_LOGITS = frozenset((*(head.class_output for head in HEADS.values()), "dgqp_reg_conv2"))


def of_scores(layers: Mapping[str, str]) -> list[str]:
    """Of these layers, the path of each by the name of its weight, the weights of those whose outputs become scores."""
    return [weight for weight, path in layers.items() if path.rpartition(".")[2] in _LOGITS]


def observe_outputs(
    onnx_file: Path,
    batches: Iterable[NDArray[np.float32]],
    threads: int,
    logits: Collection[str] = (),
) -> dict[str, tuple[OutputRange, ...]]:
    """The ranges of the convolutions' outputs by weight name, one for each use; see `observe_tensors`.

    `logits`: the weights of those whose outputs become scores: their ranges reach a score of 0.99 at least.
    """
    import onnx

    found = conv_outputs(onnx.load(str(onnx_file)))
    ranges = observe_tensors(onnx_file, [tensor for _, _, tensor in found], batches, threads)
    result: dict[str, tuple[OutputRange, ...]] = {}
    for weight, _, tensor in found:
        one = ranges[tensor]
        if weight in logits:
            one = OutputRange(one.low, max(one.high, _LARGEST_LOGIT))
        result[weight] = (*result.get(weight, ()), one)
    return result


def observe_tensors(
    onnx_file: Path,
    tensors: Iterable[str],
    batches: Iterable[NDArray[np.float32]],
    threads: int,
) -> dict[str, OutputRange]:
    """Run the FP32 graph over `batches` [N, 3, H, W]; returns the smallest and largest value of each tensor.

    Raises `EngineError` if the graph gives NaN or infinity, or if
    there is no batch.
    """
    import onnx
    from onnx import TensorProto, helper

    ort = require("onnxruntime", "calibration")
    names = list(dict.fromkeys(tensors))
    model = onnx.load(str(onnx_file))
    # Minimum and maximum in the graph: scalars, not gigabytes of activations.
    del model.graph.output[:]
    for tensor in names:
        for kind in ("ReduceMin", "ReduceMax"):
            model.graph.node.append(helper.make_node(kind, [tensor], [f"{tensor}.{kind}"], keepdims=0))
            model.graph.output.append(helper.make_tensor_value_info(f"{tensor}.{kind}", TensorProto.FLOAT, []))
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    low, high = np.full(len(names), np.inf), np.full(len(names), -np.inf)
    for batch in batches:
        values = np.array(session.run(None, {"image": batch}), np.float64).reshape(len(names), 2)
        if not np.isfinite(values).all():
            raise EngineError("the FP32 graph gives NaN or infinity on a calibration image", "Check the checkpoint.")
        low, high = np.minimum(low, values[:, 0]), np.maximum(high, values[:, 1])
    if not np.isfinite(low).all():
        raise EngineError("there was no calibration image", "Give --data with at least one image.")
    return {name: OutputRange(*pair) for name, *pair in zip(names, low.tolist(), high.tolist(), strict=True)}


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
