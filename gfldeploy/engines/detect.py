"""Runs one batch through the network and NMS: the step that every use of a detector shares.

`inputs_of` and `found_in` are of whatever graph an engine has loaded, the network or the file that deploys by itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gfldeploy.candidates import may_lack_below
from gfldeploy.detections import Detections
from gfldeploy.engines.base import Engine, Tensors
from gfldeploy.errors import EngineError
from gfldeploy.images.preprocess import Preprocess, new_memory
from gfldeploy.nms import NmsParams, postprocess


def detect_batch(
    engine: Engine, tensor: NDArray[np.float32], scales: Sequence[tuple[float, float]], nms: NmsParams
) -> list[Detections]:
    """Detections, in original pixels, for each image of a batch, float32 [N, 3, H, W]; `scales` as for `postprocess`.

    Raises `EngineError` when the engine fails or returns something unusable.
    """
    return found_in(engine, engine.infer({"image": tensor}), scales, nms)


def inputs_of(
    engine: Engine,
    images: Sequence[NDArray[np.uint8]],
    preprocess: Preprocess,
    memory: Callable[[int], NDArray[np.float32]] = new_memory,
) -> tuple[Tensors, list[tuple[float, float]]]:
    """What the engine takes of RGB images, uint8 [h, w, 3], and by which they were resized (y, x).

    `memory`: as for `Preprocess.batch_of`. Raises `DataError`.
    """
    if engine.by_itself:
        pixels = preprocess.pixels_of(images)
        return pixels, [(y, x) for y, x in pixels["scale_factor"].tolist()]
    tensor, scales = preprocess.batch_of(images, memory)
    return {"image": tensor}, scales


def found_in(
    engine: Engine, outputs: Mapping[str, NDArray[Any]], scales: Sequence[tuple[float, float]], nms: NmsParams
) -> list[Detections]:
    """Detections, in original pixels, in what the engine gave for a batch; `scales` as `inputs_of` gives them.

    Raises `EngineError` for something unusable.
    """
    if engine.by_itself:
        return list(given_detections(outputs))
    scores, boxes = check_outputs(engine, outputs, len(scales))
    return detections_of(scores, boxes, scales, nms, chosen="anchors" in outputs)


def detections_of(
    scores: NDArray[np.float32],
    boxes: NDArray[np.float32],
    scales: Sequence[tuple[float, float]],
    nms: NmsParams,
    chosen: bool,
) -> list[Detections]:
    """As `postprocess`; where the graph has `chosen` its candidates, with what it may lack by that."""
    found = postprocess(scores, boxes, scales, nms)
    if not chosen:
        return found
    return [
        replace(one, may_lack_below=may_lack_below(each, one, nms)) for each, one in zip(scores, found, strict=True)
    ]


def given_detections(outputs: Mapping[str, NDArray[Any]]) -> Iterator[Detections]:
    """Those of each image that a file that deploys by itself gives, by the names of its outputs."""
    for image, count in enumerate(outputs["count"].tolist()):
        boxes, scores, classes = (outputs[name][image, :count] for name in ("boxes", "scores", "classes"))
        yield Detections(boxes, scores, classes.astype(np.int64))


def check_outputs(
    engine: Engine, outputs: Mapping[str, NDArray[np.float32]], images: int
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """The scores and boxes that an engine returned for `images` images. Raises `EngineError` for anything else."""
    if missing := {"scores", "boxes"} - set(outputs):
        raise EngineError(f"{engine.name} returned no {' and no '.join(sorted(missing))}", "Export the model again.")
    if len(outputs["scores"]) != images:
        raise EngineError(
            f"{engine.name} returned {len(outputs['scores'])} results for {images} images", "Use a batch size of 1."
        )
    return outputs["scores"], outputs["boxes"]
