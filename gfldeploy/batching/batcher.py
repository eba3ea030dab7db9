"""The dynamic batcher: single requests in, batches for the engine, single answers out."""

from __future__ import annotations

import itertools
import logging
import math
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, InvalidStateError
from dataclasses import dataclass, field, replace
from typing import Generic, Self, TypeVar

import numpy as np
from numpy.typing import NDArray

from gfldeploy.batching.buckets import Size, area, bucket_of
from gfldeploy.batching.policy import Policy, Request, Running, decide
from gfldeploy.bundle import Bundle
from gfldeploy.detections import Detections
from gfldeploy.engines.base import Engine
from gfldeploy.engines.detect import detect_batch
from gfldeploy.errors import EngineError, RejectedError, Rejection
from gfldeploy.images.preprocess import Prepared

_log = logging.getLogger(__name__)
_LONGEST_WAIT_S = 3600.0  # far below what a lock can wait; then the policy is asked again

In = TypeVar("In")
Out = TypeVar("Out")
# Runs a batch of one size; an answer for each, in order. An exception among them is that image's alone.
RunBatch = Callable[[Sequence[In], Size], Sequence[Out | Exception]]


@dataclass
class Counts:
    """What a batcher has done since it began.

    `batch_sizes`: number of batches by their size. `rejected`: by `RejectedError.reason`. `late`: answered after their
    deadline. `queue_ms`: from submission to the start of the batch, the sum over the images that ran. `padding`: pixels
    of the batches by those of the images' own sizes.
    """

    submitted: int = 0
    answered: int = 0
    failed: int = 0
    cancelled: int = 0
    late: int = 0
    rejected: dict[Rejection, int] = field(default_factory=dict)
    batch_sizes: dict[int, int] = field(default_factory=dict)
    queue_ms: float = 0.0
    padding: float = 1.0


@dataclass
class _Item(Generic[In, Out]):
    """A request; once it is settled, without its payload and its future."""

    payload: In
    own_size: Size
    request: Request
    future: Future[Out]

    @property
    def settled(self) -> bool:
        return "future" not in vars(self)

    def begin(self) -> bool:
        """Whether somebody still waits for the answer; from here on it cannot be cancelled."""
        try:
            return self.future.set_running_or_notify_cancel()
        except (InvalidStateError, RuntimeError):  # somebody else has answered it
            return False

    def settle(self, answer: Out | Exception) -> None:
        """Answer, which runs callbacks: never under a lock. What they raise is logged and stops nothing.

        An error's traceback leads to the frames that hold the item. If the item still held the future, which holds the
        error, all of it would stay until the garbage collector runs, the image included.
        """
        future: Future[Out] | None = vars(self).pop("future", None)
        vars(self).pop("payload", None)
        if future is None:  # another thread was first
            return
        try:
            if isinstance(answer, Exception):
                future.set_exception(answer)
            else:
                future.set_result(answer)
        except InvalidStateError:  # somebody else has answered it
            return
        except BaseException:  # noqa: BLE001 - `Future` itself logs an Exception, and lets SystemExit and the like through
            _log.exception("a callback of a future raised")


@dataclass(frozen=True)
class _Decision(Generic[In, Out]):
    """What the batcher's thread does next: reject some, and run a batch padded to `size`; either may be empty."""

    rejected: Sequence[_Item[In, Out]]
    batch: Sequence[_Item[In, Out]]
    size: Size = (0, 0)
    reason: Rejection = "deadline"


