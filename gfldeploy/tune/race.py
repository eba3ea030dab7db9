"""The order of a search: first looks, climbs, the finish, accuracy. What measures is given."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from gfldeploy.bench.cell import Cell
from gfldeploy.tune.measured import Measured
from gfldeploy.tune.search import Model, Space, Step, choose, finalists, model_of, next_step

__all__ = ["Outcome", "race"]

Look = Callable[[Step], Mapping[Cell, Measured | None]]
Finish = Callable[[Sequence[Cell]], Mapping[Cell, Measured | None]]


@dataclass
class Outcome:
    """What a search found out, complete or not.

    `known`: by the latest measurement of each cell. `finished`: those measured at length that keep latency and memory,
    the choice first; empty where no cell keeps the bounds. `drops`: mAP that models were found to lose, of those asked
    for. `complete`: not cut short.
    """

    known: dict[Cell, Measured | None]
    finished: dict[Cell, Measured] = field(default_factory=dict)
    drops: dict[Model, float] = field(default_factory=dict)
    complete: bool = True

    @property
    def choice(self) -> Cell | None:
        """The cell to deploy, None where no cell keeps the bounds."""
        return next(iter(self.finished), None)


def race(
    space: Space,
    look: Look,
    finish: Finish,
    drop: Callable[[Model], float | None],
    known: Mapping[Cell, Measured | None] | None = None,
    out_of_time: Callable[[], bool] = lambda: False,
    exhaustive: bool = False,
) -> Outcome:
    """Find the fastest cell that keeps the bounds.

    `look` measures briefly, `finish` at length and interleaved. `drop`: the mAP that a model loses, None where it is
    not measured; asked of one model after the other, for the one that is in front at the finish: a loser's accuracy is
    never measured. Its refusal sends the search back to what it had given up because of that model. `known`: what was
    measured before. `out_of_time`: asked before each step; the finish is run in any case. `exhaustive`: every cell is
    measured at length instead.
    """
    outcome = Outcome(dict(known or {}))
    done: dict[Cell, Measured | None] = {}
    refused: set[Model] = set()
    if exhaustive:
        done.update({cell: outcome.known[cell] for cell in space.cells if cell in outcome.known})
        done.update(finish([cell for cell in space.cells if cell not in done]))
        outcome.known.update(done)
    while True:
        step = None if exhaustive else next_step(space, outcome.known, refused)
        if step and (out_of_time() and any(outcome.known.values())):
            outcome.complete, step = False, None
        if step:
            outcome.known.update(look(step))
            continue
        wanted = finalists(space, outcome.known, refused, done)
        if any(cell not in done for cell in wanted):
            done.update(finish(wanted))
            outcome.known.update(done)
            continue
        kept = {
            cell: found
            for cell, found in done.items()
            if found and space.bounds.keeps(found) and model_of(cell) not in refused
        }
        ranking = choose(kept)
        if ranking and _is_refused(model_of(ranking[0]), space, drop, outcome):
            refused.add(model_of(ranking[0]))
            continue
        outcome.finished = {cell: kept[cell] for cell in ranking}
        return outcome


def _is_refused(model: Model, space: Space, drop: Callable[[Model], float | None], outcome: Outcome) -> bool:
    if model not in outcome.drops and (lost := drop(model)) is not None:
        outcome.drops[model] = lost
    limit = space.bounds.max_drop
    return limit is not None and outcome.drops.get(model, 0.0) > limit
