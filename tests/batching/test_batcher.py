"""The dynamic batcher, with real threads over a small real function."""

from __future__ import annotations

import gc
import math
import random
import threading
import weakref
from collections import Counter
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
from gfldeploy.engines.base import EngineOptions
from gfldeploy.engines.registry import open_engine
from gfldeploy.errors import EngineError, RejectedError
from gfldeploy.images.coco import CocoDataset
from gfldeploy.images.decode import read_image
from gfldeploy.nms import postprocess

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


def test_as_many_batches_at_once_as_there_are_streams() -> None:
    together = threading.Barrier(3, timeout=60)  # which breaks unless three come

    def run(numbers: Sequence[int], size: Size) -> list[int]:
        together.wait()
        return list(numbers)

    with DynamicBatcher(run, NoBatching(), streams=3) as batcher:
        futures = [batcher.submit(number, SMALL, LONG_MS) for number in range(9)]
        assert [future.result(60) for future in futures] == list(range(9))
        threads = batcher._threads
    assert not any(thread.is_alive() for thread in threads)
    with pytest.raises(ValueError, match="streams"):
        DynamicBatcher(run, NoBatching(), streams=0)


def test_streams_end_though_another_ran_what_they_waited_for() -> None:
    run = Squares(open_gate=False)
    # Both streams wait for the batch of two to fill; one runs it at the end of the block, the other must not wait on.
    with DynamicBatcher(run, FixedWithTimeout(2, 0.2), streams=2) as batcher:
        future = batcher.submit(3, SMALL, LONG_MS)
        run.gate.set()
    assert future.result(0) == 9


@pytest.mark.parametrize("error", [ValueError("no"), SystemExit("no")])
def test_a_policy_that_breaks_ends_all_streams(error: BaseException, monkeypatch: pytest.MonkeyPatch) -> None:
    class Breaks(NoBatching):
        def observe(self, images: int, size: Size, ms: float) -> None:
            raise error

    monkeypatch.setattr(threading, "excepthook", lambda _: None)
    batcher = DynamicBatcher(Squares(), Breaks(), streams=3)
    assert batcher.submit(3, SMALL, LONG_MS).result(60) == 9
    for thread in batcher._threads:
        thread.join(60)
        assert not thread.is_alive()
    with pytest.raises(RejectedError, match="the batcher has stopped"):
        batcher.submit(4, SMALL, LONG_MS)
    batcher.close()


def test_more_streams_admit_more() -> None:
    model = LatencyModel(0.0, 10.0, 0.0)  # 10 ms an image
    waiting = [Request(number, SMALL, 0.0, 0.035) for number in range(12)]
    admitted = [12 - len(Adaptive(model, 1, streams).decide(0.0, waiting).reject) for streams in (1, 2, 3)]
    # What is due before an image is shared by the streams: number n ends after 10 + 10 (n - 1) / streams ms.
    assert admitted == [3, 6, 8]


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
        with pytest.raises(RejectedError, match="2 requests wait already") as full:
            batcher.submit(3, SMALL, LONG_MS)
        assert full.value.reason == "queue full"
        kept[0].cancel()  # which makes room
        kept.append(batcher.submit(4, SMALL, LONG_MS))
        run.gate.set()
        assert running.result(60) == 0
        assert [future.result(60) for future in kept[1:]] == [4, 16]
    assert batcher.counts.rejected == {"queue full": 1}