class DynamicBatcher(Generic[In, Out]):
    """Collects requests and runs them in batches, in threads of its own, as a `Policy` decides.

    A context manager; leaving the block answers what waits, then ends the threads. Thread-safe. When a batch fails as a
    whole, its images run one by one, so that the one at fault fails alone. Whatever `run` raises, the batch is answered
    and its thread continues; SystemExit, KeyboardInterrupt and the like become the cause of an `EngineError`. If the
    policy raises, the threads end and all that waits gets that error. The policy is asked and told by one thread at a
    time.

    Callbacks of futures run in the batcher's threads, or in that of `close`, without a lock: they may submit and close,
    but must not wait for other answers.
    """

    def __init__(
        self,
        run: RunBatch[In, Out],
        policy: Policy,
        buckets: Sequence[Size] | None = None,
        most_waiting: int = 256,
        streams: int = 1,
    ) -> None:
        """`buckets`: sizes that batches are padded to; None is each image's own. `most_waiting`: requests in the queue,
        beyond which new ones are rejected. `streams`: batches that run at once, each in a thread of its own."""
        if most_waiting < 1 or streams < 1:
            raise ValueError("most_waiting and streams must be at least 1")
        self._run, self._policy, self._buckets, self._most = run, policy, tuple(buckets or ()), most_waiting
        self._ids = itertools.count()
        self._waiting: dict[int, _Item[In, Out]] = {}
        self._changed = threading.Condition()
        self._closed = False
        self._refusing = False  # whether the last request was, for its deadline
        self._why_closed = "the batcher is closed"
        self._counts = Counts()
        self._running: dict[int, tuple[Running, Sequence[_Item[In, Out]]]] = {}  # by thread
        self._pixels = [0, 0]  # of the batches, of their images
        self._threads = [
            threading.Thread(target=self._work, name="gfldeploy-batcher", daemon=True) for _ in range(streams)
        ]
        for thread in self._threads:
            thread.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.close(drain=kind is None)

    def submit(self, payload: In, size: Size, timeout_ms: float) -> Future[Out]:
        """Ask for an answer within so many milliseconds. `size`: of the network's input for this image, pixels.

        The future holds the answer; or `RejectedError` if it could not come in time or the batcher was closed; or the
        error of this image. `Future.cancel` withdraws it while it waits. Raises `RejectedError` with its `reason` at
        once when the queue is full, when the policy does not admit it and after `close`, and `ValueError` for a time
        that is not above 0.
        """
        if not 0 < timeout_ms < math.inf:
            raise ValueError(f"timeout_ms must be positive and finite, not {timeout_ms}")
        now = time.monotonic()
        future: Future[Out] = Future()
        with self._changed:
            self._counts.submitted += 1
            self._drop_cancelled()
            if self._closed:
                raise self._rejection("closed")
            if len(self._waiting) >= self._most:
                raise self._rejection("queue full")
            request = Request(next(self._ids), bucket_of(size, self._buckets), now, now + timeout_ms / 1e3)
            waiting = (item.request for item in self._waiting.values())
            admitted = self._policy.admits(now, request, waiting, (batch for batch, _ in self._running.values()))
            self._refusing = not admitted
            if not admitted:
                raise self._rejection("deadline")
            self._waiting[request.id] = _Item(payload, size, request, future)
            self._changed.notify()
        return future

    def close(self, drain: bool = True) -> None:
        """End the threads. `drain`: answer what waits first, else reject it. What runs is always finished.

        Waits for the end, but not in a thread of the batcher, as in a callback. May be called again, also by another
        thread at the same time: `drain=False` then rejects what still waits.
        """
        rejected: Sequence[_Item[In, Out]] = ()
        with self._changed:
            self._closed = True
            if not drain:
                rejected = self._take(list(self._waiting))
            self._changed.notify_all()
        self._reject(rejected, "closed")
        if threading.current_thread() not in self._threads:
            for thread in self._threads:
                thread.join()

    def abandon(self, error: Exception) -> None:
        """Answer all that waits and all that runs with this error, and leave the threads to themselves.

        For a `run` that may never return. Threads that do come back end.
        """
        with self._changed:
            self._closed = True
            self._why_closed = str(error)
            left = self._take(list(self._waiting))
            left += [item for _, items in self._running.values() for item in items]
            self._counts.failed += len(left)
            self._changed.notify_all()
        for item in left:
            item.settle(error)

    def refusal(self, size: Size, timeout_ms: float) -> RejectedError | None:
        """What `submit` would raise now; None if nothing, as far as can be seen without waiting for a lock.

        While few wait and the last request was not refused, the policy is not asked: the next one hardly is either.
        """
        if self._closed:
            return self._refusal("closed")
        if not self._refusing and len(self._waiting) * 4 < self._most:
            return None
        try:
            waiting, running = list(self._waiting.values()), list(self._running.values())
        except RuntimeError:  # they have changed meanwhile
            return None
        if len(waiting) >= self._most:
            return self._refusal("queue full")
        if not waiting and not running:
            return None
        now = time.monotonic()
        request = Request(-1, bucket_of(size, self._buckets), now, now + timeout_ms / 1e3)
        before = (item.request for item in waiting)
        admitted = self._policy.admits(now, request, before, (batch for batch, _ in running))
        self._refusing = not admitted
        return None if admitted else self._refusal("deadline")

    @property
    def waiting(self) -> int:
        """Requests that wait for their batch to begin."""
        return len(self._waiting)

    @property
    def counts(self) -> Counts:
        """A snapshot."""
        with self._changed:
            rejected, batch_sizes = dict(self._counts.rejected), dict(sorted(self._counts.batch_sizes.items()))
            return replace(self._counts, rejected=rejected, batch_sizes=batch_sizes)

    def _work(self) -> None:
        step: _Decision[In, Out] | None = None
        try:
            while (step := self._next()) is not None:
                self._reject(step.rejected, step.reason)
                if step.batch:
                    self._answer(step.batch, step.size)
                step = None
        except BaseException as error:
            left = [item for item in (*step.rejected, *step.batch) if not item.settled] if step else []
            with self._changed:
                self._closed = True
                self._why_closed = f"the batcher has stopped, {type(error).__name__}: {error}"
                left += self._take(list(self._waiting))
                self._counts.failed += len(left)
                self._changed.notify_all()
            for item in left:  # nobody must wait for an answer that never comes
                item.settle(error if isinstance(error, Exception) else _stopped(error))
            raise

    def _next(self) -> _Decision[In, Out] | None:
        """The next step, as soon as the policy has one; None at the end."""
        with self._changed:
            if self._closed:
                self._changed.notify_all()  # of what this thread took since, another may wait for no more
            while True:
                self._drop_cancelled()
                if not self._waiting:
                    if self._closed:
                        return None
                    self._changed.wait()
                    continue
                now = time.monotonic()
                decision = decide(self._policy, now, {number: item.request for number, item in self._waiting.items()})
                if decision.run and decision.size is not None:
                    rejected, batch = self._take(decision.reject), self._take(decision.run)
                    self._count(batch, decision.size, now)
                    if self._waiting:  # for another thread, if one is idle
                        self._changed.notify()
                    return _Decision(rejected, batch, decision.size)
                if decision.reject:
                    return _Decision(self._take(decision.reject), ())
                if decision.wake is None and self._closed:  # nothing more will arrive
                    return _Decision(self._take(list(self._waiting)), (), reason="closed")
                wake_s = _LONGEST_WAIT_S if decision.wake is None else decision.wake - now
                self._changed.wait(min(max(wake_s, 0.0), _LONGEST_WAIT_S))

    def _take(self, numbers: Sequence[int]) -> list[_Item[In, Out]]:
        """Take them out of the queue, and return those still wanted. Under the lock."""
        items = [self._waiting.pop(number) for number in numbers]
        taken = [item for item in items if item.begin()]
        self._counts.cancelled += len(items) - len(taken)
        return taken

    def _answer(self, items: Sequence[_Item[In, Out]], size: Size) -> None:
        start = time.monotonic()
        with self._changed:
            self._running[threading.get_ident()] = Running(len(items), size, start), items
        answers, at_once = self._outcomes(items, size)
        done = time.monotonic()
        with self._changed:
            del self._running[threading.get_ident()]
            left = [answer for item, answer in zip(items, answers, strict=True) if not item.settled]  # not abandoned
            failed = sum(isinstance(answer, Exception) for answer in left)
            self._counts.failed += failed
            self._counts.answered += len(left) - failed
            self._counts.late += sum(done > item.request.deadline for item in items)
        for item, answer in zip(items, answers, strict=True):
            item.settle(answer)
        del answer, answers, left  # as `_Item.settle` says: this frame is one of those
        if at_once:
            with self._changed:
                self._policy.observe(len(items), size, (done - start) * 1e3)

    def _outcomes(self, items: Sequence[_Item[In, Out]], size: Size) -> tuple[Sequence[Out | Exception], bool]:
        """An answer or an error for each, whatever `run` raises; and whether they ran as one batch."""
        try:
            answers = self._run([item.payload for item in items], size)
            if len(answers) == len(items):
                return answers, True
            wrong = f"there were {len(answers)} answers to a batch of {len(items)}"
            return [EngineError(wrong) for _ in items], False
        except Exception as error:  # noqa: BLE001 - handed to whoever waits for the answer
            if len(items) == 1:
                return [error], False
        except BaseException as error:  # noqa: BLE001 - the same, but this one is to end, so nothing is tried again
            return [_stopped(error) for _ in items], False
        return [self._outcomes([item], size)[0][0] for item in items], False

    def _count(self, items: Sequence[_Item[In, Out]], size: Size, now: float) -> None:
        if not items:
            return
        counts = self._counts
        counts.batch_sizes[len(items)] = counts.batch_sizes.get(len(items), 0) + 1
        counts.queue_ms += sum(now - item.request.arrived for item in items) * 1e3
        self._pixels[0] += len(items) * area(size)
        self._pixels[1] += sum(area(item.own_size) for item in items)
        counts.padding = self._pixels[0] / self._pixels[1]

    def _drop_cancelled(self) -> None:
        """Take them out of the queue, which also wakes whoever waits for them with `concurrent.futures.wait`."""
        self._take([number for number, item in self._waiting.items() if item.future.cancelled()])

    def _reject(self, items: Sequence[_Item[In, Out]], reason: Rejection) -> None:
        for item in items:
            with self._changed:
                error = self._rejection(reason)
            item.settle(error)

    def _rejection(self, reason: Rejection) -> RejectedError:
        """Count one. Under the lock."""
        self._counts.rejected[reason] = self._counts.rejected.get(reason, 0) + 1
        return self._refusal(reason)

    def _refusal(self, reason: Rejection) -> RejectedError:
        if reason == "closed":
            return RejectedError(self._why_closed, "Submit to one that is open.", reason)
        if reason == "queue full":
            return RejectedError(f"{self._most} requests wait already", "Try again later, or send less.", reason)
        return RejectedError("the answer would come after its deadline", "Send less, or allow more time.", reason)


