"""The order of a search: first looks, larger batches, neighbours, the finish, accuracy. What measures is given."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from gfldeploy.bench.cell import Cell
from gfldeploy.tune.measured import Measured
from gfldeploy.tune.search import Model, Search, Step, choose, model_of

__all__ = ["Outcome", "race"]


@dataclass(frozen=True)
class Outcome:
    """What a search came to.

    `finished`: the cells measured at length that keep all bounds, the choice first; empty where no cell does.
    `complete`: not cut short.
    """

    finished: Mapping[Cell, Measured]
    complete: bool

    @property
    def choice(self) -> Cell | None:
        """The cell to deploy, None where no cell keeps the bounds."""
        return next(iter(self.finished), None)


def race(
    search: Search,
    look: Callable[[Step], Mapping[Cell, Measured | None]],
    finish: Callable[[Sequence[Cell]], Mapping[Cell, Measured | None]],
    drop: Callable[[Model], float | None],
    out_of_time: Callable[[], bool] = lambda: False,
    exhaustive: bool = False,
) -> Outcome:
    """Find the fastest cell that keeps the bounds; what is measured goes into the `search`.

    `look` measures briefly, `finish` at length and interleaved. `drop`: the mAP that a model loses, None where it is
    not measured; asked of one model after the other, for the one that leads at the finish, so that a loser's accuracy
    is never measured. Once a model is refused, the cells that were given up because of it are searched again.
    `out_of_time`: asked before each step; the finish is run in any case. `exhaustive`: every cell is measured at
    length instead.
    """
    done: dict[Cell, Measured | None] = {}
    complete = True
    if exhaustive:
        done |= {cell: search.known[cell] for cell in search.cells if cell in search.known}
        done |= finish([cell for cell in search.cells if cell not in done])
        search.known |= done
    while True:
        step = None if exhaustive else search.next_step()
        if step and out_of_time() and any(search.known.values()):
            complete, step = False, None
        if step:
            search.known |= look(step)
            continue
        wanted = search.finalists(done)
        if any(cell not in done for cell in wanted):
            done |= finish(wanted)
            search.known |= done
            continue
        kept = {
            cell: found
            for cell, found in done.items()
            if found and search.bounds.keeps(found) and not search.refused(model_of(cell))
        }
        ranking = choose(kept)
        if ranking:
            model = model_of(ranking[0])
            if model not in search.drops and (lost := drop(model)) is not None:
                search.drops[model] = lost
            if search.refused(model):
                continue
        return Outcome({cell: kept[cell] for cell in ranking}, complete)
