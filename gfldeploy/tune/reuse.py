"""Results of `gfldeploy bench` as what a search knows already."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from gfldeploy.bench.cell import BundleIdentity, Cell
from gfldeploy.bench.compare import hardware_differences, software_differences, timing_differences
from gfldeploy.bench.results import BenchResults, CellResult
from gfldeploy.errors import DataError
from gfldeploy.tune.measured import Measured


def reuse(
    paths: Sequence[Path], cells: Collection[Cell], now: BenchResults
) -> Iterator[tuple[Cell, CellResult, BenchResults]]:
    """The results of these cells in files of `gfldeploy bench`, each with the content of its file, in the files' order.

    A result has no mAP where that is of other images than those of now. `now`: results without cells, of this machine,
    its software, the data and the settings of now. Raises `DataError` where a file is not of the same machine,
    software, images and way of timing, or has none of the cells: such a file was given by mistake.
    """
    for path in paths:
        results = BenchResults.read(path)
        for differences, what in (
            (hardware_differences(results.machine, now.machine), "measured on another machine"),
            (software_differences(results.machine, now.machine), "measured with other software"),
            (timing_differences(results, now), "not of the same work"),
        ):
            if listed := "; ".join(map(str, differences)):
                raise DataError(f"{path} is {what}: {listed} (there, here)", "Leave it out of --results.")
        same_images = results.data.same_accuracy_images(now.data)
        measured = {_key(one.cell): one for one in results.cells if Measured.of(one)}
        found = [(cell, measured[_key(cell)]) for cell in cells if _key(cell) in measured]
        if not found:
            raise DataError(
                f"{path} has no cell of these bundles, engines, precisions, batch sizes and threads that was measured "
                "from file to boxes",
                "Leave it out of --results.",
            )
        for cell, one in found:
            yield cell, one if same_images else replace(one, accuracy=None), results


def _key(cell: Cell) -> Cell:
    """A bundle is found by its digest, whatever it is called now."""
    return replace(cell, bundle=BundleIdentity("", "", cell.bundle.digest))
