"""Which cells a benchmark has, which of them can run here, and why the others cannot."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path

from gfldeploy.batching.buckets import Size
from gfldeploy.batching.tiles import Tiling
from gfldeploy.bench.cell import POLICIES, STREAMS, BundleIdentity, Cell, Scenario, ServerPolicy, forms, names, suits
from gfldeploy.bench.results import CellResult
from gfldeploy.bundle import Bundle
from gfldeploy.engines.base import Device, Obstacle, Precision, check_tf32, oversubscribed
from gfldeploy.engines.hardware import usable_threads
from gfldeploy.engines.registry import ENGINES, capability, check_bundle, file_by_itself, missing_graph
from gfldeploy.errors import BundleError


@dataclass(frozen=True)
class Plan:
    """`cells` to run, in order; the results of those `skipped`; and where the `bundles` of all of them are."""

    cells: tuple[Cell, ...]
    skipped: tuple[CellResult, ...]
    bundles: Mapping[BundleIdentity, Path]

    def lines(self) -> Iterator[str]:
        """What will run, a line for each setup, and what will not, a line for each reason."""
        every = [*self.cells, *(one.cell for one in self.skipped)]
        for setup in dict.fromkeys(cell.setup(every) for cell in self.cells):
            some = [cell for cell in self.cells if cell.setup(every) == setup]
            yield f"  run   {names(some, every, whole=False)}"
        for reason, remedy in dict.fromkeys((one.reason, one.remedy) for one in self.skipped):
            some = [one.cell for one in self.skipped if (one.reason, one.remedy) == (reason, remedy)]
            yield f"  skip  {names(some, every)}: {reason}{f'; {remedy}' if remedy else ''}"


def plan(
    bundles: Sequence[Bundle],
    engines: Sequence[str],
    precisions: Sequence[Precision],
    batch_sizes: Sequence[int],
    device: Device,
    threads: int | None,
    scenarios: Sequence[Scenario] = STREAMS,
    rates: Sequence[float] = (),
    policies: Sequence[ServerPolicy] = POLICIES,
    tf32: bool = False,
    streams: Sequence[int] = (1,),
    input_sizes: Sequence[Size | None] = (None,),
    end_to_end: bool = False,
    tiling: Tiling | None = None,
) -> Plan:
    """Cross everything with everything: `rates` and `policies` with the server scenario, batches of 1 with
    single-stream and with no-batching, others with multi-stream and with the other policies.

    When some of the bundles fit a precision, the others are not mentioned: of an FP32 and an INT8 bundle each runs in
    its own precisions. `tf32`: of those in FP32. `streams`: of the offline and server scenarios; the others have one.
    `threads`: of one inference; None: the usable CPUs, shared by the streams. `input_sizes`: (height, width) in pixels,
    see `Bundle.at_size`; None: each bundle's own. `end_to_end`: the files that deploy by themselves too, on CPUs, in
    the precision of the bundle, in which they were compared when they were made, and in all but the server scenario.
    `tiling`: with images cut so too, in all but the server scenario, and not of those files.
    Raises `UnsupportedError` for an unknown engine, and where nothing has TF32.
    """
    if tf32:
        check_tf32(precisions, device)
    cells: list[Cell] = []
    skipped: list[CellResult] = []
    loads: list[tuple[int, Scenario, float | None, ServerPolicy | None, int]] = []
    for size, scenario in product(batch_sizes, scenarios):
        if scenario == "server":
            every = product(rates, policies, streams)
            loads += [(size, scenario, rate, one, count) for rate, one, count in every if forms(one, size)]
        elif scenario == "offline":
            loads += [(size, scenario, None, None, count) for count in streams]
        elif suits(scenario, size):
            loads.append((size, scenario, None, None, 1))
    identities = {BundleIdentity.of(bundle): bundle for bundle in bundles}
    for engine, precision in product(engines, precisions):
        able = capability(engine, precision, device)
        fitting = {one: bundle for one, bundle in identities.items() if check_bundle(bundle, precision) is None}
        for identity, bundle in (fitting or identities).items():
            problem: tuple[str, str | None] | None = None
            if able.reason:
                problem = able.reason, able.remedy
            elif misfit := check_bundle(bundle, precision):
                problem = f"no {'INT8' if precision == 'int8' else 'FP32'} bundle was given", misfit[1]
            else:
                problem = missing_graph(bundle, engine, precision, device)
            graphs: list[tuple[bool, Obstacle | None]] = [(False, None)]
            if end_to_end and precision == bundle.manifest.precision and device == "cpu":
                file = file_by_itself(bundle, engine, precision, device)
                graphs.append((True, file if isinstance(file, Obstacle) else None))
            ways = [(*graph, None) for graph in graphs] + ([(False, None, tiling)] if tiling else [])
            for (by_itself, no_file, tiles), (input_size, unfit), load in product(
                ways, _sizes(bundle, input_sizes), loads
            ):
                batch_size, scenario, rate, policy, count = load
                if (by_itself or tiles) and scenario == "server":
                    continue
                cell = Cell(
                    bundle=identity,
                    engine=engine,
                    precision=precision,
                    device=device,
                    threads=max(usable_threads() // count, 1) if threads is None else threads,
                    batch_size=batch_size,
                    order="bucketed" if scenario == "offline" else "listed",
                    scenario=scenario,
                    rate=rate,
                    policy=policy,
                    tf32=tf32 and precision == "fp32",
                    streams=count,
                    input_size=input_size,
                    end_to_end=by_itself,
                    tiling=tiles,
                )
                if found := problem or no_file or unfit or _fixed_batch(bundle, cell) or _several_streams(cell):
                    skipped.append(CellResult(cell, "skipped", *found))
                else:
                    cells.append(cell)
    return Plan(tuple(cells), tuple(skipped), {one: bundle.directory for one, bundle in identities.items()})


def _sizes(
    bundle: Bundle, input_sizes: Sequence[Size | None]
) -> list[tuple[Size | None, tuple[str, str | None] | None]]:
    """These sizes, None for the bundle's own, each with why the bundle cannot take it."""
    found: dict[Size | None, tuple[str, str | None] | None] = {}
    for size in input_sizes:
        try:
            found[None if bundle.at_size(size) is bundle else size] = None
        except BundleError as error:
            found[size] = error.problem, error.remedy and error.remedy.rstrip(".")
    return list(found.items())


def _several_streams(cell: Cell) -> Obstacle | None:
    """Why the engine does not run so many inferences at once here."""
    if cell.streams == 1:
        return None
    return ENGINES[cell.engine].obstacle_to_streams(cell.device) or oversubscribed(cell.streams, cell.threads)


def _fixed_batch(bundle: Bundle, cell: Cell) -> tuple[str, str] | None:
    """Why a bundle for batches of one size cannot run the cell; a server forms batches of fewer images too."""
    fixed = bundle.manifest.inputs[0].shape[0]
    if fixed not in (None, 1) and cell.tiling is not None:
        return (
            f"the bundle {bundle.directory.name} is made for batches of {fixed}, and images are other numbers of tiles",
            "export it again without a fixed batch size",
        )
    if fixed is None or (fixed == cell.batch_size and (cell.scenario != "server" or fixed == 1)):
        return None
    return (
        f"the bundle {bundle.directory.name} is made for batches of {fixed}",
        "export it again without a fixed batch size",
    )
