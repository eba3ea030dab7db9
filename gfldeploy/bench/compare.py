"""Two results files cell by cell: what became faster or slower, and whether the files can be compared at all."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import NormalDist
from typing import Literal

from gfldeploy.bench.cell import BundleIdentity, Cell
from gfldeploy.bench.estimates import CONFIDENCE, Estimate, median, ratios_of_medians
from gfldeploy.bench.results import BenchResults, CellResult
from gfldeploy.bench.table import Row, Served, rows
from gfldeploy.errors import DataError, UsageError
from gfldeploy.files import StrPath
from gfldeploy.machine import Machine
from gfldeploy.text import first_of

Verdict = Literal["faster", "slower", "no difference found", "too few samples"]

# What a cell is slower or faster by. A server's latencies are only of the images that it answered.
Figure = Literal["network", "file to boxes", "server latency", "answers in time"]

# Memory is what the kernel leaves of what is built in: that differs a little from kernel to kernel.
_MEMORY_TOLERANCE = 0.01


@dataclass(frozen=True)
class Slowness:
    """How many times as slow B is as A in one figure.

    `ratio`: of B's median latency to A's, of a batch through the network alone or from file to boxes, or of an image
    that a server answered; of "answers in time", A's images a second to B's. Its interval holds with 95 % by itself.
    `at_least`: what it is not below, with 97.5 % for all figures of all pairs together (Bonferroni); None where the
    samples are too few to say.
    """

    figure: Figure
    ratio: Estimate
    at_least: float | None


@dataclass(frozen=True)
class Pair:
    """A cell that both files measured, with the bundle of A.

    `a_ms`, `b_ms`: median latencies of a batch through the network alone (of servers: of an image, from its arrival to
    the end of its batch), all rounds together; `ratio`: B's over A's; `verdict`: on B, "faster" or "slower" where 1 is
    outside the ratio's interval. `ap_difference`: B's mAP less A's, None where one is unknown or they are not of the
    same images. `a_in_time_per_s`, `b_in_time_per_s`: of servers, whose latencies are only of what they did not reject,
    the images answered within the bound. `bundle_changed`: whether the manifests differ, that is, any file of the
    bundles. `a_flags`, `b_flags`: those of `table.FLAGS` that hold. `slowness`: of every figure that both have, the
    first that of `ratio`.
    """

    cell: Cell
    a_ms: Estimate
    b_ms: Estimate
    ratio: Estimate
    verdict: Verdict
    ap_difference: float | None
    a_in_time_per_s: float | None
    b_in_time_per_s: float | None
    bundle_changed: bool
    a_flags: tuple[str, ...]
    b_flags: tuple[str, ...]
    slowness: tuple[Slowness, ...]


@dataclass(frozen=True)
class OneSided:
    """A cell that only one file measured, and, in words, why the other did not; None where it has no such cell."""

    cell: Cell
    reason: str | None


@dataclass(frozen=True)
class Difference:
    """Something that the files differ in; None on a side that lacks it."""

    what: str
    a: str | None
    b: str | None

    def __str__(self) -> str:
        return f"{self.what} ({self.a or 'none'}, {self.b or 'none'})"


@dataclass(frozen=True)
class Comparison:
    """What `compare` found. `identical`: the files hold the same results; everything else is computed all the same.

    `failed`: cells that were measured in neither file since they failed in B, and why.
    `hardware`, `data` and `settings` are differences that make latencies incomparable and had to be allowed; `software`
    and `notes` (accuracy data, how long was measured) are there to explain what is found.
    """

    identical: bool
    pairs: tuple[Pair, ...]
    only_a: tuple[OneSided, ...]
    only_b: tuple[OneSided, ...]
    failed: tuple[OneSided, ...]
    hardware: tuple[Difference, ...]
    data: tuple[Difference, ...]
    software: tuple[Difference, ...]
    notes: tuple[Difference, ...]


def compare(
    a: BenchResults | StrPath,
    b: BenchResults | StrPath | None = None,
    *,
    bundles: tuple[str, str] | None = None,
    different_machines: bool = False,
    different_data: bool = False,
) -> Comparison:
    """Compare the cells that two benchmarks both measured, or one of two bundles.

    Each verdict is at 95 % confidence by itself: of twenty cells that did not change, one may look as if it had. What
    changed on the machine from one benchmark to the other counts as a change too; the rounds of two bundles in one
    benchmark are interleaved, so that it does not.

    Args:
        a: Results, or a file of them.
        b: Those to compare with them; None to compare `bundles`.
        bundles: The directories, without their paths, of two bundles in `a`, whatever their names: A's and B's.
        different_machines: Compare although the hardware differs.
        different_data: Compare although the timed images, or how they were timed, differ.

    Returns:
        The pairs of cells in A's order, what only one side has, and what differs between the two.

    Raises:
        DataError: A file cannot be read, the hardware or the timing differs, or no cell is measured in both.
        UsageError: There is neither a second file nor two bundles, or there is both.
    """
    if (b is None) == (bundles is None):
        raise UsageError("one results file and two bundles in it, or two files, are compared", "Give B, or --bundles.")
    a, b = (one if isinstance(one, BenchResults) else BenchResults.read(Path(one)) for one in (a, b or a))
    if bundles is not None:
        a, b = (_of_bundle(a, directory) for directory in bundles)
    hardware, data = tuple(hardware_differences(a.machine, b.machine)), tuple(timing_differences(a, b))
    if hardware and not different_machines:
        raise DataError(
            f"the machines differ: {'; '.join(map(str, hardware))}",
            "Compare results of one machine, or add --different-machines: the ratios are then of the machines too.",
        )
    if data and not different_data:
        raise DataError(
            f"the latencies are not of the same work: {'; '.join(map(str, data))}",
            "Measure both in the same way, or add --different-data: the ratios are then of that too.",
        )
    a_cells, b_cells = _cells(a, b)
    same_images = a.data.same_accuracy_images(b.data)
    both = [(one, b_cells[key]) for key, one in a_cells.items() if key in b_cells]
    measured = [(one, other) for one, other in both if one.ok and other.ok]
    count = sum(len(_figures(one.cell)) for one, _ in measured)
    pairs = tuple(_pair(one, other, same_images, count, bundles is not None) for one, other in measured)
    if not pairs:
        both_sides, alike = ("files", "bundles of the same name") if bundles is None else ("bundles", "both")
        raise DataError(
            f"no cell is measured in both {both_sides}: {_extent(a_cells)} in the first, {_extent(b_cells)} in the "
            "second",
            f"Measure the same engines, precisions, input sizes, batch sizes, threads and scenarios of {alike}.",
        )
    return Comparison(
        identical=a == b,
        pairs=pairs,
        only_a=tuple(_one_sided(a_cells, b_cells)),
        only_b=tuple(_one_sided(b_cells, a_cells)),
        failed=tuple(
            OneSided(other.cell, _why(other)) for one, other in both if not one.ok and other.result.status == "failed"
        ),
        hardware=hardware,
        data=data,
        software=tuple(software_differences(a.machine, b.machine)),
        notes=tuple(_notes(a, b)),
    )


def _of_bundle(results: BenchResults, directory: str) -> BenchResults:
    """The cells of the bundle in this directory, without a name, so that they are those of another bundle too."""
    found = [one for one in results.cells if one.cell.bundle.directory == directory]
    if not found:
        others = first_of(dict.fromkeys(one.cell.bundle.directory for one in results.cells), 5)
        raise DataError(f"no cell is of a bundle in {directory!r:.80}", f"Give two of {others}.")
    nameless = (replace(one.cell, bundle=replace(one.cell.bundle, name="")) for one in found)
    return replace(results, cells=tuple(replace(one, cell=cell) for one, cell in zip(found, nameless, strict=True)))


def _cells(a: BenchResults, b: BenchResults) -> tuple[dict[Cell, Row], dict[Cell, Row]]:
    """The rows of each file by what a cell is found again by: its axes, of the bundle the name alone, with the
    directory in those that are twice in either file without it."""
    keys = [Counter(_key(row.cell) for row in rows(one)) for one in (a, b)]
    ambiguous = {key for count in keys for key, times in count.items() if times > 1}
    found: list[dict[Cell, Row]] = [{}, {}]
    for cells, results, name in zip(found, (a, b), ("first", "second"), strict=True):
        for row in rows(results):
            directory = row.cell.bundle.directory
            key = _key(row.cell)
            if key in ambiguous:
                key = _key(row.cell, directory)
            if key in cells:
                raise DataError(
                    f"the {name} file holds {row.cell.name()} of {directory} more than once, so it is not clear which "
                    "to compare",
                    "Give the bundles' directories different names, and measure again.",
                )
            cells[key] = row
    return found[0], found[1]


def _key(cell: Cell, directory: str = "") -> Cell:
    return replace(cell, bundle=BundleIdentity(cell.bundle.name, directory, ""))


def _pair(a: Row, b: Row, same_images: bool, count: int, interleaved: bool) -> Pair:
    """`count`: the figures of all pairs, which `Slowness.at_least` holds for together."""
    slowness = tuple(_slowness(a, b, 1 - (1 - CONFIDENCE) / count, interleaved))
    ratio = slowness[0].ratio
    return Pair(
        cell=a.cell,
        a_ms=median(a.result.latency_ms),
        b_ms=median(b.result.latency_ms),
        ratio=ratio,
        verdict=_verdict(ratio),
        ap_difference=b.ap - a.ap if same_images and a.ap is not None and b.ap is not None else None,
        a_in_time_per_s=a.served.in_time_per_s if a.served else None,
        b_in_time_per_s=b.served.in_time_per_s if b.served else None,
        bundle_changed=a.cell.bundle.digest != b.cell.bundle.digest,
        a_flags=a.flags,
        b_flags=b.flags,
        slowness=slowness,
    )


def _figures(cell: Cell) -> tuple[Figure, Figure]:
    """What cells of its kind are compared by, where both files have it."""
    return ("server latency", "answers in time") if cell.is_server else ("network", "file to boxes")


def _slowness(a: Row, b: Row, together: float, interleaved: bool) -> Iterator[Slowness]:
    """`together`: the confidence of one figure for which `Slowness.at_least` holds for all."""
    latency, second = _figures(a.cell)
    paired = interleaved and len(a.result.runs) == len(b.result.runs)
    compared = partial(ratios_of_medians, confidences=(CONFIDENCE, together), paired=paired)
    found = compared(_network_ms(a.result), _network_ms(b.result))
    yield Slowness(latency, found[0], found[1].low)
    if a.served and b.served:
        ratio, sure = (_in_time(a.served, b.served, one) for one in (CONFIDENCE, together))
        yield Slowness(second, ratio, sure.low)
    elif all(min(row.result.file_ms, default=0) > 0 for row in (a, b)):
        found = compared(_file_ms(a.result), _file_ms(b.result))
        yield Slowness(second, found[0], found[1].low)


def _network_ms(result: CellResult) -> list[tuple[float, ...]]:
    return [run.samples.latency_ms for run in result.runs]


def _file_ms(result: CellResult) -> list[tuple[float, ...]]:
    return [run.stages.end_to_end_ms for run in result.runs if run.stages]


def _in_time(a: Served, b: Served, confidence: float) -> Estimate:
    """A's images in time a second to B's, by the logarithm of two counts, each with a half more: there may be none."""
    counts = [one.in_time + 0.5 for one in (a, b)]
    value = counts[0] / a.seconds / (counts[1] / b.seconds)
    spread = math.exp(NormalDist().inv_cdf((1 + confidence) / 2) * math.sqrt(sum(1 / count for count in counts)))
    return Estimate(value, value / spread, value * spread, max(min(a.in_time, b.in_time), 1))


def _verdict(ratio: Estimate) -> Verdict:
    if ratio.low is None or ratio.high is None:
        return "too few samples"
    if ratio.high < 1:
        return "faster"
    return "slower" if ratio.low > 1 else "no difference found"


def _one_sided(cells: dict[Cell, Row], others: dict[Cell, Row]) -> Iterator[OneSided]:
    for key, row in cells.items():
        other = others.get(key)
        if row.ok and not (other and other.ok):
            yield OneSided(row.cell, _why(other) if other else None)


def _why(row: Row) -> str:
    return f"{row.result.status}: {row.result.reason}"


def hardware_differences(a: Machine, b: Machine) -> Iterator[Difference]:
    """What makes latencies of two machines incomparable."""
    yield from _differences(
        ("CPU model", a.cpu, b.cpu),
        ("cores", a.cores, b.cores),
        ("usable CPUs", a.threads, b.threads),
        ("CPU flags", " ".join(sorted(a.flags)), " ".join(sorted(b.flags))),
        ("GPUs", ", ".join(sorted(a.gpus)), ", ".join(sorted(b.gpus))),
    )
    if abs(a.memory_gb - b.memory_gb) > _MEMORY_TOLERANCE * max(a.memory_gb, b.memory_gb):
        yield Difference("memory", f"{a.memory_gb:g} GB", f"{b.memory_gb:g} GB")


def timing_differences(a: BenchResults, b: BenchResults) -> Iterator[Difference]:
    """What latencies depend on: the timed images, the warm-up, the load that the monitor is, a server's arrivals
    and their bound."""
    one, two = a.settings, b.settings
    images = [f"{side.data.timed_images}, SHA-256 {side.data.timed_sha256[:12]}" for side in (a, b)]
    yield from _differences(
        ("timed images", images[0], images[1]),
        ("warm-up inferences", one.warmup, two.warmup),
        ("seconds of warm-up", one.warmup_s, two.warmup_s),
        ("hardware samples a second", one.monitor_hz, two.monitor_hz),
    )
    if all(any(one.cell.is_server for one in results.cells) for results in (a, b)):
        yield from _differences(
            ("seed of the arrivals", one.seed, two.seed),
            ("latency bound in ms", one.latency_bound_ms, two.latency_bound_ms),
        )


def software_differences(a: Machine, b: Machine) -> Iterator[Difference]:
    """System, driver and packages in other versions."""
    packages = sorted({*a.packages, *b.packages})
    yield from _differences(
        ("operating system", a.os, b.os),
        ("Python", a.python, b.python),
        ("NVIDIA driver", a.driver, b.driver),
        *((name, a.packages.get(name), b.packages.get(name)) for name in packages),
    )


def _notes(a: BenchResults, b: BenchResults) -> Iterator[Difference]:
    """What does not move a latency: how long was measured, and what mAP is of."""
    one, two = a.settings, b.settings
    yield from _differences(
        ("rounds", one.rounds, two.rounds),
        ("seconds at least", one.min_seconds, two.min_seconds),
        ("inferences at least", one.min_count, two.min_count),
        ("seconds at most", one.max_seconds, two.max_seconds),
        ("annotations", a.data.annotations_sha256[:12], b.data.annotations_sha256[:12]),
        ("images for mAP", a.data.accuracy_images, b.data.accuracy_images),
    )


def _differences(*values: tuple[str, str | float | None, str | float | None]) -> Iterator[Difference]:
    for what, *sides in values:
        # Whole: of a seed such as 20261126 six digits are not all.
        a, b = (f"{side:g}" if isinstance(side, float) else None if side is None else str(side) for side in sides)
        if a != b:
            yield Difference(what, a, b)


def _extent(cells: dict[Cell, Row]) -> str:
    """Such as "onnxruntime fp32, paddle int8 of tiny, 8 cells"."""
    measured = [row.cell for row in cells.values() if row.ok]
    if not measured:
        return "none"
    named = {(f"{cell.engine} {cell.precision}", cell.bundle.name) for cell in measured}
    models = ", ".join(f"{setup} of {name}" if name else setup for setup, name in sorted(named))
    return f"{len(measured)} cell{'s' if len(measured) > 1 else ''} ({models})"
