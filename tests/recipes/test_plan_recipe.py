"""The recipe that plans for many machines: its schedule loses nothing, and its driver is no faster than it is told."""

from __future__ import annotations

from collections.abc import Iterator
from types import ModuleType

import pytest
from demo_bundles import ROOT, imported

RECIPE = ROOT / "benchmarks" / "plan_many_machines.py"


@pytest.fixture
def recipe() -> Iterator[ModuleType]:
    with imported(RECIPE) as module:
        yield module


def test_nothing_is_lost_however_many_die(recipe: ModuleType) -> None:
    """Every shard is finished once, which a simulation checks itself, and every image at fault is found."""
    lives = {"start_s": 5.0, "machine_days": 0.01, "worker_days": 0.01, "memory": 0.0}
    fleet = recipe.Fleet(20, 10.0, per_machine=4, fatal=5, **lives)
    found = recipe.Simulation(200_000, 8, fleet, recipe.Costs(1e-4, 1e-3)).run()
    assert found["fatal_images_found"] == 5
    assert found["deaths"]["itself"] > 30 and found["deaths"]["machine"] > 5
    assert 0 < found["read_again"] < 0.5


def test_a_driver_that_is_slower_than_its_workers_sets_the_pace(recipe: ModuleType) -> None:
    fleet = recipe.Fleet(50, 10.0, start_s=1.0, fatal=0)
    slow, fast = (recipe.Simulation(50_000, 1, fleet, recipe.Costs(cost, 0)).run() for cost in (0.01, 0.0001))
    assert slow["images_per_s"] == pytest.approx(100, rel=0.05) and slow["driver_busy"] > 0.95
    assert fast["of_what_the_workers_can"] > 0.9 and fast["driver_busy"] < 0.1


def test_more_drivers_where_one_is_too_slow(recipe: ModuleType) -> None:
    first, *_, last = recipe.planned(200_000, 64, 10.0, 1, recipe.Costs(0.01, 0))
    assert first["drivers"] == 1 and first["driver_busy"] > 0.8
    assert last["drivers"] == 8 and last["driver_busy"] < 0.9
    assert last["hours"] < first["hours"] / 4


def test_what_is_measured(recipe: ModuleType) -> None:
    found = recipe.measure_record(3, 1, shard=16)
    assert all(value > 0 for value in found.values())
    assert found["working_bytes"] < found["result_bytes"]
    assert recipe.measure_inputs(50, 50)["name_bytes"] > 20
