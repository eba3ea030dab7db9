"""Which cells to measure next, given what is known: decisions alone, nothing is measured here.

Assumed of throughput and latency, and wrong where a machine behaves otherwise:

- Batching multiplies the throughput of a bundle in an engine by `BATCH_GAIN` at most, and each doubling gains no more
  than the one before, beyond the noise.
- A larger batch takes longer and more memory: what exceeds a bound there exceeds it for all larger ones.
- Other threads, or another policy, multiply it by `TURN_GAIN` at most, and where the best of them lies does not change
  with an engine's batch size by more than its neighbours.
- Two short runs of one cell differ by `measured.NOISE` at most.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, NamedTuple, get_args

from gfldeploy.bench.cell import BundleIdentity, Cell, Scenario
from gfldeploy.engines.base import Device, Precision
from gfldeploy.tune.measured import NOISE, Measured

__all__ = [
    "BATCH_GAIN",
    "POLICIES",
    "TIE",
    "TURN_GAIN",
    "Bounds",
    "Known",
    "Miss",
    "Model",
    "Policy",
    "Space",
    "Step",
    "choose",
    "finalists",
    "line",
    "model_of",
    "nearest",
    "next_step",
    "policy_of",
    "scenario_of",
]

# single: one image at a time; in-order: batches of the images as they come, padded to a common size; grouped: batches
# of images of one size each.
Policy = Literal["single", "in-order", "grouped"]
POLICIES: tuple[Policy, ...] = get_args(Policy)
_SCENARIOS: Mapping[Policy, Scenario] = {"single": "single-stream", "in-order": "multi-stream", "grouped": "offline"}

BATCH_GAIN: Mapping[Device, float] = {"cpu": 2.0, "gpu": 16.0}
TURN_GAIN = 1.25
# Of the cells that finish, those within this much of the best are as fast, and the least latency decides.
TIE = 0.02
# Cells that are measured at length: those that may be the best. No more, however alike they are.
_FINALISTS = 3
_MOST_FINALISTS = 6


class Model(NamedTuple):
    """What has one accuracy, and is climbed by itself."""

    bundle: BundleIdentity
    engine: str
    precision: Precision


# What was measured; None where that failed.
Known = Mapping[Cell, Measured | None]


@dataclass(frozen=True)
class Bounds:
    """What a choice must keep: None for no bound.

    `max_latency_ms`: of a batch from file to boxes, the 99th percentile; where too few batches were timed to know it,
    the largest of them must keep the bound, and it is said that this is not the percentile (`measured.Tail`).
    `max_memory_mb`: peak resident memory less the prepared inputs, 10^6 bytes. `max_drop`: of mAP against FP32, 0
    to 1.
    """

    max_latency_ms: float | None = None
    max_memory_mb: float | None = None
    max_drop: float | None = None

    def __post_init__(self) -> None:
        if any(value is not None and value <= 0 for value in (self.max_latency_ms, self.max_memory_mb)):
            raise ValueError("max_latency_ms and max_memory_mb must be positive")
        if self.max_drop is not None and not 0 <= self.max_drop <= 1:
            raise ValueError("max_drop must be from 0 to 1")

    def excess(self, measured: Measured) -> float:
        """By how many times the worse of latency and memory exceeds its bound, 1 or less where both may be kept.

        Of the latency, what the percentile is not below: a pause of the machine in a first look is no reason to give a
        cell up.
        """
        return max(self._latency(measured.tail.low_ms), self._memory(measured))

    def keeps(self, measured: Measured) -> bool:
        """Whether latency and memory are within their bounds, by all that was measured."""
        return max(self._latency(measured.tail.ms), self._memory(measured)) <= 1

    def may_keep(self, measured: Measured) -> bool:
        """Whether they may be, if more is measured."""
        return self.excess(measured) <= 1

    def hopeless(self, measured: Measured) -> bool:
        """Whether they are so far beyond that the noise is no excuse."""
        return self.excess(measured) > 1 + NOISE

    def _latency(self, ms: float) -> float:
        return 0.0 if self.max_latency_ms is None else ms / self.max_latency_ms

    def _memory(self, measured: Measured) -> float:
        return 0.0 if self.max_memory_mb is None else measured.memory_mb / self.max_memory_mb


@dataclass(frozen=True)
class Space:
    """All `cells` that could be measured, and the `bounds`. A batch of 1 has the policy "single"."""

    cells: tuple[Cell, ...]
    bounds: Bounds

    @cached_property
    def models(self) -> tuple[Model, ...]:
        """In the order of the cells."""
        return tuple(dict.fromkeys(map(model_of, self.cells)))

    def of(self, model: Model) -> tuple[Cell, ...]:
        """Its cells."""
        return self._by_model[model]

    @cached_property
    def _by_model(self) -> dict[Model, tuple[Cell, ...]]:
        return {model: tuple(cell for cell in self.cells if model_of(cell) == model) for model in self.models}

    def start(self, model: Model) -> Cell:
        """Where it is looked at first: the smallest batch with all threads."""
        return line(self, model)[0]


@dataclass(frozen=True)
class Step:
    """Cells to measure, and what for, in words."""

    cells: tuple[Cell, ...]
    why: str


@dataclass(frozen=True)
class Miss:
    """A cell that keeps the bounds least badly: `value` of `what` exceeds the `bound`; `unit` of both.

    `note`: what the value is, where its name does not say it.
    """

    cell: Cell
    what: Literal["latency", "memory", "mAP drop"]
    value: float
    bound: float
    unit: str
    note: str = ""

    @property
    def percent(self) -> float:
        """By how many per cent of the bound it is beyond it; infinity for a bound of 0."""
        return 100 * (self.value / self.bound - 1) if self.bound else float("inf")


def model_of(cell: Cell) -> Model:
    """What the cell has its accuracy from."""
    return Model(cell.bundle, cell.engine, cell.precision)


def policy_of(cell: Cell) -> Policy:
    """How its batches are formed."""
    return next(policy for policy, scenario in _SCENARIOS.items() if scenario == cell.scenario)


def scenario_of(policy: Policy) -> Scenario:
    """The benchmark's scenario that measures it."""
    return _SCENARIOS[policy]


