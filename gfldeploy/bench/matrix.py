"""Which cells a benchmark has, which of them can run here, and why the others cannot."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path

from gfldeploy.bundle import Bundle
from gfldeploy.engines.base import DEVICES, PRECISIONS, Device, Precision
from gfldeploy.engines.registry import ENGINES, capability, check_bundle, graph_for

__all__ = ["Cell", "Plan", "Skipped", "plan"]


@dataclass(frozen=True)
class Cell:
    """One thing to measure: a bundle in an engine. `threads`: CPU threads of one inference."""

    bundle: Path
    engine: str
    precision: Precision
    device: Device
    batch_size: int
    threads: int

    def __post_init__(self) -> None:
        if self.engine not in ENGINES:
            raise ValueError(f"engine must be one of {', '.join(ENGINES)}, not {self.engine!r}")
        if self.precision not in PRECISIONS:
            raise ValueError(f"precision must be one of {', '.join(PRECISIONS)}, not {self.precision!r}")
        if self.device not in DEVICES:
            raise ValueError(f"device must be one of {', '.join(DEVICES)}, not {self.device!r}")
        if self.batch_size < 1 or self.threads < 1:
            raise ValueError("batch_size and threads must be at least 1")

    def __str__(self) -> str:
        return f"{self.bundle.name}: {self.engine} {self.precision} on {self.device}, batch {self.batch_size}"


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
) -> Plan:
    """Cross everything with everything.

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
                if isinstance(item, Cell):
                    cells.append(item)
                else:
                    skipped.append(item)
    return Plan(tuple(cells), tuple(skipped))


def _of_bundle(
    bundle: Bundle, engine: str, precision: Precision, batch_sizes: Sequence[int], device: Device, threads: int
) -> Iterator[Cell | Skipped]:
    graph = graph_for(engine, precision)
    if not bundle.has_graph(graph):
        reason = f"the bundle {bundle.directory.name} has no {graph} graph"
        remedy = "make it again with `gfldeploy export`"
        yield Skipped(bundle.directory, engine, precision, device, None, threads, reason, remedy)
        return
    fixed = bundle.manifest.inputs[0].shape[0]
    for batch_size in batch_sizes:
        if fixed in (None, batch_size):
            yield Cell(bundle.directory, engine, precision, device, batch_size, threads)
        else:
            reason = f"the bundle {bundle.directory.name} is made for batches of {fixed}"
            remedy = "export it again without a fixed batch size"
            yield Skipped(bundle.directory, engine, precision, device, batch_size, threads, reason, remedy)
