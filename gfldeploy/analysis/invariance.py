"""What padding does to detections: the same image alone and in a batch.

A batch pads smaller images with zeros. GroupNorm takes its statistics over the padding too, so that a GFL detector
gives other scores and boxes for an image beside a larger one.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass

import numpy as np

from gfldeploy.accuracy import Accuracy, check_measurable, coco_accuracy, coco_results
from gfldeploy.analysis.sweep import batch_orders, input_sizes
from gfldeploy.batch_detection import detect_images
from gfldeploy.batching.buckets import Order, group, padding
from gfldeploy.bundle import Bundle
from gfldeploy.detections import Detections
from gfldeploy.engines.base import Engine
from gfldeploy.errors import DataError
from gfldeploy.images.coco import CocoDataset
from gfldeploy.nms import pairwise_iou
from gfldeploy.progress import SILENT, Progress

# Detections below this score are noise that a user never draws, as in `quant.agreement`.
_CONFIDENT = 0.4
_SAME_BOX = 0.5


@dataclass(frozen=True)
class Invariance:
    """Detections of images in batches against those of the same images alone.

    `padding`: pixels of the batches by those of the images. `detections`: those with a score of 0.4 or more in the
    image alone; `lost`: of these, without a detection of their class in the batch that has an IoU of 0.5 or more.
    `score_change`, `box_change_px` (of a side, in original pixels): the largest of the others. `accuracy`: mAP in these
    batches, None for data without boxes.
    """

    batch_size: int
    order: Order
    padding: float
    detections: int
    lost: int
    score_change: float
    box_change_px: float
    accuracy: Accuracy | None


def measure_invariance(
    engine: Engine,
    dataset: CocoDataset,
    bundle: Bundle,
    batch_sizes: Sequence[int],
    progress: Progress = SILENT,
) -> list[Invariance]:
    """Batch 1, then each larger batch size, listed and bucketed. Raises `DataError` and `EngineError`."""
    manifest = bundle.manifest
    paths = [image.path for image in dataset.images]
    sizes = input_sizes(paths, bundle)
    labels = None
    if dataset.annotations:
        category_ids = dataset.class_to_category(manifest.classes)
        with suppress(DataError):  # no box that counts, so no mAP
            check_measurable(dataset, category_ids)
            labels = category_ids
    wanted = batch_orders(batch_sizes)
    total, done = len(wanted) * len(paths), 0
    alone: list[Detections] = []
    found: list[Invariance] = []
    for batch_size, order in wanted:
        groups = group(sizes, batch_size, order)
        detections: dict[int, Detections] = {}
        batches = [one.indices for one in groups]
        for index, one in detect_images(engine, paths, manifest.preprocess, manifest.nms, batches):
            detections[index] = one
            done += 1
            progress.step("comparing", done, total)
        ordered = [detections[index] for index in range(len(paths))]
        alone = alone or ordered
        changes = [difference(before, after) for before, after in zip(alone, ordered, strict=True)]
        accuracy = None
        if labels is not None:
            pairs = zip(dataset.images, ordered, strict=True)
            rows = [row for image, one in pairs for row in coco_results(image.id, one, labels)]
            accuracy = coco_accuracy(dataset, rows, labels)
        counts, lost, score_changes, box_changes = zip(*changes, strict=True)
        largest = (max(score_changes), max(box_changes))
        found.append(Invariance(batch_size, order, padding(groups, sizes), sum(counts), sum(lost), *largest, accuracy))
    return found


def difference(alone: Detections, batched: Detections) -> tuple[int, int, float, float]:
    """Of one image: confident detections, those lost, the largest change of a score, and of a box side in pixels."""
    count = lost = 0
    score_change = box_change = 0.0
    for box, score, category in zip(alone.boxes, alone.scores, alone.classes, strict=True):
        if score < _CONFIDENT:
            continue
        count += 1
        same = np.flatnonzero(batched.classes == category)
        overlaps = pairwise_iou(box[np.newaxis], batched.boxes[same])[0]
        if not len(same) or overlaps.max() < _SAME_BOX:
            lost += 1
            continue
        match = same[int(overlaps.argmax())]
        score_change = max(score_change, abs(float(batched.scores[match] - score)))
        box_change = max(box_change, float(np.abs(batched.boxes[match] - box).max()))
    return count, lost, score_change, box_change
