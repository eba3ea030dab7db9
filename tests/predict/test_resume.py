"""The file of what is done: cut anywhere, it resumes from the last whole batch."""

from __future__ import annotations

import base64
import gc
import json
import math
import tracemalloc
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gfldeploy.detections import Detections
from gfldeploy.errors import DataError, OutputError
from gfldeploy.predict import resume
from gfldeploy.predict.pipeline import Found
from gfldeploy.predict.resume import WorkingFile, batch_of, plain_batch

ARRAYS = ("boxes", "scores", "classes")

QUESTION = {"bundle": "ab", "batch_size": 2, "software": {"numpy": "2"}}
NOTHING = Detections(np.zeros((0, 4), np.float32), np.zeros(0, np.float32), np.zeros(0, np.int64))
BOXES = np.array([[1.5, -2.25, 1e-30, 4e5], [0.1, 0.2, 0.3, -0.0]], np.float32)
# Of shards, in the order in which they came.
BATCHES = [
    (1, [Found(0, "d", (3, 4), Detections(BOXES, BOXES[:, 0], np.array([1, 0]), 0.1)), Found(2, "f", (3, 4), NOTHING)]),
    (0, [Found(1, "b\udcff", None, None, DataError("zwölf", "Twelve."))]),
    (1, [Found(1, "e", (3, 4), NOTHING, None, 7, 0.28)]),
    (0, [Found(0, "a", (3, 4), NOTHING)]),
]
SHARDS = range(2)
BATCH = [[{"index": 0, "file": "a", "error": "it is empty", "remedy": None}]]


def detected(box: Sequence[float] = (0, 0, 1.5, 1), score: float = 0.5, label: int = 1, **changed: Any) -> bytes:
    """A line of the working file for a batch of one image, which is odd."""
    data = np.array([*box, score], "<f4").tobytes() + np.array([label], "<i4").tobytes()
    numbers = {"detections": base64.b64encode(data).decode(), "may_lack_below": 0.0}
    entry = {"index": 1, "file": "b", "size": [3, 4]} | numbers | changed
    return line(shard=0, batch=0, batches=[[entry]])


def line(**entry: Any) -> bytes:
    return json.dumps(entry).encode() + b"\n"


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


def opened(path: Path, question: dict[str, Any] = QUESTION, anew: bool = False) -> WorkingFile:
    return WorkingFile(path, question, SHARDS, 2, anew=anew)


def carry_on(working: WorkingFile) -> None:
    """Add what is not there yet."""
    numbers = [0, 0]
    for shard, batch in BATCHES:
        if numbers[shard] == working.batches(shard):
            working.add(shard, [plain_batch(batch)])
        numbers[shard] += 1
    for shard in SHARDS:
        if not working.ended(shard):
            working.end(shard, "cpu")


def write(path: Path) -> bytes:
    with opened(path) as working:
        carry_on(working)
    return path.read_bytes()


def read_back(working: WorkingFile) -> list[Any]:
    return [plain(working.groups(shard)) for shard in SHARDS]


WHOLE = [plain(batch for number, batch in BATCHES if number == shard) for shard in SHARDS]


def test_what_is_added_is_read_back(tmp_path: Path) -> None:
    write(tmp_path / "w")
    with opened(tmp_path / "w") as working:
        assert (working.batches(0), working.batches(1), working.images, working.complete) == (2, 2, 5, True)
        assert read_back(working) == WHOLE
        assert list(working.processors) == ["cpu"]


def test_it_is_read_back_while_it_is_written(tmp_path: Path) -> None:
    with opened(tmp_path / "w") as working:
        (shard, first), (_, other), (_, second), _ = BATCHES
        working.add(shard, [plain_batch(first)])
        kept = working.groups(shard)
        assert plain([next(kept)]) == plain([first])
        working.add(0, [plain_batch(other)])
        working.add(shard, [plain_batch(second)])
        assert list(kept) == [], "what was there when it was asked for"
        assert plain(working.groups(shard)) == plain([first, second])
        assert not working.complete and not working.ended(shard)