def test_what_cannot_be_in_time_is_rejected_and_not_run() -> None:
    run = Squares()
    slow = Adaptive(LatencyModel(1000.0, 0.0, 0.0))
    with DynamicBatcher(run, slow) as batcher, pytest.raises(RejectedError, match="after its deadline") as rejected:
        batcher.submit(1, SMALL, 10.0).result(60)
    assert rejected.value.reason == "deadline"
    assert run.batches == []
    assert batcher.counts.rejected == {"deadline": 1}


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
        assert wait([waiting], 60).not_done == set()  # it is told that it was cancelled
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
    with pytest.raises(RejectedError, match="the batcher is closed") as late:
        batcher.submit(1, SMALL, LONG_MS)
    assert late.value.reason == "closed"
    assert batcher.counts.rejected == {"closed": 1 if drain else 2}


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
@pytest.mark.parametrize("error", [KeyError("why"), SystemExit("why")])
def test_a_policy_that_breaks_leaves_nobody_waiting(error: BaseException) -> None:
    class Broken(NoBatching):
        def decide(self, now: float, waiting: Sequence[Request]) -> Decision:
            raise error

    batcher = DynamicBatcher(Squares(), Broken())
    future = batcher.submit(1, SMALL, LONG_MS)
    with pytest.raises(EngineError if isinstance(error, SystemExit) else type(error)):
        future.result(60)
    batcher.close()
    with pytest.raises(RejectedError, match=f"the batcher has stopped, {type(error).__name__}: .?why") as late:
        batcher.submit(1, SMALL, LONG_MS)
    assert late.value.reason == "closed"


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_policy_that_runs_what_is_not_there_loses_nothing_that_is() -> None:
    class Broken(NoBatching):
        def decide(self, now: float, waiting: Sequence[Request]) -> Decision:
            return Decision((waiting[0].id, 999), SMALL)

    batcher = DynamicBatcher(Squares(), Broken())
    with pytest.raises(RuntimeError, match="a request that does not wait"):
        batcher.submit(1, SMALL, LONG_MS).result(60)
    batcher.close()


def test_a_policy_that_never_decides_does_not_keep_close_waiting() -> None:
    class Idle(NoBatching):
        def decide(self, now: float, waiting: Sequence[Request]) -> Decision:
            return Decision()

    batcher = DynamicBatcher(Squares(), Idle())
    future = batcher.submit(1, SMALL, LONG_MS)
    batcher.close()
    assert isinstance(error := future.exception(0), RejectedError) and error.reason == "closed"


@pytest.mark.parametrize("error", [SystemExit(3), KeyboardInterrupt(), MemoryError(), GeneratorExit()])
def test_whatever_the_engine_raises_the_batch_is_answered(error: BaseException) -> None:
    gate, started = threading.Event(), threading.Event()

    def run(numbers: Sequence[int], size: Size) -> list[int | Exception]:
        started.set()
        assert gate.wait(60)
        if 13 in numbers:
            raise error
        return [number**2 for number in numbers]

    with DynamicBatcher(run, adaptive()) as batcher:
        first = batcher.submit(1, SMALL, LONG_MS)
        assert started.wait(60)
        futures = [batcher.submit(number, SMALL, LONG_MS) for number in (2, 13, 3)]
        gate.set()
        assert first.result(60) == 1
        assert wait(futures, 60).not_done == set()
        if isinstance(error, MemoryError):  # the others alone
            assert (futures[0].result(0), futures[1].exception(0), futures[2].result(0)) == (4, error, 9)
        else:  # which asks for an end: nothing is tried again
            failed = [future.exception(0) for future in futures]
            assert all(isinstance(one, EngineError) and one.__cause__ is error for one in failed)
            assert len(set(map(id, failed))) == 3  # each its own: raising adds to the traceback
            assert type(error).__name__ in str(failed[0])
        assert batcher.submit(5, SMALL, LONG_MS).result(60) == 25  # and the next is served


def test_an_answer_too_few_is_an_error_of_the_batch() -> None:
    with DynamicBatcher[int, int](lambda numbers, size: [], adaptive()) as batcher:
        error = batcher.submit(1, SMALL, LONG_MS).exception(60)
    assert isinstance(error, EngineError) and "0 answers to a batch of 1" in str(error)


