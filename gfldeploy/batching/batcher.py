"""The dynamic batcher: single requests in, batches for the engine, single answers out."""

from __future__ import annotations

import itertools
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from types import TracebackType
from typing import Generic, Self, TypeVar

import numpy as np
from numpy.typing import NDArray

from gfldeploy.batching.buckets import Size, area, bucket_of
from gfldeploy.batching.policy import Policy, Request
from gfldeploy.bundle import Bundle
from gfldeploy.detections import Detections
from gfldeploy.engines.base import Engine
from gfldeploy.engines.detect import detect_batch
from gfldeploy.errors import EngineError, RejectedError
from gfldeploy.images.preprocess import Prepared

__all__ = ["Counts", "DetectorBatcher", "DynamicBatcher"]

In = TypeVar("In")
Out = TypeVar("Out")
# Runs a batch of one size; an answer for each, in order. An exception among them is that image's alone.
RunBatch = Callable[[Sequence[In], Size], Sequence[Out | Exception]]


@dataclass(frozen=True)
class Counts:
    """What a batcher has done since it began.

    `batch_sizes`: number of batches by their size. `rejected`: by reason. `late`: answered after their deadline.
    `queue_ms`: sum over the images that ran, from submission to the start of their batch. `padding`: pixels of the
    batches by those of the images' own sizes.
    """

    submitted: int
    answered: int
    failed: int
    cancelled: int
    late: int
    rejected: Mapping[str, int]
    batch_sizes: Mapping[int, int]
    queue_ms: float
    padding: float


@dataclass(frozen=True)
class _Item(Generic[In, Out]):
    payload: In
    own_size: Size
    request: Request
    future: Future[Out]


