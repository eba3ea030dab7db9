"""Detections: what is found in an image, and one text of it for whoever sends it."""

from __future__ import annotations

import binascii
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

_BYTES = 24  # of a detection as text: a box and a score of 32-bit floats, and a class


@dataclass(frozen=True)
class Detections:
    """The detections of one image, best first; `len()` is their number.

    Attributes:
        boxes: x1, y1, x2, y2 in pixels of the original image, float32 [K, 4].
        scores: 0 to 1, float32 [K].
        classes: Class ids, int64 [K]: indices into `class_names`.
        may_lack_below: Detections that score less may be missing or differ, since the graph decodes only so many
            anchors of an image; 0.0 if all are there.
        class_names: The names of all classes of the detector; empty before a name is given to each (`named`).
    """

    boxes: NDArray[np.float32]
    scores: NDArray[np.float32]
    classes: NDArray[np.int64]
    may_lack_below: float = 0.0
    class_names: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        count = len(self.scores)
        if self.boxes.shape != (count, 4) or self.scores.shape != (count,) or self.classes.shape != (count,):
            raise ValueError(
                "boxes, scores and classes must be [K, 4], [K] and [K], not "
                f"{list(self.boxes.shape)}, {list(self.scores.shape)} and {list(self.classes.shape)}"
            )

    def __len__(self) -> int:
        return len(self.scores)

    @property
    def names(self) -> list[str]:
        """The class name of each detection."""
        return [self.class_names[category] for category in self.classes.tolist()]

    def select(self, which: NDArray[np.bool_] | NDArray[np.intp] | slice) -> Detections:
        """Some of the detections.

        Args:
            which: A mask, bool [K], or their places, or a slice such as `slice(10)` for the ten best.

        Returns:
            Those, with everything else as it was.
        """
        return replace(self, boxes=self.boxes[which], scores=self.scores[which], classes=self.classes[which])

    def at_least(self, threshold: float) -> Detections:
        """The detections that score at least `threshold`."""
        return self.select(self.scores.astype(np.float64) >= threshold)

    def of_classes(self, *classes: str | int) -> Detections:
        """The detections of some classes.

        Args:
            classes: Names or ids.

        Returns:
            The detections of these classes, still best first.

        Raises:
            ValueError: A name is not among the `class_names`.
        """
        if unknown := {one for one in classes if isinstance(one, str)} - set(self.class_names):
            raise ValueError(f"there is no class {min(unknown)!r}")
        ids = [self.class_names.index(one) if isinstance(one, str) else one for one in classes]
        return self.select(np.isin(self.classes, ids))

    def named(self, class_names: Sequence[str]) -> Detections:
        """With these names of all classes, and without the detections of score channels that have none.

        GFLv2 has one channel more than there are classes, and what it finds there is no object.
        """
        named = self.classes < len(class_names)
        return replace(self if named.all() else self.select(named), class_names=tuple(class_names))

    def records(self) -> list[dict[str, Any]]:
        """As JSON-ready data, as in `detections.jsonl`: class, class_id, score, and bbox (x, y, width, height)."""
        rows = zip(self.names, self.classes.tolist(), self.scores.tolist(), self.boxes.tolist(), strict=True)
        return [
            {"class": name, "class_id": category, "score": score, "bbox": [x1, y1, x2 - x1, y2 - y1]}
            for name, category, score, (x1, y1, x2, y2) in rows
        ]

    def for_supervision(self) -> dict[str, Any]:
        """The arguments of `supervision.Detections`, for the annotators, trackers and filters of that package::

            supervision.Detections(**found.for_supervision())

        Returns:
            `xyxy`, `confidence` and `class_id`, and in `data` the `class_name` of each detection.
        """
        data = {"class_name": np.array(self.names, dtype=str)}
        return {"xyxy": self.boxes, "confidence": self.scores, "class_id": self.classes, "data": data}


def to_text(detections: Detections) -> str:
    """Boxes, scores and classes in one text, as they are in memory: exact, and as JSON numbers they would take longer.

    `may_lack_below` and the names of classes are not in it.
    """
    parts = detections.boxes.astype("<f4"), detections.scores.astype("<f4"), detections.classes.astype("<i4")
    return binascii.b2a_base64(b"".join(part.tobytes() for part in parts), newline=False).decode()


def from_text(text: str, may_lack_below: float) -> Detections | None:
    """The inverse of `to_text`, without names of classes; None for a text that it did not make."""
    try:
        data = binascii.a2b_base64(text, strict_mode=True)
    except ValueError:
        return None
    count, rest = divmod(len(data), _BYTES)
    if rest:
        return None
    boxes = np.frombuffer(data, "<f4", 4 * count).reshape(count, 4)
    scores = np.frombuffer(data, "<f4", count, 16 * count)
    classes = np.frombuffer(data, "<i4", count, 20 * count)
    return Detections(boxes, scores, classes.astype(np.int64), may_lack_below)
