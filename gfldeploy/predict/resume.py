"""What a prediction has done so far, on disk: a killed one resumes where it stopped, to the same result.

A JSON line for the question (all that the results depend on), one for each batch in order, and one for the end. Lines
are appended; a last line that was cut short is removed. Since batches depend on the question alone, a run that resumes
makes the missing batches and no others.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

from gfldeploy.detections import from_text, to_text
from gfldeploy.engines.base import ClosesOnExit
from gfldeploy.errors import DataError, OutputError
from gfldeploy.files import open_own, writing
from gfldeploy.predict.pipeline import Found

_END = {"end": True}
_SIDES = range(1, 1 << 31)  # of an image
_FRAMES = range(1 << 62)
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

    def add(self, batch: Sequence[Found]) -> None:
        """Append a batch. Raises `OutputError`."""
        self._append({"batch": self.batches, "images": list(map(_entry, batch))})
        self.batches += 1
        self.images += len(batch)

    def end(self) -> None:
        """Say that this was the last batch. Raises `OutputError`."""
        self._append(_END)
        self.complete = True

    def groups(self) -> Iterator[list[Found]]:
        """The batches; their detections have no names of classes."""
        with self.path.open("rb") as file:
            next(file)
            for number, line in enumerate(file):
                entry = json.loads(line)
                if entry != _END:
                    yield _batch(entry, number) or []

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
            elif number > 0 and entry and (found := _batch(entry, self.batches)) and self._possible(found):
                self.batches += 1
                self.images += len(found)
            elif number > 0 or entry is None:
                break
            position += len(line)
        return position

    def _possible(self, batch: Sequence[Found]) -> bool:
        return all(_is_possible(one, *self._numbers) for one in batch)

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


def _entry(found: Found) -> dict[str, Any]:
    """Of an image, as a line has it.

    The numbers of its detections are in one text, as they are in memory: as JSON they would take most of the time.
    """
    entry: dict[str, Any] = {"index": found.index, "file": found.name}
    if found.frame is not None and found.time_s is not None:
        entry |= {"frame": found.frame, "time_s": found.time_s}
    if found.detections is None or found.size is None:
        error = found.error or DataError(f"{found.name} cannot be used")
        return entry | {"error": error.problem, "remedy": error.remedy}
    one = found.detections
    return entry | {"size": found.size, "detections": to_text(one), "may_lack_below": one.may_lack_below}


def _batch(entry: Mapping[str, Any], number: int) -> list[Found] | None:
    """The batch of this number; None if it is anything else."""
    match entry:
        case {"batch": batch, "images": [*entries]} if batch == number:
            found = [one for entry in entries if (one := _found(entry))]
            return found if len(found) == len(entries) else None
    return None


def _found(entry: Any) -> Found | None:
    match entry:
        case {"index": int(index), "file": str(name), **rest}:
            frame, time_s = rest.get("frame"), rest.get("time_s")
            if not isinstance(frame, int | None) or not isinstance(time_s, int | float | None):
                return None
            match entry:
                case {"error": str(problem), "remedy": str() | None as remedy}:
                    return Found(index, name, None, None, DataError(problem, remedy), frame, time_s)
                case {"size": [int(h), int(w)], "detections": str(text), "may_lack_below": int() | float() as lacks}:
                    if (detections := from_text(text, lacks)) is not None:
                        return Found(index, name, (h, w), detections, None, frame, time_s)
    return None


def _is_possible(found: Found, images: range, classes: range) -> bool:
    """Whether its numbers can be; those of a damaged line are anything, and its batch is done again."""
    frame, one = (found.frame, found.time_s), found.detections
    numbers = [found.index in images, frame == (None, None) or (found.frame in _FRAMES and _is_number(found.time_s))]
    if one is not None and found.size is not None:
        numbers += [side in _SIDES for side in found.size]
        numbers += [np.abs(values).max(initial=0) < _MOST for values in (one.boxes, one.scores)]
        numbers += [_is_number(one.may_lack_below), *(label in classes for label in np.unique(one.classes).tolist())]
    return all(numbers)


def _is_number(value: float | None) -> bool:
    return value is not None and abs(value) < _MOST


def _differences(before: Mapping[str, Any], question: Mapping[str, Any]) -> list[str]:
    """The names of what differs."""
    now = json.loads(json.dumps(question))
    return [key.replace("_", " ") for key in {**before, **now} if before.get(key) != now.get(key)]
