"""What a server does next: which of the waiting images run now, in one batch, and which are rejected.

Policies are pure: they look at the time and at what waits. The simulator, the replay on a real engine and the batcher
call them in the same way, whenever the engine, or a stream of it, is free and something waits.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from gfldeploy.batching.buckets import Size, union
from gfldeploy.batching.latency import LatencyModel

# How many times as fast by the image a batch must be for the most urgent images to be rejected for its sake.
_WORTH_GIVING_UP = 1.1


@dataclass(frozen=True)
class Request:
    """An image that waits. `size`: of its bucket; `arrived`, `deadline`: seconds on the same clock."""

    id: int
    size: Size
    arrived: float
    deadline: float


@dataclass(frozen=True)
class Decision:
    """`run`: ids of one batch, padded to `size`; empty for none. `reject`: ids whose deadlines cannot be kept. `wake`:
    seconds on the clock at which to decide again if nothing arrives; None for not before."""

    run: tuple[int, ...] = ()
    size: Size | None = None
    reject: tuple[int, ...] = ()
    wake: float | None = None


@dataclass(frozen=True)
class Running:
    """A batch in the engine since a time in seconds on the clock of its requests: so many images, padded to `size`."""

    images: int
    size: Size
    since: float


class Policy(Protocol):
    """Decides when the engine is free."""

    def admits(self, now: float, new: Request, waiting: Iterable[Request], running: Iterable[Running]) -> bool:
        """Whether a request that has just arrived may wait: not if it will surely miss its deadline. Takes no time."""
        return True

    def decide(self, now: float, waiting: Sequence[Request]) -> Decision:
        """If anything waits, given in the order of arrival, run some, reject some or name a time to `wake`."""
        ...

    def observe(self, images: int, size: Size, ms: float) -> None:
        """Learn from the time of a batch."""
        return


def decide(policy: Policy, now: float, waiting: Mapping[int, Request]) -> Decision:
    """The policy's decision on what waits, by id. Raises `RuntimeError` if it is about a request twice, or none."""
    decision = policy.decide(now, list(waiting.values()))
    wanted = decision.reject + decision.run
    if len(set(wanted)) < len(wanted) or not waiting.keys() >= set(wanted):
        raise RuntimeError("the policy decided on a request that does not wait, or twice on one")
    return decision


