"""Compares the file that deploys by itself with the graph that it is made around.

What that graph computes was compared with the eager model before. Here it runs in the same engine with all the rest
done outside, so that detections have to be the same; those of the eager model come near.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from gfldeploy.bundle import GraphName, Manifest
from gfldeploy.detections import Detections
from gfldeploy.engines.base import Engine, Tensors
from gfldeploy.engines.detect import given_detections
from gfldeploy.errors import ParityError
from gfldeploy.export.parity import Shape, Tolerance, parity_pictures, parity_shapes
from gfldeploy.nms import postprocess

# What pictures are valid of, and by what they are taken to have been resized (y, x): a factor in the wrong place shows.
_VALID = ((1.0, 1.0), (0.7, 1.0), (1.0, 0.55))
_SCALE = (1.5, 1.25)
_OUTSIDE, _EAGER = "its network, NMS outside", "PaddleDetection, eager"
# Shares of detections: rounding in another order, as an engine does in another graph, can turn a decision of NMS. The
# eager model rounds otherwise from the first layer on, and random weights make boxes that overlap and score alike: a
# third of them were others, of a trained detector none. What goes wrong before NMS makes all of them others.
_MISSING, _MISSING_OF_EAGER = 0.01, 1.0


@dataclass(frozen=True)
class EndToEndComparison:
    """How far the file's detections in one engine are from others, for one input shape.

    `reference`: what the others are of. `detections`: how many those are, on all images. `missing`: how many there are
    in one, and not within the tolerance in the other. The differences, those of boxes in pixels of the original, are
    the largest of the rest.
    """

    graph: GraphName
    engine: str
    reference: str
    batch: int
    height: int
    width: int
    detections: int
    missing: int
    max_score_difference: float
    max_box_difference_px: float


def compare_end_to_end(
    graph: GraphName, alone: Engine, whole: Engine, manifest: Manifest, allowed: Tolerance
) -> list[EndToEndComparison]:
    """Run the file, `whole`, and the graph that it is made around, `alone`, in one engine on the same pictures.

    Those of one batch are valid in part, with noise in the rest. Raises `ParityError` where more than a hundredth of
    the detections are not within what is allowed.
    """
    found = []
    batch, _, *size = manifest.inputs[0].shape
    for images, height, width in parity_shapes(manifest.preprocess, (batch, size[0], size[1]))[:2]:
        pictures = parity_pictures((images, height, width), seed=1)
        valid = np.array([_VALID[-1 - image % len(_VALID)] for image in range(images)])
        sizes = np.maximum(valid * (height, width), 1).astype(np.int32)
        scales = np.tile(np.array(_SCALE, np.float32), (images, 1))
        outputs = alone.infer({"image": _network_input(pictures, sizes, manifest)})
        results = postprocess(outputs["scores"], outputs["boxes"], [_SCALE] * images, manifest.nms)
        inputs: Tensors = {"image": pictures, "im_shape": sizes, "scale_factor": scales}
        given = given_detections(whole.infer(inputs))
        empty = EndToEndComparison(graph, whole.name, _OUTSIDE, images, height, width, 0, 0, 0.0, 0.0)
        found.append(_compared(empty, results, given, manifest, allowed, _MISSING))
    return found


def compare_with_eager(
    graph: GraphName,
    whole: Engine,
    shape: Shape,
    eager: Callable[[tuple[float, float]], Iterable[Detections]],
    manifest: Manifest,
    allowed: Tolerance,
) -> EndToEndComparison:
    """Run the file, `whole`, on the pictures of this shape that graphs are compared on.

    `eager`: gives the detections of the eager model there, for a scale (y, x). Raises `ParityError` where more than
    half of both together are not within what is allowed.
    """
    images, height, width = shape
    inputs: Tensors = {
        "image": parity_pictures(shape, seed=0),
        "im_shape": np.tile(np.array([height, width], np.int32), (images, 1)),
        "scale_factor": np.tile(np.array(_SCALE, np.float32), (images, 1)),
    }
    empty = EndToEndComparison(graph, whole.name, _EAGER, images, height, width, 0, 0, 0.0, 0.0)
    return _compared(empty, eager(_SCALE), given_detections(whole.infer(inputs)), manifest, allowed, _MISSING_OF_EAGER)


def _network_input(pictures: NDArray[np.uint8], sizes: NDArray[np.int32], manifest: Manifest) -> NDArray[np.float32]:
    """The valid parts as `Preprocess` normalises and pads them, [N, 3, H, W]."""
    preprocess = manifest.preprocess
    batch = np.zeros((len(pictures), 3, *preprocess.padded_size(*pictures.shape[1:3])), np.float32)
    for row, picture, (height, width) in zip(batch, pictures, sizes.tolist(), strict=True):
        as_is = replace(preprocess, target_size=(height, width), keep_ratio=False)
        row[:, :height, :width] = as_is(np.ascontiguousarray(picture[:height, :width])).tensor
    return batch


def missing_in(found: Detections, expected: Detections, allowed: Tolerance) -> tuple[int, float, float]:
    """How many of `expected` have no one in `found` within the tolerance; the largest differences of the others."""
    missing, score, box = 0, 0.0, 0.0
    for place in range(len(expected)):
        same = np.flatnonzero(found.classes == expected.classes[place])
        scores = np.abs(found.scores[same] - expected.scores[place])
        boxes = np.abs(found.boxes[same] - expected.boxes[place]).max(axis=1, initial=0)
        near = np.flatnonzero((scores <= allowed.score) & (boxes <= allowed.box_px))
        if not len(near):
            missing += 1
            continue
        nearest = near[boxes[near].argmin()]
        score, box = max(score, float(scores[nearest])), max(box, float(boxes[nearest]))
    return missing, score, box


def _compared(
    empty: EndToEndComparison,
    reference: Iterable[Detections],
    given: Iterable[Detections],
    manifest: Manifest,
    allowed: Tolerance,
    may_miss: float,
) -> EndToEndComparison:
    """`empty` with what the detections of each image differ by.

    Raises `ParityError` where a larger share than `may_miss` is in one alone.
    """
    count = missing = 0
    score = box = 0.0
    for unnamed, found in zip(reference, given, strict=True):
        expected = unnamed.named(manifest.classes)
        count += len(expected)
        for one, other in ((expected, found), (found, expected)):
            lacking, score_difference, box_difference = missing_in(other, one, allowed)
            missing += lacking
            score, box = max(score, score_difference), max(box, box_difference)
    if missing > may_miss * count:
        raise ParityError(
            f"the {empty.graph} graph in {empty.engine} at {empty.batch}x{empty.height}x{empty.width}x3 gives other "
            f"detections than {empty.reference}: {missing}, where there are {count}",
            "Please report this with your config.",
        )
    return replace(empty, detections=count, missing=missing, max_score_difference=score, max_box_difference_px=box)
