"""The one NMS, which makes detections from the candidates of every engine's network, and of tiles."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gfldeploy.detections import Detections
from gfldeploy.errors import ConfigError, EngineError

# So many best pairs of a candidate and a class enter NMS first. They mostly suffice, since an image keeps few and no
# pair can drop a better one; if they leave too few detections, more enter.
_FIRST, _MORE = 512, 4  # times as many
_MOST_KEPT = 2**31 - 1  # PaddleDetection's are 32-bit
# A box at the edge of its tile is part of another that holds more than this share of it, and that scores this share of
# its score.
_PART, _PART_SCORE = 0.5, 0.5
_PAIRS = 1 << 20  # of boxes that are compared at once
_BAND_BOXES = 1 << 11  # of a band of an image, if they were spread evenly
_BLOCK = 192  # pairs compared at once: large enough for NumPy to pay, small enough for their square to stay cheap


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
                raise ConfigError(f"the NMS's {name} is {value!r:.40}", "Give a number from 0 to 1.")
        if self.nms_eta == 0:
            raise ConfigError("the NMS's nms_eta is 0", "Give a number above 0; 1 leaves the threshold as it is.")
        for name in ("nms_top_k", "keep_top_k"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or (value != -1 and not 1 <= value <= _MOST_KEPT):
                raise ConfigError(f"the NMS's {name} is {value!r:.40}", "Give a whole number above 0, or -1 for all.")
        if not isinstance(self.normalized, bool):
            raise ConfigError(f"the NMS's normalized is {self.normalized!r}", "Set it to true or false.")


@dataclass(frozen=True)
class UserNms(NmsParams):
    """An NMS that a user has turned, see `DetectionOptions`.

    `kept`: the score channels of the classes that are kept, in rising order; the others are as if they were not there.
    `class_agnostic`: a box is dropped by a better one of any class. `lowest`: by class id, the lowest score that is
    shown, () for all alike. Then the `keep_top_k` best of those that are shown leave too, beside the `keep_top_k` best
    of all: what is shown is not crowded out by what is not. `most`: the `keep_top_k` that the user gave, -1 for none:
    unlike the config's, it is of an image and not of each of its tiles.
    """

    kept: tuple[int, ...] = ()
    class_agnostic: bool = False
    lowest: tuple[float, ...] = ()
    most: int = -1


def postprocess(
    scores: NDArray[np.float32],
    boxes: NDArray[np.float32],
    scales: Sequence[tuple[float, float]],
    params: NmsParams,
) -> list[Detections]:
    """Turn candidates into detections, one `Detections` for each image of the batch.

    `scores`: [N, A, C]; `boxes`: [N, A, 4], x1, y1, x2, y2 in network-input pixels; `scales`: for each image (y, x), by
    which it was resized. Boxes are divided by the scale first, then each class goes through a greedy NMS, in float32,
    as in PaddleDetection's heads and Paddle's `multiclass_nms3` (`background_label=-1`). Equal scores keep the order of
    classes, then of candidates. Only the order of the result differs: by score, not by class. What a user has turned is
    in a `UserNms`.

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
        # min and max pass a NaN on, several times as fast as isfinite over all the values.
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
    scale_y, scale_x = scale
    factors = np.array([scale_x, scale_y, scale_x, scale_y], dtype=np.float32)
    turned = params if isinstance(params, UserNms) else None
    if turned is not None and len(turned.kept) < scores.shape[1]:
        others = np.ones(scores.shape[1], dtype=np.bool_)
        others[list(turned.kept)] = False
        scores = np.where(others, np.float32(-1), scores)
    above = np.flatnonzero(scores > np.float32(params.score_threshold))
    above_scores = scores.reshape(-1)[above]
    least = min(turned.lowest) if turned is not None and turned.lowest else 0.0
    first = _FIRST
    while True:
        flat, pair_scores = above, above_scores
        partial = params.keep_top_k != -1 and len(above) > first
        if partial:
            # And all that score as much as the last of them: among equals, the order of classes decides.
            best = above_scores >= np.partition(above_scores, len(above) - first)[len(above) - first]
            flat, pair_scores = above[best], above_scores[best]
        anchors, classes = np.divmod(flat, max(scores.shape[1], 1))
        # By falling score, then by class; the sort is stable, so that equals stay in the candidates' order.
        order = np.lexsort((classes, -pair_scores))
        if 0 <= params.nms_top_k < len(scores):
            order = order[_places(classes[order]) < params.nms_top_k]
        anchors, classes, pair_scores = anchors[order], classes[order], pair_scores[order]
        pair_boxes = boxes[anchors] / factors
        counted = counts_of(pair_scores, classes, params)
        rivals = np.zeros_like(classes) if turned is not None and turned.class_agnostic else classes
        kept = _greedy(pair_boxes, rivals, params, counted)
        if not partial or (
            len(kept) >= params.keep_top_k
            and (np.count_nonzero(counted[kept]) >= params.keep_top_k or pair_scores[-1] < least)
        ):
            break
        first *= _MORE
    kept = kept[_best(counted[kept], params.keep_top_k)]
    return Detections(pair_boxes[kept], pair_scores[kept], classes[kept].astype(np.int64))


