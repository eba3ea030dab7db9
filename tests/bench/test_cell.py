"""The axes of a benchmark, and how cells are named."""

from __future__ import annotations

from dataclasses import replace

import pytest
from sample_results import OK, altered, sample_results

from gfldeploy.bench.cell import Cell, names
from gfldeploy.bench.results import BenchResults
from gfldeploy.bench.table import COLUMNS, best_of_each, rows


def cell(**axes: object) -> Cell:
    return altered(OK, **axes).cell


def test_an_axis_that_a_file_lacks_has_its_default() -> None:
    results = sample_results()
    data = results.to_dict()
    for one in data["cells"]:
        for axis in ("order", "rate", "policy", "tf32", "streams", "input_size", "clients", "end_to_end", "tiling"):
            del one["cell"][axis]
    for schema in range(5, 10):
        assert BenchResults.from_dict({**data, "schema": schema}) == results


def test_a_name_says_what_tells_a_cell_from_the_others() -> None:
    one = cell()
    assert one.name() == "onnxruntime int8, batch 2" and str(one) == "tiny_dir: onnxruntime int8, batch 2"
    assert one.name([one, cell(engine="paddle")]) == "onnxruntime int8, batch 2"
    assert one.name([one, cell(threads=2)]) == "onnxruntime int8 with 1 thread, batch 2"
    smaller = cell(input_size=(256, 384))
    assert smaller.name() == "onnxruntime int8 at 256x384, batch 2" and one.name([one, smaller]) == one.name()
    assert cell(end_to_end=True).name() == "onnxruntime int8 by itself, batch 2"
    assert one.name([one, cell(device="gpu")]) == "onnxruntime int8 on cpu, batch 2"
    assert cell(precision="fp32", device="gpu", tf32=True).name() == "onnxruntime fp32 in TF32, batch 2"
    streams = cell(scenario="offline", order="bucketed", streams=2)
    assert streams.name() == "onnxruntime int8 in 2 streams, batch 2, offline"
    assert replace(streams, order="listed").name() == "onnxruntime int8 in 2 streams, batch 2, offline as listed"
    assert streams.setup([one, cell(threads=2)]) == "onnxruntime int8 with 1 thread in 2 streams"
    other = cell(bundle=replace(OK.cell.bundle, directory="other"))
    assert one.name([one, other]) == "onnxruntime int8 of tiny_dir, batch 2"
    assert cell(scenario="offline", order="bucketed").name() == "onnxruntime int8, batch 2, offline"
    server = replace(one, scenario="server", rate=5.0, policy="adaptive")
    assert server.name() == "onnxruntime int8, batch 2, server at 5 images/s, adaptive"
    http = replace(one, scenario="http", rate=5.0)
    assert http.name() == "onnxruntime int8, batch 2, http at 5 images/s"
    assert replace(http, rate=None, clients=16).name() == "onnxruntime int8, batch 2, http from 16 clients"


def test_several_cells_are_named_together() -> None:
    cells = [cell(batch_size=size) for size in (1, 2, 4)]
    every = [*cells, cell(engine="paddle"), cell(scenario="offline", order="bucketed")]
    assert names(cells[:2], every) == "onnxruntime int8, batch 1, 2"
    assert names([*cells, every[-1]], every) == "onnxruntime int8", "all that there are of it"
    assert names(every[2:], every) == "onnxruntime int8, batch 4; onnxruntime int8, batch 2, offline; paddle int8"
    assert names(cells, cells, whole=False) == "onnxruntime int8, batch 1, 2, 4"


@pytest.mark.parametrize("axes", [{"streams": 0}, {"streams": 2}, {"streams": 2, "scenario": "single-stream"}])
def test_what_waits_for_each_answer_has_one_stream(axes: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=r"streams must be at least 1|has one inference at once|does not go"):
        cell(**axes)


def test_streams_are_compared_with_as_many_threads_in_one() -> None:
    """Two inferences at once take two seconds of two threads each, in which one stream does half of that."""
    one = altered(OK, scenario="offline", order="bucketed", threads=2)
    two = altered(one, threads=1, streams=2)
    four = altered(one, threads=2, streams=2)
    shown = rows(replace(sample_results(), cells=(one, two, four)))
    assert shown[1].file_images_per_s == pytest.approx(2 * (shown[0].file_images_per_s or 0))
    assert [row.cell for row in best_of_each(shown)] == [two.cell, four.cell]


@pytest.mark.parametrize("axes", [{"precision": "fp32"}, {"device": "gpu"}, {"precision": "fp16", "device": "gpu"}])
def test_fp32_on_a_gpu_alone_has_tf32(axes: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="TF32"):
        cell(**axes, tf32=True)


def test_a_table_has_tf32_where_a_row_has_it() -> None:
    (column,) = (one for one in COLUMNS if one.key == "tf32")
    results = [altered(OK, precision="fp32", device="gpu", tf32=tf32) for tf32 in (False, True)]
    shown = rows(replace(sample_results(), cells=tuple(results)))
    assert [column.text(row) for row in shown] == ["", "yes"]
    assert column.shown(shown) and not column.shown(shown[:1])
    assert len(best_of_each(shown)) == 2, "two setups"


def test_cells_that_differ_in_another_axis_than_the_load_are_not_compared_for_the_best_batch() -> None:
    results = [altered(OK, **axes) for axes in ({}, {"threads": 2}, {"device": "gpu"}, {"batch_size": 4})]
    best = best_of_each(rows(replace(sample_results(), cells=tuple(results))))
    assert len(best) == 3 and {row.cell.batch_size for row in best} == {2, 4}