class DynamicBatcher(Generic[In, Out]):
    """Collects requests and runs them in batches, in a thread of its own, as a `Policy` decides.

    Used as a context manager; leaving the block answers what waits, then ends the thread. Thread-safe. When a batch
    fails as a whole, its images run one by one, so that the one at fault fails alone.
    """

    def __init__(
        self, run: RunBatch[In, Out], policy: Policy, buckets: Sequence[Size] | None = None, most_waiting: int = 256
    ) -> None:
        """`buckets`: sizes that batches are padded to; None is each image's own. `most_waiting`: requests in the queue,
        beyond which new ones are rejected."""
        if most_waiting < 1:
            raise ValueError("most_waiting must be at least 1")
        self._run, self._policy, self._buckets, self._most = run, policy, tuple(buckets or ()), most_waiting
        self._ids = itertools.count()
        self._waiting: dict[int, _Item[In, Out]] = {}
        self._changed = threading.Condition()
        self._closed = False
        self._counter: Counter[str] = Counter()
        self._rejected: Counter[str] = Counter()
        self._batch_sizes: Counter[int] = Counter()
        self._queue_s = 0.0
        self._pixels = [0, 0]  # paid, own
        self._thread = threading.Thread(target=self._work, name="gfldeploy-batcher", daemon=True)
        self._thread.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close(drain=error is None)

    def submit(self, payload: In, size: Size, timeout_ms: float) -> Future[Out]:
        """Ask for an answer within so many milliseconds. `size`: of the network's input for this image, pixels.

        The future holds the answer; or `RejectedError` if it could not come in time; or what went wrong with this
        image. `Future.cancel` takes it back while it waits. Raises `RejectedError` at once when the queue is full, and
        `RuntimeError` after `close`.
        """
        if timeout_ms <= 0:
            raise ValueError(f"timeout_ms must be positive, not {timeout_ms}")
        now = time.monotonic()
        future: Future[Out] = Future()
        with self._changed:
            if self._closed:
                raise RuntimeError("the batcher is closed")
            self._counter["submitted"] += 1
            self._drop_cancelled()
            if len(self._waiting) >= self._most:
                self._rejected["queue full"] += 1
                raise RejectedError(f"{self._most} requests wait already", "Try again later, or send less.")
            request = Request(next(self._ids), bucket_of(size, self._buckets), now, now + timeout_ms / 1e3)
            self._waiting[request.id] = _Item(payload, size, request, future)
            self._changed.notify_all()
        return future

    def close(self, drain: bool = True) -> None:
        """End the thread. `drain`: answer what waits first, else reject it. What runs is always finished."""
        with self._changed:
            self._closed = True
            if not drain:
                self._reject(list(self._waiting), "closed", "the batcher was closed")
            self._changed.notify_all()
        self._thread.join()

    @property
    def counts(self) -> Counts:
        """A snapshot."""
        with self._changed:
            paid, own = self._pixels
            counter = self._counter
            return Counts(
                counter["submitted"], counter["answered"], counter["failed"], counter["cancelled"], counter["late"],
                dict(self._rejected), dict(sorted(self._batch_sizes.items())), self._queue_s * 1e3,
                paid / own if own else 1.0,
            )  # fmt: skip

    def _work(self) -> None:
        try:
            while (batch := self._next()) is not None:
                self._answer(*batch)
        except BaseException as error:
            with self._changed:  # nobody must wait for an answer that never comes
                self._closed = True
                for item in self._waiting.values():
                    if item.future.set_running_or_notify_cancel():
                        item.future.set_exception(error)
                self._waiting.clear()
            raise

    def _next(self) -> tuple[list[_Item[In, Out]], Size] | None:
        """The next batch, as soon as the policy has one; None when there will be none."""
        with self._changed:
            while True:
                self._drop_cancelled()
                if not self._waiting:
                    if self._closed:
                        return None
                    self._changed.wait()
                    continue
                now = time.monotonic()
                decision = self._policy.decide(now, [item.request for item in self._waiting.values()])
                self._reject(decision.reject, "too late", "the answer would have come after its deadline")
                if decision.run and decision.size is not None:
                    items = [self._waiting.pop(number) for number in decision.run]
                    taken = [item for item in items if item.future.set_running_or_notify_cancel()]
                    self._counter["cancelled"] += len(items) - len(taken)
                    if taken:
                        self._count(taken, decision.size, now)
                        return taken, decision.size
                elif not decision.reject:
                    self._changed.wait(None if decision.wake is None else max(decision.wake - now, 0.0))

    def _answer(self, items: Sequence[_Item[In, Out]], size: Size) -> None:
        start = time.monotonic()
        answers: Sequence[Out | Exception]
        try:
            answers = self._run([item.payload for item in items], size)
            if len(answers) != len(items):
                raise EngineError(f"there were {len(answers)} answers to a batch of {len(items)}", None)
            self._policy.observe(len(items), size, (time.monotonic() - start) * 1e3)
        except Exception as error:  # noqa: BLE001 - handed to whoever waits for the answer
            answers = [error] if len(items) == 1 else [self._alone(item, size) for item in items]
        done = time.monotonic()
        for item, answer in zip(items, answers, strict=True):
            with self._changed:
                self._counter["failed" if isinstance(answer, Exception) else "answered"] += 1
                self._counter["late"] += done > item.request.deadline
            if isinstance(answer, Exception):
                item.future.set_exception(answer)
            else:
                item.future.set_result(answer)

    def _alone(self, item: _Item[In, Out], size: Size) -> Out | Exception:
        try:
            (answer,) = self._run([item.payload], size)
        except Exception as error:  # noqa: BLE001 - as above
            return error
        return answer

    def _count(self, items: Sequence[_Item[In, Out]], size: Size, now: float) -> None:
        self._batch_sizes[len(items)] += 1
        self._queue_s += sum(now - item.request.arrived for item in items)
        self._pixels[0] += len(items) * area(size)
        self._pixels[1] += sum(area(item.own_size) for item in items)

    def _drop_cancelled(self) -> None:
        gone = [number for number, item in self._waiting.items() if item.future.cancelled()]
        for number in gone:
            del self._waiting[number]
        self._counter["cancelled"] += len(gone)

    def _reject(self, numbers: Sequence[int], reason: str, why: str) -> None:
        for number in numbers:
            item = self._waiting.pop(number)
            if item.future.set_running_or_notify_cancel():
                self._rejected[reason] += 1
                item.future.set_exception(RejectedError(why, "Send less, or allow more time."))
            else:
                self._counter["cancelled"] += 1


class DetectorBatcher(DynamicBatcher[Prepared, Detections]):
    """A `DynamicBatcher` over a detector: images in, detections in original pixels out.

    Images are preprocessed in the caller's thread, the network and NMS run in the batcher's. The engine must not be
    used by others meanwhile.
    """

    def __init__(
        self,
        engine: Engine,
        bundle: Bundle,
        policy: Policy,
        buckets: Sequence[Size] | None = None,
        most_waiting: int = 256,
    ) -> None:
        self._manifest = bundle.manifest
        self._engine = engine
        super().__init__(self._detect, policy, buckets, most_waiting)

    def detect(self, image: NDArray[np.uint8], timeout_ms: float) -> Future[Detections]:
        """Submit an RGB image, uint8 [h, w, 3]. Raises as `submit`, and `DataError` for an image of no use."""
        preprocess = self._manifest.preprocess
        return self.submit(preprocess(image), preprocess.input_size(*image.shape[:2]), timeout_ms)

    def _detect(self, prepared: Sequence[Prepared], size: Size) -> Sequence[Detections]:
        tensor = self._manifest.preprocess.batch(prepared, size)
        return detect_batch(self._engine, tensor, [one.scale for one in prepared], self._manifest.nms)
