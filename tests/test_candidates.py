"""How many candidates lose nothing, which of them two graphs share, and what INT8 is charged for one not chosen."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from numpy.typing import NDArray

from gfldeploy.candidates import anchors_of, default_candidates, matched, may_lack_below, suffice
from gfldeploy.detections import Detections
from gfldeploy.nms import NmsParams, UserNms, postprocess
from gfldeploy.quant.agreement import Reference, agreement
from gfldeploy.quant.sensitivity import output_difference

NMS = NmsParams(score_threshold=0.05, nms_threshold=0.6, nms_top_k=100, keep_top_k=100)


def outputs(anchors: list[int]) -> dict[str, NDArray[np.generic]]:
    """Anchor `a` scores (a + 1) / 10 in class 0, at a place of its own."""
    rows = np.array([[max(anchor, -1) + 1] for anchor in anchors], np.float32)
    return {
        "scores": np.concatenate([rows / 10, rows * 0], axis=1)[np.newaxis],
        "boxes": (rows * 20 + np.array([0, 0, 10, 10], np.float32))[np.newaxis],
        "anchors": np.array([anchors], np.int32),
    }


def test_the_anchors_that_both_have() -> None:
    here, there = matched(np.array([0, 2, 5, -1, -1], np.int64), np.array([2, 4, 5, 7, -1], np.int64))
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


@pytest.mark.parametrize(
    ("keep_top_k", "nms_top_k", "channels", "wanted"),
    [
        (100, 1000, 80, 1000),
        (100, -1, 80, 1000),
        (1, 5000, 80, 1000),
        (101, 1000, 80, None),
        (500, 5000, 3, None),
        (-1, 1000, 80, None),
        (-1, 1000, 1, 1000),  # no more enter NMS of one class
        (500, 3000, 1, 3000),
        (500, 3840, 1, None),  # more than the graph can choose
        (100, 3840, 1, 1000),
        (-1, -1, 1, None),
    ],
)
def test_how_many_are_chosen_by_default(keep_top_k: int, nms_top_k: int, channels: int, wanted: int | None) -> None:
    params = dataclasses.replace(NMS, keep_top_k=keep_top_k, nms_top_k=nms_top_k)
    assert default_candidates(params, channels) == wanted


def turned(own: NmsParams, channels: int, rng: np.random.Generator) -> NmsParams:
    """As users may have: some classes alone, NMS across classes, thresholds of single classes."""
    kept = np.sort(rng.choice(channels, rng.integers(1, channels + 1), replace=False)).tolist()
    lowest = [float(rng.choice([0.1, 0.3, 0.6])) if one in kept else np.inf for one in range(channels)]
    by_class = tuple(lowest) if rng.integers(2) else ()
    return UserNms(**dataclasses.asdict(own), kept=tuple(kept), class_agnostic=bool(rng.integers(2)), lowest=by_class)


@pytest.mark.parametrize(("channels", "by_users"), [(1, False), (4, False), (1, True), (4, True)])
def test_what_is_said_to_be_lost_is_all_that_can_be(channels: int, by_users: bool) -> None:
    # Boxes in clusters, so that NMS drops most; of 400 anchors 20 to 200 are decoded.
    rng = np.random.default_rng(channels)
    seen = {"nothing": 0, "something": 0}
    for _ in range(200):
        anchors, count = 400, int(rng.integers(20, 200))
        scores = (rng.uniform(0, 1, (anchors, channels)) ** 4).astype(np.float32)
        corners = rng.integers(0, 12, (anchors, 2)) * 20 + rng.uniform(-4, 4, (anchors, 2))
        boxes = np.concatenate([corners, corners + 30], 1).astype(np.float32)
        params = NmsParams(
            score_threshold=float(rng.choice([0.0, 0.1, 0.5])),
            nms_threshold=float(rng.choice([0.3, 0.6])),
            nms_top_k=int(rng.choice([-1, 10, 50])),
            keep_top_k=int(rng.choice([-1, 5, 50])),
            normalized=bool(rng.integers(2)),
            nms_eta=float(rng.choice([1.0, 0.9])),
        )
        if by_users:
            params = turned(params, channels, rng)
        chosen = np.sort(np.argsort(-scores.max(axis=1))[:count])
        [every] = postprocess(scores[np.newaxis], boxes[np.newaxis], [(1.0, 1.0)], params)
        [found] = postprocess(scores[np.newaxis, chosen], boxes[np.newaxis, chosen], [(1.0, 1.0)], params)
        least = may_lack_below(scores[chosen], found, params)
        assert suffice(count, [{"scores": scores[np.newaxis], "boxes": boxes[np.newaxis]}], params) == (least == 0)
        seen["something" if least else "nothing"] += 1
        for ours, theirs in zip(above(found, least), above(every, least), strict=True):
            np.testing.assert_array_equal(ours, theirs)
    assert min(seen.values()) >= 20


def above(found: Detections, score: float) -> tuple[NDArray[np.generic], ...]:
    rows = found.scores > score
    return found.boxes[rows], found.scores[rows], found.classes[rows]


def test_what_is_not_there_cannot_be_lost() -> None:
    nothing = Detections(np.zeros((0, 4), np.float32), np.zeros(0, np.float32), np.zeros(0, np.int64))
    scores = np.array([[0.9, 0.1], [0.8, 0.3], [0.0, 0.0]], np.float32)
    assert may_lack_below(scores, nothing, NMS) == 0  # the last: the image has fewer anchors than the graph chooses
    assert may_lack_below(scores[:2], nothing, NMS) == np.float32(0.8)
    assert may_lack_below(scores[:0], nothing, NMS) == 0
