"""What a server does next: which of the waiting images run now, in one batch, and which are turned away.

Policies are pure: they look at a clock's reading and at what waits. The simulator, the replay on a real engine and the
batcher all ask them the same question, whenever the engine is free and something waits.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from gfldeploy.batching.buckets import Size, union
from gfldeploy.batching.latency import LatencyModel

__all__ = ["Adaptive", "Decision", "FixedWithTimeout", "NoBatching", "Policy", "Request"]


# How many times as fast by the image a batch must be for the most urgent images to be turned away for its sake.
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
    """`run`: ids of one batch, padded to `size`; empty for none. `reject`: ids to turn away, whose deadlines cannot be
    kept. `wake`: seconds on the clock at which to ask again if nothing arrives; None for not before."""

    run: tuple[int, ...] = ()
    size: Size | None = None
    reject: tuple[int, ...] = ()
    wake: float | None = None


class Policy(Protocol):
    """Asked when the engine is free, with what waits in the order of arrival."""

    def decide(self, now: float, waiting: Sequence[Request]) -> Decision:
        """Must run, reject or name a time to `wake`, if anything waits."""
        ...

    def observe(self, images: int, size: Size, ms: float) -> None:
        """Told what each batch took."""
        ...


@dataclass(frozen=True)
class Adaptive:
    """Batches of one bucket, as large as pays and as the deadlines allow; never waits while something could run.

    First, those are rejected that would miss their deadlines though all that are due before ran at the best rate there
    is: the newest of what is too much, at once, rather than everyone's later. Of each bucket, the batch of its most
    urgent images is considered that takes least time by the image and ends by its deadlines. Of these batches the most
    efficient one runs, measured by the best batch of its bucket, so that the others' images go on gathering; but only
    if the most urgent image of every other bucket can still be served in time after it, else the most urgent of all
    decides. Hence none waits for ever behind another bucket. Not to run at all until more images arrive is not worth
    it: under load they gather while the engine is at work, and without load nobody gains.
    """

    model: LatencyModel
    most: int = 8

    def decide(self, now: float, waiting: Sequence[Request]) -> Decision:
        kept, rejected = self._admit(now, sorted(waiting, key=lambda one: (one.deadline, one.id)))
        buckets: dict[Size, list[Request]] = {}
        for one in kept:
            buckets.setdefault(one.size, []).append(one)
        if not buckets:
            self.model.fade()
            return Decision(reject=rejected)
        counts = {size: self._count(now, images) for size, images in buckets.items()}
        safe = [size for size in buckets if len(buckets) == 1 or self._leaves_time(now, size, counts[size], buckets)]
        # Without a safe one, the bucket of the most urgent image: the first.
        size = max(safe, key=lambda size: self._efficiency(size, counts[size]), default=kept[0].size)
        images = buckets[size]
        given_up = self._give_up(now, images, counts[size])
        count = self._count(now, images[given_up:]) if given_up else counts[size]
        run = tuple(one.id for one in images[given_up : given_up + count])
        return Decision(run, size, rejected + tuple(one.id for one in images[:given_up]))

    def observe(self, images: int, size: Size, ms: float) -> None:
        self.model.observe(images, size, ms)

    def _admit(self, now: float, urgent: Sequence[Request]) -> tuple[list[Request], tuple[int, ...]]:
        """Those whose deadlines can be kept, by deadline, and the others.

        An image is expected to end after all that are due before it, in batches of their buckets as full as they make
        them. A new one must leave room for a full batch on top of that, or the most urgent would soon force batches of
        one, and nobody would be served at the best rate; the room shrinks with the time that it has left. A full batch
        is the largest that can wait for another one and still end in time.
        """
        kept: list[Request] = []
        rejected: list[int] = []
        counts: dict[Size, int] = {}
        work_s: dict[Size, float] = {}
        for one in urgent:
            size, count = one.size, counts.get(one.size, 0) + 1
            full = self._full(size, one.deadline - one.arrived)
            own_s = self._work_s(size, count, full)
            busy_s = sum(work_s.values()) - work_s.get(size, 0.0) + own_s
            left = (one.deadline - now) / max(one.deadline - one.arrived, 1e-9)
            room_s = (self.model.predict(full, size) - self.model.predict(1, size)) / 1e3 * max(left, 0.0)
            alone = now + self.model.margin(1, size) / 1e3
            if max(alone, now + busy_s + room_s) > one.deadline:
                rejected.append(one.id)
            else:
                kept.append(one)
                counts[size], work_s[size] = count, own_s
        return kept, tuple(rejected)

    def _full(self, size: Size, bound_s: float) -> int:
        """Images in a full batch, of a bucket whose images are due so many seconds after they arrive."""
        counts = range(self.most, 1, -1)
        return next((count for count in counts if 2 * self.model.predict(count, size) <= bound_s * 1e3), 1)

    def _work_s(self, size: Size, count: int, full: int) -> float:
        """Seconds that so many images of a bucket take in batches of `full` images and a rest."""
        batches, rest = divmod(count, full)
        whole = batches * self.model.predict(full, size)
        return (whole + (self.model.predict(rest, size) if rest else 0.0)) / 1e3

    def _count(self, now: float, images: Sequence[Request]) -> int:
        """How many of these, all of one bucket and by deadline, to run at once."""
        size, deadline = images[0].size, images[0].deadline
        best, least = 1, self.model.predict(1, size)
        for count in range(2, min(len(images), self.most) + 1):
            if now + self.model.margin(count, size) / 1e3 > deadline:
                break
            per_image = self.model.predict(count, size) / count
            if per_image < least:
                best, least = count, per_image
        return best

    def _give_up(self, now: float, images: Sequence[Request], count: int) -> int:
        """How many of the most urgent of a bucket to turn away, as they would force a small batch on many that wait.

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
        clock = now + self.model.margin(count, size) / 1e3
        left = [images[count:] if other == size else images for other, images in buckets.items()]
        for images in sorted((images for images in left if images), key=lambda images: images[0].deadline):
            clock += self.model.margin(min(len(images), self.most), images[0].size) / 1e3
            if clock > images[0].deadline:
                return False
        return True

    def _efficiency(self, size: Size, count: int) -> float:
        return self._best_ms(size) * count / self.model.predict(count, size)

    def _best_ms(self, size: Size) -> float:
        """Of one image, in the batch size with the best rate."""
        return min(self.model.predict(count, size) / count for count in (1, self.most))


@dataclass(frozen=True)
class NoBatching:
    """One image after the other in the order of arrival, whatever their deadlines."""

    def decide(self, now: float, waiting: Sequence[Request]) -> Decision:
        return Decision((waiting[0].id,), waiting[0].size) if waiting else Decision()

    def observe(self, images: int, size: Size, ms: float) -> None:
        """Learns nothing."""


@dataclass(frozen=True)
class FixedWithTimeout:
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

    def observe(self, images: int, size: Size, ms: float) -> None:
        """Learns nothing."""
