"""From the parts that `predict_images(shard=(k, n))` wrote, on whatever machines, to the results of one run."""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from gfldeploy.detection_options import DetectionOptions
from gfldeploy.errors import DataError, GfldeployError, reading
from gfldeploy.files import (
    StrPath,
    atomic_directory,
    check_apart,
    check_target,
    is_unfinished,
    publish,
    read_json,
    scratch_directory,
    sha256,
    writing,
)
from gfldeploy.images.coco import CocoId
from gfldeploy.predict.draw import drawn_from
from gfldeploy.predict.outputs import NOTE, PredictResults, write_outputs
from gfldeploy.predict.pipeline import Found, in_order
from gfldeploy.predict.resume import Records, differences, read_header
from gfldeploy.predict.session import (
    HARDWARE,
    PART,
    RECORDS,
    detection_of,
    finish_results,
    part_of,
    processors,
)
from gfldeploy.predict.shards import Shards
from gfldeploy.progress import SILENT, Progress
from gfldeploy.serialization import check
from gfldeploy.storage import Source, Url, open_url, source_of
from gfldeploy.text import first_of

_REMEDY = "Give the folders that `gfldeploy predict --shard K/N` wrote."
_CONTENT = {
    "part": str,
    "records": str,
    "classes": [str],
    "threshold": float,
    "images": int,
    "listed": int,
    "batch_size": int,
}
_PLACE = re.compile(r"([1-9]\d{0,5})/([1-9]\d{0,5})")
_MOST_NAMED = 5
_COPY_BYTES = 1 << 24


@dataclass(frozen=True)
class _Part:
    """A part's folder, its place `number`, from 1, `of` how many, the numbers of its shards, and what its files say.

    `source`: the folder as it was given; `folder`: where it is on this machine. `inputs`: how many it has. `question`:
    what its records begin with, in `header` bytes. `note`: the rest of what it says of itself.
    """

    source: Source
    folder: Path
    number: int
    of: int
    shards: range
    inputs: int
    question: Mapping[str, Any]
    header: int
    note: Mapping[str, Any]

    @property
    def detection(self) -> DetectionOptions:
        """What was turned of NMS and of what is shown."""
        try:
            detection = detection_of(self.question)
            detection.shown(self.note["classes"])
        except GfldeployError as error:
            raise self.damaged(error.problem) from error
        return detection

    @property
    def common(self) -> dict[str, Any]:
        """What all parts have in common."""
        own = {key: value for key, value in self.question.items() if key not in ("part", *HARDWARE)}
        shared = {key: self.note[key] for key in ("classes", "categories", "listed")}
        return {**own, **shared, "number of parts": self.of}

    @property
    def processors(self) -> list[Any]:
        """Of the machines that did it: on a Ray cluster several, and maybe not that of the command."""
        named = self.note.get("processor")
        return named if isinstance(named, list) else [named]

    def damaged(self, how: str) -> DataError:
        again = f"Run its command again, with --shard {self.number}/{self.of} and --force."
        return DataError(f"{self.source} is damaged: {how}", again)


def merge_parts(
    parts: StrPath | Iterable[StrPath],
    *,
    output: StrPath,
    draw: bool = False,
    draw_threshold: float | None = None,
    force: bool = False,
    progress: Progress = SILENT,
) -> PredictResults:
    """Write what one `predict_images` would have written, from the parts that several wrote with `shard`.

    The bytes are the same where the processors are; others may differ in the last digits of scores and boxes, which is
    noted, and `predict.json` lists them.

    Args:
        parts: The folders of all parts, in any order, paths or addresses of filesystems.
        output: The folder to write, as that of `predict_images`.
        draw: Draw the boxes, too: the images have to be where they were.
        draw_threshold: The lowest score in pictures, if a higher one than in `detections.jsonl`.
        force: Replace the output if gfldeploy made it.
        progress: Told of notes, and of the images that are done.

    Returns:
        How many images there were, how many could not be read, and why.

    Raises:
        UsageError: Pictures cannot have this threshold.
        DataError: A part is missing, is there twice, is of another run, or is damaged; or no image could be read.
        ServerError: A store of parts at addresses, or of the output, does not answer, or lets nobody in.
        OutputError: The output cannot be written, or something is in the way.
    """
    given = [source_of(one) for one in ([parts] if isinstance(parts, str | os.PathLike) else parts)]
    if not given:
        raise DataError("there are no parts to merge", _REMEDY)
    target = source_of(output)
    check_apart(target, given)
    check_target(target, "predict", force=force)
    with ExitStack() as stack:
        copies = stack.enter_context(scratch_directory()) if any(isinstance(one, Url) for one in given) else Path()
        found = _together([_read(one, _here(one, copies / str(place))) for place, one in enumerate(given)])
        return _merge(found, target, draw, draw_threshold, force, progress)