def next_step(space: Space, known: Known, refused: Collection[Model] = ()) -> Step | None:
    """What to measure next, None when there is nothing left that could be the best.

    `refused`: models that lose too much accuracy. Depends on nothing else, so that a search that was interrupted goes
    on where it was, and one with results of earlier benchmarks starts from them.
    """
    models = [model for model in space.models if model not in refused]
    if starts := tuple(start for model in models if (start := space.start(model)) not in known):
        return Step(starts, "a first look at each engine and precision")
    best = _leader(space, known, refused)
    for model in sorted(models, key=lambda model: -_fastest(space, known, model)):
        if (cell := _climb(space, known, model, best)) is not None:
            return Step((cell,), "a larger batch")
    for model in sorted(models, key=lambda model: -_fastest(space, known, model)):
        if (cell := _polish(space, known, model, best)) is not None:
            return Step((cell,), "other threads, grouping and batches beside the best")
    return None


def finalists(space: Space, known: Known, refused: Collection[Model], done: Collection[Cell]) -> tuple[Cell, ...]:
    """The cells to measure at length interleaved: those that may be the best, at least two where there are two.

    One of another model is among them, within `TURN_GAIN` of the best, for the runner-up to be an alternative. `done`:
    those that were measured at length before; of what keeps the bounds no more than six are.
    """
    ranked = [
        cell
        for cell in _ranked(space, known, refused)
        if cell not in done or ((found := known.get(cell)) is not None and space.bounds.keeps(found))
    ]
    if not ranked:
        return ()
    best = _speed(known, ranked[0])
    close = [cell for cell in ranked if _speed(known, cell) * (1 + NOISE) >= best * (1 - NOISE)]
    chosen = close[:_FINALISTS] if len(close) > 1 else ranked[:2]
    if len({model_of(cell) for cell in chosen}) == 1:
        others = [cell for cell in ranked if model_of(cell) != model_of(ranked[0])]
        chosen += [cell for cell in others[:1] if _speed(known, cell) * TURN_GAIN >= best]
    finished = [cell for cell in ranked if cell in done]
    if len(finished) >= _MOST_FINALISTS:
        return tuple(finished)
    return tuple(chosen)


def choose(finished: Mapping[Cell, Measured]) -> tuple[Cell, ...]:
    """The cells measured at length, the choice first: the fastest, of those within `TIE` of it the least latency."""
    ranked = sorted(finished, key=lambda cell: -finished[cell].images_per_s)
    if not ranked:
        return ()
    least = finished[ranked[0]].images_per_s * (1 - TIE)
    tied = [cell for cell in ranked if finished[cell].images_per_s >= least]
    choice = min(tied, key=lambda cell: (finished[cell].median_ms, cell.threads))
    return (choice, *(cell for cell in ranked if cell != choice))


def nearest(space: Space, known: Known, drops: Mapping[Model, float]) -> Miss | None:
    """Of the cells that miss a bound the one that misses it least, by its ratio to the bound; None without any.

    `drops`: the mAP that models were found to lose.
    """
    bounds = space.bounds
    misses: list[tuple[float, float, Miss]] = []
    for cell, measured in known.items():
        if measured is None:
            continue
        found = [
            Miss(cell, "latency", measured.tail.ms, bounds.max_latency_ms or 0, "ms", measured.tail.what),
            Miss(cell, "memory", measured.memory_mb, bounds.max_memory_mb or 0, "MB"),
        ]
        found = [miss for miss in found if miss.bound]
        if bounds.max_drop is not None and model_of(cell) in drops:
            found.append(Miss(cell, "mAP drop", drops[model_of(cell)], bounds.max_drop, "mAP"))
        over = [miss for miss in found if miss.value > miss.bound]
        if over:
            worst = max(over, key=lambda miss: miss.percent)
            misses.append((worst.percent, -measured.images_per_s, worst))
    return min(misses, key=lambda item: item[:2])[2] if misses else None


