"""What a prediction has done so far, on disk: a killed one resumes where it stopped, to the same result.

A JSON line for the question (all that the results depend on), and one for what was done of a shard, shards in any
order: batches, from a number in the shard on; that it ended, with its number of images; or that inputs end whatever
process reads them, so that what was there of the shard is void. Lines are appended; a last line that was cut short is
removed. Since batches depend on the question alone, a run that resumes makes the missing batches and no others.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, TypeAlias

import numpy as np

from gfldeploy.detections import from_text, to_text
from gfldeploy.engines.base import ClosesOnExit
from gfldeploy.errors import DataError, OutputError
from gfldeploy.files import open_own, parse_json, writing
from gfldeploy.predict.pipeline import Found

# An image as a line has it, ready for JSON.
Entry: TypeAlias = dict[str, Any]

_FORM = 2  # of the lines; an earlier one knew no shards
_SIDES = range(1, 1 << 31)  # of an image
_FRAMES = range(1 << 62)
_MOST_BYTES = 256 << 20  # of a line
_MOST_DIGITS = 9  # of the place of an input in its shard
_MOST = 1e12  # no score and no side is as large, and NaN is not below it either
_ANEW = "add --force to begin again."


@dataclass(slots=True)
class _Done:
    """Of a shard. `spans`: where its lines are in the file, [start, stop); `bad`: as for `ShardTask`."""

    batches: int = 0
    images: int = 0
    indices: int = 0  # their sum
    squares: int = 0  # of the indices, their sum
    ended: bool = False
    bad: Mapping[int, str] = field(default_factory=dict)
    spans: list[tuple[int, int]] = field(default_factory=list)

    @property
    def is_whole(self) -> bool:
        """Whether the indices are those from 0 on: by sums, which take no memory; two wrong ones change one of them."""
        count = self.images
        whole = count * (count - 1) // 2
        return (self.indices, self.squares) == (whole, whole * (2 * count - 1) // 3)

    def add(self, batches: Sequence[Sequence[Entry]], start: int, stop: int) -> None:
        self.batches += len(batches)
        self.images += sum(map(len, batches))
        places = [entry["index"] for batch in batches for entry in batch]
        self.indices += sum(places)
        self.squares += sum(place * place for place in places)
        if self.spans and self.spans[-1][1] == start:
            start = self.spans.pop()[0]  # the usual case: one span for each shard
        self.spans.append((start, stop))


_NOTHING = _Done()


class Records(ClosesOnExit):
    """The lines of such a file, read; a context manager. It holds where the lines of a shard are, not what is in them.

    `shards`: the numbers of those that are to be done. `images`: how many are done. `processors`: of the machines that
    did the shards that ended.
    """

    def __init__(self, path: Path, shards: range, classes: int) -> None:
        """Open the file and read no line. `classes`: how many there are. Raises `OSError`."""
        self.path = path
        self.shards = shards
        self.images = 0
        self.processors: dict[str, None] = {}
        self._classes = range(classes)
        self._done: dict[int, _Done] = {}
        self._ended = 0
        self._lines = path.open("rb")

    def close(self) -> None:
        self._lines.close()

    @property
    def complete(self) -> bool:
        """Whether all shards ended."""
        return self._ended == len(self.shards)

    def batches(self, shard: int) -> int:
        """How many of the shard are done."""
        return self._done.get(shard, _NOTHING).batches

    def ended(self, shard: int) -> bool:
        """Whether all batches of the shard are done."""
        return self._done.get(shard, _NOTHING).ended

    def bad(self, shard: int) -> Mapping[int, str]:
        """The inputs of the shard, by their place in it, that are errors and are not opened, and why."""
        return self._done.get(shard, _NOTHING).bad

    def groups(self, shard: int) -> Iterator[list[Found]]:
        """The batches of a shard that are there now; their detections have no names of classes.

        `Found.index` counts from 0 in the shard. Raises `OutputError` if the file was changed meanwhile.
        """
        for start, stop in tuple(self._done.get(shard, _NOTHING).spans):
            while start < stop:
                self._lines.seek(start)
                line = self._lines.readline()
                start += len(line)
                batches = (_parsed(line) or {}).get("batches", ())
                found = [batch_of(batch) for batch in batches]
                if not found or None in found:
                    raise OutputError(f"{self.path} was changed while it was used", f"Run it again, and {_ANEW}")
                yield from (batch for batch in found if batch)

    def read(self, header: int) -> int:
        """Take in the lines after the first `header` bytes; the number of bytes that can be used."""
        position = header
        self._lines.seek(header)
        while line := self._lines.readline(_MOST_BYTES):
            entry = _parsed(line)
            if entry is None or not self._take(entry, position, position + len(line)):
                break
            position += len(line)
        return position

    def _take(self, entry: Entry, start: int, stop: int) -> bool:
        """Take in a line at this place; False for one that cannot be."""
        shard = entry.get("shard")
        if type(shard) is not int or shard not in self.shards:
            return False
        done = self._done.setdefault(shard, _Done())
        match entry:
            case {"batch": int(number), "batches": [_, *_] as batches}:
                if done.ended or number != done.batches or not all(map(self._is_possible, batches)):
                    return False
                done.add(batches, start, stop)
                self.images += sum(map(len, batches))
            case {"end": int(images), "processor": str(processor)}:
                if done.ended or images != done.images or not done.is_whole:
                    return False
                self._end(done, processor)
            case {"bad": dict() as reasons}:
                if done.ended or not all(_is_place(key) and isinstance(why, str) for key, why in reasons.items()):
                    return False
                self._again(shard, {int(key): why for key, why in reasons.items()})
            case _:
                return False
        return True

    def _end(self, done: _Done, processor: str) -> None:
        done.ended = True
        self._ended += 1
        self.processors[processor] = None

    def _again(self, shard: int, bad: Mapping[int, str]) -> None:
        self.images -= self._done.get(shard, _NOTHING).images
        self._done[shard] = _Done(bad=bad)

    def _is_possible(self, batch: object) -> bool:
        found = batch_of(batch)
        return bool(found) and all(_is_possible(one, self._classes) for one in found or ())


class WorkingFile(Records):
    """The open file, to which lines are appended."""

    def __init__(
        self, path: Path, question: Mapping[str, Any], shards: range, classes: int, *, anew: bool = False
    ) -> None:
        """Resume the file at `path` if there is one, else begin it.

        `shards`, `classes`: as for `Records`; what has other numbers is done again. `anew`: begin again if the file is
        of another question. Raises `OutputError` for another question unless `anew`, and for what the file system
        refuses.
        """
        with writing(path), ExitStack() as undo:
            self._file = undo.enter_context(open_own(path))
            super().__init__(path, shards, classes)
            undo.callback(super().close)
            line = self._lines.readline(_MOST_BYTES)
            kept = 0
            if (header := _parsed(line)) is not None and self._is_same(header, question, anew):
                kept = self.read(len(line))
            self._file.seek(kept)
            self._file.truncate()
            self._lines.seek(0, os.SEEK_END)  # forgets what it has read ahead, which may just have been cut off
            self._position = kept
            if kept == 0:
                self._append(_encoded({"form": _FORM, **question}))
            undo.pop_all()

    def close(self) -> None:
        super().close()
        with writing(self.path):  # once more what could not be written before
            self._file.close()

    def add(self, shard: int, batches: Sequence[Sequence[Entry]]) -> None:
        """Append the next batches of a shard, each as `plain_batch` makes it. Raises `OutputError`."""
        done = self._done.setdefault(shard, _Done())
        line = _encoded({"shard": shard, "batch": done.batches, "batches": batches})
        if len(line) > _MOST_BYTES and len(batches) > 1:
            middle = len(batches) // 2
            self.add(shard, batches[:middle])
            self.add(shard, batches[middle:])
            return
        if len(line) > _MOST_BYTES:  # it could not be read again
            raise OutputError(
                f"the detections of one batch take {len(line) / 1e6:,.0f} MB in {self.path}",
                "Use a smaller --batch-size, or a bundle whose NMS keeps fewer detections.",
            )
        start = self._position
        self._append(line)
        done.add(batches, start, self._position)
        self.images += sum(map(len, batches))

    def end(self, shard: int, processor: str) -> None:
        """Say that a machine with this processor did the last batch of a shard. Raises `OutputError`.

        Raises `DataError` where batches of this run do not fit those of an earlier one: an input whose size could not
        be read in one of them, as of a store that did not answer, makes others. What is there of the shard is void.
        """
        done = self._done.setdefault(shard, _Done())
        if done.ended:
            raise AssertionError(f"shard {shard} ends a second time")
        if not done.is_whole:
            self.again(shard, done.bad)
            raise DataError(
                f"some inputs of shard {shard} could be read in one run and not in another, so it is done anew",
                "Run the same command again: it resumes.",
            )
        self._append(_encoded({"shard": shard, "end": done.images, "processor": processor}))
        self._end(done, processor)

    def again(self, shard: int, bad: Mapping[int, str]) -> None:
        """Void what is there of a shard, which is done again with these inputs as errors. Raises `OutputError`."""
        self._append(_encoded({"shard": shard, "bad": bad}))
        self._again(shard, bad)

    def _is_same(self, header: Mapping[str, Any], question: Mapping[str, Any], anew: bool) -> bool:
        """Whether the file is of the question; False for one to begin again. Raises `OutputError`."""
        folder = self.path.parent
        if header.get("form") != _FORM and not anew:
            raise OutputError(f"{folder} is of an unfinished run of another version of gfldeploy", _ANEW.capitalize())
        if (other := differences(header, {"form": _FORM, **question})) and not anew:
            raise OutputError(
                f"{folder} is of an unfinished run with other {', '.join(other)}",
                f"Give the same command to resume it, or {_ANEW}",
            )
        return not other

    def _append(self, line: bytes) -> None:
        with writing(self.path):
            self._position += self._file.write(line)
            self._file.flush()


def read_header(file: IO[bytes]) -> tuple[Entry, int]:
    """The question at the beginning of such a file, and how many bytes it takes; nothing if it is not there."""
    line = file.readline(_MOST_BYTES)
    with suppress(ValueError):
        header = parse_json(line)
        if isinstance(header, dict) and header.pop("form", None) == _FORM:
            return header, len(line)
    return {}, 0


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """The names of what differs between two questions, the first as it was read."""
    now = json.loads(json.dumps(now))
    different = [key for key in {**before, **now} if before.get(key) != now.get(key)]
    if "detection" in different:  # of which each part is an option
        parts = [part if isinstance(part := one.get("detection", {}), dict) else {} for one in (before, now)]
        place = different.index("detection")
        different[place : place + 1] = differences(*parts) or ["detection"]
    return [key.replace("_", " ") for key in different]


def plain_batch(batch: Sequence[Found]) -> list[Entry]:
    """A batch, ready for JSON; `batch_of` is the inverse."""
    return list(map(_entry, batch))


def batch_of(entries: object) -> list[Found] | None:
    """The inverse of `plain_batch`; None for what it did not make."""
    if not isinstance(entries, list):
        return None
    found = [one for entry in entries if (one := _found(entry))]
    return found if len(found) == len(entries) else None


def _encoded(entry: Mapping[str, Any]) -> bytes:
    return json.dumps(entry).encode() + b"\n"


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


def _is_place(key: str) -> bool:
    return key.isascii() and key.isdecimal() and len(key) <= _MOST_DIGITS


def _is_possible(found: Found, classes: range) -> bool:
    """Whether its numbers can be; those of a damaged line are anything, and its batch is done again."""
    frame, one = (found.frame, found.time_s), found.detections
    numbers = [found.index in _FRAMES, frame == (None, None) or (found.frame in _FRAMES and _is_number(found.time_s))]
    if one is not None and found.size is not None:
        numbers += [side in _SIDES for side in found.size]
        numbers += [np.abs(values).max(initial=0) < _MOST for values in (one.boxes, one.scores)]
        numbers += [_is_number(one.may_lack_below), *(label in classes for label in np.unique(one.classes).tolist())]
    return all(numbers)


def _is_number(value: float | None) -> bool:
    return value is not None and abs(value) < _MOST
