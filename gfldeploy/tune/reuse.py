"""Results of `gfldeploy bench` as what a search knows already."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from gfldeploy.accuracy import Accuracy
from gfldeploy.bench.cell import BundleIdentity, Cell
from gfldeploy.bench.compare import hardware_differences, software_differences, timing_differences
from gfldeploy.bench.results import BenchResults, CellResult
from gfldeploy.errors import DataError
from gfldeploy.tune.measured import measurable
from gfldeploy.tune.search import Model, Space, model_of

__all__ = ["Reused", "reuse"]


@dataclass(frozen=True)
class Reused:
    """`cells`: those of the space that were measured before, `quick`: of those, the ones measured too briefly for
    figures to be quoted; `accuracies`: of models, on the images to be used now."""

    cells: Mapping[Cell, CellResult]
    accuracies: Mapping[Model, Accuracy]
    quick: Collection[Cell]


def reuse(paths: Sequence[Path], space: Space, now: BenchResults) -> Reused:
    """What results files say of the cells of the `space`; of a cell in several of them, the last file.

    `now`: results without cells, of this machine, its software, the data and the
    settings of now. Raises `DataError` where a file is not of the same machine, software, images and way of timing, or
    has none of the cells: such a file was given by mistake.
    """
    cells: dict[Cell, CellResult] = {}
    accuracies: dict[Model, Accuracy] = {}
    quick: dict[Cell, bool] = {}
    for path in paths:
        results = BenchResults.read(path)
        _check(path, results, now)
        same_images = (results.data.annotations_sha256, results.data.accuracy_images) == (
            now.data.annotations_sha256,
            now.data.accuracy_images,
        )
        found = _found(results.cells, space.cells)
        if not found:
            raise DataError(
                f"{path} has no cell of these bundles, engines, precisions, batch sizes and threads that was measured "
                "from file to boxes",
                "Leave it out of --results.",
            )
        cells |= found
        quick |= dict.fromkeys(found, results.settings.quick)
        if same_images:
            accuracies |= {
                model_of(cell): one.accuracy for cell, one in found.items() if one.accuracy and one.ap is not None
            }
    return Reused(cells, accuracies, [cell for cell, brief in quick.items() if brief])


def _check(path: Path, results: BenchResults, now: BenchResults) -> None:
    for differences, what in (
        (hardware_differences(results.machine, now.machine), "measured on another machine"),
        (software_differences(results.machine, now.machine), "measured with other software"),
        (timing_differences(results, now), "not of the same work"),
    ):
        if listed := "; ".join(map(str, differences)):
            raise DataError(f"{path} is {what}: {listed} (there, here)", "Leave it out of --results.")


def _found(results: Collection[CellResult], cells: Collection[Cell]) -> dict[Cell, CellResult]:
    """A bundle is found again by its digest, whatever it is called now."""
    measured = {_key(one.cell): one for one in results if measurable(one)}
    return {cell: one for cell in cells if (one := measured.get(_key(cell))) is not None}


def _key(cell: Cell) -> Cell:
    return replace(cell, bundle=BundleIdentity("", "", cell.bundle.digest))
