"""Merging the detections of an image's tiles, against the rule written out pair by pair."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from gfldeploy.detections import Detections, NmsParams, merge_tiles


def brute_force(parts: list[Detections], cut: list[NDArray[np.bool_]], params: NmsParams) -> list[tuple[float, ...]]:
    """Box by box and pair by pair: (class, score, x1, y1, x2, y2) of what is left, best first."""
    extra = np.float32(0 if params.normalized else 1)
    every = [
        (-float(score), int(category), part, place, *box, bool(is_cut))
        for part, (one, mask) in enumerate(zip(parts, cut, strict=True))
        for place, (box, score, category, is_cut) in enumerate(
            zip(one.boxes, one.scores, one.classes, mask, strict=True)
        )
    ]
    every.sort(key=lambda row: row[:4])
    kept: list[tuple[Any, ...]] = []
    limits: dict[int, np.float32] = {}
    for row in every:
        limit = limits.get(row[1], np.float32(params.nms_threshold))
        if all(other[1] != row[1] or iou(row, other, extra) <= limit for other in kept):
            kept.append(row)
            limits[row[1]] = limit * np.float32(params.nms_eta) if limit > np.float32(0.5) else limit
    left = [row for row in kept if not row[-1]]
    whole = list(left)
    for row in kept:
        by_whole = (
            common(row, other, extra) > area(row, extra) / 2 and other[0] <= row[0] * (0.5 if other[1] == row[1] else 1)
            for other in whole
        )
        by_part = (
            other[-1]
            and other[1] == row[1]
            and common(row, other, extra) > min(area(row, extra), area(other, extra)) / 2
            for other in left
        )
        if row[-1] and not any(by_whole) and not any(by_part):
            left.append(row)
    left.sort(key=lambda row: row[:4])
    return [(row[1], -row[0], *map(float, row[4:8])) for row in left]


def area(one: tuple[Any, ...], extra: np.float32) -> np.float32:
    x1, y1, x2, y2 = one[4:8]
    return np.float32((x2 - x1 + extra) * (y2 - y1 + extra))


def common(one: tuple[Any, ...], other: tuple[Any, ...], extra: np.float32) -> np.float32:
    """The area that two boxes share."""
    (ax1, ay1, ax2, ay2), (bx1, by1, bx2, by2) = one[4:8], other[4:8]
    if ax1 > bx2 or bx1 > ax2 or ay1 > by2 or by1 > ay2:
        return np.float32(0)
    return np.float32((min(ax2, bx2) - max(ax1, bx1) + extra) * (min(ay2, by2) - max(ay1, by1) + extra))


def iou(one: tuple[Any, ...], other: tuple[Any, ...], extra: np.float32) -> np.float32:
    shared = common(one, other, extra)
    return shared / (area(one, extra) + area(other, extra) - shared)


@pytest.mark.parametrize("eta", [1.0, 0.8])
@pytest.mark.parametrize("normalized", [True, False])
@pytest.mark.parametrize("pairs_at_once", [7, 1 << 20])
def test_what_is_left_is_what_the_rule_says(
    eta: float, normalized: bool, pairs_at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gfldeploy.detections._PAIRS", pairs_at_once)
    random = np.random.default_rng(24)
    params = NmsParams(0.05, 0.6, 100, 5, normalized, eta)
    for counts in ([0, 0], [1, 0], [40, 60, 20], [90, 1, 30]):
        parts, cut = [], []
        for count in counts:
            corner = random.uniform(0, 80, (count, 2))
            boxes = np.concatenate([corner, corner + random.choice([3, 10, 40], (count, 1))], 1).round(0)
            scores = random.uniform(0.05, 1, count).round(1)  # equal ones too
            order = np.argsort(-scores, kind="stable")
            classes = random.integers(0, 3, count)
            parts.append(Detections(boxes.astype(np.float32)[order], scores.astype(np.float32)[order], classes))
            cut.append(random.random(count) < 0.4)
        found = merge_tiles(parts, cut, params)
        rows = zip(found.classes.tolist(), found.scores.tolist(), found.boxes.tolist(), strict=True)
        assert [(category, score, *box) for category, score, box in rows] == brute_force(parts, cut, params)
        assert sum(counts) < 10 or 10 < len(found) < sum(counts) - 10  # `keep_top_k` is no limit, and some go
