"""Which candidates two graphs share, and what INT8 is charged for one that it does not choose."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from gfldeploy.candidates import anchors_of, matched
from gfldeploy.detections import NmsParams
from gfldeploy.quant.agreement import Reference, agreement
from gfldeploy.quant.sensitivity import output_difference

NMS = NmsParams(score_threshold=0.05, nms_threshold=0.6, nms_top_k=100, keep_top_k=100)


def outputs(anchors: list[int]) -> dict[str, NDArray[np.generic]]:
    """Anchor `a` scores (a + 1) / 10 in class 0, at a place of its own."""
    rows = np.float32([[max(anchor, -1) + 1] for anchor in anchors])
    return {
        "scores": np.concatenate([rows / 10, rows * 0], axis=1)[np.newaxis],
        "boxes": (rows * 20 + np.float32([0, 0, 10, 10]))[np.newaxis],
        "anchors": np.int32([anchors]),
    }


def test_the_anchors_that_both_have() -> None:
    here, there = matched(np.int64([0, 2, 5, -1, -1]), np.int64([2, 4, 5, 7, -1]))
    assert (here.tolist(), there.tolist()) == ([1, 2], [0, 2])


def test_a_graph_that_does_not_choose_has_them_all() -> None:
    every = {"scores": np.zeros((2, 3, 1), np.float32)}
    assert anchors_of(every, 1).tolist() == [0, 1, 2]


def test_what_both_chose_is_compared_wherever_it_stands() -> None:
    reference = Reference.of(outputs([1, 3, 5, -1]), NMS)
    found = agreement([reference], [outputs([3, 5, 6, 8])], NMS)
    assert (found.score_difference, found.score_difference_max) == (0, 0)
    assert (found.detections, found.detections_found) == (2, 1)
    nothing = agreement([reference], [outputs([0, 2, 4, 6])], NMS)
    assert (nothing.score_difference, nothing.detections_found) == (1, 0)


def test_a_candidate_that_was_not_chosen_has_lost_its_score_and_its_box() -> None:
    reference = Reference.of(outputs([1, 3, 5, -1]), NMS)
    assert output_difference(reference, outputs([1, 2, 3, 5])) == (0, 0)
    scores, boxes = output_difference(reference, outputs([1, 2, 5, 6]))
    assert scores == pytest.approx(0.4 / 3)
    assert boxes == pytest.approx(1 / 3)
