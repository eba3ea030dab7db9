"""A trace of requests served as a policy decides: in virtual time, or in real time on a real engine, by one loop."""

from __future__ import annotations

import functools
import heapq
import math
import time
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from queue import Empty, SimpleQueue

import numpy as np
from numpy.typing import NDArray

from gfldeploy.batching.buckets import Size, area
from gfldeploy.batching.policy import Policy, Request, decide

# Runs the requests as one batch padded to a size; in virtual time it returns the milliseconds that this takes, in real
# time it takes them.
Run = Callable[[Sequence[Request], Size], float | None]
Times = NDArray[np.float64]


class VirtualClock:
    """Seconds from the start of a trace, which pass only in `wait`."""

    def __init__(self) -> None:
        self._now = 0.0
        self._running: list[tuple[float, int]] = []  # when each batch ends, and its number

    def now(self) -> float:
        return self._now

    def start(self, number: int, run: Callable[[], float | None]) -> None:
        """Begin a batch."""
        heapq.heappush(self._running, (self._now + (run() or 0.0) / 1e3, number))

    def ended(self) -> Iterator[tuple[int, float]]:
        """The batches that have ended since this was asked before, and when."""
        while self._running and self._running[0][0] <= self._now:
            at, number = heapq.heappop(self._running)
            yield number, at

    def wait(self, until: float) -> None:
        """Until then, or until a batch ends."""
        self._now = max(self._now, min([until, *(at for at, _ in self._running[:1])]))


class RealClock:
    """Seconds since it was made. Batches run in the threads of `submit`; None: in the thread that starts them."""

    def __init__(self, submit: Callable[[Callable[[], None]], object] | None = None) -> None:
        self._submit = submit
        self._ended: SimpleQueue[tuple[int, float, BaseException | None]] = SimpleQueue()
        self._seen: list[tuple[int, float, BaseException | None]] = []
        self._start = time.perf_counter()

    def now(self) -> float:
        return time.perf_counter() - self._start

    def start(self, number: int, run: Callable[[], float | None]) -> None:
        """Begin a batch."""

        def work() -> None:
            error = None
            try:
                run()
            except BaseException as raised:  # noqa: BLE001 - raised by `ended`
                error = raised
            self._ended.put((number, self.now(), error))

        self._submit(work) if self._submit else work()

    def ended(self) -> Iterator[tuple[int, float]]:
        """The batches that have ended since this was asked before, and when. Raises what a batch raised."""
        while self._seen or not self._ended.empty():
            number, at, error = self._seen.pop() if self._seen else self._ended.get()
            if error is not None:
                raise error
            yield number, at

    def wait(self, until: float) -> None:
        """Until then, or until a batch ends."""
        with suppress(Empty):
            if not self._seen:
                timeout = None if math.isinf(until) else max(until - self.now(), 0.0)
                self._seen.append(self._ended.get(timeout=timeout))


@dataclass(frozen=True)
class RequestOutcome:
    """What became of a request: `served` or rejected at `at`, in seconds; `batch`: images in its batch, else 0."""

    request: Request
    served: bool
    at: float
    batch: int

    @property
    def kept(self) -> bool:
        """Served by its deadline."""
        return self.served and self.at <= self.request.deadline


@dataclass(frozen=True)
class Played:
    """The outcomes in the order of time, and `padding`: pixels of the batches by those of the images' own buckets."""

    outcomes: tuple[RequestOutcome, ...]
    padding: float

    @property
    def latency_ms(self) -> list[float]:
        """Of those served, from arrival to the end of their batch."""
        return [(one.at - one.request.arrived) * 1e3 for one in self.outcomes if one.served]

    @property
    def kept(self) -> int:
        """How many were served by their deadline."""
        return sum(one.kept for one in self.outcomes)