def limited(found: Detections, params: NmsParams) -> Detections:
    """The detections, best first, that leave NMS at most: as many as `keep_top_k` says, see `UserNms`."""
    return found.select(_best(counts_of(found.scores, found.classes, params), params.keep_top_k))


def counts_of(scores: NDArray[np.float32], classes: NDArray[Any], params: NmsParams) -> NDArray[np.bool_]:
    """Which detections count against `keep_top_k`: all, or those that are shown."""
    if not isinstance(params, UserNms) or not params.lowest:
        return np.ones(len(scores), dtype=np.bool_)
    counted: NDArray[np.bool_] = scores.astype(np.float64) >= np.array(params.lowest, np.float64)[classes]
    return counted


def _best(counted: NDArray[np.bool_], most: int) -> NDArray[np.intp]:
    """The places of the `most` first, and of the `most` first that count, in order; -1: all."""
    if most == -1:
        return np.arange(len(counted))
    return np.flatnonzero((np.arange(len(counted)) < most) | (counted & (np.cumsum(counted) <= most)))


def _places(classes: NDArray[np.intp]) -> NDArray[np.intp]:
    """The place of each pair among those of its class, 0 for the first."""
    order = np.argsort(classes, kind="stable")
    ordered = classes[order]
    places = np.empty(len(classes), dtype=np.intp)
    places[order] = np.arange(len(classes)) - np.searchsorted(ordered, ordered)
    return places


def _greedy(
    boxes: NDArray[np.float32], classes: NDArray[np.intp], params: NmsParams, counted: NDArray[np.bool_]
) -> NDArray[np.intp]:
    """Indices of the boxes that survive, in order; the input has falling scores.

    `counted`: those of which there are `keep_top_k` or a few more.

    A box survives when its IoU with every surviving, earlier box of its class is at most the threshold. The boxes are
    compared in blocks, each block with itself and the survivors of the blocks before.
    """
    columns = _columns(boxes, params.normalized)
    most = len(boxes) if params.keep_top_k == -1 else params.keep_top_k
    kept = np.empty(0, dtype=np.intp)
    limits: dict[int, np.float32] = {}
    for start in range(0, len(boxes), _BLOCK):
        if len(kept) >= most and (np.count_nonzero(counted[kept]) >= most or not counted[start:].any()):
            break
        pool = np.concatenate([kept, np.arange(start, min(start + _BLOCK, len(boxes)))])
        order = np.argsort(classes.take(pool), kind="stable")
        here = columns.take(pool.take(order), axis=1)
        earlier, later = _near(here, *_pairs_of_a_class(classes.take(pool.take(order)), order, len(kept)))
        iou = _iou(here.take(earlier, axis=1), here.take(later, axis=1), params.normalized)
        earlier, later = order.take(earlier), order.take(later)
        if params.nms_eta < 1:
            survives = _falling_threshold(classes[pool], len(kept), earlier, later, iou, params, limits)
        else:
            # Not `iou > threshold`: a NaN, the IoU of two equal boxes without area, drops the box, as in Paddle.
            drops = np.flatnonzero(~(iou <= np.float32(params.nms_threshold)))
            survives = _survivors(len(pool), earlier.take(drops), later.take(drops))
        kept = pool[survives]
    return kept


