"""Checks that every exported graph computes what the eager model computes.

The reference is ppdet's own forward pass, before BatchNorm folding and with ppdet's own decode. The graph runs in the
engine that users deploy, oneDNN and graph fusions included.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gfldeploy._quiet import quiet
from gfldeploy.bundle import GraphName
from gfldeploy.candidates import anchors_of, matched
from gfldeploy.detections import Detections
from gfldeploy.engines.base import Engine
from gfldeploy.errors import ParityError
from gfldeploy.images.preprocess import Preprocess


@dataclass(frozen=True)
class Tolerance:
    """Largest differences from the reference that a graph may have: of scores, and of boxes in pixels."""

    score: float
    box_px: float

    def times(self, factor: float) -> Tolerance:
        return Tolerance(self.score * factor, self.box_px * factor)

    @classmethod
    def recorded(cls, record: Any) -> Tolerance:
        """The tolerance in a `parity.json`, limited to what an export may allow."""
        allowed = record.get("tolerance") if isinstance(record, dict) else None
        values = [allowed.get(key) if isinstance(allowed, dict) else None for key in ("score", "box_px")]
        score, box = (value if isinstance(value, int | float) else 0.0 for value in values)
        return _within(score, box)


# Summing in another order moves FP32 scores by up to 7e-6 and boxes by 0.005 px over the model zoo with random weights
# (export/results/zoo.json), and more where logits spread wider; real defects (a wrong epsilon, a folded stride, a
# swapped axis) are orders of magnitude beyond these limits.
TOLERANCE = Tolerance(score=5e-5, box_px=0.05)
# A model may itself amplify rounding beyond that, most of all with random weights. Graphs of LCNet, SENet, ConvNeXt and
# MobileNetV3 differ by 1 to 4 times what half a unit in the last place of every pixel moves the eager model by. Where
# ten times that is more than `_MOST` times the tolerance, a comparison says little, and the graph is not published.
_ROUNDINGS = 10.0
_MOST = 20.0

_DEFECT = "The graph must not be deployed. Please report this with your config and package versions."

Shape = tuple[int, int, int]
# As engines give them: "scores" [N, A, C] and "boxes" [N, A, 4], with "anchors" [N, A] where the graph chooses.
Outputs = Mapping[str, NDArray[Any]]


@dataclass(frozen=True)
class GraphComparison:
    """Largest absolute differences of one graph in one engine from the reference, for one input shape.

    Where a graph chooses its candidates, those that both have are compared; one that is left out, although it scores
    more than the worst that was chosen, counts with how much more.
    """

    graph: GraphName
    engine: str
    batch: int
    height: int
    width: int
    max_score_difference: float
    max_box_difference_px: float


_MOST_PIXELS = 4_000_000


def parity_shapes(preprocess: Preprocess, fixed: tuple[int | None, int | None, int | None]) -> list[Shape]:
    """Batch, height and width of the test pictures: portrait, a landscape batch of three, and the largest size in use.

    The last is the reader's own largest picture (800x1344 for the model zoo), or 800x1344 if that is larger; a picture
    of more than 4 million pixels is compared smaller, since a config may ask for more than memory can hold.
    """
    batch, height, width = fixed
    if height and width:
        return [(size, height, width) for size in ((1, 3) if batch is None else (batch,))]
    stride = max(preprocess.pad_stride, 32)
    short, long = sorted(preprocess.target_size)
    height, width = max(short, 800), max(long, 1344)
    shrink = min(1.0, math.sqrt(_MOST_PIXELS / (height * width)))
    shapes = [(1, 320, 256), (3, 256, 416), (1, int(height * shrink), int(width * shrink))]
    return [(size, _round_up(height, stride), _round_up(width, stride)) for size, height, width in shapes]


def parity_images(shape: Shape, preprocess: Preprocess, seed: int) -> NDArray[np.float32]:
    """`parity_pictures` [N, 3, H, W], normalised as the reader would."""
    as_is = replace(preprocess, target_size=shape[1:], keep_ratio=False)  # which makes Resize do nothing
    return np.stack([as_is(picture).tensor for picture in parity_pictures(shape, seed)])


def parity_pictures(shape: Shape, seed: int) -> NDArray[np.uint8]:
    """Pictures [N, H, W, 3]: noise at several scales with sharp-edged shapes."""
    import cv2

    batch, height, width = shape
    rng = np.random.default_rng([seed, batch, height, width])
    pictures = np.empty((batch, height, width, 3), np.uint8)
    for picture in pictures:
        field = np.zeros((height, width, 3), np.float32)
        for cells in (2, 8, 32, 128):
            coarse = rng.standard_normal((cells, cells, 3)).astype(np.float32)
            field += cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC) * 24
        image = np.ascontiguousarray(np.clip(field + 128, 0, 255).astype(np.uint8))
        for _ in range(12):
            centre = (int(rng.integers(width)), int(rng.integers(height)))
            size = int(rng.integers(6, max(8, min(height, width) // 3)))
            colour = tuple(int(value) for value in rng.integers(0, 256, 3))
            if rng.random() < 0.5:
                cv2.circle(image, centre, size, colour, -1)
            else:
                corner = (centre[0] + size, centre[1] + size)
                cv2.rectangle(image, centre, corner, colour, -1)
        picture[:] = image
    return pictures


def eager_outputs(detector: Any, images: NDArray[np.float32]) -> dict[str, NDArray[np.float32]]:
    """Scores [N, A, C] and boxes [N, A, 4] from ppdet's own layers and decode. Raises `ParityError` for NaN."""
    import paddle

    with paddle.no_grad(), quiet():
        scores, boxes = detector.head(detector.neck(detector.backbone({"image": paddle.to_tensor(images)})))
        outputs = {"scores": paddle.concat(scores, 1).numpy(), "boxes": paddle.concat(boxes, 1).numpy()}
    _check_eager(outputs)
    return outputs


