"""`deploy.yml`: written, read back, and refused where it does not hold."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from sample_deploy import CELL, CHOICE, DEPLOY, EVIDENCE, SECOND, UNMEASURED

from gfldeploy.bench.cell import BundleIdentity
from gfldeploy.bench.estimates import Estimate
from gfldeploy.bundle import Bundle
from gfldeploy.detection_options import DetectionOptions
from gfldeploy.engines.base import Precision
from gfldeploy.errors import BundleError, DataError, GfldeployError
from gfldeploy.machine import describe_machine
from gfldeploy.serialization import plain
from gfldeploy.tune.deploy_file import Deploy, SizeChoice, check_deploy
from gfldeploy.tune.search import Bounds

SIZES = SizeChoice((64, 96), Estimate(1.5, 1.4, 1.6, 12), 0.01, (((64, 96), 0.004), ((32, 48), 0.2)))


@pytest.mark.parametrize(
    "deploy", [DEPLOY, replace(DEPLOY, sizes=SIZES), replace(DEPLOY, runner_up=None, knee=None, bounds=Bounds())]
)
def test_what_is_written_is_read_back(deploy: Deploy, tmp_path: Path) -> None:
    path = tmp_path / "new" / "deploy.yml"
    deploy.write(path)
    assert Deploy.read(path) == deploy
    assert list(yaml.safe_load(path.read_text())) == [
        *(
            "schema",
            "created",
            "summary",
            "choice",
            "runner_up",
            "bounds",
            "knee",
            "search",
            "machine",
            "data",
            "shapes",
            "sizes",
            "detection",
        ),
    ]
    assert deploy.bundle_path(path) == tmp_path / "new" / "models" / "int8"


@pytest.mark.parametrize("schema", [1, 2])
def test_files_of_older_schemas_are_upgraded(schema: int, tmp_path: Path) -> None:
    text = (Path(__file__).parent / f"deploy_files/schema_{schema}.yml").read_text()
    path = tmp_path / "deploy.yml"
    path.write_text(text)
    read = Deploy.read(path)
    assert read.runner_up is not None
    unnamed = replace(CELL, bundle=BundleIdentity("int8", "int8", "ab" * 32))
    second = replace(SECOND, bundle=BundleIdentity("fp32", "fp32", "ab" * 32))
    assert (read.choice.path, read.choice.cell) == ("models/int8", unnamed)
    assert (read.runner_up.path, read.runner_up.cell) == ("../fp32", second)
    if schema == 2:
        assert (read.choice.evidence, read.runner_up.evidence) == (EVIDENCE, UNMEASURED)
        assert (read.bounds, read.knee, read.search) == (DEPLOY.bounds, DEPLOY.knee, DEPLOY.search)
    else:
        unknown = ("images_per_s", "latency_p50_ms", "latency_p99_ms", "latency_max_ms", "padded")
        assert [getattr(read.choice.evidence, name) for name in unknown] == [None] * 5 and read.knee is None
        assert read.choice.evidence.network_p50_ms.value == 25.0
    read.write(path)
    assert Deploy.read(path) == read and yaml.safe_load(path.read_text())["schema"] == 7
    for wrong in (3, {"evidence": 3}):
        path.write_text(yaml.safe_dump({**yaml.safe_load(text), "choice": wrong}))
        with pytest.raises(DataError, match=rf"deploy\.yml: a deploy file of schema {schema} cannot be read: "):
            Deploy.read(path)


@pytest.mark.parametrize(("schema", "unknown"), [(3, "tf32"), (4, "input_size")])
def test_what_cells_of_older_schemas_did_not_say_has_its_default(schema: int, unknown: str) -> None:
    data = DEPLOY.to_dict()
    for one in ("choice", "runner_up"):
        del data[one]["cell"][unknown]
    assert Deploy.from_dict({**data, "schema": schema}) == DEPLOY


@pytest.mark.parametrize("name", ["search", "exhaustive"])
def test_what_a_recipe_measured_with_schema_1_is_read(name: str) -> None:
    path = Path(__file__).parents[2] / "benchmarks/results/epyc-2core/checks/tune_demo.json"
    record = json.loads(path.read_text())
    tuned = {key: value for key, value in record[name].items() if key != "wall_s"}
    read = Deploy.from_dict({"schema": 1, "created": "2026-11-24", "machine": record["machine"], **tuned})
    assert (read.choice.cell.engine, read.choice.cell.order) == ("openvino", "bucketed")
    assert read.choice.evidence.network_images_per_s.value == tuned["choice"]["evidence"]["images_per_s"]["value"]


def broken(change: Callable[[dict[str, Any]], object]) -> str:
    data = DEPLOY.to_dict()
    change(data)
    return yaml.safe_dump(data)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "cannot be read: expected the node content"),
        ("", "no schema number"),
        ("- 1", "no schema number"),
        ("!!python/object/apply:os.system [exit]", "cannot be read: unknown tag"),
        ("a: &a [*a]", "an alias refers to the value that it is part of"),
        ("x: " + "9" * 5000, "a number of 5000 characters"),
        (
            broken(lambda data: data.update(schema=99)),
            "a newer gfldeploy: schema 99, this one reads schema 1 to 7.*Update",
        ),
        (broken(lambda data: data.update(schema=0)), "an older gfldeploy.*Make it again with `gfldeploy tune`"),
        (broken(lambda data: data.update(more=1)), "it has unknown fields: more"),
        (broken(lambda data: data.pop("machine")), "it lacks machine"),
        (broken(lambda data: data["choice"]["cell"].update(order="random")), "choice.cell.order must be one of"),
        (
            broken(lambda data: data["choice"]["cell"].update(batch_size="2")),
            ".cell.batch_size must be of type int",
        ),
        (
            broken(lambda data: data["choice"]["cell"].update(batch_size=0)),
            "choice.cell: batch_size, threads and streams must",
        ),
        (
            broken(lambda data: data["choice"]["cell"].update(tiling={"tile": [64, 64], "overlap": 0.2})),
            "tiling must be null",
        ),
        (broken(lambda data: data["choice"].update(path="/home/me/int8")), "path must be relative"),
        (broken(lambda data: data["choice"]["evidence"].update(ap=float("nan"))), "must be a finite number"),
        (broken(lambda data: data["bounds"].update(max_drop=2.0)), "max_drop must be from 0 to 1"),
        (broken(lambda data: data.update(shapes=[[1, 64, 96]] * 17)), "shapes must be at most 16, not 17"),
        (broken(lambda data: data.update(shapes=[[3, 64, 96]])), r"shapes must be of 1 to 2 images.*\[3, 64, 96\]"),
        (broken(lambda data: data.update(shapes=[[1, 0, 96]])), "shapes must be of 1 to 2 images"),
        (
            broken(lambda data: data.update(sizes={**plain(SIZES), "own_size": [64, 0]})),
            "sizes: input sizes must be of at",
        ),
        (
            broken(lambda data: data.update(sizes={**plain(SIZES), "drops": [[[64], 0.1]]})),
            r"sizes.drops\[0\]\[0\] must be",
        ),
        (broken(lambda data: data.update(shapes=[[1, 64]])), r"shapes\[0\] must be a list of 3"),
        (broken(lambda data: data.update(shapes=[[1, 64, "96"]])), r"shapes\[0\]\[2\] must be of type int"),
    ],
)
def test_a_bad_file_is_refused(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "deploy.yml"
    path.write_text(text)
    with pytest.raises(DataError, match=message) as refused:
        Deploy.read(path)
    assert str(path) in str(refused.value) and refused.value.remedy


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"cannot be read: No such file"):
        Deploy.read(tmp_path / "deploy.yml")


def test_it_holds_for_its_bundle_and_its_machine_alone(tiny_bundle: Path) -> None:
    bundle, machine = Bundle.open(tiny_bundle), describe_machine()
    deploy = replace(DEPLOY, choice=replace(CHOICE, cell=replace(CELL, bundle=BundleIdentity.of(bundle))))
    assert deploy.check(bundle, machine) == ()
    with pytest.raises(BundleError, match=r"is not the bundle that was tuned, int8: .*abababababab\. Give the bundle"):
        DEPLOY.check(bundle, machine)
    shaped = replace(deploy, shapes=((2, 64, 96), (1, 96, 32)))
    assert shaped.check(bundle, machine) == ()
    with pytest.raises(BundleError, match=r"makes no input of 1x65536x96 of any image\. Run `gfldeploy tune` again"):
        replace(shaped, shapes=((2, 64, 96), (1, 65536, 96))).check(bundle, machine)
    with pytest.raises(DataError, match=r"made on another machine: CPU model \(.*, Abacus\)\. Run `gfldeploy tune`"):
        deploy.check(bundle, replace(machine, cpu="Abacus"))
    updated = replace(machine, python="9.9", packages={**machine.packages, "onnxruntime": "9.0"})
    assert len(deploy.check(bundle, updated)) == 2


@pytest.mark.parametrize(
    ("engine", "precision", "detection", "message"),
    [
        ("onnxruntime", "fp32", None, None),
        ("tensorflow", "fp32", None, "there is no engine 'tensorflow'"),
        ("onnxruntime", "int8", None, "onnxruntime int8 on cpu is not possible: .*tiny is FP32"),
        ("onnxruntime", "fp32", DetectionOptions(classes=("boxx",)), "Did you mean 'box'"),
    ],
)
def test_what_cannot_run_does_not_hold(
    engine: str,
    precision: Precision,
    detection: DetectionOptions | None,
    message: str | None,
    tiny_bundle: Path,
    tmp_path: Path,
) -> None:
    pytest.importorskip("onnxruntime")
    cell = replace(CELL, bundle=BundleIdentity.of(Bundle.open(tiny_bundle)), engine=engine, precision=precision)
    replace(DEPLOY, choice=replace(CHOICE, cell=cell), detection=detection).write(tmp_path / "deploy.yml")
    if message is None:
        assert check_deploy(tmp_path / "deploy.yml", tiny_bundle) == ()
        return
    with pytest.raises(GfldeployError, match=message):
        check_deploy(tmp_path / "deploy.yml", tiny_bundle)