def test_what_is_read_back_was_written_by_this_run(tmp_path: Path) -> None:
    write(tmp_path / "w")
    other = [Found(0, "of the other run", (3, 4), NOTHING)]
    with opened(tmp_path / "w", {**QUESTION, "bundle": "cd"}, anew=True) as working:  # as long as the header before
        working.add(1, [plain_batch(other)])
        working.end(1, "cpu")
        assert plain(working.groups(1)) == plain([other])
    damaged = (tmp_path / "w").read_bytes().replace(b"other run", b"\0ther run")
    (tmp_path / "w").write_bytes(damaged)
    with opened(tmp_path / "w", {**QUESTION, "bundle": "cd"}) as working:
        assert working.batches(1) == 0, "what is after a damaged line is done again"
        working.add(1, [plain_batch(other)])
        assert plain(working.groups(1)) == plain([other])


def test_an_input_that_could_be_read_in_one_run_alone(tmp_path: Path) -> None:
    with opened(tmp_path / "w") as working:
        working.add(0, [plain_batch([Found(0, "a", (3, 4), NOTHING), Found(1, "b", (3, 4), NOTHING)])])
        working.add(0, [plain_batch([Found(1, "b", (3, 4), NOTHING)])])
        with pytest.raises(DataError, match=r"shard 0 could be read in one run .* Run the same command again"):
            working.end(0, "cpu")
    with opened(tmp_path / "w") as working:
        assert (working.batches(0), working.images) == (0, 0)
        carry_on(working)
        assert read_back(working) == WHOLE


def test_a_line_of_several_batches(tmp_path: Path) -> None:
    batches = [batch for shard, batch in BATCHES if shard == 1]
    for _ in range(2):
        with opened(tmp_path / "w") as working:
            if working.batches(1) == 0:
                working.add(1, [plain_batch(batch) for batch in batches])
            assert (working.batches(1), working.images) == (2, 3)
            assert plain(working.groups(1)) == plain(batches)


def test_a_batch_goes_as_json() -> None:
    for _, batch in BATCHES:
        assert plain([batch_of(json.loads(json.dumps(plain_batch(batch)))) or []]) == plain([batch])


def test_what_was_there_of_a_shard_is_void(tmp_path: Path) -> None:
    path = tmp_path / "w"
    write(path)
    path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[:-2]))  # neither has ended
    with opened(path) as working:
        working.again(1, {2: "it ends its worker"})
    for _ in range(2):
        with opened(path) as working:
            assert (working.batches(0), working.batches(1), working.images) == (2, 0, 2)
            assert (working.bad(0), working.bad(1)) == ({}, {2: "it ends its worker"})
            assert list(working.groups(1)) == []
    with opened(path) as working:
        carry_on(working)
    with opened(path) as working:
        assert working.complete and read_back(working) == WHOLE


@pytest.mark.posix
def test_a_disk_that_fills_up(tmp_path: Path) -> None:
    import resource

    path = tmp_path / "w"
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        with pytest.raises(OutputError, match=r"cannot write .*/w: "), opened(path) as working:
            working.add(1, [plain_batch(BATCHES[0][1])])
            resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + 10, before[1]))
            working.add(0, [plain_batch(BATCHES[1][1])])  # and it cannot be written when the file is closed either
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    with opened(path) as working:
        assert (working.batches(0), working.batches(1)) == (0, 1)


def test_cut_anywhere_it_resumes(tmp_path: Path) -> None:
    path = tmp_path / "w"
    whole = write(path)
    starts = [0, *(place + 1 for place, byte in enumerate(whole) if byte == ord("\n"))]
    near = {start + more for start in starts for more in (-1, 0, 1)}  # and some between
    for length in sorted(one for one in {*near, *range(0, len(whole), 9)} if 0 <= one <= len(whole)):
        path.write_bytes(whole[:length])
        with opened(path) as working:
            lines = sum(start <= length for start in starts[1:])  # that are whole
            assert working.batches(0) + working.batches(1) == min(max(lines - 1, 0), 4)
            assert working.complete == (lines == 7)
            carry_on(working)
        assert path.read_bytes() == whole