def line(space: Space, model: Model, threads: int | None = None, policy: Policy | None = None) -> list[Cell]:
    """The batch sizes of a model, the smallest first, with one number of threads (None: the most) and one policy.

    The policy None is grouped where there is one, since it pads less. Batches of 1 belong to either.
    """
    cells = space.of(model)
    threads = max(cell.threads for cell in cells) if threads is None else threads
    if policy is None:
        policy = "grouped" if any(policy_of(cell) == "grouped" for cell in cells) else "in-order"
    chosen = [cell for cell in cells if cell.threads == threads and policy_of(cell) in ("single", policy)]
    return sorted(chosen, key=lambda cell: cell.batch_size)


def _speed(known: Known, cell: Cell) -> float:
    measured = known.get(cell)
    return measured.images_per_s if measured else 0.0


def _may_keep(space: Space, known: Known, cell: Cell) -> bool:
    measured = known.get(cell)
    return measured is not None and space.bounds.may_keep(measured)


def _ranked(space: Space, known: Known, refused: Collection[Model]) -> list[Cell]:
    """What may keep the bounds, the fastest first."""
    kept = (cell for cell in space.cells if model_of(cell) not in refused and _may_keep(space, known, cell))
    return sorted(kept, key=lambda cell: -_speed(known, cell))


def _leader(space: Space, known: Known, refused: Collection[Model]) -> float:
    """Images a second of the fastest that may keep the bounds, less the noise; 0 without one."""
    ranked = _ranked(space, known, refused)
    return _speed(known, ranked[0]) * (1 - NOISE) if ranked else 0.0


def _fastest(space: Space, known: Known, model: Model) -> float:
    return max(_speed(known, cell) for cell in space.of(model))


def _climb(space: Space, known: Known, model: Model, best: float) -> Cell | None:
    """The next larger batch with all threads, None where it is no use."""
    cells = line(space, model)
    if _speed(known, cells[0]) * (1 + NOISE) * BATCH_GAIN[cells[0].device] < best:
        return None
    base, flat = 0.0, 0
    for number, cell in enumerate(cells):
        if cell not in known:
            before, last = (_speed(known, cells[max(number - back, 0)]) for back in (2, 1))
            gain = max(last / before * (1 + NOISE), 1.0) if number > 1 else BATCH_GAIN[cell.device]
            steps = len(cells) - number if number > 1 else 1
            return cell if last * (1 + NOISE) * gain**steps >= best else None
        measured = known[cell]
        if measured is None or space.bounds.hopeless(measured):
            return None
        speed = measured.images_per_s
        if speed > base * (1 + NOISE):
            base, flat = speed, 0
        else:
            flat += 1
        if flat == 2 or speed < base * (1 - 2 * NOISE):
            return None
    return None


def _polish(space: Space, known: Known, model: Model, best: float) -> Cell | None:
    """A neighbour of the model's best cell that was not measured yet, if one of them could be the best of all."""
    measured = {cell: found for cell in space.of(model) if (found := known.get(cell)) is not None}
    if not measured:
        return None
    kept = [cell for cell in measured if space.bounds.may_keep(measured[cell])]
    if kept:
        top = max(kept, key=lambda cell: measured[cell].images_per_s)
        if measured[top].images_per_s * (1 + NOISE) * TURN_GAIN < best:
            return None
    else:
        top = min(measured, key=lambda cell: space.bounds.excess(measured[cell]))
        if space.bounds.excess(measured[top]) > TURN_GAIN * (1 + NOISE):
            return None
    around = (cell for cell in _neighbours(space.of(model), top) if cell not in known)
    return next((cell for cell in around if not _too_large(space, known, cell)), None)


def _neighbours(cells: Sequence[Cell], top: Cell) -> Iterator[Cell]:
    """Those that differ from `top` in one thing by one step: threads, then policy, then batch size."""

    def alike(cell: Cell, threads: bool = False, policy: bool = False, batch: bool = False) -> bool:
        return (
            (threads or cell.threads == top.threads)
            and (policy or cell.scenario == top.scenario or "single" in (policy_of(cell), policy_of(top)))
            and (batch or cell.batch_size == top.batch_size)
        )

    by_threads = sorted((cell for cell in cells if alike(cell, threads=True)), key=lambda cell: cell.threads)
    at = by_threads.index(top)
    yield from reversed(by_threads[max(at - 1, 0) : at])
    yield from by_threads[at + 1 : at + 2]
    yield from (cell for cell in cells if cell != top and alike(cell, policy=True))
    sizes = sorted({cell.batch_size for cell in cells if alike(cell, batch=True)})
    at = sizes.index(top.batch_size)
    for size in (*sizes[max(at - 1, 0) : at], *sizes[at + 1 : at + 2]):
        yield from (cell for cell in cells if cell.batch_size == size and alike(cell, batch=True))


def _too_large(space: Space, known: Known, cell: Cell) -> bool:
    """Whether a smaller batch with all else alike is beyond a bound for good, or failed."""
    for other in line(space, model_of(cell), cell.threads, policy_of(cell)):
        if other.batch_size < cell.batch_size and other in known:
            measured = known[other]
            if measured is None or space.bounds.hopeless(measured):
                return True
    return False