def test_callbacks_run_without_the_lock() -> None:
    # Each asks from another thread what the batcher's lock guards: with the lock held it would never be told.
    told: list[int] = []

    def ask(future: Future[int]) -> None:
        other = threading.Thread(target=lambda: told.append(batcher.counts.submitted))
        other.start()
        other.join(10)

    run = Squares(open_gate=False)
    with DynamicBatcher(run, adaptive(), most_waiting=2) as batcher:
        futures = [batcher.submit(1, SMALL, LONG_MS)]  # answered
        assert run.started.wait(60)
        futures.append(batcher.submit(2, LARGE, LONG_MS))  # rejected
        futures.append(batcher.submit(3, LARGE, LONG_MS))  # cancelled
        for future in futures:
            future.add_done_callback(ask)
        assert futures[2].cancel()
        closing = threading.Thread(target=batcher.close, args=(False,))
        closing.start()
        assert isinstance(futures[1].exception(60), RejectedError)
        run.gate.set()
        closing.join(60)
        assert not closing.is_alive()
    assert told == [3, 3, 3]


def test_closing_from_a_callback() -> None:
    run = Squares(open_gate=False)
    batcher = DynamicBatcher(run, adaptive())
    first = batcher.submit(1, SMALL, LONG_MS)
    assert run.started.wait(60)
    closed = threading.Event()

    def close(_: object) -> None:
        batcher.close()
        closed.set()

    first.add_done_callback(close)
    second = batcher.submit(2, SMALL, LONG_MS)
    run.gate.set()
    assert (first.result(60), second.result(60)) == (1, 4)  # what waited is answered first
    assert closed.wait(60)
    closers = [threading.Thread(target=batcher.close) for _ in range(4)]
    for closer in closers:
        closer.start()
    for closer in closers:
        closer.join(60)
    assert not any(closer.is_alive() for closer in closers)
    with pytest.raises(RejectedError):
        batcher.submit(3, SMALL, LONG_MS)


def test_a_second_close_gives_up_what_the_first_still_waits_for() -> None:
    run = Squares(open_gate=False)
    batcher = DynamicBatcher(run, adaptive())
    running = batcher.submit(1, SMALL, LONG_MS)
    assert run.started.wait(60)
    waiting = batcher.submit(2, SMALL, LONG_MS)
    closers = [threading.Thread(target=batcher.close, args=(drain,)) for drain in (True, False)]
    for closer in closers:
        closer.start()
    assert isinstance(error := waiting.exception(60), RejectedError) and error.reason == "closed"
    run.gate.set()
    for closer in closers:
        closer.join(60)
    assert running.result(0) == 1 and not any(closer.is_alive() for closer in closers)


def test_callbacks_that_submit_and_that_raise() -> None:
    more: list[Future[int]] = []

    def submit(future: Future[int]) -> None:
        more.append(batcher.submit(future.result() + 1, SMALL, LONG_MS))
        done.set()

    def raise_exit(future: Future[int]) -> None:
        raise SystemExit

    run, done = Squares(open_gate=False), threading.Event()
    with DynamicBatcher(run, adaptive()) as batcher:
        running = batcher.submit(0, SMALL, LONG_MS)
        assert run.started.wait(60)
        futures = [batcher.submit(number, SMALL, LONG_MS) for number in (2, 3, 4)]
        futures[0].add_done_callback(raise_exit)
        futures[1].add_done_callback(submit)
        run.gate.set()
        assert [future.result(60) for future in (running, *futures)] == [0, 4, 9, 16]
        assert done.wait(60) and more[0].result(60) == 100


def test_futures_that_somebody_else_answered() -> None:
    run = Squares(open_gate=False)
    with DynamicBatcher(run, adaptive()) as batcher:
        running = batcher.submit(1, SMALL, LONG_MS)
        assert run.started.wait(60)
        waiting = batcher.submit(2, SMALL, LONG_MS)
        waiting.set_result(-2)
        last = batcher.submit(3, SMALL, LONG_MS)
        running.set_result(-1)
        run.gate.set()
        assert (running.result(60), waiting.result(60), last.result(60)) == (-1, -2, 9)


