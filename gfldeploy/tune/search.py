"""Which cells to measure, in which order: decisions alone, what measures is given.

Assumed of throughput and latency, and wrong where a machine behaves otherwise:

- Batching multiplies the throughput of a bundle in an engine by `BATCH_GAIN` at most, in several streams, which leave
  no CPU idle anyway, by `STREAMS_BATCH_GAIN`; and each doubling gains no more than the one before, beyond the noise.
- A larger batch takes longer and more memory: what exceeds a bound there exceeds it for all larger ones.
- Another number of threads, in as many streams as there are CPUs for, or another order, multiplies it by `TURN_GAIN` at
  most, and the best of them for one batch size of an engine is the best of its neighbours, or next to it, for others.
- Two short runs of one cell differ by `measured.NOISE` at most.
- With fewer pixels throughput is no lower, and higher by the ratio of the pixels at most; mAP is no higher. An input
  size costs as much mAP in every engine and precision, up to `SIZE_SPREAD`: so one of them is asked for most of it.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from math import inf
from typing import Literal, NamedTuple

from gfldeploy.batching.buckets import Order, Size
from gfldeploy.bench.cell import BundleIdentity, Cell
from gfldeploy.engines.base import Device, Precision
from gfldeploy.tune.measured import NOISE, Measured

BATCH_GAIN: Mapping[Device, float] = {"cpu": 2.0, "gpu": 16.0}
STREAMS_BATCH_GAIN = 1.5
TURN_GAIN = 1.25
# Throughputs within this much of the best count as equal; then the lowest latency decides.
TIE = 0.02
# Of mAP: what an input size costs in one engine and precision may differ by this much from what it costs in another.
SIZE_SPREAD = 0.005
# Cells that are measured at length: those that may be the best, but no more than this many.
_FINALISTS = 3
_MOST_FINALISTS = 6


class Model(NamedTuple):
    """What has one accuracy: its batch sizes are searched on their own. `input_size`: None for the bundle's own."""

    bundle: BundleIdentity
    engine: str
    precision: Precision
    input_size: Size | None = None

    @property
    def own(self) -> Model:
        """The same at the bundle's own input size."""
        return self._replace(input_size=None)


def model_of(cell: Cell) -> Model:
    """The model that the cell runs."""
    return Model(cell.bundle, cell.engine, cell.precision, cell.input_size)


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
        """The larger of latency and memory, each relative to its bound; at 1 or less both may be kept.

        For latency the percentile's lower limit counts: a pause of the machine in a first look is no reason to give a
        cell up.
        """
        return self._ratio(measured, measured.tail.low_ms)

    def keeps(self, measured: Measured) -> bool:
        """Whether latency and memory are within their bounds, by all that was measured."""
        return self._ratio(measured, measured.tail.ms) <= 1

    def may_keep(self, measured: Measured) -> bool:
        """Whether more measurements may show that they are within the bounds."""
        return self.excess(measured) <= 1

    def hopeless(self, measured: Measured) -> bool:
        """Whether they exceed their bounds by more than the noise."""
        return self.excess(measured) > 1 + NOISE

    def _ratio(self, measured: Measured, latency_ms: float) -> float:
        latency = latency_ms / self.max_latency_ms if self.max_latency_ms else 0.0
        return max(latency, measured.memory_mb / self.max_memory_mb if self.max_memory_mb else 0.0)


@dataclass(frozen=True)
class Step:
    """Cells to measure, and what for, in words; then the mAP of `model`, if there is one."""

    cells: tuple[Cell, ...]
    why: str
    model: Model | None = None