def _pairs_of_a_class(
    ordered: NDArray[np.intp], order: NDArray[np.intp], settled: int
) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    """All pairs of one class, except where the later one is, by `order`, among the first `settled`.

    `ordered`: rising classes. Pairs are positions in it, in rising order of the earlier one for each later one.
    """
    numbers = np.arange(len(ordered))
    firsts = np.searchsorted(ordered, ordered)  # of each one's class
    before = np.where(order < settled, 0, numbers - firsts)
    ends = np.cumsum(before)
    later = np.repeat(numbers, before)
    earlier = np.arange(len(later)) - np.repeat(ends - before - firsts, before)
    return earlier, later


def _near(
    columns: NDArray[np.float32], earlier: NDArray[np.intp], later: NDArray[np.intp]
) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    """The pairs that are not `_apart`: first by x, then, of those that are left, by y."""
    for low, high in ((columns[0], columns[2]), (columns[1], columns[3])):
        apart = low.take(earlier) > high.take(later)
        apart |= high.take(earlier) < low.take(later)
        near = np.flatnonzero(~apart)
        earlier, later = earlier.take(near), later.take(near)
    return earlier, later


def _survivors(count: int, earlier: NDArray[np.intp], later: NDArray[np.intp]) -> NDArray[np.bool_]:
    """Which of `count` boxes survive if each surviving `earlier` one drops its `later` one.

    All boxes at once, in rounds: a box is final when all boxes that could drop it are. So the rounds are as many as the
    longest chain of boxes of which each would drop the next, mostly two or three.
    """
    survives = np.ones(count, dtype=np.bool_)
    survives[later] = False
    while True:
        again = np.ones(count, dtype=np.bool_)
        again[later[survives[earlier]]] = False
        if again.tobytes() == survives.tobytes():
            return survives
        survives = again


def _falling_threshold(
    classes: NDArray[np.intp],
    settled: int,
    earlier: NDArray[np.intp],
    later: NDArray[np.intp],
    iou: NDArray[np.float32],
    params: NmsParams,
    limits: dict[int, np.float32],
) -> NDArray[np.bool_]:
    """As `_survivors`, box by box: every survivor lowers the threshold of its class in `limits`."""
    dropping: dict[int, list[tuple[int, np.float32]]] = {}
    for one, other, overlap in zip(earlier.tolist(), later.tolist(), iou, strict=True):
        dropping.setdefault(other, []).append((one, overlap))
    survives = np.ones(len(classes), dtype=np.bool_)
    eta, half = np.float32(params.nms_eta), np.float32(0.5)
    for position in range(settled, len(classes)):
        category = int(classes[position])
        limit = limits.get(category, np.float32(params.nms_threshold))
        survives[position] = all(overlap <= limit for one, overlap in dropping.get(position, ()) if survives[one])
        if survives[position]:
            limits[category] = limit * eta if limit > half else limit
    return survives


def pairwise_iou(one: NDArray[np.float32], other: NDArray[np.float32], normalized: bool = True) -> NDArray[np.float32]:
    """Pairwise IoU [M, K] of boxes [M, 4] and [K, 4], with Paddle's rules for odd boxes.

    A box with x2 < x1 or y2 < y1 has no area; boxes that merely touch intersect; 0 / 0 is NaN. With `normalized` False,
    widths and heights gain 1, but whether two boxes intersect is decided without it.
    """
    first, second = _columns(one, normalized)[:, :, np.newaxis], _columns(other, normalized)[:, np.newaxis]
    return np.where(_apart(first, second), np.float32(0), _iou(first, second, normalized))


def _columns(boxes: NDArray[np.float32], normalized: bool) -> NDArray[np.float32]:
    """x1, y1, x2, y2 and the area of boxes [M, 4]: [5, M]."""
    extra = np.float32(0 if normalized else 1)
    with np.errstate(all="ignore"):
        width = boxes[:, 2] - boxes[:, 0]
        height = boxes[:, 3] - boxes[:, 1]
        area = np.where((width < 0) | (height < 0), np.float32(0), (width + extra) * (height + extra))
    return np.concatenate([boxes.T, area[np.newaxis]])


