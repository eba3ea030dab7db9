"""What a prediction has done so far, on disk: a killed one resumes where it stopped, to the same result.

A JSON line for the question (all that the results depend on), one for each batch in order, and one for the end. Lines
are appended; a last line that was cut short is removed. Since batches depend on the question alone, a run that resumes
makes the missing batches and no others.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, TypeAlias

from gfldeploy.engines.base import ClosesOnExit
from gfldeploy.errors import OutputError
from gfldeploy.files import open_own, writing

# One image's line in the result, ready for JSON.
Record: TypeAlias = dict[str, Any]
_END = {"end": True}
_SIDES = range(1, 1 << 31)  # of an image
_MOST = 1e12  # no score and no side is as large, and NaN is not below it either


class WorkingFile(ClosesOnExit):
    """The open file; a context manager. `batches`, `images`: how many are done. `complete`: all are."""

    def __init__(
        self, path: Path, question: Mapping[str, Any], images: int, classes: int, *, anew: bool = False
    ) -> None:
        """Resume the file at `path` if there is one, else begin it.

        `images`, `classes`: how many there are; a batch with other numbers is made again. `anew`: begin again if the
        file is of another question. Raises `OutputError` for another question unless `anew`, and for what the file
        system refuses.
        """
        self.path = path
        self._numbers = range(images), range(classes)
        self.batches = self.images = 0
        self.complete = False
        with writing(path), ExitStack() as undo:
            self._file = undo.enter_context(open_own(path))
            kept = self._read(question, anew)
            self._file.seek(kept)
            self._file.truncate()
            if kept == 0:
                self._append(question)
            undo.pop_all()

    def close(self) -> None:
        with writing(self.path):  # once more what could not be written before
            self._file.close()

    def add(self, batch: Sequence[tuple[int, Record]]) -> None:
        """Append a batch: each image's number among all, from 0, and its record. Raises `OutputError`."""
        self._append({"batch": self.batches, "images": batch})
        self.batches += 1
        self.images += len(batch)

    def end(self) -> None:
        """Say that this was the last batch. Raises `OutputError`."""
        self._append(_END)
        self.complete = True

    def groups(self) -> Iterator[Iterable[tuple[int, Record]]]:
        """The batches."""
        with self.path.open("rb") as file:
            next(file)
            for line in file:
                entry = json.loads(line)
                if entry != _END:
                    yield [(index, record) for index, record in entry["images"]]

    def _read(self, question: Mapping[str, Any], anew: bool) -> int:
        """How many bytes of the file can be used."""
        position = 0
        for number, line in enumerate(self._file):
            entry = _parsed(line)
            if number == 0 and entry is not None and (other := _differences(entry, question)):
                if anew:
                    return 0
                raise OutputError(
                    f"{self.path.parent} is of an unfinished run with other {', '.join(other)}",
                    "Give the same command to resume it, or add --force to begin again.",
                )
            if number > 0 and entry == _END:
                self.complete = True
            elif number > 0 and entry is not None and _is_batch(entry, self.batches, *self._numbers):
                self.batches += 1
                self.images += len(entry["images"])
            elif number > 0 or entry is None:
                break
            position += len(line)
        return position

    def _append(self, entry: Mapping[str, Any]) -> None:
        with writing(self.path):
            self._file.write(json.dumps(entry).encode() + b"\n")
            self._file.flush()


def _parsed(line: bytes) -> dict[str, Any] | None:
    """None for a line that was cut short."""
    try:
        entry = json.loads(line) if line.endswith(b"\n") else None
    except (ValueError, RecursionError):
        return None
    return entry if isinstance(entry, dict) else None


def _is_batch(entry: Mapping[str, Any], number: int, images: range, classes: range) -> bool:
    """Whether it is the batch of this number; if not, the batch is done again."""
    match entry:
        case {"batch": batch, "images": [*found]} if batch == number:
            return all(
                isinstance(one, list) and len(one) == 2 and _is_in(one[0], images) and _is_record(one[1], classes)
                for one in found
            )
    return False


def _is_record(one: Any, classes: range) -> bool:
    match one:
        case {"file": str(), "error": str()}:
            return True
        case {"file": str(), "width": width, "height": height, "detections": [*found]}:
            numbers = _is_in(width, _SIDES) and _is_in(height, _SIDES) and _is_number(one.get("may_lack_below", 0.0))
            return numbers and all(_is_detection(each, classes) for each in found)
    return False


def _is_detection(one: Any, classes: range) -> bool:
    match one:
        case {"class": str(), "class_id": category, "score": score, "bbox": [x, y, width, height], **rest}:
            return not rest and _is_in(category, classes) and all(map(_is_number, (score, x, y, width, height)))
    return False


def _is_in(value: Any, numbers: range) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value in numbers


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < _MOST


def _differences(before: Mapping[str, Any], question: Mapping[str, Any]) -> list[str]:
    """The names of what differs."""
    now = json.loads(json.dumps(question))
    return [key.replace("_", " ") for key in {**before, **now} if before.get(key) != now.get(key)]
