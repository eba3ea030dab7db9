"""Which cells a benchmark has, which of them can run here, and why the others cannot."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path

from gfldeploy.bench.results import POLICIES, SCENARIOS, Scenario, ServerPolicy
from gfldeploy.bundle import Bundle
from gfldeploy.engines.base import DEVICES, PRECISIONS, Device, Precision
from gfldeploy.engines.registry import ENGINES, capability, check_bundle, missing_graph

__all__ = ["STREAMS", "Cell", "Plan", "Skipped", "plan"]

# One query after the other; the batch size says which of the two it is.
STREAMS: tuple[Scenario, ...] = ("single-stream", "multi-stream")


@dataclass(frozen=True)
class Cell:
    """One thing to measure: a bundle in an engine, in a scenario.

    `threads`: CPU threads of one inference. `rate`: images arriving a second, and `policy`: how they become batches, in
    the server scenario alone; its `batch_size` is the largest that the policy may form.
    """

    bundle: Path
    engine: str
    precision: Precision
    device: Device
    batch_size: int
    threads: int
    scenario: Scenario
    rate: float | None = None
    policy: ServerPolicy | None = None

    def __post_init__(self) -> None:
        if self.engine not in ENGINES:
            raise ValueError(f"engine must be one of {', '.join(ENGINES)}, not {self.engine!r}")
        if self.precision not in PRECISIONS:
            raise ValueError(f"precision must be one of {', '.join(PRECISIONS)}, not {self.precision!r}")
        if self.device not in DEVICES:
            raise ValueError(f"device must be one of {', '.join(DEVICES)}, not {self.device!r}")
        if self.batch_size < 1 or self.threads < 1:
            raise ValueError("batch_size and threads must be at least 1")
        if self.scenario not in SCENARIOS:
            raise ValueError(f"scenario must be one of {', '.join(SCENARIOS)}, not {self.scenario!r}")
        if not _suits(self.scenario, self.batch_size):
            raise ValueError(f"{self.scenario} does not go with batches of {self.batch_size}")
        if (self.scenario == "server") != (self.rate is not None) or (self.rate is not None and self.rate <= 0):
            raise ValueError("the server scenario needs a positive rate, and no other has one")
        if (self.scenario == "server") != (self.policy is not None):
            raise ValueError("the server scenario needs a policy, and no other has one")
        if self.policy is not None and self.policy not in POLICIES:
            raise ValueError(f"policy must be one of {', '.join(POLICIES)}, not {self.policy!r}")
        if self.policy is not None and not _forms(self.policy, self.batch_size):
            raise ValueError(f"{self.policy} does not go with batches of {self.batch_size}")

    def __str__(self) -> str:
        """For progress: the scenario is named where the batch size does not give it away."""
        more = "" if self.scenario in STREAMS else f", {self.scenario}"
        rate = f" at {self.rate:g} images/s, {self.policy}" if self.rate else ""
        return (
            f"{self.bundle.name}: {self.engine} {self.precision} on {self.device}, batch {self.batch_size}{more}{rate}"
        )


@dataclass(frozen=True)
class Skipped:
    """What cannot run, with the `reason` and, where there is one, the `remedy`.

    `bundle` and `batch_size` are None where the reason holds for all of them.
    """

    bundle: Path | None
    engine: str
    precision: Precision
    device: Device
    batch_size: int | None
    threads: int
    reason: str
    remedy: str | None


@dataclass(frozen=True)
class Plan:
    """`cells` to run, in order, and those `skipped`."""

    cells: tuple[Cell, ...]
    skipped: tuple[Skipped, ...]


def plan(
    bundles: Sequence[Bundle],
    engines: Sequence[str],
    precisions: Sequence[Precision],
    batch_sizes: Sequence[int],
    device: Device,
    threads: int,
    scenarios: Sequence[Scenario] = STREAMS,
    rates: Sequence[float] = (),
    policies: Sequence[ServerPolicy] = POLICIES,
) -> Plan:
    """Cross everything with everything: `rates` and `policies` with the server scenario, batches of 1 with
    single-stream and with no-batching, others with multi-stream and with the other policies.

    An engine and precision that do not work on this machine, or that none of the bundles is made for, are skipped once.
    When some of the bundles fit, the others are not mentioned: of an FP32 and an INT8 bundle each runs in its own
    precisions. Raises `UnsupportedError` for an unknown engine.
    """
    cells: list[Cell] = []
    skipped: list[Skipped] = []
    for engine, precision in product(engines, precisions):
        able = capability(engine, precision, device)
        if able.reason:
            skipped.append(Skipped(None, engine, precision, device, None, threads, able.reason, able.remedy))
            continue
        misfits = [check_bundle(bundle, precision) for bundle in bundles]
        fitting = [bundle for bundle, misfit in zip(bundles, misfits, strict=True) if misfit is None]
        if not fitting:
            remedy = next((misfit[1] for misfit in misfits if misfit), None)
            needed = "INT8" if precision == "int8" else "FP32"
            reason = f"no {needed} bundle was given"
            skipped.append(Skipped(None, engine, precision, device, None, threads, reason, remedy))
        for bundle in fitting:
            for item in _of_bundle(bundle, engine, precision, batch_sizes, device, threads):
                if isinstance(item, Skipped):
                    skipped.append(item)
                    continue
                for scenario in scenarios:
                    # A server forms batches of fewer images too.
                    if scenario == "server" and item > 1 and bundle.manifest.inputs[0].shape[0] is not None:
                        skipped.append(_fixed_batch(bundle, engine, precision, device, item, threads))
                    elif _suits(scenario, item):
                        served = [(rate, one) for rate in rates for one in policies if _forms(one, item)]
                        cells += [
                            Cell(bundle.directory, engine, precision, device, item, threads, scenario, *how)
                            for how in (served if scenario == "server" else ((None, None),))
                        ]
    return Plan(tuple(cells), tuple(skipped))


def _suits(scenario: Scenario, batch_size: int) -> bool:
    return scenario not in STREAMS or (scenario == "single-stream") == (batch_size == 1)


def _forms(policy: ServerPolicy, batch_size: int) -> bool:
    return (policy == "no-batching") == (batch_size == 1)


def _of_bundle(
    bundle: Bundle, engine: str, precision: Precision, batch_sizes: Sequence[int], device: Device, threads: int
) -> Iterator[int | Skipped]:
    """The batch sizes that can run, and why others cannot."""
    if problem := missing_graph(bundle, engine, precision, device):
        yield Skipped(bundle.directory, engine, precision, device, None, threads, *problem)
        return
    fixed = bundle.manifest.inputs[0].shape[0]
    for batch_size in batch_sizes:
        if fixed in (None, batch_size):
            yield batch_size
        else:
            yield _fixed_batch(bundle, engine, precision, device, batch_size, threads)


def _fixed_batch(
    bundle: Bundle, engine: str, precision: Precision, device: Device, batch_size: int, threads: int
) -> Skipped:
    reason = f"the bundle {bundle.directory.name} is made for batches of {bundle.manifest.inputs[0].shape[0]}"
    remedy = "export it again without a fixed batch size"
    return Skipped(bundle.directory, engine, precision, device, batch_size, threads, reason, remedy)
