"""The same image alone and in a batch."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest

from gfldeploy.analysis.invariance import difference
from gfldeploy.detections import Detections


def detections(*found: tuple[Sequence[float], float, int]) -> Detections:
    boxes, scores, classes = zip(*found, strict=True) if found else ((), (), ())
    return Detections(
        np.array(boxes, np.float32).reshape(-1, 4), np.array(scores, np.float32), np.array(classes, np.int64)
    )


CAT, DOG = ([0, 0, 10, 10], 0.9, 0), ([20, 20, 40, 40], 0.6, 1)


def test_the_same() -> None:
    assert difference(detections(CAT, DOG), detections(DOG, CAT)) == (2, 0, 0.0, 0.0)


def test_scores_and_boxes() -> None:
    count, lost, score, box = difference(detections(CAT, DOG), detections(([0, 0, 10, 12], 0.8, 0), DOG))
    assert (count, lost) == (2, 0)
    assert score == pytest.approx(0.1) and box == 2


def test_lost_elsewhere_or_of_another_class() -> None:
    assert difference(detections(CAT), detections(([50, 50, 60, 60], 0.9, 0)))[:2] == (1, 1)
    assert difference(detections(CAT), detections(([0, 0, 10, 10], 0.9, 1)))[:2] == (1, 1)
    assert difference(detections(CAT), detections())[:2] == (1, 1)


def test_what_nobody_draws_does_not_count() -> None:
    assert difference(detections(([0, 0, 10, 10], 0.39, 0)), detections()) == (0, 0, 0.0, 0.0)
