"""NMS: by hand on small cases, against Paddle's own operator on many."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence

import numpy as np
import pytest

from gfldeploy.detections import Detections
from gfldeploy.errors import ConfigError, DataError, EngineError
from gfldeploy.nms import NmsParams, postprocess
from gfldeploy.serialization import build, plain

GFL = NmsParams(score_threshold=0.025, nms_threshold=0.6, nms_top_k=1000, keep_top_k=100)
ONE = [(1.0, 1.0)]


def run(scores: Sequence[Sequence[float]], boxes: Sequence[Sequence[float]], params: NmsParams = GFL) -> Detections:
    """One image: scores [A][C], boxes [A][4]."""
    [found] = postprocess(np.array([scores], np.float32), np.array([boxes], np.float32), ONE, params)
    return found


def test_an_overlapping_worse_box_is_dropped_within_its_class_only() -> None:
    # The IoU of the first two is 80 / 120 = 0.667; the third lies apart.
    boxes = [[0.0, 0.0, 10.0, 10.0], [2.0, 0.0, 12.0, 10.0], [50.0, 50.0, 60.0, 60.0]]
    same = run([[0.9], [0.8], [0.5]], boxes)
    np.testing.assert_array_equal(same.boxes, [boxes[0], boxes[2]])
    np.testing.assert_array_equal(same.scores, np.array([0.9, 0.5], np.float32))
    other = run([[0.9, 0], [0, 0.8], [0.5, 0]], boxes)
    assert other.classes.tolist() == [0, 1, 0]
    assert [other.boxes.dtype, other.scores.dtype, other.classes.dtype] == ["float32", "float32", "int64"]


def test_a_dropped_box_drops_nothing() -> None:
    # The IoU of neighbours is 0.667, of the first and third 0.43: the second is gone before it could drop the third.
    found = run([[0.9], [0.8], [0.7]], [[0.0, 0, 10, 10], [2, 0, 12, 10], [4, 0, 14, 10]])
    assert found.scores.tolist() == pytest.approx([0.9, 0.7])


def test_many_candidates_of_few_objects() -> None:
    # 400 candidates of two objects in turn, in two classes: the best of each object and class is left, and no other.
    boxes = [[0.0, 0.0, 10.0, 10.0], [50.0, 50.0, 90.0, 80.0]] * 200
    scores = [[0.99 - 0.002 * number, 0.1 + 0.002 * number] for number in range(400)]
    found = run(scores, boxes)
    assert found.scores.tolist() == pytest.approx([0.99, 0.988, 0.898, 0.896])
    assert found.classes.tolist() == [0, 0, 1, 1]
    assert found.boxes.tolist() == [boxes[0], boxes[1], boxes[1], boxes[0]]


@pytest.mark.parametrize(("threshold", "left"), [(0.5, 2), (0.49, 1)])
def test_an_iou_equal_to_the_threshold_is_kept(threshold: float, left: int) -> None:
    params = dataclasses.replace(GFL, nms_threshold=threshold)
    assert len(run([[0.9], [0.8]], [[0.0, 0, 4, 4], [0, 0, 4, 2]], params)) == left  # IoU 8 / 16


def test_scores_must_exceed_the_threshold() -> None:
    params = dataclasses.replace(GFL, score_threshold=0.5)
    found = run([[0.5], [0.50001]], [[0.0, 0, 1, 1], [5, 5, 6, 6]], params)
    assert found.boxes.tolist() == [[5, 5, 6, 6]]


def test_top_k_before_and_after() -> None:
    boxes = [[10.0 * number, 0, 10 * number + 5, 5] for number in range(5)]
    scores = [[0.5, 0.1], [0.6, 0.2], [0.7, 0.3], [0.8, 0.4], [0.9, 0.45]]
    before = run(scores, boxes, dataclasses.replace(GFL, nms_top_k=2))
    assert before.scores.tolist() == pytest.approx([0.9, 0.8, 0.45, 0.4])
    after = run(scores, boxes, dataclasses.replace(GFL, keep_top_k=3))
    assert after.scores.tolist() == pytest.approx([0.9, 0.8, 0.7])
    assert len(run(scores, boxes, dataclasses.replace(GFL, nms_top_k=-1, keep_top_k=-1))) == 10


def test_pixels_counted_in_full() -> None:
    # Without normalisation the widths are 10 and 5 rather than 9 and 4: IoU 50 / 100 rather than 36 / 81 = 0.44.
    boxes = [[0.0, 0.0, 9.0, 9.0], [0.0, 0.0, 9.0, 4.0]]
    at = dataclasses.replace(GFL, nms_threshold=0.47)
    assert len(run([[0.9], [0.8]], boxes, at)) == 2
    assert len(run([[0.9], [0.8]], boxes, dataclasses.replace(at, normalized=False))) == 1


def test_boxes_become_original_pixels_before_nms() -> None:
    scores = np.array([[[0.9]], [[0.9]]], np.float32)
    boxes = np.array([[[10, 20, 30, 40]], [[10, 20, 30, 40]]], np.float32)
    first, second = postprocess(scores, boxes, [(2.0, 5.0), (1.0, 0.5)], GFL)
    np.testing.assert_allclose(first.boxes, [[2, 10, 6, 20]])
    np.testing.assert_allclose(second.boxes, [[20, 20, 60, 40]])


def test_nothing_found_is_empty_not_an_error() -> None:
    found = run([[0.01]], [[0.0, 0, 1, 1]])
    assert (found.boxes.shape, found.scores.shape, found.classes.shape) == ((0, 4), (0,), (0,))
    [none] = postprocess(np.zeros((1, 0, 3), np.float32), np.zeros((1, 0, 4), np.float32), ONE, GFL)
    assert len(none) == 0


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_unusable_numbers_are_an_error(bad: float) -> None:
    scores, boxes = np.full((1, 3, 2), 0.5, np.float32), np.ones((1, 3, 4), np.float32)
    broken = scores.copy()
    broken[0, 2, 1] = bad
    with pytest.raises(EngineError, match="NaN or infinite scores"):
        postprocess(broken, boxes, ONE, GFL)
    broken = boxes.copy()
    broken[0, 0, 3] = bad
    with pytest.raises(EngineError, match="NaN or infinite boxes"):
        postprocess(scores, broken, ONE, GFL)


def test_shapes_that_do_not_fit_are_an_error() -> None:
    with pytest.raises(EngineError, match=r"\[1, 3, 2\] and boxes of shape \[1, 4, 4\]"):
        postprocess(np.zeros((1, 3, 2), np.float32), np.zeros((1, 4, 4), np.float32), ONE, GFL)
    with pytest.raises(ValueError, match="as many scales"):
        postprocess(np.zeros((2, 3, 2), np.float32), np.zeros((2, 3, 4), np.float32), ONE, GFL)


@pytest.mark.parametrize(
    "wrong",
    [
        {"score_threshold": 1.5},
        {"score_threshold": float("nan")},
        {"score_threshold": "0.5"},
        {"nms_threshold": -0.1},
        {"nms_top_k": 0},
        {"nms_top_k": -2},
        {"keep_top_k": 1.5},
        {"keep_top_k": True},
        {"normalized": 1},
        {"nms_eta": 0},
    ],
)
def test_params_that_cannot_work(wrong: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        NmsParams(**(dataclasses.asdict(GFL) | wrong))


def test_params_round_trip() -> None:
    assert build(NmsParams, plain(GFL)) == GFL
    with pytest.raises(DataError, match="lacks keep_top_k, nms_threshold, nms_top_k"):
        build(NmsParams, {"score_threshold": 0.5})
    with pytest.raises(DataError, match="background_label"):
        build(NmsParams, plain(GFL) | {"background_label": -1})


def test_a_full_size_model_takes_milliseconds() -> None:
    rng = np.random.default_rng(0)
    scores = rng.uniform(0, 0.02, (1, 22400, 80)).astype(np.float32)
    scores[0, rng.choice(22400, 1000), rng.integers(0, 80, 1000)] = rng.uniform(0.03, 1, 1000)
    corners = rng.uniform(0, 800, (1, 22400, 2))
    boxes = np.concatenate([corners, corners + rng.uniform(10, 300, corners.shape)], -1).astype(np.float32)
    times = []
    for _ in range(5):
        start = time.perf_counter()
        postprocess(scores, boxes, ONE, GFL)
        times.append(time.perf_counter() - start)
    assert min(times) < 0.1  # some 4 ms: the bound only catches a loop over anchors, even on a busy machine


@pytest.mark.parametrize("kind", ["random", "clustered"])
@pytest.mark.parametrize("nms_top_k", [-1, 40])
def test_many_pairs_give_the_best_of_what_all_would_give(kind: str, nms_top_k: int) -> None:
    # 12,000 pairs of a candidate and a class; the objects of "clustered" fill `keep_top_k` late, or never.
    rng = np.random.default_rng(7)
    scores = np.round(rng.uniform(0.03, 1, (2, 300, 40)), 2).astype(np.float32)  # many equal scores
    boxes = random_boxes(rng, kind, 2, 300)
    params = dataclasses.replace(GFL, nms_top_k=nms_top_k, nms_threshold=0.1)
    everything = postprocess(scores, boxes, ONE * 2, dataclasses.replace(params, keep_top_k=-1))
    for keep in (50, 150, 100_000):
        found = postprocess(scores, boxes, ONE * 2, dataclasses.replace(params, keep_top_k=keep))
        for ours, theirs in zip(found, everything, strict=True):
            np.testing.assert_array_equal(ours.boxes, theirs.boxes[:keep])
            np.testing.assert_array_equal(ours.scores, theirs.scores[:keep])
            np.testing.assert_array_equal(ours.classes, theirs.classes[:keep])


def random_boxes(rng: np.random.Generator, kind: str, images: int, anchors: int) -> np.ndarray:
    if kind == "random":
        corners = rng.uniform(0, 300, (images, anchors, 2))
        boxes = np.concatenate([corners, corners + rng.uniform(0, 150, corners.shape)], -1)
    elif kind == "clustered":  # a detector's output: many candidates around few objects
        centres, sizes = rng.uniform(50, 400, (5, 2)), rng.uniform(20, 120, (5, 2))
        which = rng.integers(0, 5, (images, anchors))
        boxes = np.concatenate([(centres - sizes / 2)[which], (centres + sizes / 2)[which]], -1)
        boxes = boxes + rng.normal(0, 4, boxes.shape)
    elif kind == "odd":  # small whole numbers: inverted boxes, boxes without area, duplicates, IoUs on the threshold
        boxes = rng.integers(0, 6, (images, anchors, 4)).astype(float)
    else:  # "tiny": without area or touching
        corners = rng.integers(0, 20, (images, anchors, 2)).astype(np.float64)
        boxes = np.concatenate([corners, corners + rng.integers(0, 4, corners.shape)], -1).astype(np.float64)
    return boxes.astype(np.float32)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["random", "clustered", "odd", "tiny"])
def test_every_detection_equals_paddles(kind: str) -> None:
    paddle = pytest.importorskip("paddle")
    rng = np.random.default_rng(len(kind))
    for case in range(300):
        images, anchors, classes = int(rng.integers(1, 4)), int(rng.integers(1, 400)), int(rng.integers(1, 6))
        if case % 25 == 0:  # more pairs than NMS looks at first
            anchors, classes = 1000, 20
        boxes = random_boxes(rng, kind, images, anchors)
        scores = (rng.uniform(0, 1, (images, anchors, classes)) ** 3).astype(np.float32)
        if case % 3 == 0:
            scores = np.round(scores, 1)  # many equal scores
        params = NmsParams(
            score_threshold=float(rng.choice([0.0, 0.025, 0.1, 0.5, 0.99])),
            nms_threshold=float(rng.choice([0.0, 0.3, 0.5, 0.6, 0.75, 1.0])),
            nms_top_k=int(rng.choice([-1, 1, 10, 100, 1000])),
            keep_top_k=int(rng.choice([-1, 1, 10, 100])),
            normalized=bool(rng.integers(2)),
            nms_eta=float(rng.choice([1.0, 0.9])),
        )
        scales = [tuple(scale) for scale in rng.uniform(0.5, 3, (images, 2))] if kind == "clustered" else ONE * images
        factors = np.array([[x, y, x, y] for y, x in scales], dtype=np.float32)[:, np.newaxis]
        rows, _, counts = paddle._C_ops.multiclass_nms3(
            paddle.to_tensor(boxes / factors),
            paddle.to_tensor(np.ascontiguousarray(scores.transpose(0, 2, 1))),
            None,
            params.score_threshold,
            params.nms_top_k,
            params.keep_top_k,
            params.nms_threshold,
            params.normalized,
            params.nms_eta,
            -1,
        )
        expected = np.split(rows.numpy(), np.cumsum(counts.numpy())[:-1])
        for theirs, ours in zip(expected, postprocess(scores, boxes, scales, params), strict=True):
            theirs = theirs[np.argsort(-theirs[:, 1], kind="stable")]
            np.testing.assert_array_equal(ours.classes, theirs[:, 0])
            np.testing.assert_array_equal(ours.scores, theirs[:, 1])
            np.testing.assert_array_equal(ours.boxes, theirs[:, 2:])


# --- what a user does with them ---------------------------------------------------------------------------------------


FOUND = Detections(
    np.array([[0, 0, 4, 2], [1, 1, 2, 3], [5, 5, 6, 6]], np.float32),
    np.array([0.9, 0.5, 0.2], np.float32),
    np.array([1, 0, 2]),
).named(["cat", "dog"])


def test_names_and_channels_without_a_class() -> None:
    assert len(FOUND) == 2 and FOUND.names == ["dog", "cat"] and FOUND.class_names == ("cat", "dog")


def test_thresholds_and_classes() -> None:
    assert FOUND.at_least(0.5).names == ["dog", "cat"] and FOUND.at_least(0.51).names == ["dog"]
    assert FOUND.of_classes("cat").scores.tolist() == [0.5] and FOUND.of_classes(0, "dog").names == ["dog", "cat"]
    assert len(FOUND.of_classes()) == 0 and FOUND.select(slice(1)).names == ["dog"]
    with pytest.raises(ValueError, match="cow"):
        FOUND.of_classes("cow")


def test_records_for_json() -> None:
    first, _ = FOUND.records()
    assert first == {"class": "dog", "class_id": 1, "score": pytest.approx(0.9), "bbox": [0, 0, 4, 2]}


def test_the_arguments_of_supervision() -> None:
    given = FOUND.for_supervision()
    assert set(given) == {"xyxy", "confidence", "class_id", "data"}
    assert given["xyxy"].shape == (2, 4) and given["confidence"].shape == given["class_id"].shape == (2,)
    assert given["data"]["class_name"].tolist() == ["dog", "cat"]
    nothing = FOUND.of_classes().for_supervision()
    assert nothing["xyxy"].shape == (0, 4) and nothing["data"]["class_name"].shape == (0,)


def test_supervision_takes_them() -> None:
    supervision = pytest.importorskip("supervision")
    for found, count in ((FOUND, 2), (FOUND.of_classes(), 0)):
        arguments = found.for_supervision()
        taken = supervision.Detections(**arguments)
        assert len(taken) == count and list(taken["class_name"]) == list(arguments["data"]["class_name"])
        assert len(taken[taken.confidence > 0.6]) == min(count, 1)