def _check_eager(outputs: Outputs) -> None:
    for name in ("scores", "boxes"):
        if not np.isfinite(outputs[name]).all():
            raise ParityError(f"the eager model itself gives NaN or infinite {name}", "Check the checkpoint.")


def eager_detections(detector: Any, outputs: Outputs, scale: tuple[float, float]) -> Iterator[Detections]:
    """What ppdet's own NMS makes of the outputs, of each image; `scale` (y, x), by which all were resized."""
    import paddle

    boxes = outputs["boxes"] / np.array([*scale[::-1], *scale[::-1]], np.float32)
    scores = np.ascontiguousarray(outputs["scores"].transpose(0, 2, 1))
    rows, counts, _ = detector.head.nms(paddle.to_tensor(boxes), paddle.to_tensor(scores))
    ends = np.cumsum(counts.numpy())
    for count, end in zip(counts.numpy(), ends, strict=True):
        found = rows.numpy()[end - count : end]
        yield Detections(found[:, 2:], found[:, 1], found[:, 0].astype(np.int64))


def tolerance(detector: Any, images: Sequence[NDArray[np.float32]]) -> Tolerance:
    """How far a graph of this model may be from it on these batches [N, 3, H, W].

    `TOLERANCE`, or more for a model that amplifies rounding: ten times what it makes of half a unit in the last place
    of every pixel, within limits.
    """
    score = box = 0.0
    for batch in images:
        noise = np.random.default_rng(0).uniform(-1, 1, batch.shape) * np.finfo(np.float32).eps / 2
        moved, still = (eager_outputs(detector, one) for one in ((batch * (1 + noise)).astype(np.float32), batch))
        score = max(score, float(np.abs(moved["scores"] - still["scores"]).max()))
        box = max(box, float(np.abs(moved["boxes"] - still["boxes"]).max()))
    return _within(_ROUNDINGS * score, _ROUNDINGS * box)


def _within(score: float, box_px: float) -> Tolerance:
    """These values, limited to what an export may allow."""
    score, box_px = (
        float(min(max(usual, value), usual * _MOST))
        for usual, value in ((TOLERANCE.score, score), (TOLERANCE.box_px, box_px))
    )
    return Tolerance(score, box_px)


def compare(graph: GraphName, engine: Engine, images: NDArray[np.float32], reference: Outputs) -> GraphComparison:
    """Run `images` [N, 3, H, W] and measure the largest differences.

    Raises `ParityError` for NaN, other shapes, or candidates that are not as many as can be in the order of anchors.
    """
    outputs = engine.infer({"image": images})
    batch, _, height, width = images.shape
    where = f"the {graph} graph in {engine.name} at {batch}x3x{height}x{width}"
    rows = outputs.get("anchors", reference["scores"][..., 0]).shape
    _check_eager(reference)
    for name in ("scores", "boxes"):
        actual, expected = outputs[name], reference[name]
        if len(rows) != 2 or rows[0] != len(expected) or actual.shape != (*rows, expected.shape[2]):
            raise ParityError(
                f"{where} gives {name} {list(actual.shape)}, the reference {list(expected.shape)}", _DEFECT
            )
        if not np.isfinite(actual).all():
            raise ParityError(f"{where} gives NaN or infinite {name}", "Please report this with your config.")
    found = [differences(outputs, reference, image, where) for image in range(batch)]
    return GraphComparison(graph, engine.name, batch, height, width, *(max(column) for column in zip(*found)))  # noqa: B905


