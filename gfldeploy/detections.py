"""From a network's candidates to detections: the one NMS that every engine shares."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gfldeploy.errors import ConfigError, EngineError

__all__ = ["Detections", "NmsParams", "pairwise_iou", "postprocess"]

_BLOCK = 64  # candidates compared at once: large enough for NumPy to pay, small enough for their square to stay cheap


@dataclass(frozen=True)
class NmsParams:
    """The arguments of PaddleDetection's `MultiClassNMS`, by the same names.

    `score_threshold`: candidates must score above it. `nms_threshold`: a box is dropped when its IoU with a better one
    of its class is above it. `nms_top_k`: so many best candidates of each class enter; -1 = all. `keep_top_k`: so many
    best boxes of the image leave; -1 = all. `normalized`: False counts a box's last pixel, adding 1 to widths and
    heights. `nms_eta`: below 1, the threshold is multiplied by it after every kept box while it is above 0.5.

    Raises `ConfigError` for values that cannot work.
    """

    score_threshold: float
    nms_threshold: float
    nms_top_k: int
    keep_top_k: int
    normalized: bool = True
    nms_eta: float = 1.0

    def __post_init__(self) -> None:
        for name in ("score_threshold", "nms_threshold", "nms_eta"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:
                raise ConfigError(f"the NMS's {name} is {value!r}", "Give a number from 0 to 1.")
        if self.nms_eta == 0:
            raise ConfigError("the NMS's nms_eta is 0", "Give a number above 0; 1 leaves the threshold as it is.")
        for name in ("nms_top_k", "keep_top_k"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or (value != -1 and value < 1):
                raise ConfigError(f"the NMS's {name} is {value!r}", "Give a whole number above 0, or -1 for all.")
        if not isinstance(self.normalized, bool):
            raise ConfigError(f"the NMS's normalized is {self.normalized!r}", "Set it to true or false.")

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> NmsParams:
        """The inverse of `to_dict`. Raises `ConfigError` for unknown or missing keys and unusable values."""
        known = [field.name for field in fields(cls)]
        if unknown := sorted(str(key) for key in data if key not in known):
            raise ConfigError(f"unknown NMS keys: {', '.join(unknown)}", f"Known: {', '.join(known)}.")
        required = ("score_threshold", "nms_threshold", "nms_top_k", "keep_top_k")
        if missing := [key for key in required if key not in data]:
            raise ConfigError(f"the NMS lacks {', '.join(missing)}", "Give all of them.")
        return cls(**data)

    def to_dict(self) -> dict[str, Any]:
        """Every field, ready for JSON."""
        return asdict(self)


@dataclass(frozen=True)
class Detections:
    """What was found in one image, best first.

    `boxes`: float32 [K, 4], x1, y1, x2, y2 in original image pixels; `scores`: float32 [K]; `classes`: int64 [K],
    indices into the model's score channels.
    """

    boxes: NDArray[np.float32]
    scores: NDArray[np.float32]
    classes: NDArray[np.int64]

    def __post_init__(self) -> None:
        count = len(self.scores)
        if self.boxes.shape != (count, 4) or self.scores.shape != (count,) or self.classes.shape != (count,):
            raise ValueError(
                "boxes, scores and classes must be [K, 4], [K] and [K], not "
                f"{list(self.boxes.shape)}, {list(self.scores.shape)} and {list(self.classes.shape)}"
            )

    def __len__(self) -> int:
        return len(self.scores)


def postprocess(
    scores: NDArray[np.float32],
    boxes: NDArray[np.float32],
    scales: Sequence[tuple[float, float]],
    params: NmsParams,
) -> list[Detections]:
    """Turn candidates into detections: one `Detections` for each image of the batch.

    `scores`: [N, A, C]; `boxes`: [N, A, 4], x1, y1, x2, y2 in network-input pixels; `scales`: for each image (y, x), by
    which it was resized. Boxes are divided by the scale first, then each class goes through a greedy NMS: what
    PaddleDetection's heads and Paddle's `multiclass_nms3` do (`background_label=-1`), in float32 as they do. Equal
    scores keep the order of classes, then of candidates. Only the order of the result differs: by score, not by class.

    Raises `EngineError` for NaN or infinite values and for shapes that do not fit together.
    """
    scores = np.asarray(scores, dtype=np.float32)
    boxes = np.asarray(boxes, dtype=np.float32)
    if scores.ndim != 3 or boxes.shape != (*scores.shape[:2], 4):
        raise EngineError(
            f"the engine returned scores of shape {list(scores.shape)} and boxes of shape {list(boxes.shape)}",
            "They must be [N, A, C] and [N, A, 4]: export the model again.",
        )
    if len(scales) != len(scores):
        raise ValueError(f"{len(scores)} images need as many scales, not {len(scales)}")
    if not all(math.isfinite(factor) and factor > 0 for scale in scales for factor in scale):
        raise ValueError("scales must be positive")
    for name, values in (("scores", scores), ("boxes", boxes)):
        # A NaN comes through min and max, which are several times as fast as isfinite over all the values.
        if values.size and not (np.isfinite(values.min()) and np.isfinite(values.max())):
            raise EngineError(
                f"the engine returned NaN or infinite {name}",
                "The model or its precision is unusable: check its parity.",
            )
    return [
        _image_nms(image_scores, image_boxes, scale, params)
        for image_scores, image_boxes, scale in zip(scores, boxes, scales, strict=True)
    ]


def _image_nms(
    scores: NDArray[np.float32], boxes: NDArray[np.float32], scale: tuple[float, float], params: NmsParams
) -> Detections:
    """NMS over one image: `scores` [A, C], `boxes` [A, 4]."""
    flat = np.flatnonzero(scores > np.float32(params.score_threshold))
    anchors, classes = np.divmod(flat, max(scores.shape[1], 1))
    candidate_scores = scores.reshape(-1)[flat]
    # By class, then by falling score; the sort is stable, so equal scores stay in the candidates' order.
    order = np.lexsort((-candidate_scores, classes))
    if params.nms_top_k != -1:
        sorted_classes = classes[order]
        starts = np.searchsorted(sorted_classes, sorted_classes, side="left")
        order = order[np.arange(len(order)) - starts < params.nms_top_k]
    classes, candidate_scores = classes[order], candidate_scores[order]
    scale_y, scale_x = scale
    candidate_boxes = boxes[anchors[order]] / np.array([scale_x, scale_y, scale_x, scale_y], dtype=np.float32)
    kept = _greedy(candidate_boxes, classes, params)
    kept = kept[np.argsort(-candidate_scores[kept], kind="stable")]
    if params.keep_top_k != -1:
        kept = kept[: params.keep_top_k]
    return Detections(candidate_boxes[kept], candidate_scores[kept], classes[kept].astype(np.int64))


def _greedy(boxes: NDArray[np.float32], classes: NDArray[np.intp], params: NmsParams) -> NDArray[np.intp]:
    """Indices of the boxes that survive, in order; the input is sorted by class, then by falling score.

    A box survives when its IoU with every surviving, earlier box of its class is at most the threshold. It goes block
    by block: each block is compared with the survivors of its first class (later classes have none yet), then with
    itself.
    """
    kept: list[int] = []
    current, first = -1, 0  # the class at hand, and where its survivors start in `kept`
    limit = threshold = np.float32(params.nms_threshold)
    eta = np.float32(params.nms_eta)
    half = np.float32(0.5)
    for start in range(0, len(boxes), _BLOCK):
        block = boxes[start : start + _BLOCK]
        block_classes = classes[start : start + _BLOCK]
        among = np.where(
            block_classes[:, np.newaxis] == block_classes, pairwise_iou(block, block, params.normalized), 0
        )
        worst = np.zeros(len(block), dtype=np.float32)  # the largest IoU with a survivor so far
        if block_classes[0] == current and first < len(kept):
            before = pairwise_iou(boxes[kept[first:]], block, params.normalized).max(axis=0)
            worst = np.where(block_classes == current, before, worst)
        for offset, category in enumerate(block_classes.tolist()):
            if category != current:
                current, first, limit = category, len(kept), threshold
            # Not `worst > limit`: a NaN, the IoU of two equal boxes without area, drops the box, as in Paddle.
            if worst[offset] <= limit:
                kept.append(start + offset)
                np.maximum(worst, among[offset], out=worst)
                if eta < 1 and limit > half:
                    limit = limit * eta
    return np.array(kept, dtype=np.intp)


def pairwise_iou(one: NDArray[np.float32], other: NDArray[np.float32], normalized: bool = True) -> NDArray[np.float32]:
    """Pairwise IoU [M, K] of boxes [M, 4] and [K, 4], with Paddle's rules for odd boxes.

    A box with x2 < x1 or y2 < y1 has no area; boxes that merely touch intersect; 0 / 0 is NaN. With `normalized` False,
    widths and heights gain 1, but whether two boxes intersect is decided without it.
    """
    extra = np.float32(0 if normalized else 1)
    x1, y1, x2, y2 = (one[:, [index]] for index in range(4))
    other_x1, other_y1, other_x2, other_y2 = other.T
    with np.errstate(all="ignore"):
        width = np.minimum(x2, other_x2) - np.maximum(x1, other_x1)
        height = np.minimum(y2, other_y2) - np.maximum(y1, other_y1)
        overlap = (width + extra) * (height + extra)
        iou = overlap / (_area(one, extra)[:, np.newaxis] + _area(other, extra) - overlap)
    apart = (other_x1 > x2) | (other_x2 < x1) | (other_y1 > y2) | (other_y2 < y1)
    result: NDArray[np.float32] = np.where(apart, np.float32(0), iou)
    return result


def _area(boxes: NDArray[np.float32], extra: np.float32) -> NDArray[np.float32]:
    width = boxes[:, 2] - boxes[:, 0]
    height = boxes[:, 3] - boxes[:, 1]
    area: NDArray[np.float32] = np.where((width < 0) | (height < 0), np.float32(0), (width + extra) * (height + extra))
    return area
