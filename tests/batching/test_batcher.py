"""The dynamic batcher, with real threads over a small real function."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from concurrent.futures import CancelledError, Future, wait
from pathlib import Path

import numpy as np
import pytest

from gfldeploy.batching.batcher import DetectorBatcher, DynamicBatcher
from gfldeploy.batching.buckets import Size
from gfldeploy.batching.latency import LatencyModel
from gfldeploy.batching.policy import Adaptive, Decision, FixedWithTimeout, NoBatching, Request
from gfldeploy.bundle import Bundle
from gfldeploy.detections import postprocess
from gfldeploy.engines.base import EngineOptions
from gfldeploy.engines.registry import open_engine
from gfldeploy.errors import EngineError, RejectedError
from gfldeploy.images.coco import CocoDataset
from gfldeploy.images.decode import read_image

SMALL, LARGE = (32, 32), (64, 64)
LONG_MS = 60_000.0


def adaptive() -> Adaptive:
    return Adaptive(LatencyModel(1.0, 0.1, 0.0), most=4)


class Squares:
    """Squares numbers; stops at the gate until it opens, and remembers its batches."""

    def __init__(self, open_gate: bool = True) -> None:
        self.gate = threading.Event()
        self.started = threading.Event()
        self.batches: list[tuple[list[int], Size]] = []
        if open_gate:
            self.gate.set()

    def __call__(self, numbers: Sequence[int], size: Size) -> list[int | Exception]:
        self.batches.append((list(numbers), size))
        self.started.set()
        assert self.gate.wait(60)
        if -1 in numbers:
            raise EngineError("the engine chokes on -1", None)
        return [ValueError("13 is unlucky") if number == 13 else number**2 for number in numbers]


def test_everyone_gets_their_own_answer() -> None:
    run = Squares()
    with DynamicBatcher(run, adaptive()) as batcher:
        futures = [batcher.submit(number, SMALL if number % 2 else LARGE, LONG_MS) for number in range(20, 70)]
        assert [future.result(60) for future in futures] == [number**2 for number in range(20, 70)]
    counts = batcher.counts
    assert (counts.submitted, counts.answered, counts.failed, counts.late) == (50, 50, 0, 0)
    assert sum(size * count for size, count in counts.batch_sizes.items()) == 50
    assert counts.padding == 1.0
    assert all(len({number % 2 for number in numbers}) == 1 for numbers, _ in run.batches)


def test_what_waits_is_batched_and_no_more_than_allowed() -> None:
    run = Squares(open_gate=False)
    with DynamicBatcher(run, adaptive()) as batcher:
        futures = [batcher.submit(0, SMALL, LONG_MS)]
        assert run.started.wait(60)
        futures += [batcher.submit(number, SMALL, LONG_MS) for number in range(1, 8)]
        run.gate.set()
        wait(futures, 60)
    assert [len(numbers) for numbers, _ in run.batches] == [1, 4, 3]
    assert batcher.counts.queue_ms > 0


def test_images_are_padded_to_their_bucket() -> None:
    run = Squares()
    with DynamicBatcher(run, adaptive(), buckets=[LARGE]) as batcher:
        batcher.submit(3, SMALL, LONG_MS).result(60)
    assert run.batches == [([3], LARGE)]
    assert batcher.counts.padding == 4.0


def test_one_bad_image_fails_alone() -> None:
    run = Squares(open_gate=False)
    with DynamicBatcher(run, adaptive()) as batcher:
        first = batcher.submit(0, SMALL, LONG_MS)
        assert run.started.wait(60)
        futures = [batcher.submit(number, SMALL, LONG_MS) for number in (2, -1, 13, 4)]
        run.gate.set()
        assert first.result(60) == 0
        assert futures[0].result(60) == 4 and futures[3].result(60) == 16
        with pytest.raises(EngineError, match="chokes on -1"):
            futures[1].result(60)
        with pytest.raises(ValueError, match="unlucky"):
            futures[2].result(60)
    assert (batcher.counts.answered, batcher.counts.failed) == (3, 2)


def test_a_full_queue_rejects_at_once() -> None:
    run = Squares(open_gate=False)
    with DynamicBatcher(run, adaptive(), most_waiting=2) as batcher:
        running = batcher.submit(0, SMALL, LONG_MS)
        assert run.started.wait(60)
        kept = [batcher.submit(number, SMALL, LONG_MS) for number in (1, 2)]
        with pytest.raises(RejectedError, match="2 requests wait already"):
            batcher.submit(3, SMALL, LONG_MS)
        kept[0].cancel()  # which makes room
        kept.append(batcher.submit(4, SMALL, LONG_MS))
        run.gate.set()
        assert running.result(60) == 0
        assert [future.result(60) for future in kept[1:]] == [4, 16]
    assert batcher.counts.rejected == {"queue full": 1}


def test_what_cannot_be_in_time_is_rejected_and_not_run() -> None:
    run = Squares()
    slow = Adaptive(LatencyModel(1000.0, 0.0, 0.0))
    with DynamicBatcher(run, slow) as batcher, pytest.raises(RejectedError, match="after its deadline"):
        batcher.submit(1, SMALL, 10.0).result(60)
    assert run.batches == []
    assert batcher.counts.rejected == {"too late": 1}


def test_cancelled_before_it_ran() -> None:
    run = Squares(open_gate=False)
    with DynamicBatcher(run, adaptive()) as batcher:
        running = batcher.submit(0, SMALL, LONG_MS)
        assert run.started.wait(60)
        waiting = batcher.submit(1, SMALL, LONG_MS)
        assert waiting.cancel()
        assert not running.cancel()
        run.gate.set()
        assert running.result(60) == 0
    with pytest.raises(CancelledError):
        waiting.result(60)
    assert run.batches == [([0], SMALL)]
    assert batcher.counts.cancelled == 1


@pytest.mark.parametrize("drain", [True, False])
def test_closing(drain: bool) -> None:
    run = Squares(open_gate=False)
    batcher = DynamicBatcher(run, adaptive())
    running = batcher.submit(2, SMALL, LONG_MS)
    assert run.started.wait(60)
    waiting = batcher.submit(3, SMALL, LONG_MS)
    threading.Timer(0.05, run.gate.set).start()
    batcher.close(drain)
    batcher.close(drain)
    assert running.result(0) == 4
    if drain:
        assert waiting.result(0) == 9
    else:
        assert isinstance(waiting.exception(0), RejectedError)
    with pytest.raises(RuntimeError, match="closed"):
        batcher.submit(1, SMALL, LONG_MS)


def test_an_error_leaving_the_block_does_not_wait_for_the_queue() -> None:
    run = Squares(open_gate=False)
    futures: list[Future[int]] = []

    def use() -> None:
        with DynamicBatcher(run, adaptive()) as batcher:
            futures.append(batcher.submit(1, SMALL, LONG_MS))
            assert run.started.wait(60)
            futures.append(batcher.submit(2, SMALL, LONG_MS))
            threading.Timer(0.05, run.gate.set).start()
            raise KeyError

    with pytest.raises(KeyError):
        use()
    assert futures[0].result(0) == 1
    assert isinstance(futures[1].exception(0), RejectedError)


def test_the_timeout_of_a_fixed_batch_passes_without_arrivals() -> None:
    run = Squares()
    with DynamicBatcher(run, FixedWithTimeout(8, 0.01)) as batcher:
        assert batcher.submit(5, SMALL, LONG_MS).result(60) == 25


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_policy_that_breaks_leaves_nobody_waiting() -> None:
    class Broken(NoBatching):
        def decide(self, now: float, waiting: Sequence[Request]) -> Decision:
            return Decision((999,), SMALL)

    batcher = DynamicBatcher(Squares(), Broken())
    with pytest.raises(KeyError):
        batcher.submit(1, SMALL, LONG_MS).result(60)
    batcher.close()


def test_many_threads() -> None:
    run = Squares()
    answers: dict[int, int] = {}

    def ask(first: int) -> None:
        for number in range(first, first + 50):
            answers[number] = batcher.submit(number, SMALL if number % 3 else LARGE, LONG_MS).result(60)

    with DynamicBatcher(run, adaptive()) as batcher:
        threads = [threading.Thread(target=ask, args=(1000 * k,)) for k in range(1, 9)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
    assert answers == {number: number**2 for k in range(1, 9) for number in range(1000 * k, 1000 * k + 50)}


def test_a_detector_behind_it_answers_as_it_does_alone(tiny_bundle: Path, tiny_coco: Path) -> None:
    bundle = Bundle.open(tiny_bundle)
    manifest = bundle.manifest
    images = [read_image(image.path) for image in CocoDataset.load(tiny_coco).images]
    with open_engine("onnxruntime", bundle, EngineOptions("fp32", "cpu", 1)) as engine:
        alone = []
        for image in images:
            prepared = manifest.preprocess(image)
            outputs = engine.infer({"image": manifest.preprocess.batch([prepared])})
            alone += postprocess(outputs["scores"], outputs["boxes"], [prepared.scale], manifest.nms)
        with DetectorBatcher(engine, bundle, adaptive()) as batcher:
            futures = [batcher.detect(image, LONG_MS) for image in images * 3]
            found = [future.result(60) for future in futures]
    assert batcher.counts.answered == 18 and batcher.counts.padding == 1.0
    for before, after in zip(alone * 3, found, strict=True):
        np.testing.assert_allclose(after.boxes, before.boxes, atol=1e-3)
        np.testing.assert_allclose(after.scores, before.scores, atol=1e-5)
        np.testing.assert_array_equal(after.classes, before.classes)