def differences(outputs: Outputs, reference: Outputs, image: int, where: str) -> tuple[float, float]:
    """Of scores and boxes of one image of the batch; see `GraphComparison`.

    Raises `ParityError` where the candidates are not as many as can be in the order of anchors.
    """
    ours, theirs = anchors_of(outputs, image), anchors_of(reference, image)
    there = ours[ours >= 0]
    if len(there) != min(len(ours), int((theirs >= 0).sum())) or (np.diff(there) <= 0).any():
        raise ParityError(f"{where} does not choose as many different anchors as there are, in their order", _DEFECT)
    here, same = matched(ours, theirs)
    scores, boxes = (
        np.abs(outputs[name][image, here].astype(np.float64) - reference[name][image, same]).max(initial=0)
        for name in ("scores", "boxes")
    )
    best, best_of_reference = (every["scores"][image].max(axis=1) for every in (outputs, reference))
    beyond = (
        _beyond(best_of_reference[np.isin(theirs, ours, invert=True)], best[ours >= 0]),
        _beyond(best[np.isin(ours, theirs, invert=True)], best_of_reference[theirs >= 0]),
    )
    return float(max(scores, *beyond)), float(boxes)


def _beyond(left_out: NDArray[np.float32], chosen: NDArray[np.float32]) -> float:
    """By how much the best anchor that was left out scores above the worst that was chosen."""
    return float(left_out.max() - chosen.min()) if len(left_out) else 0.0


def exceeds(found: GraphComparison, allowed: Tolerance) -> bool:
    return found.max_score_difference > allowed.score or found.max_box_difference_px > allowed.box_px


def check(comparisons: Sequence[GraphComparison], allowed: Tolerance = TOLERANCE) -> None:
    """Raise `ParityError` if any comparison exceeds what is allowed."""
    for found in comparisons:
        if exceeds(found, allowed):
            raise ParityError(
                f"the {found.graph} graph in {found.engine} differs from the reference at "
                f"{found.batch}x3x{found.height}x{found.width}: scores by {found.max_score_difference:.3g} "
                f"(allowed {allowed.score:.2g}), boxes by {found.max_box_difference_px:.3g} px "
                f"(allowed {allowed.box_px:.2g})",
                _DEFECT,
            )


def check_paddledetection(detector: Any, directory: Path, images: NDArray[np.float32], reference: Outputs) -> None:
    """Raise `ParityError` unless PaddleDetection's graph gives the detections of ppdet's own NMS on the reference.

    The images [N, 3, H, W] are taken to have been resized to half their size, so that a scale in the wrong place shows.
    """
    import paddle

    batch, _, height, width = images.shape
    half = np.full((batch, 2), 0.5, np.float32)
    with quiet():
        model = paddle.jit.load(str(directory / "model"))
    inputs = [np.full((batch, 2), (height, width), np.float32), images, half]
    actual, count = (output.numpy() for output in model(*(paddle.to_tensor(value) for value in inputs)))
    scores, boxes = reference["scores"], reference["boxes"]
    expected, expected_count, _ = detector.head.nms(
        paddle.to_tensor(boxes / 0.5), paddle.to_tensor(scores.transpose(0, 2, 1).copy())
    )
    expected = expected.numpy()
    same = np.array_equal(count, expected_count.numpy()) and actual.shape == expected.shape
    if same and len(actual):
        same = bool(
            np.abs(np.sort(actual[:, 1]) - np.sort(expected[:, 1])).max() <= TOLERANCE.score
            and np.abs(np.sort(actual[:, 2:], axis=0) - np.sort(expected[:, 2:], axis=0)).max() <= 2 * TOLERANCE.box_px
        )
    if not same:
        raise ParityError("PaddleDetection's graph and its eager NMS disagree", "Please report this with your config.")


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple
