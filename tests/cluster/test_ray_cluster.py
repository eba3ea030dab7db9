"""What needs a Ray cluster: one of this machine, which all tests share."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray_work
from conftest import SIZES
from recorded_progress import RecordedProgress

from gfldeploy.accuracy import evaluate
from gfldeploy.bundle import Bundle
from gfldeploy.cluster import ray_cluster, worker
from gfldeploy.cluster.ray_cluster import ClusterOptions, connected, run_on_ray
from gfldeploy.cluster.schedule import Again, Job, Part
from gfldeploy.engines.base import EngineOptions
from gfldeploy.errors import DataError, EngineError, UnsupportedError, UsageError
from gfldeploy.images.coco import CocoDataset
from gfldeploy.predict.session import predict_images
from gfldeploy.quant.measurement import Fp32Reference, PlainOnnxRuntime

pytest.importorskip("ray")
DOUBLING = "ray_work:Doubling"
OPTIONS = ClusterOptions("local", workers=2)


@pytest.fixture(scope="module")
def local() -> Iterator[None]:
    """A cluster of this machine, whose workers find `ray_work`."""
    before = {process.pid for process in psutil.Process().children(recursive=True)}
    folder = str(Path(ray_work.__file__).parent)
    path = os.pathsep.join([folder, os.environ.get("PYTHONPATH", "")])
    with connected("local", cpus=2, environment={"PYTHONPATH": path}):
        yield
    left = [process for process in psutil.Process().children(recursive=True) if process.pid not in before]
    _, alive = psutil.wait_procs(left, timeout=20)
    assert not alive, "processes of the cluster outlived it"


@pytest.fixture
def bundle(tiny_bundle: Path) -> Bundle:
    return Bundle.open(tiny_bundle)


def run(
    bundle: Bundle,
    numbers: Sequence[Sequence[int]],
    jobs: Iterable[Job] | None = None,
    setting: dict[str, Any] | None = None,
    progress: RecordedProgress | None = None,
) -> tuple[dict[int, list[Any]], list[Again]]:
    """Of each job its values, which have one entry each; and the jobs that were begun again."""
    values: dict[int, list[Any]] = {}
    again: list[Again] = []
    ended: list[int] = []
    given = jobs if jobs is not None else [Job(number, len(one)) for number, one in enumerate(numbers)]
    parts = run_on_ray(
        OPTIONS,
        DOUBLING,
        setting or {},
        given,
        lambda number: {"numbers": numbers[number]},
        bundle=bundle,
        engine="onnxruntime",
        progress=progress or RecordedProgress(),
    )
    for part in parts:
        if isinstance(part, Part):
            assert part.job not in ended
            values.setdefault(part.job, []).extend(entry for (entry,) in part.values)
            ended += [part.job] * part.end
        else:
            values.pop(part.job, None)
            again.append(part)
    assert len(ended) == len(list(numbers))
    return values, again


def doubled(entries: Iterable[Any]) -> list[Any]:
    return [entry if isinstance(entry, str) else entry[0] for entry in entries]


def test_values_of_jobs_are_those_of_the_inputs_in_order(local: None, bundle: Bundle) -> None:
    numbers = [list(range(10 * job, 10 * job + 10)) for job in range(8)]
    values, again = run(bundle, numbers, [Job(job, 10, skip=3 * (job == 2)) for job in range(8)])
    expected = {job: [2 * number for number in one[3 * (job == 2) :]] for job, one in enumerate(numbers)}
    assert {job: doubled(one) for job, one in values.items()} == expected
    assert not again
    assert {entry[1] for one in values.values() for entry in one} == {str(bundle.directory)}


def test_one_input_that_kills_is_an_error_and_the_rest_is_done(local: None, bundle: Bundle) -> None:
    numbers = [[1, 2], [3, ray_work.EXITS]]
    progress = RecordedProgress()
    values, again = run(bundle, numbers, progress=progress)
    why = {(one.job, place): reason for one in again for place, reason in one.bad.items()}
    assert sorted(why) == [(1, 1)]
    assert {job: doubled(one) for job, one in values.items()} == {0: [2, 4], 1: [6, why[1, 1]]}
    assert all("process" in reason for reason in why.values())
    assert any("died" in note and "shard 1 is done again" in note for note in progress.notes)


def test_the_bundle_is_sent_to_workers_that_do_not_have_it(
    local: None, bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def opening(*given: Any) -> worker.Opening:
        return replace(worker.Opening(*given), bundle=str(tmp_path / "not here"))

    monkeypatch.setattr(ray_cluster, "Opening", opening)
    values, _ = run(bundle, [[1, 2]])
    assert doubled(values[0]) == [2, 4]
    (directory,) = {entry[1] for entry in values[0]}
    assert directory != str(bundle.directory)


def test_what_a_worker_raises_on_purpose_ends_the_run(local: None, bundle: Bundle) -> None:
    with pytest.raises(DataError, match="1302 cannot be doubled") as raised:
        run(bundle, [[1, 2], [ray_work.RAISES]])
    assert raised.value.remedy == "Take another number."
    with pytest.raises(UnsupportedError, match="it does not run here"):
        run(bundle, [[1]], setting={"refuses": True})
    with pytest.raises(ZeroDivisionError, match="of a mistake of ours"):
        run(bundle, [[ray_work.BUG]])


def test_workers_that_die_as_they_start_end_the_run(local: None, bundle: Bundle) -> None:
    with pytest.raises(EngineError, match="no worker starts: its process ended"):
        run(bundle, [[1]], setting={"dies": True})


def test_other_versions_are_refused(local: None, bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    right = worker.versions("onnxruntime")
    assert {"Python", "gfldeploy", "onnxruntime"} <= right.keys()
    monkeypatch.setattr(ray_cluster, "versions", lambda engine: {**right, "numpy": "0.9"})
    with pytest.raises(UnsupportedError, match=r"other versions than the machine of the command: numpy .*, not 0\.9"):
        run(bundle, [[1]])


def test_leaving_early_ends_the_workers(local: None, bundle: Bundle) -> None:
    parts = run_on_ray(
        OPTIONS,
        DOUBLING,
        {},
        [Job(0, 1000)],
        lambda number: {"numbers": [ray_work.SLOW] * 1000},
        bundle=bundle,
        engine="onnxruntime",
    )
    with closing(parts):
        first = next(parts)
        assert isinstance(first, Part) and not first.end
        (workers,) = {entry[2] for (entry,) in first.values}
        assert psutil.pid_exists(workers)
    _, alive = psutil.wait_procs([psutil.Process(workers)] if psutil.pid_exists(workers) else [], timeout=10)
    assert not alive


def test_a_cluster_of_this_machine_listens_on_loopback_alone(local: None) -> None:
    here = psutil.Process()
    listening = []
    for process in (here, *here.children(recursive=True)):
        with suppress(psutil.NoSuchProcess):  # a worker of another test, which is ending
            listening += [one.laddr.ip for one in process.net_connections("inet") if one.status == psutil.CONN_LISTEN]
    assert listening
    assert {address.removeprefix("::ffff:") for address in listening} == {"127.0.0.1"}


def test_prediction_writes_the_bytes_of_this_process(
    local: None, tiny_bundle: Path, tiny_coco: Path, tmp_path: Path
) -> None:
    images = tmp_path / "images"
    images.mkdir()
    for number in range(80):  # three shards
        source = tiny_coco.parent / "images" / f"{number % len(SIZES) + 1}.jpg"
        (images / f"{number:03d}.jpg").write_bytes(source.read_bytes()[: 60 if number == 7 else None])
    how: dict[str, Any] = {"engine": "onnxruntime", "threads": 1, "streams": 1, "batch_size": 1}
    here = predict_images(tiny_bundle, images, output=tmp_path / "here", **how)
    there = predict_images(tiny_bundle, images, output=tmp_path / "there", ray="local", workers=2, **how)
    assert here == there and here.images == 80 and here.failed == 1
    files = sorted(path.name for path in (tmp_path / "here").iterdir())
    assert files == sorted(path.name for path in (tmp_path / "there").iterdir())
    assert all((tmp_path / "here" / name).read_bytes() == (tmp_path / "there" / name).read_bytes() for name in files)


def test_more_than_a_machine_has_is_refused(local: None, bundle: Bundle) -> None:
    parts = run_on_ray(
        replace(OPTIONS, cpus=64), DOUBLING, {}, [Job(0, 1)], lambda number: {}, bundle=bundle, engine="onnxruntime"
    )
    with pytest.raises(UsageError, match="no machine of the cluster has 64 CPUs for a worker; the largest has 2 CPUs"):
        next(parts)


def test_map_is_that_of_this_process(local: None, tiny_bundle: Path, tiny_coco: Path, tmp_path: Path) -> None:
    """Of a bundle at another size, in batches; and of one that is being made, in an engine that is in no table."""
    how: dict[str, Any] = {"data": tiny_coco, "engine": "onnxruntime", "threads": 1}
    batches: dict[str, Any] = {"batch_size": 2, "order": "bucketed", "input_sizes": [(96, 128)]}
    assert evaluate(tiny_bundle, **how, **batches, ray="local", workers=1) == evaluate(tiny_bundle, **how, **batches)
    source = Bundle.open(tiny_bundle)
    made = replace(source, directory=tmp_path / "made", manifest=replace(source.manifest, files={}, notes=("made",)))
    shutil.copytree(tiny_bundle / "onnx", made.directory / "onnx")
    dataset = CocoDataset.load(tiny_coco)
    here = Fp32Reference.of(source, [dataset.images[0].path], dataset, 1)
    there = replace(here, cluster=replace(OPTIONS, workers=1))
    with PlainOnnxRuntime(made, EngineOptions(), "onnx") as engine:
        found = [one.measured(engine, made, "plain", "made").accuracy for one in (here, there)]
    assert found[0] is not None and found[0] == found[1]
