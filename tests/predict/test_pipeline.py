"""The stages at once: the same detections as one image after the other, in order, with bounded reading, and no thread
left behind."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import cv2
import numpy as np
import pytest

from gfldeploy.at_once import at_once
from gfldeploy.batching.buckets import union
from gfldeploy.bundle import Bundle, Manifest
from gfldeploy.detections import Detections
from gfldeploy.engines.base import Device, Engine, EngineOptions, Tensors
from gfldeploy.engines.detect import detect_batch
from gfldeploy.engines.registry import open_engine
from gfldeploy.images.decode import read_image
from gfldeploy.predict.pipeline import Found, detect_groups, in_order
from gfldeploy.predict.sources import picture_of

pytest.importorskip("onnxruntime")

SIZES = [(48, 80), (80, 48), (64, 64), (48, 72), (200, 160)]


def threads() -> set[str]:
    return {thread.name for thread in threading.enumerate() if thread.name.startswith("gfldeploy")}


# --- at once ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 2, 5])
def test_at_once_gives_the_results_in_order(count: int) -> None:
    random = np.random.default_rng(count)
    pauses = random.random(100) * 2e-3

    def work(number: int) -> tuple[int, str]:
        time.sleep(pauses[number])
        return number, threading.current_thread().name

    assert [number for number, _ in at_once(work, range(100), count)] == list(range(100))
    assert list(at_once(work, iter(()), count)) == []
    assert threads() == set()


def test_as_many_as_asked_for_work_at_once() -> None:
    together = threading.Barrier(3, timeout=10)  # which breaks unless three come
    assert len(list(at_once(lambda _: together.wait(), range(9), 3))) == 9


def test_at_once_takes_so_many_jobs_and_no_more() -> None:
    taken: list[int] = []

    takers: set[int] = set()

    def jobs() -> Iterator[int]:
        for number in range(100):
            taken.append(number)
            takers.add(threading.get_ident())
            yield number

    with closing(at_once(lambda number: number, jobs(), 2)) as items:
        assert next(items) == 0
        # One with the reader, and three that wait for it.
        while len(taken) < 4:
            time.sleep(0.01)
        time.sleep(0.2)
        assert len(taken) == 4
        assert next(items) == 1
    assert len(taken) <= 5
    assert len(takers) == 1, "what jobs come from need not be made for several threads"
    assert threads() == set()


def test_results_do_not_wait_for_jobs_that_are_still_to_come() -> None:
    more = threading.Event()

    def jobs() -> Iterator[int]:
        yield 1
        assert more.wait(10)
        yield 2

    items = at_once(lambda number: number, jobs(), 2)
    assert next(items) == 1
    more.set()
    assert list(items) == [2]


@pytest.mark.parametrize("error", [KeyError("two"), StopIteration("two"), KeyboardInterrupt("two")])
@pytest.mark.parametrize("where", ["job", "work"])
def test_an_error_comes_in_its_place(error: BaseException, where: str) -> None:
    class Jobs:
        """Not a generator: those must not raise StopIteration."""

        def __init__(self) -> None:
            self.number = 0

        def __iter__(self) -> Jobs:
            return self

        def __next__(self) -> int:
            self.number += 1
            if self.number == 2 and where == "job":
                raise error
            return self.number

    def work(number: int) -> int:
        if number == 2 and where == "work":
            raise error
        time.sleep(0.05 if number == 1 else 0)
        return number

    if where == "job" and isinstance(error, StopIteration):
        assert list(at_once(work, Jobs(), 2)) == [1]  # which is how it ends
        return
    items = at_once(work, Jobs(), 2)
    assert next(items) == 1
    # Generators make a RuntimeError of a StopIteration.
    with pytest.raises((type(error), RuntimeError)):
        next(items)
    assert threads() == set()


def test_what_gives_no_jobs_is_an_error_of_the_first() -> None:
    class Broken:
        def __iter__(self) -> Iterator[int]:
            raise OSError("no jobs today")

    with pytest.raises(OSError, match="no jobs today"):
        next(at_once(lambda number: number, Broken(), 2))
    assert threads() == set()


def test_closing_ends_what_is_behind_too() -> None:
    closed = []

    def work() -> Iterator[int]:
        try:
            yield from range(1000)
        finally:
            closed.append(threading.current_thread().name)

    with closing(at_once(lambda number: number, work(), 2)) as items:
        next(items)
    assert threads() == set()
    assert len(closed) == 1


def test_closing_does_not_wait_for_a_job_that_may_never_come(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gfldeploy.at_once._LONGEST_WAIT_S", 0.01)
    more = threading.Event()

    def jobs() -> Iterator[int]:
        yield 1
        more.wait(10)
        yield 2

    with closing(at_once(lambda number: number, jobs(), 2)) as items:
        assert next(items) == 1
    assert not more.is_set() and threads() == {"gfldeploy-take"}
    more.set()
    while threads():
        time.sleep(0.001)


def test_order_is_restored() -> None:
    groups = [[(1, "b"), (3, "d")], [(0, "a")], [(4, "e")], [(2, "c")]]
    assert "".join(in_order(groups)) == "abcde"


# --- detections -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twenty images of five sizes in turn; the fifth and the twelfth are damaged: in the body, in the head."""
    folder = tmp_path_factory.mktemp("images")
    random = np.random.default_rng(0)
    for number in range(20):
        picture = random.integers(0, 256, (*SIZES[number % 5], 3), np.uint8)
        assert cv2.imwrite(str(folder / f"{number:02d}.jpg"), picture)
    body, head = folder / "05.jpg", folder / "12.jpg"
    body.write_bytes(body.read_bytes()[:-200])
    head.write_bytes(b"this is no picture")
    return folder