def _merge(
    found: Sequence[_Part],
    target: Source,
    draw: bool,
    draw_threshold: float | None,
    force: bool,
    progress: Progress,
) -> PredictResults:
    working = [one for one in found if one.shards]
    note, question = working[0].note, {key: value for key, value in working[0].question.items() if key != "part"}
    detection = working[0].detection
    question |= processors(question, (name for one in working for name in one.processors))
    gpus = {json.dumps(one.question.get("gpus")): one.question.get("gpus") for one in working}
    if len(gpus) > 1:
        question["gpus"] = list(gpus.values())
    several = question["processor"] if isinstance(question["processor"], list) else list(gpus)
    if len(several) > 1:
        progress.note(f"the parts ran on several processors, which may round differently: {'; '.join(several):.300}")
    question["draw_threshold"] = drawn_from(draw, draw_threshold, detection.shown(note["classes"]))
    for one in found:
        if sha256(one.folder / RECORDS) != one.note["records"]:
            raise one.damaged(f"{RECORDS} is not as it was written")
    ids = None if note["ids"] is None else [image_id for one in found for image_id in one.note["ids"]]
    with _written_to(target, force) as results:
        images = _images(found, progress)
        summary = write_outputs(results, images, note["classes"], ids, note["categories"], detection, target)
        finish_results(results, question, summary, question["draw_threshold"], progress)
    return summary


@contextmanager
def _written_to(target: Source, force: bool) -> Iterator[Path]:
    """A folder that becomes the output when the block succeeds."""
    if isinstance(target, Path):
        with atomic_directory(target, "predict", force=force) as results:
            yield results
        return
    with scratch_directory() as results:
        yield results
        check_target(target, "predict", force=force)
        with writing(target):
            publish(results, target, "predict")


def _here(source: Source, copy: Path) -> Path:
    """The folder of a part; of one at an address a `copy`. Raises `DataError` and `ServerError`."""
    if isinstance(source, Path):
        return source
    for name in (NOTE, RECORDS):
        reads = reading(source / name, DataError, _REMEDY)
        with reads, suppress(FileNotFoundError), open_url(source / name, None) as file:
            block = file.read(_COPY_BYTES)  # which says whether it is there
            copy.mkdir(exist_ok=True)
            with (copy / name).open("wb") as here:
                while block:
                    here.write(block)
                    block = file.read(_COPY_BYTES)
    return copy


def _images(parts: Sequence[_Part], progress: Progress) -> Iterator[Found]:
    """What is in the parts, in order. Raises `DataError` for a part that is not whole."""
    done, total = 0, sum(one.note["images"] for one in parts)
    for one in parts:
        path = one.folder / RECORDS
        with reading(path, DataError, _REMEDY), Records(path, one.shards, len(one.note["classes"])) as records:
            if records.read(one.header) != path.stat().st_size or not records.complete:
                raise one.damaged("not all of its shards are there")
            # Each image has at least one line, and a video several.
            if records.images != one.note["images"] or records.images < one.inputs:
                raise one.damaged(f"it has {records.images} images, and its {NOTE} says {one.note['images']}")
            if one.note["ids"] is not None and records.images != one.inputs:
                raise one.damaged(f"it has {records.images} images, and {one.inputs} ids")
            for shard in one.shards:
                yield from in_order(((image.index, image) for image in group) for group in records.groups(shard))
            done += records.images
            progress.step("merging", done, total)


