"""What a server does next: which of the waiting images run now, in one batch, and which are turned away.

Policies are pure: they look at a clock's reading and at what waits. The simulator, the replay on a real engine and the
batcher all ask them the same question, whenever the engine is free and something waits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from gfldeploy.batching.buckets import Size, union
from gfldeploy.batching.latency import LatencyModel

__all__ = ["Adaptive", "Decision", "FixedWithTimeout", "NoBatching", "Policy", "Request"]


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

    Images are served by deadline. First, those are rejected that would miss theirs though all before them ran at the
    best rate there is: the newest of what is too much, at once, rather than everyone's later. The most urgent image
    chooses the bucket, so that none waits for ever behind another bucket. Of the batch sizes that are no slower by the
    image than smaller ones, the largest is run with which no image of the batch misses its deadline and no other misses
    one that it would have kept behind a smaller batch. Waiting for more images is not worth it: under load they gather
    while the engine is at work, and without load nobody gains.
    """

    model: LatencyModel
    most: int = 8

    def decide(self, now: float, waiting: Sequence[Request]) -> Decision:
        kept, rejected = self._admit(now, sorted(waiting, key=lambda one: (one.deadline, one.id)))
        if not kept:
            return Decision(reject=rejected)
        lead = kept[0]
        alike = [one for one in kept if one.size == lead.size][: self.most]
        others = [one for one in kept if one.size != lead.size]
        count = self._count(now, lead, alike, others)
        return Decision(tuple(one.id for one in alike[:count]), lead.size, rejected)

    def observe(self, images: int, size: Size, ms: float) -> None:
        self.model.observe(images, size, ms)

    def _admit(self, now: float, urgent: Sequence[Request]) -> tuple[list[Request], tuple[int, ...]]:
        """Those whose deadlines can be kept, by deadline, and the others."""
        kept: list[Request] = []
        rejected: list[int] = []
        busy_until = now
        for one in urgent:
            # Alone and at once is the soonest; behind the others it shares a batch at best.
            alone = now + self.model.margin(1, one.size) / 1e3
            finish = max(alone, busy_until + self._best_ms(one.size) / 1e3)
            if finish > one.deadline:
                rejected.append(one.id)
            else:
                kept.append(one)
                busy_until += self._best_ms(one.size) / 1e3
        return kept, tuple(rejected)

    def _count(self, now: float, lead: Request, alike: Sequence[Request], others: Sequence[Request]) -> int:
        best, single = 1, self.model.predict(1, lead.size)
        lowest = single
        slack_s = min((one.deadline - self.model.margin(1, one.size) / 1e3 for one in others), default=float("inf"))
        for count in range(2, len(alike) + 1):
            finish = now + self.model.margin(count, lead.size) / 1e3
            if finish > lead.deadline or (finish > slack_s and now + single / 1e3 <= slack_s):
                break
            per_image = self.model.predict(count, lead.size) / count
            if per_image < lowest:
                best, lowest = count, per_image
        return best

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