def _stopped(cause: BaseException) -> EngineError:
    """In place of an exception that is no `Exception`, which would end whoever waits for the answer."""
    error = EngineError(f"the work on it was stopped by {type(cause).__name__}", "See what raised that: its cause.")
    error.__cause__ = cause
    return error


class DetectorBatcher(DynamicBatcher[Prepared, Detections]):
    """A `DynamicBatcher` over a detector: images in, detections in original pixels out.

    Images are preprocessed in the caller's thread; the network and NMS run in the batcher's, as many batches at once as
    the engine has streams. Detections of channels without a class are left out. Nothing else may use the engine
    meanwhile.
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
        super().__init__(self._detect, policy, buckets, most_waiting, engine.options.streams)

    def detect(self, image: NDArray[np.uint8], timeout_ms: float) -> Future[Detections]:
        """Submit an RGB image, uint8 [h, w, 3]. Raises as `submit`, and `DataError` for an image of no use."""
        preprocess = self._manifest.preprocess
        return self.submit(preprocess(image), preprocess.input_size(*image.shape[:2]), timeout_ms)

    def _detect(self, prepared: Sequence[Prepared], size: Size) -> Sequence[Detections]:
        tensor = self._manifest.preprocess.batch(prepared, size)
        found = detect_batch(self._engine, tensor, [one.scale for one in prepared], self._manifest.nms)
        return [one.named(self._manifest.classes) for one in found]
