"""The file of what is done: cut anywhere, it resumes from the last whole batch."""

from __future__ import annotations

import json
import resource
from pathlib import Path
from typing import Any

import pytest

from gfldeploy.errors import OutputError
from gfldeploy.predict.resume import WorkingFile

QUESTION = {"bundle": "ab", "batch_size": 2, "software": {"numpy": "2"}}
SIZED: dict[str, Any] = {"width": 4, "height": 3, "detections": []}
BATCHES: list[list[tuple[int, dict[str, Any]]]] = [
    [(0, {"file": "a", **SIZED}), (2, {"file": "c", **SIZED})],
    [(1, {"file": "b", "error": "zwölf"})],
    [(3, {"file": "d", **SIZED})],
]


def detected(**changed: Any) -> bytes:
    """A line of the working file for a batch of one image, whose detection is odd."""
    one = {"class": "ball", "class_id": 1, "score": 0.5, "bbox": [0, 0, 1.5, 1]} | changed
    record = {"file": "b", "width": 4, "height": 3, "detections": [one]}
    return json.dumps({"batch": 1, "images": [[1, record]]}).encode() + b"\n"


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
        assert list(working.groups()) == BATCHES


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
        b'{"batch": 1, "images": [[1, {}]]}\n',
        b'{"batch": 1, "images": [[9, {"file": "b", "error": "there is no tenth image"}]]}\n',
        detected(class_id=2),
        detected(score="0.5"),
        detected(bbox=[0, 0, 1]),
        detected(more=1),
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