def test_every_request_is_counted_once_however_it_ends() -> None:
    def run(numbers: Sequence[int], size: Size) -> list[int | Exception]:
        if 13 in numbers:
            raise ValueError("13")
        if 31 in numbers:
            raise SystemExit
        return [number**2 for number in numbers]

    def ask(seed: int) -> None:
        draw = random.Random(seed)
        for _ in range(200):
            number, timeout_ms = draw.randrange(60), draw.choice([LONG_MS, LONG_MS, 1.5])
            try:
                future = batcher.submit(number, draw.choice([SMALL, LARGE]), timeout_ms)
            except RejectedError as error:
                ends.append(error.reason)
                wait([future for _, future in futures[-1:]], 60)
                continue
            if number == 7:
                future.cancel()
            futures.append((number, future))

    ends: list[str] = []
    futures: list[tuple[int, Future[int]]] = []
    batcher = DynamicBatcher(run, Adaptive(LatencyModel(1.0, 0.1, 0.0), most=8), most_waiting=20)
    threads = [threading.Thread(target=ask, args=(seed,)) for seed in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    closing = threading.Thread(target=batcher.close, args=(False,))
    threads = [threading.Thread(target=ask, args=(seed,)) for seed in range(6, 9)]
    for thread in (threads[0], closing, *threads[1:]):
        thread.start()
    for thread in (*threads, closing):
        thread.join(60)
    ask(9)
    for number, future in futures:
        assert future.done()
        if future.cancelled():
            ends.append("cancelled")
        elif (error := future.exception()) is None:
            assert future.result() == number**2
            ends.append("answered")
        else:
            ends.append(error.reason if isinstance(error, RejectedError) else "failed")
    counts, found = batcher.counts, Counter(ends)
    assert counts.submitted == len(ends) == 2000
    assert (counts.answered, counts.failed, counts.cancelled) == tuple(
        found.pop(name, 0) for name in ("answered", "failed", "cancelled")
    )
    assert counts.rejected == found
    assert counts.answered and counts.rejected["closed"] >= 200


def test_nothing_of_what_was_done_is_kept() -> None:
    # Without the garbage collector: what is in a circle would stay.
    class Payload(list[int]):
        pass

    def run(payloads: Sequence[Payload], size: Size) -> list[int | Exception]:
        if any(13 in payload for payload in payloads):
            raise ValueError("13")
        return [sum(payload) for payload in payloads]

    gc.collect()
    gc.disable()
    try:
        with DynamicBatcher(run, adaptive()) as batcher:
            kept = []
            for number in (1, 13, 2):
                payload = Payload([number])
                kept.append(weakref.ref(payload))
                future = batcher.submit(payload, SMALL, LONG_MS)
                del payload
                assert wait([future], 60).not_done == set()
                del future
            # The thread has let go of all that it answered before it answers another one.
            assert batcher.submit(Payload([3]), SMALL, LONG_MS).result(60) == 3
            assert [one() for one in kept] == [None, None, None]
    finally:
        gc.enable()


@pytest.mark.parametrize("timeout_ms", [0.0, -1.0, math.nan, math.inf])
def test_a_time_that_is_none(timeout_ms: float) -> None:
    with DynamicBatcher(Squares(), adaptive()) as batcher, pytest.raises(ValueError, match="positive and finite"):
        batcher.submit(1, SMALL, timeout_ms)


def test_the_latency_model_remembers_a_limited_number_of_shapes() -> None:
    model = LatencyModel(10.0, 0.0, 0.0)
    for height in range(1, 3000):
        model.observe(1, (height, 32), 5.0)
        model.observe(4, (7, 7), 40.0)  # seen again and again
    sizes = [height for height in range(1, 3000) if (1, (height, 32)) in model._ratios]
    assert len(model._ratios) == 1024 and sizes == list(range(3000 - 1023, 3000))
    assert model.predict(4, (7, 7)) == pytest.approx(40.0, rel=0.01)
    assert 0 < model.predict(1, (1, 32)) < 40.0  # forgotten: what everything seen says


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
