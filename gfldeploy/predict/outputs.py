"""What a prediction writes: `detections.jsonl`, `coco.json`, and the images that its ids stand for."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, TypeAlias

import numpy as np

from gfldeploy.detection_options import AS_CONFIGURED, DetectionOptions, Shown
from gfldeploy.detections import Detections
from gfldeploy.engines.base import ClosesOnExit
from gfldeploy.files import write_json, writing
from gfldeploy.images.coco import CocoId
from gfldeploy.predict.pipeline import Found
from gfldeploy.storage import Source

DETECTIONS = "detections.jsonl"
COCO = "coco.json"
IMAGES = "images.json"
NOTE = "predict.json"
PICTURES = "pictures"
WHAT = "results of gfldeploy predict"
# In the folder of unfinished work: the working file, and what becomes the output.
WORKING, RESULTS = "working.jsonl", "results"
# What is in the folder of unfinished work.
MADE = (
    r"(?s)working\.jsonl|"
    r"results/((detections\.jsonl|coco\.json|images\.json|predict\.json|records\.jsonl)?|pictures/(\.?\d{6,}[-.].*)?)"
)
_MOST_REASONS = 3

# What the files hold, for their schemas: a line of `detections.jsonl`, with detections or with an error; the list in
# `coco.json`; the object in `images.json`.
_NAMED = {"file": str, "frame?": int, "time_s?": float}
_LIVE = {"time?": str, "dropped?": int, "latency_s?": float}
_BOX = tuple[float, float, float, float]
_DETECTION = {"class": str, "class_id": int, "score": float, "bbox": _BOX}
DETECTED = (
    {**_NAMED, **_LIVE, "width": int, "height": int, "detections": [_DETECTION], "may_lack_below?": float},
    {**_NAMED, "error": str},
)
COCO_RESULTS = [{"image_id": CocoId, "category_id": CocoId, "bbox": _BOX, "score": float}]
LISTED_IMAGES = {
    "images": [{"id": int, "file_name": str, "width": int, "height": int}],
    "categories": [{"id": int, "name": str}],
    "annotations": [Any],
}


# One image's line in the result, or a detection in it, ready for JSON.
Record: TypeAlias = dict[str, Any]


@dataclass(frozen=True)
class PredictResults:
    """What a prediction found.

    `images`, `failed`: how many. `reasons`: of the first failures. `detections`: those in `detections.jsonl`. `kept`:
    images that an earlier run had done. `incomplete`: images whose detections may be missing or differ, since the
    bundle decodes only so many anchors; `lack_below`: the highest score of such a detection. `lowest`: the lowest
    score that a detection can have in `detections.jsonl`. `live`: of a live source.
    """

    images: int
    failed: int
    reasons: tuple[str, ...]
    detections: int
    kept: int = 0
    incomplete: int = 0
    lack_below: float = 0.0
    lowest: float = 0.0
    live: LiveSummary | None = None


@dataclass(frozen=True)
class LiveSummary:
    """What `PredictResults` says of a live source beside its frames, `images`.

    `name`: its address without user name, password and query. `dropped`: frames that were read and not detected in, as
    newer ones came. `reconnects`: how often the connection was lost and made again. `latency_s`: from reading a frame
    to having its detections, the median (to 1%) and the longest of this run. `error`: why the source ended by itself;
    None if it was stopped.
    """

    name: str
    dropped: int
    reconnects: int
    latency_s: tuple[float, float]
    error: str | None


@dataclass
class Summary:
    """What has been found so far; detections that are `shown` count."""

    shown: Shown
    images: int = 0
    failed: int = 0
    reasons: tuple[str, ...] = ()
    detections: int = 0
    incomplete: int = 0
    lack_below: float = 0.0

    def add(self, one: Found) -> list[int]:
        """Take in an image; the places of its detections that count."""
        self.images += 1
        if one.detections is None or one.size is None:
            self.failed += 1
            if self.failed <= _MOST_REASONS:
                self.reasons = (*self.reasons, str(one.error))
            return []
        shown: list[int] = self.shown.places(one.detections).tolist()
        self.detections += len(shown)
        if self.shown.lacks(one.detections):
            self.incomplete += 1
            self.lack_below = max(self.lack_below, one.detections.may_lack_below)
        return shown

    def lacking(self, one: Found) -> Record:
        """What a line says of them."""
        assert one.detections is not None
        return {"may_lack_below": one.detections.may_lack_below} if self.shown.lacks(one.detections) else {}

    def results(self, kept: int = 0) -> PredictResults:
        """As `predict` returns it; `kept`: images that an earlier run had done."""
        return PredictResults(
            *(self.images, self.failed, self.reasons, self.detections, kept),
            *(self.incomplete, self.lack_below, self.shown.least),
        )


def write_outputs(
    directory: Path,
    found: Iterable[Found],
    classes: Sequence[str],
    image_ids: Sequence[CocoId] | None = None,
    category_ids: Sequence[CocoId | None] | None = None,
    detection: DetectionOptions = AS_CONFIGURED,
    target: Source | None = None,
) -> PredictResults:
    """Write the files, each image as it is found: memory does not grow with their number.

    `detections.jsonl` has a line for each image: `bbox` is x, y, width, height in original pixels. Nothing is rounded:
    even a thousandth of a pixel turns some IoU, and the mAP of the results would not be that of `gfldeploy eval`.
    `may_lack_below`, as for `Detections`, is left out if nothing that is shown may be missing.

    `coco.json` is a list of results as COCO's tools read it, with all that NMS leaves, which mAP needs. `detection`:
    says what is in `detections.jsonl`. `image_ids` and `category_ids`: those of annotations, by image and by class;
    `coco.json` leaves out a class whose category is None. Without them images and classes are numbered from 1 in their
    order, and `images.json` lists them in the format of annotations. Raises `OutputError` about `target`, by default
    the directory, also if one of the files exists.
    """
    heads = _heads(classes)
    categories: Sequence[CocoId | None] = category_ids or range(1, len(classes) + 1)
    named_ids = [None if one is None else f'"category_id": {json.dumps(one)}, "bbox": [' for one in categories]
    summary = Summary(detection.shown(classes))
    with ExitStack() as stack:
        lines = stack.enter_context(_TextFile(directory / DETECTIONS, target or directory))
        results = stack.enter_context(_JsonList(directory / COCO, target or directory, "[", "]"))
        listed = None
        if image_ids is None:
            named = [{"id": number, "name": name} for number, name in enumerate(classes, start=1)]
            tail = f'], "categories": {json.dumps(named)}, "annotations": []}}'
            listed = stack.enter_context(_JsonList(directory / IMAGES, target or directory, '{"images": [', tail))
        for index, one in enumerate(found):
            line: Record = {"file": one.name}
            if one.frame is not None and one.time_s is not None:
                line |= {"frame": one.frame, "time_s": round(one.time_s, 3)}
            shown = summary.add(one)
            if one.detections is None or one.size is None:
                lines.write(json.dumps({**line, "error": str(one.error)}) + "\n")
                continue
            height, width = one.size
            rows, labels = _rows(one.detections), one.detections.classes.tolist()
            line |= {"width": width, "height": height}
            lines.write(_line(line, [(heads[labels[place]], *rows[place]) for place in shown], summary.lacking(one)))
            image_id: CocoId = index + 1 if image_ids is None else image_ids[index]
            if listed is not None:
                name = one.name + (f"#{one.frame}" if "frame" in line else "")
                listed.add([json.dumps({"id": image_id, "file_name": name, "width": width, "height": height})])
            head = f'{{"image_id": {json.dumps(image_id)}, '
            results.add(
                [
                    f'{head}{named_id}{x}, {y}, {w}, {h}], "score": {score}}}'
                    for label, (x, y, w, h, score) in zip(labels, rows, strict=True)
                    if (named_id := named_ids[label]) is not None
                ]
            )
    return summary.results()


def live_line(line: Record, one: Found, summary: Summary, classes: Sequence[str]) -> str:
    """The line of a frame of a live source, which begins with `line`; it is taken into the summary."""
    assert one.detections is not None and one.size is not None
    shown, heads = summary.add(one), _heads(classes)
    rows, labels = _rows(one.detections), one.detections.classes.tolist()
    line |= {"width": one.size[1], "height": one.size[0]}
    return _line(line, [(heads[labels[place]], *rows[place]) for place in shown], summary.lacking(one))


def _heads(classes: Sequence[str]) -> list[str]:
    """How a detection of each class begins."""
    return [f'{{"class": {json.dumps(name)}, "class_id": {number}, ' for number, name in enumerate(classes)]


def _line(line: Record, shown: Iterable[tuple[Any, ...]], more: Record) -> str:
    """A line of `detections.jsonl`: `line`, the detections as beginnings and numbers, `more`."""
    entries = ", ".join(f'{head}"score": {score}, "bbox": [{x}, {y}, {w}, {h}]}}' for head, x, y, w, h, score in shown)
    text = f'{json.dumps(line)[:-1]}, "detections": [{entries}]'
    return f"{text}, {json.dumps(more)[1:]}\n" if more else f"{text}}}\n"


def read_records(path: Path) -> Iterator[Record]:
    """The lines of a `detections.jsonl`. Raises `OSError` and `ValueError`."""
    with path.open(encoding="utf-8") as file:
        for line in file:
            yield json.loads(line)


class _TextFile(ClosesOnExit):
    """A new file; a context manager. What the file system refuses is an `OutputError` about `target`."""

    def __init__(self, path: Path, target: Source) -> None:
        self._target = target
        with writing(target):
            self._file: IO[str] = path.open("x", encoding="utf-8", newline="")  # the same bytes everywhere

    def write(self, text: str) -> None:
        with writing(self._target):
            self._file.write(text)

    def close(self) -> None:
        with writing(self._target):
            self._file.close()


class _JsonList(_TextFile):
    """A JSON list in a file, written entry by entry between two texts."""

    def __init__(self, path: Path, target: Source, before: str, after: str) -> None:
        super().__init__(path, target)
        self._after, self._empty = after, True
        self.write(before)

    def close(self) -> None:
        try:
            self.write(f"{'' if self._empty else chr(10)}{self._after}\n")
        finally:
            super().close()

    def add(self, entries: Sequence[str]) -> None:
        """Entries as JSON."""
        if entries:
            self.write(f"{'' if self._empty else ','}\n" + ",\n".join(entries))
            self._empty = False


def _rows(detections: Detections) -> list[tuple[Any, ...]]:
    """x, y, width, height and score of each detection: numbers that Python's `str` spells as JSON has them, or texts.

    JSON is put together from these by hand: objects for each box, encoded by `json`, take three times as long.
    """
    numbers = np.concatenate([detections.boxes, detections.scores[:, np.newaxis]], axis=1, dtype=np.float64)
    numbers[:, 2:4] -= numbers[:, :2]
    rows = list(map(tuple, numbers.tolist()))
    return rows if np.isfinite(numbers).all() else [tuple(map(json.dumps, row)) for row in rows]


def write_note(
    results: Path, what: str, question: Mapping[str, Any], summary: PredictResults, more: Mapping[str, Any]
) -> None:
    counts = {"images": summary.images, "failed": summary.failed, "detections": summary.detections}
    write_json(results / NOTE, {"what": what, **question, **counts, **more})
