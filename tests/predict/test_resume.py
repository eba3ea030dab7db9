"""The file of what is done: cut anywhere, it resumes from the last whole batch."""

from __future__ import annotations

import base64
import json
import math
import resource
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gfldeploy.detections import Detections
from gfldeploy.errors import DataError, OutputError
from gfldeploy.predict.pipeline import Found
from gfldeploy.predict.resume import WorkingFile

ARRAYS = ("boxes", "scores", "classes")

QUESTION = {"bundle": "ab", "batch_size": 2, "software": {"numpy": "2"}}
NOTHING = Detections(np.zeros((0, 4), np.float32), np.zeros(0, np.float32), np.zeros(0, np.int64))
BOXES = np.array([[1.5, -2.25, 1e-30, 4e5], [0.1, 0.2, 0.3, -0.0]], np.float32)
BATCHES = [
    [Found(0, "a", (3, 4), Detections(BOXES, BOXES[:, 0], np.array([1, 0]), 0.1)), Found(2, "c", (3, 4), NOTHING)],
    [Found(1, "b\udcff", None, None, DataError("zwölf", "Twelve."))],
    [Found(3, "d", (3, 4), NOTHING, None, 7, 0.28)],
]


def detected(box: Sequence[float] = (0, 0, 1.5, 1), score: float = 0.5, label: int = 1, **changed: Any) -> bytes:
    """A line of the working file for a batch of one image, which is odd."""
    data = np.array([*box, score], "<f4").tobytes() + np.array([label], "<i4").tobytes()
    numbers = {"detections": base64.b64encode(data).decode(), "may_lack_below": 0.0}
    entry = {"index": 1, "file": "b", "size": [3, 4]} | numbers | changed
    return json.dumps({"batch": 1, "images": [entry]}).encode() + b"\n"


def plain(batches: Iterable[Sequence[Found]]) -> list[Any]:
    """All that is in them, to compare."""
    return [
        [
            (one.index, one.name, one.size, str(one.error), one.frame, one.time_s)
            + (
                (*(getattr(one.detections, name).tobytes() for name in ARRAYS), one.detections.may_lack_below)
                if one.detections
                else ()
            )
            for one in batch
        ]
        for batch in batches
    ]


def write(path: Path) -> bytes:
    with WorkingFile(path, QUESTION, 9, 2) as working:
        for batch in BATCHES:
            working.add(batch)
        working.end()
    return path.read_bytes()


def test_what_is_added_is_read_back(tmp_path: Path) -> None:
    write(tmp_path / "w")
    with WorkingFile(tmp_path / "w", QUESTION, 9, 2) as working:
        assert (working.batches, working.images, working.complete) == (3, 4, True)
        assert plain(working.groups()) == plain(BATCHES)


def test_a_disk_that_fills_up(tmp_path: Path) -> None:
    path = tmp_path / "w"
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        with pytest.raises(OutputError, match=r"cannot write .*/w: "), WorkingFile(path, QUESTION, 9, 2) as working:
            working.add(BATCHES[0])
            resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + 10, before[1]))
            working.add(BATCHES[1])  # and it cannot be written when the file is closed either
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    with WorkingFile(path, QUESTION, 9, 2) as working:
        assert working.batches == 1


def test_cut_anywhere_it_resumes(tmp_path: Path) -> None:
    path = tmp_path / "w"
    whole = write(path)
    starts = [0, *(place + 1 for place, byte in enumerate(whole) if byte == ord("\n"))]
    for length in range(len(whole) + 1):
        path.write_bytes(whole[:length])
        with WorkingFile(path, QUESTION, 9, 2) as working:
            lines = sum(start <= length for start in starts[1:])  # that are whole
            assert working.batches == min(max(lines - 1, 0), 3)
            assert working.complete == (lines == 5)
            for batch in BATCHES[working.batches :]:
                working.add(batch)
            if not working.complete:
                working.end()
        assert path.read_bytes() == whole


@pytest.mark.parametrize(
    "junk",
    [
        b"\0\0\0\n",
        b'{"batch": 1}\n',
        b'{"batch": 1, "images": [{}]}\n',
        b'{"batch": 1, "images": [[1, {"file": "b", "error": "as an earlier version wrote it"}]]}\n',
        detected(index=9),
        detected(label=2),
        detected(label=-1),
        detected(score=math.nan),
        detected(box=(0, 0, math.inf, 1)),
        detected(box=(0, 0, 1)),
        detected(detections="AAAA"),
        detected(detections="no base64"),
        detected(detections=[]),
        detected(size=[0, 4]),
        detected(may_lack_below="0.5"),
        detected(frame=-1, time_s=0.0),
        detected(frame=1),
        b"[" * 100_000 + b"\n",
        b'{"batch": 9, "images": []}\n',
        b"[1]\n",
        b"{\n",
    ],
)
def test_what_follows_damage_is_done_again(junk: bytes, tmp_path: Path) -> None:
    path = tmp_path / "w"
    lines = write(path).splitlines(keepends=True)
    path.write_bytes(b"".join([*lines[:2], junk, *lines[2:]]))
    with WorkingFile(path, QUESTION, 9, 2) as working:
        assert (working.batches, working.images, working.complete) == (1, 2, False)
    assert path.read_bytes() == b"".join(lines[:2])


def test_another_question_is_refused_or_begun_anew(tmp_path: Path) -> None:
    path = tmp_path / "w"
    before = write(path)
    other = {**QUESTION, "batch_size": 4, "software": {"numpy": "3"}}
    with pytest.raises(OutputError, match=r"unfinished run with other batch size, software\. .*--force"):
        WorkingFile(path, other, 9, 2)
    assert path.read_bytes() == before
    with WorkingFile(path, other, 9, 2, anew=True) as working:
        assert (working.batches, working.complete) == (0, False)
    assert path.read_bytes().count(b"\n") == 1


def test_a_file_that_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="cannot write"):
        WorkingFile(tmp_path / "missing" / "w", QUESTION, 9, 2)
    with pytest.raises(OutputError, match="cannot write"):
        WorkingFile(tmp_path, QUESTION, 9, 2)
