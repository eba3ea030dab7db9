"""Which groups go back to float, decided without any engine."""

from __future__ import annotations

import json

import pytest

from gfldeploy.accuracy import Accuracy
from gfldeploy.errors import EngineError, ParityError
from gfldeploy.quant.agreement import Agreement
from gfldeploy.quant.calibration import ConvUse
from gfldeploy.quant.fallback import MOST_FLOAT_MACS, FallbackStep, affordable, fall_back, fewest, not_held
from gfldeploy.quant.gate import Int8Measurement
from gfldeploy.quant.sensitivity import Sensitivity

PROBLEM = ParityError("INT8 in paddle loses 0.2000 mAP", "Try another --algo.")


def group(name: str, share: float = 0.01, total: float = 0.1) -> Sensitivity:
    return Sensitivity(name, frozenset({ConvUse(name, 0)}), share, total, 0.0)


@pytest.mark.parametrize("most", range(1, 20))
def test_the_fewest_are_found(most: int) -> None:
    for least in range(1, most + 2):
        tried: list[int] = []

        def holds(count: int, least: int = least, tried: list[int] = tried) -> bool:
            tried.append(count)
            return count >= least

        assert fewest(most, holds) == (least if least <= most else None)
        assert len(tried) == len(set(tried))
        assert max(tried) <= most
        assert len(tried) <= 2 * most.bit_length()
        assert tried[0] == 1
        if least > most:
            assert tried[-1] == most, "the last try is the most that can be done"


def test_there_may_be_nothing_to_try() -> None:
    assert fewest(0, lambda count: pytest.fail("there is nothing to try")) is None


def test_what_holds_holds_even_where_more_would_not() -> None:
    holding = {3, 4, 7}
    assert fewest(8, holding.__contains__) in holding


def test_at_most_half_of_the_work_goes_back() -> None:
    ranked = [group("a", 0.3), group("b", 0.3), group("c", 0.2), group("d", 0.01)]
    assert [one.name for one in affordable(ranked)] == ["a", "c"]
    assert [one.name for one in affordable(ranked, spent=0.45)] == ["d"]
    assert affordable([group("all", MOST_FLOAT_MACS + 0.01)]) == ()
    assert [one.name for one in affordable([group("half", MOST_FLOAT_MACS)])] == ["half"]


def test_every_step_is_recorded() -> None:
    ranked = tuple(group(name) for name in "abcde")

    def attempt(chosen: tuple[Sensitivity, ...]) -> FallbackStep:
        return FallbackStep(chosen, {}, None if len(chosen) >= 3 else PROBLEM)

    steps, found = fall_back(ranked, attempt)
    assert [len(step.groups) for step in steps] == [1, 2, 4, 3]
    assert found is steps[-1]
    assert [one.name for one in found.groups] == ["a", "b", "c"]
    assert fall_back((), attempt) == ((), None)


def test_a_step_tells_of_the_worst_engine() -> None:
    engines = {
        name: Int8Measurement(Agreement(0.0, 0.0, 40, found, {"int8": 9}), Accuracy(ap, ap, ap, ap, ap, ap, 10, 100))
        for name, found, ap in (("onnxruntime", 0.5, 0.7), ("paddle", 1.0, 0.6))
    }
    step = FallbackStep((group("a", 0.1), group("b", 0.2)), engines, PROBLEM)
    assert json.loads(json.dumps(step.to_dict())) == {
        "groups": ["a", "b"],
        "convolutions": 2,
        "macs_share": pytest.approx(0.3),
        "holds": False,
        "problem": PROBLEM.problem,
        "worst_ap": 0.6,
        "worst_detections_found": 0.5,
    }
    empty = FallbackStep((), {}, None).to_dict()
    assert empty["holds"]
    assert empty["worst_ap"] is empty["worst_detections_found"] is empty["problem"] is None


def test_what_is_said_when_nothing_holds() -> None:
    steps = [
        FallbackStep((group("a", 0.1), group("b", 0.3)), {}, ParityError("INT8 in paddle loses 0.1000 mAP", "Try."))
    ]
    told = not_held(PROBLEM, steps)
    assert "loses 0.1000 mAP, even with 2 groups back in float that have 40% of the multiply-accumulates" in str(told)
    assert told.remedy == "Try."
    told = not_held(PROBLEM, [])
    assert "loses 0.2000 mAP, and no group can go back to float" in str(told)
    assert told.remedy == PROBLEM.remedy
    assert not isinstance(told, EngineError)
