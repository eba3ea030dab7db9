"""A results file: what is read is shown in every way, and compared with itself and with a good one."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1]))

from sample_results import OK, RUN, altered, sample_results

from gfldeploy.batching.latency import Point
from gfldeploy.bench.compare import compare
from gfldeploy.bench.report.page import write_report
from gfldeploy.bench.results import BenchResults, Serving
from gfldeploy.bench.table import COLUMNS, rows, write_csv

_GOOD = sample_results()


def seeds() -> Iterable[bytes]:
    """With every status, a server, and a GPU."""
    yield json.dumps(_GOOD.to_dict()).encode()
    served = replace(RUN, serving=Serving(10, 2, (Point(1, (64, 96), 5.0), Point(2, (64, 96), 8.0)), 9))
    cell = altered(OK, scenario="server", rate=30.0, policy="adaptive", runs=(served, served))
    settings = replace(_GOOD.settings, latency_bound_ms=50.0)
    yield json.dumps(replace(_GOOD, cells=(*_GOOD.cells, cell), settings=settings).to_dict()).encode()
    yield json.dumps(replace(_GOOD, cells=(altered(OK, device="gpu"),)).to_dict()).encode()


def one(data: bytes, folder: Path) -> None:
    """Read, then everything that reads results."""
    path = folder / "results.json"
    path.write_bytes(data)
    results = BenchResults.read(path)
    for row in rows(results):
        [column.value(row) for column in COLUMNS]
    write_csv(results, folder / "results.csv")
    write_report(results, folder / "results.html")
    compare(results, results, different_data=True, different_machines=True)
    compare(_GOOD, results, different_data=True, different_machines=True)