@dataclass(frozen=True)
class Adaptive(Policy):
    """Batches of one bucket, as large as pays and as the deadlines allow; never waits while something could run.

    First it rejects the images that would miss their deadlines even if all that are due before them ran at the best
    rate: the newest of an excess, at once, rather than everyone's later. In each bucket it considers, of the batches of
    its most urgent images that end by their deadlines, the one with the least time per image. The most efficient of
    these batches, measured by the best batch of its bucket, runs, and the other buckets gather more images; but only if
    the most urgent image of every other bucket can still be served in time after it, else the bucket of the most urgent
    image runs. Hence no image waits for ever behind another bucket. Waiting for more images is not worth it: under load
    they gather while the engine is at work, and without load nobody gains.

    `streams`: batches that run at once; `model` tells how long one takes beside the others. What is due before an image
    runs in all of them.
    """

    model: LatencyModel
    most: int = 8
    streams: int = 1

    def admits(self, now: float, new: Request, waiting: Iterable[Request], running: Iterable[Running]) -> bool:
        """Unless it would be late if all that is due before it ran at the best rate, in all streams at once.

        If nothing else is there and it is refused all the same, a little of what was learnt is forgotten.
        """
        busy_ms, alone = 0.0, True
        best: dict[Size, float] = {}
        for batch in running:
            busy_ms += max(self.model.predict(batch.images, batch.size) - (now - batch.since) * 1e3, 0.0)
            alone = False
        for one in waiting:
            alone = False
            if one.deadline <= new.deadline:
                if one.size not in best:
                    best[one.size] = self._best_ms(one.size)
                busy_ms += best[one.size]
        own_ms = self.model.margin(1, new.size)
        admitted = now + (busy_ms / self.streams + own_ms) / 1e3 <= new.deadline
        if alone and not admitted:
            self.model.fade()
        return admitted

    def decide(self, now: float, waiting: Sequence[Request]) -> Decision:
        kept, rejected = self._admit(now, sorted(waiting, key=lambda one: (one.deadline, one.id)))
        buckets: dict[Size, list[Request]] = {}
        for one in kept:
            buckets.setdefault(one.size, []).append(one)
        if not buckets:
            self.model.fade()
            return Decision(reject=rejected)
        if len(buckets) == 1 or self.most == 1:  # there is nothing to choose but the bucket of the most urgent image
            size, counts = kept[0].size, {kept[0].size: self._count(now, buckets[kept[0].size])}
        else:
            size, counts = self._best_bucket(now, kept[0].size, buckets)
        images = buckets[size]
        given_up = self._give_up(now, images, counts[size])
        count = self._count(now, images[given_up:]) if given_up else counts[size]
        run = tuple(one.id for one in images[given_up : given_up + count])
        return Decision(run, size, rejected + tuple(one.id for one in images[:given_up]))

    def _best_bucket(
        self, now: float, urgent: Size, buckets: Mapping[Size, Sequence[Request]]
    ) -> tuple[Size, dict[Size, int]]:
        """The bucket whose batch is the most efficient of those after which nobody is late, and how many each runs."""
        counts = {size: self._count(now, images) for size, images in buckets.items()}

        def efficiency(size: Size) -> float:
            """Images a second of this bucket's batch, by those of its best batch size."""
            return self._best_ms(size) * counts[size] / self.model.predict(counts[size], size)

        safe = [size for size in buckets if self._leaves_time(now, size, counts[size], buckets)]
        return max(safe, key=efficiency, default=urgent), counts

    def observe(self, images: int, size: Size, ms: float) -> None:
        self.model.observe(images, size, ms)

    def _best_ms(self, size: Size) -> float:
        """Milliseconds of an image at the best rate."""
        return min(self.model.predict(count, size) / count for count in (1, self.most))

    def _admit(self, now: float, urgent: Sequence[Request]) -> tuple[list[Request], tuple[int, ...]]:
        """Those whose deadlines can be kept, by deadline, and the others.

        An image is expected to end after all that are due before it, in batches as full as their buckets allow. A new
        one must leave room for a full batch on top of that, or the most urgent would soon force batches of one, and
        no image would be served at the best rate; the room shrinks with the time that is left. A full batch is the
        largest that can wait for another one and still end in time.
        """
        kept: list[Request] = []
        rejected: list[int] = []
        counts: dict[Size, int] = {}
        work_ms: dict[Size, float] = {}
        all_ms, elsewhere = 0.0, 1 - 1 / self.streams
        fullest: dict[tuple[Size, float], int] = {}
        for one in urgent:
            size, count = one.size, counts.get(one.size, 0) + 1
            bound_ms = (one.deadline - one.arrived) * 1e3
            if (full := fullest.get((size, bound_ms), 0)) == 0:
                larger = range(self.most, 1, -1)
                full = next((number for number in larger if 2 * self.model.predict(number, size) <= bound_ms), 1)
                fullest[size, bound_ms] = full
            batches, rest = divmod(count, full)
            full_ms = self.model.predict(full, size)
            rest_ms = self.model.predict(rest, size) if rest else 0.0
            own_ms = batches * full_ms + rest_ms
            busy_ms = all_ms - work_ms.get(size, 0.0) + own_ms
            left_ms = (one.deadline - now) * 1e3
            room_ms = (full_ms - self.model.predict(1, size)) * max(left_ms / max(bound_ms, 1e-6), 0.0)
            last_ms = rest_ms or full_ms  # of its own batch
            others_ms = (busy_ms - last_ms + room_ms) * elsewhere  # in other streams
            if max(self.model.margin(1, size), busy_ms + room_ms - others_ms) > left_ms:
                rejected.append(one.id)
            else:
                kept.append(one)
                counts[size], work_ms[size], all_ms = count, own_ms, busy_ms
        return kept, tuple(rejected)

    def _count(self, now: float, images: Sequence[Request]) -> int:
        """How many of these, all of one bucket and by deadline, to run at once."""
        size, deadline = images[0].size, images[0].deadline
        in_time = itertools.takewhile(
            lambda count: now + self.model.margin(count, size) / 1e3 <= deadline,
            range(2, min(len(images), self.most) + 1),
        )
        return min((1, *in_time), key=lambda count: self.model.predict(count, size) / count)

    def _give_up(self, now: float, images: Sequence[Request], count: int) -> int:
        """How many of the most urgent of a bucket to reject, as they would force a small batch on many that wait.

        An early drop, as in Nexus (Shen et al., SOSP 2019): in overload, serving every image at the last moment means
        batches of one, and fewer images served in time.
        """
        size, most = images[0].size, min(len(images), self.most)
        best, rate = 0, _WORTH_GIVING_UP * count / self.model.predict(count, size)
        for left_out in range(1, len(images) - count):
            if count == most:
                break
            more = self._count(now, images[left_out:])
            if (found := more / self.model.predict(more, size)) > rate:
                best, rate = left_out, found
            if more == self.most:
                break
        return best

    def _leaves_time(self, now: float, size: Size, count: int, buckets: Mapping[Size, Sequence[Request]]) -> bool:
        """Whether after this batch the most urgent of every bucket is served in time, with all it can take along."""
        clock = now + self.model.margin(count, size) / 1e3 / self.streams
        left = [images[count:] if other == size else images for other, images in buckets.items()]
        for images in sorted((images for images in left if images), key=lambda images: images[0].deadline):
            takes_s = self.model.margin(min(len(images), self.most), images[0].size) / 1e3
            if clock + takes_s > images[0].deadline:
                return False
            clock += takes_s / self.streams
        return True


@dataclass(frozen=True)
class NoBatching(Policy):
    """One image after the other in the order of arrival, whatever their deadlines."""

    def decide(self, now: float, waiting: Sequence[Request]) -> Decision:
        return Decision((waiting[0].id,), waiting[0].size) if waiting else Decision()


@dataclass(frozen=True)
class FixedWithTimeout(Policy):
    """Triton Inference Server's rule: a batch runs when `batch` images wait, or the oldest has waited `delay_s`.

    Images are taken in the order of arrival and padded to their common size, as a server without buckets does.
    """

    batch: int
    delay_s: float

    def decide(self, now: float, waiting: Sequence[Request]) -> Decision:
        if not waiting:
            return Decision()
        ready = waiting[0].arrived + self.delay_s
        if len(waiting) < self.batch and now < ready:
            return Decision(wake=ready)
        taken = waiting[: self.batch]
        return Decision(tuple(one.id for one in taken), union(one.size for one in taken))
