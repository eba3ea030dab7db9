"""Which anchors a graph decoded: graphs that choose are compared anchor by anchor, not row by row."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["DEFAULT_CANDIDATES", "MOST_CANDIDATES", "anchors_of", "matched"]

# As many as PaddleDetection's NMS takes of each class (its nms_top_k). Detections with a score above that of the worst
# candidate are those of the whole graph, and an image keeps 100: see export/README.md for what that does to mAP.
DEFAULT_CANDIDATES = 1000
# TensorRT's TopK gives fewer than 3840.
MOST_CANDIDATES = 3839


def anchors_of(outputs: Mapping[str, NDArray[Any]], image: int) -> NDArray[np.int64]:
    """The anchor of each candidate [K] of an image of the batch, -1 where there is none; of a graph that does not
    choose, all of them."""
    if "anchors" not in outputs:
        return np.arange(outputs["scores"].shape[1])
    anchors: NDArray[np.int64] = outputs["anchors"][image].astype(np.int64)
    return anchors


def matched(one: NDArray[np.int64], other: NDArray[np.int64]) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    """The candidates of `one` that `other` has too, and which of `other` these are, in rising order of anchors.

    Both: anchors [K], each at most once, -1 for none.
    """
    found, here, there = np.intersect1d(one, other, return_indices=True)
    return here[found >= 0], there[found >= 0]