def play(
    trace: Sequence[Request], policy: Policy, run: Run, clock: VirtualClock | RealClock, streams: int = 1
) -> Played:
    """Let requests arrive as the trace says, one engine serving them as the policy decides, until none is left.

    `streams`: so many batches run at once. Raises `RuntimeError` if the policy breaks its contract: it runs or rejects
    what does not wait, or does nothing.
    """
    waiting: dict[int, Request] = {}
    running: dict[int, tuple[list[Request], Size, float]] = {}
    outcomes: list[RequestOutcome] = []
    arrived, begun, paid, own = 0, 0, 0, 0
    while len(outcomes) < len(trace):
        for number, done in clock.ended():
            batch, size, start = running.pop(number)
            policy.observe(len(batch), size, (done - start) * 1e3)
            outcomes += [RequestOutcome(one, True, done, len(batch)) for one in batch]
        now = clock.now()
        while arrived < len(trace) and trace[arrived].arrived <= now:
            waiting[trace[arrived].id] = trace[arrived]
            arrived += 1
        next_arrival = trace[arrived].arrived if arrived < len(trace) else math.inf
        if not waiting or len(running) == streams:
            if running or next_arrival < math.inf:
                clock.wait(next_arrival if len(running) < streams else math.inf)
            continue
        decision = decide(policy, now, waiting)
        for number in decision.reject:
            outcomes.append(RequestOutcome(waiting.pop(number), False, now, 0))
        if decision.run:
            batch = [waiting.pop(number) for number in decision.run]
            assert decision.size is not None
            running[begun] = batch, decision.size, now
            clock.start(begun, functools.partial(run, batch, decision.size))
            begun += 1
            paid += len(batch) * area(decision.size)
            own += sum(area(one.size) for one in batch)
        elif not decision.reject:
            until = min(next_arrival, math.inf if decision.wake is None else decision.wake)
            if until <= now or (until == math.inf and not running):
                raise RuntimeError("the policy neither runs nor rejects, and names no time to wake")
            clock.wait(until)
    return Played(tuple(outcomes), paid / own if own else 1.0)


def most_kept(trace: Sequence[Request], batch_ms: Callable[[int, Size], float], most: int) -> int:
    """An upper bound of the deadlines that any policy can keep, even one that knows the whole trace.

    `batch_ms`: of so many images of a size; an image must not take longer in a larger batch. `most`: images in a batch.
    All requests must be due equally long after they arrive. Images that share a batch have all arrived when it begins
    and are all due after it ends, so that they arrive within that time, less the batch's, of each other. This limits
    with how many others an image can share a batch, and so the smallest cost of an image. Any schedule of batches can
    be turned into one of single images of that cost, each inside the time of its batch, which keeps the same deadlines:
    the best schedule of single images is the bound. Later arrivals have later deadlines, so that it is optimal to take
    images by deadline and, whenever one would be late, to leave out the one without which the others end soonest (Kise,
    Ibaraki and Mine, Operations Research 26, 1978).
    """
    least_s = _least_s(trace, batch_ms, most)
    urgent = sorted(trace, key=lambda request: request.deadline)
    arrival, took = np.array([one.arrived for one in urgent]), np.array([least_s[one.id] for one in urgent])
    chosen: list[int] = []
    ends = np.zeros(0)
    for number, one in enumerate(urgent):
        chosen.append(number)
        ends = np.append(ends, max(ends[-1] if len(ends) else 0.0, arrival[number]) + took[number])
        if ends[-1] > one.deadline:
            del chosen[_best_left_out(arrival[chosen], took[chosen], ends)]
            total = np.cumsum(took[chosen])
            ends = total + np.maximum.accumulate(arrival[chosen] - (total - took[chosen])) if chosen else total
    return len(chosen)


def _best_left_out(arrival: Times, took: Times, ends: Times) -> int:
    """The place of the one without which the last of the others ends soonest; `ends`: of all of them."""
    # Seconds of all that come after each, and when they end if nothing comes before them.
    after = np.cumsum(took[::-1])[::-1] - took
    alone = np.maximum.accumulate((arrival + took + after)[::-1])[::-1]
    before = np.concatenate([[0.0], ends[:-1]])
    last = np.maximum(before + after, np.append(alone[1:], 0.0))
    return int(len(last) - 1 - np.argmin(last[::-1]))


def _least_s(trace: Sequence[Request], batch_ms: Callable[[int, Size], float], most: int) -> dict[int, float]:
    """The smallest cost of each request, in seconds."""
    found = {}
    for size in {one.size for one in trace}:
        alike = sorted((one for one in trace if one.size == size), key=lambda one: one.arrived)
        arrivals = [one.arrived for one in alike]
        window = alike[0].deadline - alike[0].arrived - batch_ms(1, size) / 1e3
        # The images that arrive within the window from each on.
        counts = [bisect_right(arrivals, at + window) - first for first, at in enumerate(arrivals)]
        for number, one in enumerate(alike):
            first = bisect_left(arrivals, one.arrived - window)
            count = max(1, min(most, max(counts[first : number + 1])))
            found[one.id] = batch_ms(count, size) / count / 1e3
    return found
