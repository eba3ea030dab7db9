"""What a prediction writes: `detections.jsonl`, `coco.json`, and the images that its ids stand for."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from gfldeploy.images.coco import CocoId
from gfldeploy.predict.pipeline import Found
from gfldeploy.predict.resume import Record

# What PaddleDetection draws from, unless told otherwise.
DEFAULT_THRESHOLD = 0.5

DETECTIONS = "detections.jsonl"
COCO = "coco.json"
IMAGES = "images.json"
_MOST_REASONS = 3


@dataclass(frozen=True)
class PredictResults:
    """What a prediction found.

    `images`, `failed`: how many. `reasons`: of the first failures. `detections`: those in `detections.jsonl`. `kept`:
    images that an earlier run had done. `incomplete`: images whose detections may be missing or differ, since the
    bundle decodes only so many anchors; `lack_below`: the highest score of such a detection.
    """

    images: int
    failed: int
    reasons: tuple[str, ...]
    detections: int
    kept: int = 0
    incomplete: int = 0
    lack_below: float = 0.0


def record_of(found: Found) -> Record:
    """One image with all that NMS left, as a line of `detections.jsonl` has it.

    `bbox` is x, y, width, height in original pixels. Nothing is rounded: even a thousandth of a pixel turns some
    IoU, and the mAP of the results would not be that of `gfldeploy eval`. `may_lack_below`: as for `Detections`, left
    out if nothing is missing.
    """
    record: Record = {"file": found.name}
    if found.frame is not None and found.time_s is not None:
        record |= {"frame": found.frame, "time_s": round(found.time_s, 3)}
    if found.detections is None or found.size is None:
        return {**record, "error": str(found.error)}
    height, width = found.size
    record |= {"width": width, "height": height, "detections": found.detections.records()}
    lacks = found.detections.may_lack_below
    return {**record, "may_lack_below": lacks} if lacks > 0 else record


def write_outputs(
    directory: Path,
    records: Iterable[Record],
    classes: Sequence[str],
    image_ids: Sequence[CocoId] | None = None,
    category_ids: Sequence[CocoId | None] | None = None,
    threshold: float = DEFAULT_THRESHOLD,
) -> PredictResults:
    """Write the files, one record at a time: memory does not grow with their number.

    `coco.json` is a list of results as COCO's tools read it, with all scores, which mAP needs. `threshold`: the
    smallest score in `detections.jsonl`. `image_ids` and `category_ids`: those of annotations, by image and by class;
    `coco.json` leaves out a class whose category is None. Without them images and classes are numbered from 1 in their
    order, and `images.json` lists them in the format of annotations. Raises `OSError`, also if one of the files exists.
    """
    categories: Sequence[CocoId | None] = category_ids or range(1, len(classes) + 1)
    images = failed = detections = incomplete = 0
    lack_below = 0.0
    reasons: list[str] = []
    with ExitStack() as stack:
        lines = stack.enter_context((directory / DETECTIONS).open("x", encoding="utf-8"))
        results = stack.enter_context(_JsonList(directory / COCO, "[", "]"))
        listed = None
        if image_ids is None:
            named = [{"id": number, "name": name} for number, name in enumerate(classes, start=1)]
            tail = f'], "categories": {json.dumps(named)}, "annotations": []}}'
            listed = stack.enter_context(_JsonList(directory / IMAGES, '{"images": [', tail))
        for index, record in enumerate(records):
            shown = [one for one in record.get("detections", ()) if one["score"] >= threshold]
            may_lack = record.get("may_lack_below", 0.0) > threshold
            line = {key: value for key, value in record.items() if key != "may_lack_below" or may_lack}
            lines.write(json.dumps(line | {"detections": shown} if "detections" in record else line) + "\n")
            images += 1
            detections += len(shown)
            if "error" in record:
                failed += 1
                reasons += [record["error"]] if failed <= _MOST_REASONS else []
                continue
            if may_lack:
                incomplete += 1
                lack_below = max(lack_below, record["may_lack_below"])
            image_id: CocoId = index + 1 if image_ids is None else image_ids[index]
            if listed is not None:
                name = record["file"] + (f"#{record['frame']}" if "frame" in record else "")
                listed.add({"id": image_id, "file_name": name, "width": record["width"], "height": record["height"]})
            for one in record["detections"]:
                if (category_id := categories[one["class_id"]]) is not None:
                    place = {"image_id": image_id, "category_id": category_id}
                    results.add({**place, "bbox": one["bbox"], "score": one["score"]})
    return PredictResults(images, failed, tuple(reasons), detections, incomplete=incomplete, lack_below=lack_below)


def read_records(path: Path) -> Iterator[Record]:
    """The lines of a `detections.jsonl`. Raises `OSError` and `ValueError`."""
    with path.open(encoding="utf-8") as file:
        for line in file:
            yield json.loads(line)


class _JsonList:
    """A JSON list in a file, written entry by entry between two texts; a context manager."""

    def __init__(self, path: Path, before: str, after: str) -> None:
        self._file: IO[str] = path.open("x", encoding="utf-8")
        self._after, self._empty = after, True
        self._file.write(before)

    def __enter__(self) -> _JsonList:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.write(f"{'' if self._empty else chr(10)}{self._after}\n")
        self._file.close()

    def add(self, entry: Any) -> None:
        self._file.write(f"{'' if self._empty else ','}\n{json.dumps(entry)}")
        self._empty = False