def _apart(one: NDArray[np.float32], other: NDArray[np.float32]) -> NDArray[np.bool_]:
    """Whether boxes neither overlap nor touch; both as `_columns` returns them, in shapes that broadcast."""
    apart: NDArray[np.bool_] = (other[0] > one[2]) | (other[2] < one[0]) | (other[1] > one[3]) | (other[3] < one[1])
    return apart


def _iou(one: NDArray[np.float32], other: NDArray[np.float32], normalized: bool) -> NDArray[np.float32]:
    """IoU of boxes that are not `_apart`, given likewise; 0 / 0 is NaN."""
    overlap = _overlap(one, other, normalized)
    with np.errstate(all="ignore"):
        iou: NDArray[np.float32] = overlap / (one[4] + other[4] - overlap)
    return iou


def _overlap(one: NDArray[np.float32], other: NDArray[np.float32], normalized: bool) -> NDArray[np.float32]:
    """The area that boxes which are not `_apart` share, given likewise."""
    extra = np.float32(0 if normalized else 1)
    with np.errstate(all="ignore"):
        width = np.minimum(one[2], other[2]) - np.maximum(one[0], other[0])
        height = np.minimum(one[3], other[3]) - np.maximum(one[1], other[1])
        overlap: NDArray[np.float32] = (width + extra) * (height + extra)
    return overlap


def merge_tiles(parts: Sequence[Detections], cut: Sequence[NDArray[np.bool_]], params: NmsParams) -> Detections:
    """One image's detections out of those of its tiles and of the whole image, all in pixels of the image.

    `cut`: of each part, bool [K], which boxes end at an edge of their tile inside the image, so that they may hold a
    part of an object. First the NMS that made the parts runs once more, over all of them together: what two tiles see
    of one object has an IoU. Parts of an object have a small IoU with the whole, and often another class. So, of what
    is left, a box that is cut is dropped

    - by one that is not, and that holds more than half of its area, if that scores half as much, or as much where the
      class is another;
    - by another that is cut, of its class, better and not dropped itself, if they share more than half of the area of
      the smaller.

    A box that is not cut is never dropped so: small objects in front of large ones stay.

    SAHI merges any two boxes of a class that share more than half of the area of the smaller, cut or not. That takes
    the small objects in front of large ones, and a part outdoes the whole that scores less (obss/sahi issue 560 on
    GitHub). What each rule is worth is measured in benchmarks/tiles.py.

    Returns the detections best first; equal scores keep the order of classes, then of parts. The config's `keep_top_k`
    is of each part: an image may be many tiles full of objects. One that the user gave is of the image.
    """
    scores = np.concatenate([one.scores for one in parts])
    order = np.lexsort((np.concatenate([one.classes for one in parts]), -scores))
    joined = Detections(
        np.concatenate([one.boxes for one in parts]),
        scores,
        np.concatenate([one.classes for one in parts]),
        max(one.may_lack_below for one in parts),
        parts[0].class_names,
    ).select(order)
    kept = np.flatnonzero(_leave_nms(joined, params))
    found = joined.select(kept)
    found = found.select(_are_whole(found, np.concatenate(cut)[order[kept]], params))
    return limited(found, params) if isinstance(params, UserNms) and params.most != -1 else found


def _leave_nms(found: Detections, params: NmsParams) -> NDArray[np.bool_]:
    """Which detections, best first, leave NMS, as many as they are."""
    columns, classes = _columns(found.boxes, params.normalized), _nms_classes(found, params)
    # No threshold falls below this.
    least = np.float32(min(params.nms_threshold, 0.49 * params.nms_eta if params.nms_eta < 1 else 1))
    pairs = [(np.empty(0, np.intp), np.empty(0, np.intp), np.empty(0, np.float32))]
    for earlier, later in _near_of_many(columns, classes):
        iou = _iou(columns.take(earlier, axis=1), columns.take(later, axis=1), params.normalized)
        drops = np.flatnonzero(~(iou <= least))
        pairs.append((earlier.take(drops), later.take(drops), iou.take(drops)))
    earlier, later, iou = (np.concatenate(values) for values in zip(*pairs, strict=True))
    if params.nms_eta < 1:
        return _falling_threshold(classes, 0, earlier, later, iou, params, {})
    return _survivors(len(found), earlier, later)