@pytest.fixture(scope="module")
def manifest(tiny_bundle: Path) -> Manifest:
    return Bundle.open(tiny_bundle).manifest


@pytest.fixture(scope="module")
def engine(tiny_bundle: Path) -> Iterator[Engine]:
    with open_engine("onnxruntime", Bundle.open(tiny_bundle), EngineOptions(threads=1)) as engine:
        yield engine


def alone(engine: Engine, manifest: Manifest, path: Path) -> Detections:
    prepared = manifest.preprocess(read_image(path))
    (found,) = detect_batch(engine, manifest.preprocess.batch([prepared]), [prepared.scale], manifest.nms)
    return found


def same(one: Detections | None, other: Detections) -> bool:
    return one is not None and all(
        np.array_equal(getattr(one, name), getattr(other, name)) for name in ("boxes", "scores", "classes")
    )


def run(engine: Engine, manifest: Manifest, paths: Sequence[Path], **options: Any) -> list[list[Found]]:
    return list(detect_groups(engine, manifest, map(picture_of, paths), **options))


def ordered(groups: list[list[Found]]) -> list[Found]:
    return list(in_order([(one.index, one) for one in group] for group in groups))


def indices(groups: list[list[Found]]) -> list[list[int]]:
    return [[one.index for one in group] for group in groups]


@pytest.mark.parametrize(("batch_size", "look_ahead"), [(1, 0), (2, 3), (4, 100)])
def test_images_have_the_detections_that_they_have_alone(
    engine: Engine, manifest: Manifest, folder: Path, batch_size: int, look_ahead: int
) -> None:
    paths = sorted(folder.iterdir())
    before = cv2.getNumThreads()
    groups = run(engine, manifest, paths, batch_size=batch_size, look_ahead=look_ahead)
    assert cv2.getNumThreads() == before and threads() == set()
    assert max(map(len, groups)) <= batch_size
    found = ordered(groups)
    assert [one.name for one in found] == [str(path) for path in paths]
    for number, (one, path) in enumerate(zip(found, paths, strict=True)):
        if number in (5, 12):
            assert one.detections is None and path.name in str(one.error)
        else:
            assert one.error is None and same(one.detections, alone(engine, manifest, path)), number
            assert one.size == SIZES[number % 5]
    scores = {float(one.detections.scores[0]) for one in found if one.detections}
    assert len(scores) == 18, "each image has scores of its own, so that an exchange would be seen"


