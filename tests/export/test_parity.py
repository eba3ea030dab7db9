"""The comparison of graphs that choose candidates with all that the eager model gives."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
from numpy.typing import NDArray

from gfldeploy.engines.base import Engine, EngineOptions, Tensors
from gfldeploy.errors import ParityError
from gfldeploy.export.parity import GraphComparison, Outputs, compare, eager_outputs, parity_shapes
from gfldeploy.images.preprocess import Preprocess

CELLS, CLASSES, CHOSEN = 12, 3, 5
IMAGES = np.zeros((2, 3, 32, 32), np.float32)


class Gives(Engine):
    """An engine that gives these outputs."""

    name, version, options = "given", "1", EngineOptions()

    def __init__(self, outputs: Outputs) -> None:
        self.outputs = dict(outputs)

    def infer(self, inputs: Tensors) -> dict[str, NDArray[Any]]:
        return self.outputs


def everything() -> dict[str, NDArray[Any]]:
    random = np.random.default_rng(0)
    scores = random.permutation(2 * CELLS * CLASSES).reshape(2, CELLS, CLASSES) / (2 * CELLS * CLASSES)
    return {
        "scores": scores.astype(np.float32),
        "boxes": random.uniform(0, 32, (2, CELLS, 4)).astype(np.float32),
    }


def chosen(full: Outputs, count: int = CHOSEN) -> dict[str, NDArray[Any]]:
    """As a graph chooses, with rows for cells that are not there."""
    best = np.sort(np.argsort(-full["scores"].max(axis=2), axis=1)[:, :count], axis=1)
    missing = max(0, count - CELLS)
    found = {name: np.take_along_axis(full[name], best[..., np.newaxis], 1) for name in ("scores", "boxes")}
    found["anchors"] = best.astype(np.int32)
    fill = {"scores": 0, "boxes": 7, "anchors": -1}
    return {
        name: np.pad(value, [(0, 0), (0, missing), *[(0, 0)] * (value.ndim - 2)], constant_values=fill[name])
        for name, value in found.items()
    }


def compared(actual: Outputs, reference: Outputs) -> GraphComparison:
    return compare("onnx", cast(Engine, Gives(actual)), IMAGES, reference)


@pytest.mark.parametrize("count", [1, CHOSEN, CELLS, CELLS + 3])
def test_the_right_choice_differs_by_nothing(count: int) -> None:
    full = everything()
    found = compared(chosen(full, count), full)
    assert (found.max_score_difference, found.max_box_difference_px) == (0, 0)
    between = compared(chosen(full, count), chosen(full, count))
    assert (between.max_score_difference, between.max_box_difference_px) == (0, 0)


def test_differences_are_of_the_same_anchors() -> None:
    full = everything()
    actual = chosen(full)
    actual["scores"][1, 2, 0] += 0.25
    actual["boxes"][0, 3, 1] -= 2
    found = compared(actual, full)
    assert found.max_score_difference == pytest.approx(0.25)
    assert found.max_box_difference_px == pytest.approx(2)


def test_a_better_anchor_that_was_left_out_counts() -> None:
    full = everything()
    actual = chosen(full)
    # Instead of the best anchor of the second image, its worst.
    best = full["scores"][1].max(axis=1)
    rows = [*(row for row in range(CHOSEN) if actual["anchors"][1, row] != best.argmax())]
    anchors = np.sort([*actual["anchors"][1, rows], best.argmin()])
    actual["anchors"][1], actual["scores"][1], actual["boxes"][1] = (
        anchors,
        full["scores"][1, anchors],
        full["boxes"][1, anchors],
    )
    expected = pytest.approx(best.max() - best.min(), abs=1e-6)
    assert compared(actual, full).max_score_difference == expected
    assert compared(actual, chosen(full)).max_score_difference == expected
    assert compared(chosen(full), actual).max_score_difference == expected


@pytest.mark.parametrize("anchors", [[1, 0, 2, 3, 4], [0, 1, 1, 2, 3], [0, 1, 2, 3, -1]])
def test_anchors_out_of_order_twice_or_missing_are_refused(anchors: list[int]) -> None:
    full = everything()
    actual = chosen(full)
    actual["anchors"][0] = anchors
    with pytest.raises(ParityError, match="does not choose as many different anchors"):
        compared(actual, full)


def test_other_shapes_are_refused() -> None:
    full = everything()
    actual = chosen(full)
    actual["boxes"] = actual["boxes"][:, 1:]
    with pytest.raises(ParityError, match=r"boxes \[2, 4, 4\]"):
        compared(actual, full)
    with pytest.raises(ParityError, match=r"scores \[2, 11, 3\], the reference \[2, 12, 3\]"):
        compared({name: value[:, 1:] for name, value in full.items()}, full)


@pytest.mark.parametrize(
    ("target", "largest"),
    [((320, 320), (800, 1344)), ((800, 1333), (800, 1344)), ((1536, 2560), (1536, 2560)), ((8192, 8192), (2016, 2016))],
)
def test_what_is_compared_is_the_readers_largest_picture_within_reason(
    target: tuple[int, int], largest: tuple[int, int]
) -> None:
    shapes = parity_shapes(Preprocess(target, pad_stride=32), (None, None, None))
    assert shapes[-1] == (1, *largest)
    assert all(height % 32 == width % 32 == 0 for _, height, width in shapes)
    assert parity_shapes(Preprocess(target, pad_stride=32), (None, 8192, 8192))[-1] == (3, 8192, 8192)


def test_a_checkpoint_that_gives_nan_is_told_before_anything_is_written() -> None:
    paddle = pytest.importorskip("paddle")
    full = {name: paddle.to_tensor(values) for name, values in everything().items()}
    broken = [full["scores"]], [full["boxes"] * float("nan")]
    same = dict.fromkeys(("backbone", "neck"), lambda given: given)
    with pytest.raises(ParityError, match=r"gives NaN or infinite boxes\. Check the checkpoint"):
        eager_outputs(SimpleNamespace(**same, head=lambda given: broken), IMAGES)
