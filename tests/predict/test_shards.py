"""Shards: how inputs are cut, and that one worker finds in them what one pipeline finds."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from threading import Event
from typing import Any

import cv2
import numpy as np
import pytest

from gfldeploy.errors import BundleError
from gfldeploy.predict.engine_selection import choose
from gfldeploy.predict.pipeline import Found
from gfldeploy.predict.shards import ShardJob, Shards, ShardTask, ShardWorker
from gfldeploy.serialization import build, plain

pytest.importorskip("onnxruntime")

SIZES = [(48, 80), (80, 48), (64, 64)]


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """25 images of three sizes, of which one is damaged."""
    folder = tmp_path_factory.mktemp("shards")
    source = np.random.default_rng(0)
    for number in range(25):
        assert cv2.imwrite(
            str(folder / f"{number:02d}.jpg"), source.integers(0, 256, (*SIZES[number % 3], 3), np.uint8)
        )
    (folder / "07.jpg").write_bytes(b"no picture")
    return sorted(folder.iterdir())


@pytest.fixture(scope="module")
def job(tiny_bundle: Path) -> ShardJob:
    choice = choose(tiny_bundle, engine="onnxruntime", threads=1, batch_size=2)
    return ShardJob.of(choice, choice.options, reduced=False)


def told(batch: list[Found]) -> list[Any]:
    """All that is in a batch, to compare."""
    return [(one.index, one.name, one.size, str(one.error), one.detections and plain_detections(one)) for one in batch]


def plain_detections(found: Found) -> tuple[bytes, ...]:
    assert found.detections is not None
    return found.detections.boxes.tobytes(), found.detections.scores.tobytes(), found.detections.classes.tobytes()


@pytest.mark.parametrize("batch_size", [1, 3, 8, 16])
@pytest.mark.parametrize("inputs", [0, 1, 31, 32, 33, 1000, 2049, 100_000])
def test_every_input_is_in_one_shard(inputs: int, batch_size: int) -> None:
    shards = Shards(inputs, batch_size)
    assert [one.number for one in shards] == list(range(len(shards)))
    edges = [0, *(one.stop for one in shards)]
    assert [one.start for one in shards] == edges[:-1] and edges[-1] == inputs
    for one in shards[:-1]:
        assert one.stop - one.start == shards.size and shards.size % batch_size == 0
        assert 32 * batch_size <= shards.size <= max(256 + batch_size, 32 * batch_size)
    assert all(one.stop > one.start for one in shards)


def test_a_hundred_million_inputs_take_no_memory() -> None:
    shards = Shards(100_000_000, 8)
    assert shards[-1].stop == 100_000_000 and shards[5].start == 5 * 256
    assert [one.number for one in shards[2:4]] == [2, 3]
    with pytest.raises(IndexError):
        shards[len(shards)]


def test_a_job_goes_as_json(job: ShardJob) -> None:
    assert build(ShardJob, json.loads(json.dumps(plain(job)))) == job


def test_another_bundle_is_refused(job: ShardJob) -> None:
    with pytest.raises(BundleError, match=r"is another bundle here: .* Copy the same bundle"):
        ShardWorker(replace(job, digest="0" * 64))


def test_shards_in_a_row_are_those_by_themselves(job: ShardJob, paths: list[Path]) -> None:
    cuts = [paths[:10], paths[10:16], [], paths[16:]]
    with ShardWorker(job) as worker:
        alone = [[told(batch) for batch in worker.detect(cut)] for cut in cuts]
        row: list[list[Any]] = [[] for _ in cuts]
        ended: list[int] = []
        for number, batch in worker.detect_shards([ShardTask(number, cut) for number, cut in enumerate(cuts)]):
            assert number == len(ended), "one after the other"
            if batch:
                row[number].append(told(batch))
            else:
                ended.append(number)
        assert row == alone and ended == [0, 1, 2, 3]
        for found, cut in zip(row, cuts, strict=True):
            assert sorted(one[0] for batch in found for one in batch) == list(range(len(cut)))
        for skip in range(len(alone[0]) + 2):
            assert [told(batch) for batch in worker.detect(cuts[0], skip)] == alone[0][skip:]


def test_what_is_done_does_not_wait_for_the_next_shard(job: ShardJob, paths: list[Path]) -> None:
    taken = Event()

    def tasks() -> Iterator[ShardTask]:
        yield ShardTask(0, paths[:6])
        assert taken.wait(60), "all of the first is there before the second comes"
        yield ShardTask(1, paths[6:9])

    found = []
    with ShardWorker(job) as worker:
        for number, batch in worker.detect_shards(tasks()):
            found.append((number, len(batch)))
            if not batch:
                taken.set()
    assert sum(count for number, count in found if number == 0) == 6
    assert found[-1] == (1, 0)