def _read(source: Source, folder: Path) -> _Part:
    """What a part says of itself. Raises `DataError`."""
    path = source / NOTE
    if not (folder / NOTE).exists() and is_unfinished(folder, "predict"):
        raise DataError(f"{source} is unfinished", "Run its command again: it resumes.")
    if not (folder / NOTE).exists():
        raise DataError(
            f"{source} is no part: {f'it has no {NOTE}' if folder.exists() else 'it is not there'}", _REMEDY
        )
    with reading(path, DataError, _REMEDY):
        note = read_json(folder / NOTE)
        if not isinstance(note, dict) or note.get("what") != PART:
            raise DataError(f"{path} is not of a part", _REMEDY)
        check(_CONTENT, note, str(path))
        place = _PLACE.fullmatch(note["part"])
        number, of = map(int, place.groups()) if place else (1, 0)
        if number > of or min(note["listed"], note["batch_size"]) < 1 or note["images"] < 0:
            raise DataError(f"{path} has numbers that cannot be", _REMEDY)
        shards = Shards(note["listed"], note["batch_size"])
        mine = part_of(len(shards), number, of)
        inputs = min(mine.stop * shards.size, shards.inputs) - mine.start * shards.size if mine else 0
        _check_ids(note, inputs, path)
        part = _Part(source, folder, number, of, mine, inputs, {}, 0, note)
        check([str], part.processors, f"{path}: processor")
    if not (folder / RECORDS).is_file():
        raise part.damaged(f"it has no {RECORDS}")
    with reading(folder / RECORDS, DataError, _REMEDY), (folder / RECORDS).open("rb") as file:
        question, header = read_header(file)
    same = all(question.get(key) == note.get(key) for key in ("part", "batch_size", "threshold", "detection"))
    if not same or question.get("draw_threshold", "absent") is not None:
        raise part.damaged(f"{RECORDS} and {NOTE} are not of one another")
    return replace(part, question=question, header=header)


def _check_ids(note: dict[str, Any], images: int, path: Source) -> None:
    """Raise `DataError` unless the ids of images and categories, None or as many as needed, are what ids can be."""
    for key, count in (("ids", images), ("categories", len(note["classes"]))):
        values = note.setdefault(key, None)
        if values is not None and not (
            isinstance(values, list)
            and len(values) == count
            and all(isinstance(one, CocoId | None if key == "categories" else CocoId) for one in values)
        ):
            raise DataError(f"{path} has other {key} than it needs", _REMEDY)


def _together(parts: Sequence[_Part]) -> list[_Part]:
    """The parts in order. Raises `DataError` unless they are all of one run, each once."""
    keys = [json.dumps(one.common, sort_keys=True) for one in parts]
    most = Counter(keys).most_common(1)[0][0]
    first = parts[keys.index(most)]
    for one, key in zip(parts, keys, strict=True):
        if key != most:
            other = ", ".join(differences(first.common, one.common))
            raise DataError(
                f"{one.source} is not of the run of {first.source}: other {other}",
                "Leave it out, or run its command again with the arguments and the software of the others.",
            )
    by_number: dict[int, _Part] = {}
    for one in parts:
        if (same := by_number.setdefault(one.number, one)) is not one:
            problem = f"{same.source} and {one.source} are both part {one.number} of {one.of}"
            raise DataError(problem, "Give each part once.")
    if missing := [number for number in range(1, first.of + 1) if number not in by_number]:
        raise DataError(
            f"of {first.of} parts {first_of(missing, _MOST_NAMED)} {'is' if len(missing) == 1 else 'are'} missing",
            f"Give {'its folder' if len(missing) == 1 else 'their folders'} too, or run --shard "
            f"{missing[0]}/{first.of}.",
        )
    return [by_number[number] for number in sorted(by_number)]
