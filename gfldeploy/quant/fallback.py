"""Which groups go back to float so that the accuracy gate holds: the fewest, starting with the most sensitive.

Decisions only: the caller writes and measures the candidates.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from gfldeploy.errors import GfldeployError, ParityError
from gfldeploy.quant.gate import Int8Measurement
from gfldeploy.quant.sensitivity import Sensitivity

# A network that mostly runs in float is not the INT8 one that was asked for, nor as fast.
MOST_FLOAT_MACS = 0.5


@dataclass(frozen=True)
class FallbackStep:
    """One attempt: the `groups` that were put back to float, and what each engine then measured.

    `problem`: why the gate still fails, None if it holds. `engines` is empty if nothing could be measured.
    """

    groups: tuple[Sensitivity, ...]
    engines: Mapping[str, Int8Measurement]
    problem: GfldeployError | None

    @property
    def macs_share(self) -> float:
        """What the groups have of the network's multiply-accumulates, 0 to 1."""
        return sum(group.macs_share for group in self.groups)

    def to_dict(self) -> dict[str, Any]:
        """As JSON-ready data, with the worst of the engines."""
        accuracies = [one.accuracy.ap for one in self.engines.values() if one.accuracy]
        found = [one.agreement.detections_found for one in self.engines.values()]
        return {
            "groups": [group.name for group in self.groups],
            "convolutions": sum(group.convolutions for group in self.groups),
            "macs_share": self.macs_share,
            "holds": self.problem is None,
            "problem": self.problem.problem if self.problem else None,
            "worst_ap": min(accuracies, default=None),
            "worst_detections_found": min(found, default=None),
        }


def affordable(ranked: Sequence[Sensitivity], spent: float = 0.0) -> tuple[Sensitivity, ...]:
    """The groups that may go back to float together, in order; a group that would exceed the limit is left out.

    `spent`: the share of the multiply-accumulates that is in float already.
    """
    chosen = []
    for group in ranked:
        if spent + group.macs_share <= MOST_FLOAT_MACS:
            spent += group.macs_share
            chosen.append(group)
    return tuple(chosen)


def fewest(most: int, holds: Callable[[int], bool]) -> int | None:
    """The smallest number from 1 to `most` that holds, or None: tries 1, 2, 4, ... and `most`, then bisects.

    This assumes that every number above one that holds also holds; where that is wrong, the result holds and the number
    below it does not. No number is tried twice.
    """
    if most < 1:
        return None
    failing, holding = 0, 1
    while not holds(holding):
        if holding == most:
            return None
        failing, holding = holding, min(2 * holding, most)
    while holding - failing > 1:
        middle = (failing + holding) // 2
        if holds(middle):
            holding = middle
        else:
            failing = middle
    return holding


def fall_back(
    groups: Sequence[Sensitivity], attempt: Callable[[tuple[Sensitivity, ...]], FallbackStep]
) -> tuple[tuple[FallbackStep, ...], FallbackStep | None]:
    """Every step that was tried, and the one with the fewest of `groups` (see `affordable`) that holds, or None."""
    steps: dict[int, FallbackStep] = {}

    def holds(count: int) -> bool:
        steps[count] = attempt(tuple(groups[:count]))
        return steps[count].problem is None

    found = fewest(len(groups), holds)
    return tuple(steps.values()), None if found is None else steps[found]


def not_held(problem: GfldeployError, steps: Sequence[FallbackStep]) -> ParityError:
    """What to raise when no step holds. `problem`: the gate's before any of them."""
    if not steps:
        return ParityError(
            f"{problem.problem}, and no group can go back to float: each has more than {MOST_FLOAT_MACS:.0%} of the "
            "multiply-accumulates, or would add up to it",
            problem.remedy,
        )
    last = steps[-1]
    assert last.problem is not None
    return ParityError(
        f"{last.problem.problem}, even with {len(last.groups)} groups back in float that have {last.macs_share:.0%} of "
        f"the multiply-accumulates (more than {MOST_FLOAT_MACS:.0%} would not be INT8 any more)",
        last.problem.remedy,
    )