def test_a_run_that_goes_on_makes_the_missing_batches(engine: Engine, manifest: Manifest, folder: Path) -> None:
    paths = sorted(folder.iterdir())
    whole = run(engine, manifest, paths, batch_size=3, look_ahead=6)
    for skip in range(len(whole) + 2):
        rest = run(engine, manifest, paths, batch_size=3, look_ahead=6, skip=skip)
        assert [[one.index for one in group] for group in rest] == [
            [one.index for one in group] for group in whole[skip:]
        ]


def test_listed_batches_are_those_of_the_padded_images(engine: Engine, manifest: Manifest, folder: Path) -> None:
    paths = sorted(folder.iterdir())
    groups = run(engine, manifest, paths, batch_size=3, order="listed")
    assert indices(groups) == [list(range(start, min(start + 3, 20))) for start in range(0, 20, 3)]
    for group in groups:
        numbers = [one.index for one in group if one.index not in (5, 12)]
        prepared = [manifest.preprocess(read_image(paths[number])) for number in numbers]
        known = [SIZES[one.index % 5] for one in group if one.index != 12]  # one has a head that says its size
        height, width = union(manifest.preprocess.input_size(*size) for size in known)
        batch = np.zeros((len(numbers), 3, height, width), np.float32)
        for row, one in zip(batch, prepared, strict=True):
            row[:, : one.tensor.shape[1], : one.tensor.shape[2]] = one.tensor
        expected = detect_batch(engine, batch, [one.scale for one in prepared], manifest.nms)
        found = {one.index: one.detections for one in group}
        assert [number for number, one in found.items() if one is None] == [n for n in found if n in (5, 12)]
        assert all(same(found[number], one) for number, one in zip(numbers, expected, strict=True))


class Watched(Engine):
    """An engine that notes the batches it gets, and in which thread they were copied and inferred."""

    name = "watched"
    version = ""

    def __init__(self, engine: Engine, options: EngineOptions) -> None:
        self.options, self.taken, self.workers = options, list[int](), set[tuple[str, int]]()
        self._engine = engine

    def upload(self, inputs: Tensors) -> Tensors:
        self.workers.add(("upload", threading.get_ident()))
        return {name: array.copy() for name, array in inputs.items()}

    def infer(self, inputs: Tensors) -> dict[str, np.ndarray]:
        self.workers.add(("infer", threading.get_ident()))
        self.taken.append(len(inputs["image"]))
        return self._engine.infer(inputs)


def test_a_network_of_a_fixed_batch_size_gets_it(engine: Engine, manifest: Manifest, folder: Path) -> None:
    (image,) = manifest.inputs
    fixed = replace(manifest, inputs=(replace(image, shape=(4, *image.shape[1:])),))
    watched = Watched(engine, engine.options)
    paths = sorted(folder.iterdir())
    found = ordered(run(watched, fixed, paths, batch_size=4, look_ahead=100))
    assert set(watched.taken) == {4}
    for number, (one, path) in enumerate(zip(found, paths, strict=True)):
        assert number in (5, 12) or same(one.detections, alone(engine, manifest, path))


def test_several_threads_decode_for_a_gpu(engine: Engine, manifest: Manifest, folder: Path) -> None:
    watched = Watched(engine, EngineOptions(device="gpu", threads=4))
    paths = sorted(folder.iterdir())
    found = ordered(run(watched, manifest, paths, batch_size=4, look_ahead=100))
    assert max(watched.taken) == 4
    (inferring,) = (thread for what, thread in watched.workers if what == "infer")
    assert ("upload", inferring) not in watched.workers, "one batch is copied beside the inference of another"
    for number, (one, path) in enumerate(zip(found, paths, strict=True)):
        assert (number in (5, 12)) == (one.error is not None)
        assert one.error or same(one.detections, alone(engine, manifest, path))


