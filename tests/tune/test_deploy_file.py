"""`deploy.yml`: written, read back, and refused where it does not hold."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from gfldeploy.bench.estimates import Estimate
from gfldeploy.bench.results import DataDescription
from gfldeploy.bundle import Bundle
from gfldeploy.errors import BundleError, DataError
from gfldeploy.machine import describe_machine
from gfldeploy.tune.deploy_file import Configuration, Deploy, Evidence, SearchRecord
from gfldeploy.tune.knee import CurvePoint, Knee
from gfldeploy.tune.search import Bounds

EVIDENCE = Evidence(
    images_per_s=Estimate(80.0, 79.0, 81.5, 12),
    latency_p50_ms=Estimate(25.0, 24.9, 25.2, 400),
    latency_ms=Estimate(31.0, None, None, 400),
    latency_percent=99,
    memory_mb=310.5,
    ap=0.701,
    ap_drop=0.004,
    ap_images=200,
    runs=3,
    started="2026-01-01T00:00:00+00:00",
)
CHOICE = Configuration("models/int8", "ab" * 32, "onnxruntime", "int8", "cpu", 2, 2, "grouped", EVIDENCE)
UNMEASURED = replace(EVIDENCE, ap=None, ap_drop=None, ap_images=None)
DEPLOY = Deploy(
    created="2026-01-01T00:10:00+00:00",
    summary="Deploy it: it is fast, zwölf times — and " + "long " * 60 + "enough.",
    choice=CHOICE,
    runner_up=replace(CHOICE, bundle="../fp32", precision="fp32", batch_size=1, policy="single", evidence=UNMEASURED),
    bounds=Bounds(max_latency_ms=50, max_drop=0.01),
    knee=Knee(2, (CurvePoint(1, 60.0), CurvePoint(2, 80.0), CurvePoint(4, 80.5)), False),
    search=SearchRecord(55, 12, 2, 61.5, False, True),
    machine=describe_machine(),
    data=DataDescription("cd" * 32, "ef" * 32, 32, 200),
)


@pytest.mark.parametrize("deploy", [DEPLOY, replace(DEPLOY, runner_up=None, knee=None, bounds=Bounds())])
def test_what_is_written_is_read_back(deploy: Deploy, tmp_path: Path) -> None:
    path = tmp_path / "new" / "deploy.yml"
    deploy.write(path)
    assert Deploy.read(path) == deploy
    assert list(yaml.safe_load(path.read_text())) == [
        *("schema", "created", "summary", "choice", "runner_up", "bounds", "knee", "search", "machine", "data"),
    ]
    assert deploy.bundle_path(path) == tmp_path / "new" / "models" / "int8"


def broken(change: Callable[[dict[str, Any]], object]) -> str:
    data = DEPLOY.to_dict()
    change(data)
    return yaml.safe_dump(data)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is not YAML"),
        ("", "no schema number"),
        ("- 1", "no schema number"),
        ("!!python/object/apply:os.system [exit]", "is not YAML"),
        ("a: &a [*a]", "an alias refers to the value that it is part of"),
        ("x: " + "9" * 5000, "a number of 5000 characters"),
        (broken(lambda data: data.update(schema=99)), "a newer gfldeploy: schema 99, this one reads schema 1.*Update"),
        (broken(lambda data: data.update(schema=0)), "an older gfldeploy.*Run `gfldeploy tune` again"),
        (broken(lambda data: data.update(more=1)), "it has unknown keys: more"),
        (broken(lambda data: data.pop("machine")), "it lacks machine"),
        (broken(lambda data: data["choice"].update(policy="random")), "it.choice.policy must be one of single, in-or"),
        (broken(lambda data: data["choice"].update(batch_size="2")), "it.choice.batch_size must be of type int"),
        (broken(lambda data: data["choice"].update(batch_size=0)), "batch_size must be at least 1"),
        (broken(lambda data: data["choice"].update(bundle="/home/me/int8")), "must be a path relative"),
        (broken(lambda data: data["choice"]["evidence"].update(ap=float("nan"))), "must be a finite number"),
        (broken(lambda data: data["bounds"].update(max_drop=2.0)), "max_drop must be from 0 to 1"),
    ],
)
def test_a_bad_file_is_refused(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "deploy.yml"
    path.write_text(text)
    with pytest.raises(DataError, match=message) as refused:
        Deploy.read(path)
    assert str(path) in str(refused.value) and refused.value.remedy


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"cannot read .*No such file"):
        Deploy.read(tmp_path / "deploy.yml")


def test_it_holds_for_its_bundle_and_its_machine_alone(tiny_bundle: Path) -> None:
    bundle, machine = Bundle.open(tiny_bundle), describe_machine()
    deploy = replace(DEPLOY, choice=replace(CHOICE, digest=bundle.digest))
    deploy.check(bundle, machine)
    assert deploy.software_changes(machine) == ()
    with pytest.raises(BundleError, match=r"is not the bundle that was tuned, int8: .*abababababab\. Give the bundle"):
        DEPLOY.check(bundle, machine)
    with pytest.raises(DataError, match=r"made on another machine: CPU model \(.*, Abacus\)\. Run `gfldeploy tune`"):
        deploy.check(bundle, replace(machine, cpu="Abacus"))
    updated = replace(machine, python="9.9", packages={**machine.packages, "onnxruntime": "9.0"})
    deploy.check(bundle, updated)
    assert len(deploy.software_changes(updated)) == 2
