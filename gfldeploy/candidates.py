"""Which anchors of an image a graph decodes, what NMS can lose by that, and which ones a graph decoded.

NMS goes through the pairs of an anchor and a class by falling score, so that better pairs alone drop or keep a pair.
If a graph leaves out the anchors whose best class scores lowest, all detections that score more than the worst
candidate are therefore exactly those of all anchors; those that may be missing or differ score less. Nothing is lost

- if no anchor was left out, or the worst candidate scores no more than `score_threshold`;
- if `keep_top_k` detections score more than the worst candidate, since no others leave NMS;
- with a single class and at least `nms_top_k` candidates, since no others enter NMS.

What a user has turned changes nothing of that: of classes that are not kept no pair is in NMS, and the worst candidate
is still that of all classes, by which the graph chose. With thresholds for single classes, `keep_top_k` of those that
are shown have to score more.

The last holds for every image; with more classes a class can have all of its best anchors among those left out. The
others depend on the image, and `may_lack_below` tells afterwards.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gfldeploy.detections import Detections
from gfldeploy.nms import NmsParams, counts_of, postprocess

# As many as PaddleDetection's NMS takes of each class (its usual nms_top_k), and ten for each of the 100 detections
# that an image usually keeps: see export/README.md for what that does to mAP.
DEFAULT_CANDIDATES = 1000
_FOR_EACH_KEPT = 10
# TensorRT's TopK gives fewer than 3840.
MOST_CANDIDATES = 3839


def default_candidates(nms: NmsParams, channels: int) -> int | None:
    """How many anchors of an image a graph with so many score channels should decode; None for all.

    1000 if the config keeps up to 100 detections; with one class, no fewer than enter NMS. Otherwise all: several
    hundred detections can need more candidates than TensorRT's TopK gives, and decoding all anchors takes little time
    beside the network.
    """
    if channels == 1 and 0 < nms.nms_top_k <= MOST_CANDIDATES:
        return max(DEFAULT_CANDIDATES, nms.nms_top_k)
    if nms.keep_top_k == -1 or _FOR_EACH_KEPT * nms.keep_top_k > DEFAULT_CANDIDATES:
        return None
    return DEFAULT_CANDIDATES


def may_lack_below(scores: NDArray[np.float32], found: Detections, nms: NmsParams) -> float:
    """The score below which detections may be missing or differ because of anchors left out; 0.0 if none are.

    `scores`: [K, C] of the candidates of one image; `found`: what NMS made of all of them.
    """
    # Transposed first: NumPy takes longer to go through the few channels of each candidate.
    worst = float(scores.T.copy().max(axis=0).min()) if scores.size else 0.0
    if worst <= nms.score_threshold or (scores.shape[1] == 1 and 0 < nms.nms_top_k <= len(scores)):
        return 0.0
    counted = found.scores[counts_of(found.scores, found.classes, nms)]
    filled = 0 < nms.keep_top_k <= len(counted) and float(counted[nms.keep_top_k - 1]) > worst
    return 0.0 if filled else worst


def suffice(candidates: int, outputs: Iterable[Mapping[str, NDArray[Any]]], nms: NmsParams) -> bool:
    """Whether so many candidates of each image certainly lose nothing of these outputs of all anchors.

    `outputs`: "scores" [N, A, C] and "boxes" [N, A, 4]; images with NaN or infinite numbers are passed over.
    """
    for batch in outputs:
        for scores, boxes in zip(batch["scores"], batch["boxes"], strict=True):
            if len(scores) <= candidates or not (np.isfinite(scores).all() and np.isfinite(boxes).all()):
                continue
            chosen = np.sort(np.argpartition(scores.max(axis=1), -candidates)[-candidates:])
            (found,) = postprocess(scores[np.newaxis, chosen], boxes[np.newaxis, chosen], [(1.0, 1.0)], nms)
            if may_lack_below(scores[chosen], found, nms):
                return False
    return True


def anchors_of(outputs: Mapping[str, NDArray[Any]], image: int) -> NDArray[np.int64]:
    """The anchor of each candidate [K] of an image of the batch, -1 for none; all, if the graph does not choose."""
    if "anchors" not in outputs:
        return np.arange(outputs["scores"].shape[1])
    anchors: NDArray[np.int64] = outputs["anchors"][image].astype(np.int64)
    return anchors


def matched(one: NDArray[np.int64], other: NDArray[np.int64]) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    """The places in `one` and in `other` of the candidates that both have, in rising order of anchors.

    Both: anchors [K], each at most once, -1 for none.
    """
    found, here, there = np.intersect1d(one, other, return_indices=True)
    return here[found >= 0], there[found >= 0]