@dataclass(frozen=True)
class Miss:
    """A cell that exceeds a bound: `value` of `what` exceeds the `bound`; `unit` of both.

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
        """By how many per cent the value exceeds the bound; infinity for a bound of 0."""
        return 100 * (self.value / self.bound - 1) if self.bound else float("inf")


@dataclass
class Search:
    """All `cells` that could be measured, the `bounds`, and what was found out so far.

    `known`: the latest measurement of each cell, None where it failed. `drops`: mAP that models were found to lose.
    Decisions depend on nothing else, so that an interrupted search resumes where it was, and one with results of
    earlier benchmarks starts from them. `finished`: in the end, the cells measured at length that keep all bounds, the
    choice first. A batch of one image has the order "listed". Where a bundle has several input sizes its own is among
    them, and `pixels` has the mean pixels of an input of the bundle at each.

    `own_size`: in the end, where the choice has another input size than its bundle's own, the fastest cell of the same
    bundle, engine and precision at the bundle's own that was measured at length.
    """

    cells: tuple[Cell, ...]
    bounds: Bounds
    known: dict[Cell, Measured | None] = field(default_factory=dict)
    drops: dict[Model, float] = field(default_factory=dict)
    finished: dict[Cell, Measured] = field(default_factory=dict)
    pixels: Mapping[tuple[BundleIdentity, Size | None], float] = field(default_factory=dict)
    own_size: tuple[Cell, Measured] | None = None
    _presumes: bool = True

    @cached_property
    def by_model(self) -> Mapping[Model, Sequence[Cell]]:
        """The cells of each model, both in the order of `cells`."""
        found: dict[Model, list[Cell]] = {}
        for cell in self.cells:
            found.setdefault(model_of(cell), []).append(cell)
        return found

    @cached_property
    def families(self) -> Mapping[Model, Sequence[Model]]:
        """The models that differ in input size alone, that with the fewest pixels first, under that of the own size."""
        found: dict[Model, list[Model]] = {}
        for model in self.by_model:
            found.setdefault(model.own, []).append(model)
        return {own: sorted(models, key=self._pixels) if len(models) > 1 else models for own, models in found.items()}

    def start(self, model: Model) -> Cell:
        """The cell of its first look: the smallest batch with the usual threads."""
        return self.line(model)[0]

    def refused(self, model: Model) -> bool:
        """Whether the model loses too much mAP: it was measured, or follows from other input sizes that were."""
        if self.bounds.max_drop is None:
            return False
        if model in self.drops or not self._presumes:
            return self.drops.get(model, 0.0) > self.bounds.max_drop
        return self._least_drop(model) > self.bounds.max_drop

    def line(self, model: Model, threads: int | None = None, order: Order | None = None) -> list[Cell]:
        """The batch sizes of a model, the smallest first, with one number of threads (None: the usual) and one order.

        Usual is what throughput is most likely highest with: all CPUs, in as many streams as there are. With a bound on
        latency, all in one inference, which may keep the bound where streams do not.

        None is bucketed where there are such batches, since it pads less. Batches of one image belong to either.
        """
        cells = self.by_model[model]
        if threads is None:
            threads = max(cells, key=self._likely).threads
        order = order or ("bucketed" if any(cell.order == "bucketed" for cell in cells) else "listed")
        chosen = [cell for cell in cells if cell.threads == threads and (cell.order == order or cell.batch_size == 1)]
        return sorted(chosen, key=lambda cell: cell.batch_size)

    def run(
        self,
        look: Callable[[Step], Mapping[Cell, Measured | None]],
        finish: Callable[[Sequence[Cell]], Mapping[Cell, Measured | None]],
        drop: Callable[[Model], float | None],
        out_of_time: Callable[[], bool] = lambda: False,
        exhaustive: bool = False,
    ) -> bool:
        """Find the fastest cell that keeps the bounds, the first of `finished`; returns False if it was cut short.

        `look` measures briefly, `finish` at length and interleaved. `drop`: the mAP that a model loses, None where it
        is neither measured nor bounded; asked of one model after the other, for the one that leads at the finish, so
        that a loser's accuracy is never measured. Where there are several input sizes, it is asked before that of some
        of them in the fastest bundle, engine and precision, to find the smallest that keeps the bound: smaller ones are
        not searched then, and larger ones cannot be faster. Once a model is refused, the cells that were given up
        because of it are searched again. `out_of_time`: asked before each step; the finish is run in any case.
        `exhaustive`: every cell is measured at length instead, and no mAP is presumed.
        """
        done: dict[Cell, Measured | None] = {}
        complete, self._presumes = True, not exhaustive
        if exhaustive:
            done |= {cell: self.known[cell] for cell in self.cells if cell in self.known}
            done |= finish([cell for cell in self.cells if cell not in done])
            self.known |= done
        while True:
            step = None if exhaustive else self.next_step()
            if step and out_of_time() and any(self.known.values()):
                complete, step = False, None
            if step:
                if step.cells:
                    self.known |= look(step)
                if step.model:
                    self._ask(step.model, drop)
                continue
            wanted = self.finalists(done)
            if any(cell not in done for cell in wanted):
                done |= finish(wanted)
                self.known |= done
                continue
            kept = {
                cell: found
                for cell, found in done.items()
                if found and self.bounds.keeps(found) and not self.refused(model_of(cell))
            }
            ranking = choose(kept)
            if ranking:
                self._ask(model_of(ranking[0]), drop)
                if self.refused(model_of(ranking[0])):
                    continue
                if missing := self._at_own_size(ranking[0], done):
                    done |= finish(missing)
                    self.known |= done
                    continue
                self.own_size = self._fastest_at_own_size(ranking[0], done)
            # A smaller input size is offered, as a runner-up too, only where it is known what it costs.
            self.finished = {
                cell: kept[cell] for cell in ranking if cell.input_size is None or model_of(cell) in self.drops
            }
            return complete

    def _ask(self, model: Model, drop: Callable[[Model], float | None]) -> None:
        if model not in self.drops and (lost := drop(model)) is not None:
            self.drops[model] = lost
        if model not in self.drops and self.bounds.max_drop is not None:
            raise ValueError("what is bounded must be measured")

    def _at_own_size(self, cell: Cell, done: Collection[Cell]) -> tuple[Cell, ...]:
        """What to measure at length so that what the cell's input size gains is known: at most one, like the cell."""
        own = model_of(cell).own
        if own == model_of(cell) or own in map(model_of, done):
            return ()
        alike = replace(cell, input_size=None)
        return (alike if alike in self.by_model[own] else self.start(own),)

    def _fastest_at_own_size(self, choice: Cell, done: Mapping[Cell, Measured | None]) -> tuple[Cell, Measured] | None:
        own = model_of(choice).own
        alike = [(cell, found) for cell, found in done.items() if found and model_of(cell) == own != model_of(choice)]
        return max(alike, key=lambda one: one[1].images_per_s, default=None)

    def next_step(self) -> Step | None:
        """What to measure next, None when nothing is left that could be the best."""
        own = [one for one in self.families if one in self.by_model and not self.refused(one)]
        if starts := tuple(start for start in map(self.start, own) if start not in self.known):
            return Step(starts, "a first look at each engine and precision")
        if (asked := self._open_question()) is not None:
            start = self.start(asked)
            return Step(() if start in self.known else (start,), "the mAP of an input size", asked)
        ranked = self._ranked()
        best = self._speed(ranked[0]) * (1 - NOISE) if ranked else 0.0
        competing = [one for one in map(self._competing, self.families) if one is not None]
        unknown = [one for one in competing if self.start(one) not in self.known]
        if unknown and self._hope(hopeful := max(unknown, key=self._hope)) >= best:
            return Step((self.start(hopeful),), "a look at an input size")
        models = [one for one in competing if one not in unknown]
        models.sort(key=lambda model: -max(map(self._speed, self.by_model[model])))
        if models and models[0].input_size and models[0] not in self.drops and self.bounds.max_drop is not None:
            return Step((), "the mAP of an input size", models[0])  # before its batches are searched
        for model in models:
            if (cell := self._larger_batch(model, best)) is not None:
                return Step((cell,), "a larger batch")
        for model in models:
            if (cell := self._neighbour(model, best)) is not None:
                return Step((cell,), "other threads, orders and batch sizes beside the best")
        return None

    def finalists(self, done: Collection[Cell]) -> tuple[Cell, ...]:
        """The cells to measure at length, interleaved: those that may be the best, at least two where there are two.

        One of another model is among them, within `TURN_GAIN` of the best, for the runner-up to be an alternative; and
        one at the bundle's own input size where the best is not, for what the size gains.
        `done`: those that were measured at length before; of what keeps the bounds no more than six are.
        """
        ranked = [
            cell
            for cell in self._ranked()
            if cell not in done or ((found := self.known.get(cell)) is not None and self.bounds.keeps(found))
        ]
        finished = tuple(cell for cell in ranked if cell in done)
        if not ranked or len(finished) >= _MOST_FINALISTS:
            return finished
        best = self._speed(ranked[0])
        close = [cell for cell in ranked if self._speed(cell) * (1 + NOISE) >= best * (1 - NOISE)]
        chosen = close[:_FINALISTS] if len(close) > 1 else ranked[:2]
        if len({model_of(cell) for cell in chosen}) == 1:
            others = [cell for cell in ranked if model_of(cell) != model_of(ranked[0])]
            chosen += [cell for cell in others[:1] if self._speed(cell) * TURN_GAIN >= best]
        return (*chosen, *self._at_own_size(chosen[0], {*chosen, *done}))

    def nearest(self) -> Miss | None:
        """Of the cells that exceed a bound the one that does so by the smallest ratio; None without any."""
        bounds = self.bounds
        misses: list[tuple[float, float, Miss]] = []
        for cell, measured in self.known.items():
            if measured is None:
                continue
            found = [
                Miss(cell, "latency", measured.tail.ms, bounds.max_latency_ms or 0, "ms", measured.tail.what),
                Miss(cell, "memory", measured.memory_mb, bounds.max_memory_mb or 0, "MB"),
            ]
            found = [miss for miss in found if miss.bound]
            if bounds.max_drop is not None and model_of(cell) in self.drops:
                found.append(Miss(cell, "mAP drop", self.drops[model_of(cell)], bounds.max_drop, "mAP"))
            if over := [miss for miss in found if miss.value > miss.bound]:
                worst = max(over, key=lambda miss: miss.percent)
                misses.append((worst.percent, -measured.images_per_s, worst))
        return min(misses, key=lambda item: item[:2])[2] if misses else None

    def no_smaller(self, choice: Cell) -> tuple[Model, str] | None:
        """The next smaller input size of the choice's model, and why it was not chosen, in words to follow its name.

        None where there is none, and where its mAP or that of a larger one was measured in this bundle and precision.
        """
        model = model_of(choice)
        sizes = self.families[model.own]
        if not (smaller := sizes[: sizes.index(model)]):
            return None
        one = smaller[-1]
        if self.refused(one):
            alike = [each for each in self.drops if (each.bundle, each.precision) == (one.bundle, one.precision)]
            if any(self.refused(each) and each.input_size != model.input_size for each in alike):
                return None
            if (most := max(self._costs(one), key=lambda found: found[0], default=None)) is None:
                return one, "was left out, by what other sizes lose"
            return one, f"was left out, as it costs {most[0]:.4f} mAP in {most[1].engine} {most[1].precision}"
        if fastest := max(map(self._speed, self.by_model[one])):
            alike_fast = fastest <= self._speed(choice) * (1 + NOISE)
            return one, "is no faster" if alike_fast else "does not keep the other bounds"
        return one, "failed" if self.start(one) in self.known else "was not looked at"

    def _speed(self, cell: Cell) -> float:
        measured = self.known.get(cell)
        return measured.images_per_s if measured else 0.0

    def _ranked(self) -> list[Cell]:
        """The cells that may keep the bounds, the fastest first."""
        kept = (
            cell
            for cell in self.cells
            if (found := self.known.get(cell)) and self.bounds.may_keep(found) and not self.refused(model_of(cell))
        )
        return sorted(kept, key=lambda cell: -self._speed(cell))

    def _likely(self, cell: Cell) -> tuple[int, int]:
        if self.bounds.max_latency_ms is None:
            return cell.threads * cell.streams, cell.streams
        return cell.threads, 0

    def _pixels(self, model: Model) -> float:
        return self.pixels[model.bundle, model.input_size]

    def _least_drop(self, model: Model) -> float:
        """What the model loses in mAP at least, by what larger input sizes of its bundle in the same engine and
        precision lose, and by what such sizes cost in others."""
        if len(self.families[model.own]) == 1:
            return 0.0
        asked = [one for one in self.families[model.own] if one in self.drops]
        larger = (self.drops[one] for one in asked if self._pixels(one) >= self._pixels(model))
        if model.own in self.drops:
            base = self.drops[model.own]
        else:
            base = max((self.drops[one] - self._cost(one) for one in asked), default=0.0)
        return max(0.0, *larger, max(base, 0.0) + self._cost(model) - SIZE_SPREAD)

    def _cost(self, model: Model) -> float:
        """What other engines and precisions lose in mAP at the model's input size, of what they have at their own.

        They count where the own size was measured too: an engine that is wrong at any size says nothing of sizes.
        """
        return max((cost for cost, _ in self._costs(model)), default=0.0)

    def _costs(self, model: Model) -> Iterator[tuple[float, Model]]:
        for own, models in self.families.items():
            if own in self.drops and own != model.own:
                for one in models:
                    if one in self.drops and self._pixels(one) >= self._pixels(model):
                        yield self.drops[one] - self.drops[own], one

    def _competing(self, family: Model) -> Model | None:
        """The smallest of its input sizes that is not refused and has not failed: it is the fastest."""
        left = [model for model in self.families[family] if not self.refused(model)]
        working = (model for model in left if self.known.get(start := self.start(model)) or start not in self.known)
        return next(working, left[0] if left else None)

    def _open_question(self) -> Model | None:
        """Of the fastest bundle, engine and precision the input size whose mAP is to be measured next: its own first,
        then the middle of those that are not refused and smaller than what keeps the bound."""
        if self.bounds.max_drop is None or not self._presumes:
            return None
        several = [one for one, models in self.families.items() if len(models) > 1 and self._competing(one)]
        family = max(several, key=lambda one: self._speed(self.start(one)), default=None)
        if family is None or not self._speed(self.start(family)):
            return None
        if family not in self.drops:
            return family
        left = [model for model in self.families[family] if not self.refused(model)]
        kept = [self._pixels(model) for model in left if model in self.drops]
        still = [model for model in left if model not in self.drops and self._pixels(model) < min(kept, default=inf)]
        return still[len(still) // 2] if still else None

    def _hope(self, model: Model) -> float:
        """Images a second that the model, which was not looked at, may reach at most by other input sizes."""
        starts = {one: self.start(one) for one in self.families[model.own]}
        known = [one for one, start in starts.items() if self._speed(start)]
        if not known:
            return inf
        ratios = (self._speed(starts[one]) * max(self._pixels(one) / self._pixels(model), 1.0) for one in known)
        return min(ratios) * (1 + NOISE) * _batch_gain(starts[model])

    def _larger_batch(self, model: Model, best: float) -> Cell | None:
        """The next larger batch with the usual threads, None where it cannot reach `best` images a second."""
        cells = self.line(model)
        if self._speed(cells[0]) * (1 + NOISE) * _batch_gain(cells[0]) < best:
            return None
        base, flat = 0.0, 0
        for number, cell in enumerate(cells):
            if cell not in self.known:
                before, last = (self._speed(cells[max(number - back, 0)]) for back in (2, 1))
                gain = max(last / before * (1 + NOISE), 1.0) if number > 1 else _batch_gain(cell)
                steps = len(cells) - number if number > 1 else 1
                return cell if last * (1 + NOISE) * gain**steps >= best else None
            measured = self.known[cell]
            if measured is None or self.bounds.hopeless(measured):
                return None
            speed = measured.images_per_s
            if speed > base * (1 + NOISE):
                base, flat = speed, 0
            else:
                flat += 1
            if flat == 2 or speed < base * (1 - 2 * NOISE):
                return None
        return None

    def _neighbour(self, model: Model, best: float) -> Cell | None:
        """A neighbour of the model's best cell that was not measured yet, if one of them could be the best of all."""
        measured = {cell: found for cell in self.by_model[model] if (found := self.known.get(cell)) is not None}
        if not measured:
            return None
        kept = [cell for cell in measured if self.bounds.may_keep(measured[cell])]
        if kept:
            top = max(kept, key=self._speed)
            if self._speed(top) * (1 + NOISE) * TURN_GAIN < best:
                return None
        else:
            top = min(measured, key=lambda cell: self.bounds.excess(measured[cell]))
            if self.bounds.excess(measured[top]) > TURN_GAIN * (1 + NOISE):
                return None
        around = (cell for cell in _around(self.by_model[model], top) if cell not in self.known)
        return next((cell for cell in around if not self._too_large(cell)), None)

    def _too_large(self, cell: Cell) -> bool:
        """Whether a smaller batch that is otherwise alike exceeds a bound beyond the noise, or failed."""
        line = self.line(model_of(cell), cell.threads, cell.order)
        smaller = [self.known[one] for one in line if one.batch_size < cell.batch_size and one in self.known]
        return any(measured is None or self.bounds.hopeless(measured) for measured in smaller)


def choose(finished: Mapping[Cell, Measured]) -> tuple[Cell, ...]:
    """The cells measured at length, the choice first: of those within `TIE` of the fastest that of lowest latency.

    One that is as fast at the bundle's own input size is not chosen at another.
    """
    ranked = sorted(finished, key=lambda cell: -finished[cell].images_per_s)
    if not ranked:
        return ()
    tied = [cell for cell in ranked if finished[cell].images_per_s >= finished[ranked[0]].images_per_s * (1 - TIE)]
    tied = [cell for cell in tied if cell.input_size is None or replace(cell, input_size=None) not in tied]
    choice = min(tied, key=lambda cell: (finished[cell].median_ms, cell.threads))
    return (choice, *(cell for cell in ranked if cell != choice))


def _batch_gain(cell: Cell) -> float:
    return STREAMS_BATCH_GAIN if cell.streams > 1 else BATCH_GAIN[cell.device]


def _around(cells: Sequence[Cell], top: Cell) -> Iterator[Cell]:
    """Those that differ from `top` in one thing by one step: threads, then order, then batch size."""

    def alike(cell: Cell, but: str) -> bool:
        single = 1 in (cell.batch_size, top.batch_size)
        return all(
            getattr(cell, name) == getattr(top, name) or name == but or (name == "order" and single)
            for name in ("threads", "order", "batch_size")
        )

    def nearest(values: Collection[int], value: int) -> list[int]:
        """The next smaller and the next larger."""
        return [*sorted(one for one in values if one < value)[-1:], *sorted(one for one in values if one > value)[:1]]

    by_threads = {cell.threads: cell for cell in cells if alike(cell, "threads")}
    yield from (by_threads[threads] for threads in nearest(by_threads, top.threads))
    yield from (cell for cell in cells if cell != top and alike(cell, "order"))
    by_size = [cell for cell in cells if alike(cell, "batch_size")]
    for size in nearest({cell.batch_size for cell in by_size}, top.batch_size):
        yield from (cell for cell in by_size if cell.batch_size == size)