@pytest.mark.parametrize(
    "junk",
    [
        b"\0\0\0\n",
        line(batch=0),
        line(shard=0, batch=0, batches=[]),
        line(shard=0, batch=0, batches=[[]]),
        line(shard=0, batch=0, batches=[[{}]]),
        line(shard=0, batch=1, batches=BATCH),
        line(shard=1, batch=0, batches=BATCH),
        line(shard=2, batch=0, batches=BATCH),
        line(shard=-1, batch=0, batches=BATCH),
        line(shard=1, end=3, processor="cpu"),
        line(shard=1, end=2, processor="cpu"),
        line(shard=0, end=0),
        line(shard=0, bad={"x": "y"}),
        line(shard=0, bad={"9" * 5000: "y"}),
        line(shard=0, bad=[]),
        detected(index=-1),
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
        b"[1]\n",
        b"{\n",
    ],
)
def test_what_follows_damage_is_done_again(junk: bytes, tmp_path: Path) -> None:
    path = tmp_path / "w"
    lines = write(path).splitlines(keepends=True)
    path.write_bytes(b"".join([*lines[:2], junk, *lines[2:]]))
    with opened(path) as working:
        assert (working.batches(0), working.batches(1), working.images, working.complete) == (0, 1, 2, False)
    assert path.read_bytes() == b"".join(lines[:2])


def test_another_question_is_refused_or_begun_anew(tmp_path: Path) -> None:
    path = tmp_path / "w"
    before = write(path)
    other = {**QUESTION, "batch_size": 4, "software": {"numpy": "3"}}
    with pytest.raises(OutputError, match=r"unfinished run with other batch size, software\. .*--force"):
        opened(path, other)
    assert path.read_bytes() == before
    with opened(path, other, anew=True) as working:
        assert (working.images, working.complete) == (0, False)
    assert path.read_bytes().count(b"\n") == 1


def test_work_of_an_earlier_version_is_refused_or_begun_anew(tmp_path: Path) -> None:
    path = tmp_path / "w"
    path.write_bytes(line(**QUESTION) + line(batch=0, images=BATCH[0]) + line(end=True))
    before = path.read_bytes()
    with pytest.raises(OutputError, match=r"run of another version of gfldeploy\. Add --force to begin again"):
        opened(path)
    assert path.read_bytes() == before
    opened(path, anew=True).close()
    assert path.read_bytes().count(b"\n") == 1


def test_a_file_that_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="cannot write"):
        opened(tmp_path / "missing" / "w")
    with pytest.raises(OutputError, match="cannot write"):
        opened(tmp_path)


def held() -> int:
    """Bytes that were allocated by `resume`, or under it, and are still there; other threads' are not counted."""
    gc.collect()
    here = tracemalloc.Filter(True, resume.__file__, all_frames=True)
    return sum(one.size for one in tracemalloc.take_snapshot().filter_traces([here]).statistics("filename"))


def test_memory_is_of_the_shards_alone(tmp_path: Path) -> None:
    """In a file that is written, and in one that is read: an image as it is in memory has ten times as much."""
    batch = [[{"index": 0, "file": "a" * 100, "error": "it is empty", "remedy": None}]]
    count, sizes = 1000, []
    tracemalloc.start(8)
    try:
        with opened(tmp_path / "w") as working:
            for number in range(count):
                batch[0][0]["index"] = number
                working.add(0, batch)
            sizes.append(held())
        with opened(tmp_path / "w") as working:
            assert working.images == count
            sizes.append(held())
    finally:
        tracemalloc.stop()
    assert 0 < max(sizes) < 60 * count


def test_no_line_is_longer_than_what_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "working.jsonl"
    several = [[Found(number, f"image {number}", (3, 4), NOTHING)] for number in range(7)]
    monkeypatch.setattr(resume, "_MOST_BYTES", 400)
    with opened(path) as working:
        working.add(0, list(map(plain_batch, several)))
        huge = [Found(number, "a" * 80, (3, 4), NOTHING) for number in range(5)]
        with pytest.raises(OutputError, match=r"one batch take .*smaller --batch-size"):
            working.add(1, [plain_batch(huge)])
    assert max(map(len, path.read_bytes().splitlines(keepends=True))) <= 400
    with opened(path) as working:
        assert (working.batches(0), working.images) == (7, 7)
        assert plain(working.groups(0)) == plain(several)