def test_as_many_inferences_at_once_as_there_are_streams(engine: Engine, manifest: Manifest, folder: Path) -> None:
    class Streamed(Watched):
        """An engine that answers when three have asked."""

        together = threading.Barrier(3, timeout=10)
        callers: ClassVar[set[int]] = set()

        def infer(self, inputs: Tensors) -> dict[str, np.ndarray]:
            self.callers.add(threading.get_ident())
            self.together.wait()
            with lock:
                return super().infer(inputs)

    lock = threading.Lock()
    streamed = Streamed(engine, engine.options)
    paths = [path for path in sorted(folder.iterdir()) if path.name not in ("05.jpg", "12.jpg")]
    found = ordered(run(streamed, manifest, paths, streams=3))
    assert len(streamed.callers) == 3, "each stream has a thread of its own"
    assert all(same(one.detections, alone(engine, manifest, path)) for one, path in zip(found, paths, strict=True))
    assert threads() == set()


def test_classes_without_a_name_are_left_out(engine: Engine, manifest: Manifest, folder: Path) -> None:
    less = replace(manifest, classes=("box",), nms=replace(manifest.nms, score_threshold=0.0))
    (found,) = ordered(run(engine, less, [folder / "00.jpg"]))
    assert found.detections is not None and set(found.detections.classes.tolist()) == {0}


def test_arrays_wait_no_longer_than_the_look_ahead(engine: Engine, manifest: Manifest) -> None:
    read = 0

    def arrays() -> Iterator[np.ndarray]:
        nonlocal read
        for number in range(200):
            read += 1
            yield np.full((*SIZES[number % 5], 3), number, np.uint8)

    groups = detect_groups(engine, manifest, map(picture_of, arrays()), batch_size=4, look_ahead=8)
    with closing(groups):
        for done, _ in enumerate(groups, start=1):
            # Three batches of up to four are under way, and eight pictures wait.
            assert read <= 4 * (done + 3) + 8
            if done == 10:
                break
    assert threads() == set()


@pytest.mark.parametrize("device", ["cpu", "gpu"])
@pytest.mark.parametrize("step", ["upload", "infer"])
def test_an_engine_that_fails_ends_it(manifest: Manifest, folder: Path, device: Device, step: str) -> None:
    class Broken(Engine):
        name = "broken"

        def __init__(self) -> None:
            self.options = EngineOptions(device=device)

        def upload(self, inputs: Tensors) -> Tensors:
            if step == "upload":
                raise MemoryError("no room")
            return inputs

        def infer(self, inputs: Tensors) -> dict[str, np.ndarray]:
            raise MemoryError("no room")

    with pytest.raises(MemoryError, match="no room"):
        run(Broken(), manifest, sorted(folder.iterdir()))
    assert threads() == set()


def test_reduced_decoding_keeps_boxes_in_original_pixels(engine: Engine, manifest: Manifest, tmp_path: Path) -> None:
    picture = cv2.resize(np.random.default_rng(3).integers(0, 256, (6, 9, 3), np.uint8), (1003, 671))
    assert cv2.imwrite(str(tmp_path / "large.jpg"), picture)
    pictures = [picture_of(tmp_path / "large.jpg")]
    (exact,), (fast,) = (
        ordered(list(detect_groups(engine, manifest, pictures, reduced=reduced))) for reduced in (False, True)
    )
    assert exact.size == fast.size == (671, 1003)
    assert exact.detections is not None and fast.detections is not None
    np.testing.assert_allclose(fast.detections.boxes, exact.detections.boxes, atol=1e-3)
    np.testing.assert_allclose(fast.detections.scores, exact.detections.scores, atol=0.02)
    assert not np.array_equal(fast.detections.scores, exact.detections.scores)