def _are_whole(found: Detections, is_cut: NDArray[np.bool_], params: NmsParams) -> NDArray[np.bool_]:
    """Which detections, best first, are not parts of others: see `merge_tiles`."""
    columns, classes, scores = _columns(found.boxes, params.normalized), _nms_classes(found, params), found.scores
    pairs = [(np.empty(0, np.intp), np.empty(0, np.intp))]
    for earlier, later in _near_of_many(columns, np.zeros_like(classes)):
        swapped = is_cut.take(earlier) & ~is_cut.take(later)
        whole, part = np.where(swapped, later, earlier), np.where(swapped, earlier, later)
        some = np.flatnonzero(is_cut.take(part))
        whole, part = whole.take(some), part.take(some)
        first, second = columns.take(whole, axis=1), columns.take(part, axis=1)
        both, same = is_cut.take(whole), classes.take(whole) == classes.take(part)
        area = np.where(both, np.minimum(first[4], second[4]), second[4])
        factor = np.where(same, np.float32(_PART_SCORE), np.float32(1))
        outdone = np.where(both, same, scores.take(whole) >= factor * scores.take(part))
        drops = np.flatnonzero(outdone & (_overlap(first, second, params.normalized) > np.float32(_PART) * area))
        pairs.append((whole.take(drops), part.take(drops)))
    whole, part = (np.concatenate(values) for values in zip(*pairs, strict=True))
    return _survivors(len(found), whole, part)


def _nms_classes(found: Detections, params: NmsParams) -> NDArray[np.intp]:
    """What of each detection has to be equal for one to drop another."""
    agnostic = isinstance(params, UserNms) and params.class_agnostic
    return np.zeros(len(found), np.intp) if agnostic else found.classes.astype(np.intp)


def _near_of_many(
    columns: NDArray[np.float32], classes: NDArray[np.intp]
) -> Iterator[tuple[NDArray[np.intp], NDArray[np.intp]]]:
    """All pairs of boxes of a class that are not `_apart`, the earlier first, some at a time; `columns`: as `_columns`.

    An image in thousands of tiles has too many boxes to look at all pairs: a sweep along x, in each of some bands of y.
    A box is in every band that it meets; a pair counts in the band in which the lower of the two begins.
    """
    if not len(classes):
        return
    count = max(columns.shape[1] // _BAND_BOXES, 1)
    top = columns[1].min()
    height = max((np.maximum(columns[1], columns[3]).max() - top) / count, np.float32(1e-6))
    first, last = (np.clip((columns[row] - top) / height, 0, count - 1).astype(np.intp) for row in (1, 3))
    times = np.maximum(last - first, 0) + 1
    boxes = np.repeat(np.arange(len(classes)), times)
    bands = np.arange(len(boxes)) - np.repeat(np.cumsum(times) - times - first, times)
    keys = bands * (int(classes.max()) + 1) + classes[boxes]
    order = np.lexsort((columns[0].take(boxes), keys))
    boxes, bands, keys = boxes[order], bands[order], keys[order]
    ordered = columns.take(boxes, axis=1)
    # A box meets the ones of its class that begin before it ends: those that follow it here up to this place.
    ends = np.empty(len(boxes), np.intp)
    bounds = [*np.flatnonzero(np.diff(keys, prepend=-1)).tolist(), len(boxes)]
    for start, stop in itertools.pairwise(bounds):
        ends[start:stop] = start + np.searchsorted(ordered[0, start:stop], ordered[2, start:stop], side="right")
    counts = np.maximum(ends - np.arange(1, len(boxes) + 1), 0)
    totals = np.cumsum(counts)
    start = done = 0
    while start < len(boxes):
        stop = max(int(np.searchsorted(totals, done + _PAIRS, side="right")), start + 1)
        some = counts[start:stop]
        one = np.repeat(np.arange(start, stop), some)
        other = one + 1 + np.arange(len(one)) - np.repeat(totals[start:stop] - some - done, some)
        one, other = _near(ordered, one, other)
        here = np.maximum(first.take(boxes.take(one)), first.take(boxes.take(other))) == bands.take(one)
        one, other = boxes.take(one[here]), boxes.take(other[here])
        yield np.minimum(one, other), np.maximum(one, other)
        start, done = stop, int(totals[stop - 1])
