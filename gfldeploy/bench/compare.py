"""Two results files side by side: which cells became faster or slower, beyond what chance explains."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable
from dataclasses import dataclass, fields
from typing import Literal

from gfldeploy.bench.estimates import Estimate, ratio_of_medians
from gfldeploy.bench.results import BenchResults, CellResult, Settings
from gfldeploy.bench.table import rows
from gfldeploy.errors import DataError
from gfldeploy.machine import Machine

__all__ = ["Comparison", "Difference", "compare"]

Verdict = Literal["faster", "slower", "no difference found", "too few samples"]

# Of the hardware; memory may differ by what firmware and kernel keep.
_HARDWARE = ("cpu", "cores", "threads", "flags", "gpus")
_MEMORY_SHARE = 0.01
_SOFTWARE = ("driver", "os", "python")
# Settings that change what a latency is; the others change how well it is known.
_SETTINGS = ("warmup", "seed", "latency_bound_ms")


@dataclass(frozen=True)
class Difference:
    """One cell of both files.

    `ratio`: the median latency in the second file over that in the first, with its interval; below 1 the second is
    faster. `ap_change`: second less first, None where either is unknown. `same_bundle`: whether the bundle is the same
    to the bit. `flags`: those of `table.FLAGS` that hold in either file.
    """

    name: str
    ratio: Estimate
    ap_change: float | None
    same_bundle: bool
    flags: tuple[str, ...]

    @property
    def verdict(self) -> Verdict:
        """In words: "no difference found" where the interval holds 1."""
        if self.ratio.low is None or self.ratio.high is None:
            return "too few samples"
        if self.ratio.high < 1:
            return "faster"
        return "slower" if self.ratio.low > 1 else "no difference found"


@dataclass(frozen=True)
class Comparison:
    """`differences` of the cells that both files measured; the names of those that `only_first` or `only_second` did.

    `warnings`: what else differs between the files, software first.
    """

    differences: tuple[Difference, ...]
    only_first: tuple[str, ...]
    only_second: tuple[str, ...]
    warnings: tuple[str, ...]


def compare(
    first: BenchResults, second: BenchResults, *, different_machines: bool = False, different_data: bool = False
) -> Comparison:
    """Compare the cells that both files measured.

    Cells are the same by engine, precision, device, batch size, scenario, rate, threads and the bundle's name, and,
    where a file has several bundles of that name, its directory. Raises `DataError` if the machines or the data differ,
    unless told that they may, and if no cell is in both.
    """
    machines, data = _hardware(first.machine, second.machine), _data(first, second)
    if machines and not different_machines:
        raise DataError(
            f"the machines differ: {'; '.join(machines)}", "Measure both on one, or add --different-machines."
        )
    if data and not different_data:
        raise DataError(f"the measurements differ: {'; '.join(data)}", "Measure both alike, or add --different-data.")
    names = _ambiguous(first) | _ambiguous(second)
    left, right = _cells(first, names), _cells(second, names)
    if not left.keys() & right.keys():
        raise DataError("no cell was measured in both files", "Compare files of the same engines and batch sizes.")
    flags = [dict(zip(map(id, one.cells), (row.flags for row in rows(one)), strict=True)) for one in (first, second)]
    differences = []
    for key, base in left.items():
        if (other := right.get(key)) is None:
            continue
        rounds = [[run.samples.latency_ms for run in cell.runs] for cell in (base, other)]
        known = base.accuracy and other.accuracy
        differences.append(
            Difference(
                _name(base),
                ratio_of_medians(*rounds),
                other.accuracy.ap - base.accuracy.ap if known and other.accuracy and base.accuracy else None,
                base.bundle == other.bundle
                or (base.bundle and base.bundle.digest) == (other.bundle and other.bundle.digest),
                tuple(dict.fromkeys((*flags[0][id(base)], *flags[1][id(other)]))),
            )
        )
    return Comparison(
        tuple(differences),
        tuple(_name(cell) for key, cell in left.items() if key not in right),
        tuple(_name(cell) for key, cell in right.items() if key not in left),
        (*_software(first.machine, second.machine), *machines, *data),
    )


def _hardware(first: Machine, second: Machine) -> list[str]:
    found = [_differs(name, first, second) for name in _HARDWARE if getattr(first, name) != getattr(second, name)]
    if abs(first.memory_gb - second.memory_gb) > _MEMORY_SHARE * max(first.memory_gb, second.memory_gb):
        found.append(_differs("memory_gb", first, second))
    return found


def _software(first: Machine, second: Machine) -> list[str]:
    found = [_differs(name, first, second) for name in _SOFTWARE if getattr(first, name) != getattr(second, name)]
    for package in sorted(first.packages.keys() | second.packages.keys()):
        versions = [machine.packages.get(package, "not installed") for machine in (first, second)]
        if versions[0] != versions[1]:
            found.append(f"{package}: {versions[0]} against {versions[1]}")
    return found


def _data(first: BenchResults, second: BenchResults) -> list[str]:
    found = []
    if first.data.timed_sha256 != second.data.timed_sha256:
        found.append("other images were timed")
    known = {field.name for field in fields(Settings)}
    assert known.issuperset(_SETTINGS)
    for name in _SETTINGS:
        if getattr(first.settings, name) != getattr(second.settings, name):
            found.append(_differs(name, first.settings, second.settings))
    return found


def _differs(name: str, first: object, second: object) -> str:
    one, other = (
        ", ".join(value) or "none" if isinstance(value := getattr(side, name), tuple) else str(value)
        for side in (first, second)
    )
    return f"{name}: {one} against {other}"


def _ambiguous(results: BenchResults) -> set[str]:
    """Names that several bundles of these results have."""
    names = Counter(
        name for name, _ in {(cell.bundle.name, cell.bundle.directory) for cell in results.cells if cell.bundle}
    )
    return {name for name, count in names.items() if count > 1}


def _cells(results: BenchResults, ambiguous: set[str]) -> dict[Hashable, CellResult]:
    cells: dict[Hashable, CellResult] = {}
    for cell in results.cells:
        if cell.status == "ok" and cell.bundle:
            directory = cell.bundle.directory if cell.bundle.name in ambiguous else None
            bundle = (cell.bundle.name, directory)
            what = (cell.engine, cell.precision, cell.device, cell.batch_size, cell.scenario, cell.rate, cell.threads)
            cells[bundle, what] = cell
    return cells


def _name(cell: CellResult) -> str:
    bundle = cell.bundle.directory if cell.bundle else "?"
    rate = f" at {cell.rate:g}/s" if cell.rate else ""
    scenario = f", {cell.scenario}{rate}" if cell.scenario in ("offline", "server") else ""
    return f"{bundle}: {cell.engine} {cell.precision} on {cell.device}, batch {cell.batch_size}{scenario}"
