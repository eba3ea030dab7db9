"""Boxes on pictures."""

from __future__ import annotations

import numpy as np
import pytest

from gfldeploy.predict.draw import colour, draw_boxes


def box(x: float, y: float, width: float, height: float, score: float = 0.9, category: int = 0) -> dict[str, object]:
    return {"class": "box", "class_id": category, "score": score, "bbox": [x, y, width, height]}


def test_the_box_is_where_it_should_be() -> None:
    picture = np.full((200, 300, 3), 90, np.uint8)
    drawn = draw_boxes(picture, [box(50, 60, 100, 80)])
    assert (picture == 90).all(), "the image is left alone"
    for place in ((100, 50), (100, 150), (60, 100), (140, 100)):
        assert tuple(drawn[place]) == colour(0), place
    assert (drawn[70:130, 60:140] == 90).all()
    assert (drawn[45:59, 50:100] != 90).any(), "a label above it"


def test_scores_below_the_threshold_are_left_out() -> None:
    picture = np.zeros((100, 100, 3), np.uint8)
    assert not draw_boxes(picture, [box(10, 20, 50, 50, score=0.3)], 0.4).any()
    assert draw_boxes(picture, [box(10, 20, 50, 50, score=0.4)], 0.4).any()


@pytest.mark.parametrize(
    "detection",
    [box(-20, -20, 50, 50), box(80, 90, 500, 500), box(10, 10, 0, 0), box(10, 10, -5, 3), box(500, 500, 5, 5)],
)
def test_boxes_beyond_the_image_do_no_harm(detection: dict[str, object]) -> None:
    for shape in ((100, 100, 3), (1, 1, 3)):
        drawn = draw_boxes(np.zeros(shape, np.uint8), [detection])
        assert drawn.shape == shape and drawn.dtype == np.uint8


def test_neighbouring_classes_look_different() -> None:
    colours = np.array([colour(category) for category in range(80)])
    assert len(np.unique(colours, axis=0)) == 80
    assert np.abs(np.diff(colours, axis=0)).sum(axis=1).min() > 100
