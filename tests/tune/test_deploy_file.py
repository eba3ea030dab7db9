"""`deploy.yml`: written, read back, and refused where it does not hold."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from sample_deploy import CHOICE, DEPLOY, EVIDENCE

from gfldeploy.bundle import Bundle
from gfldeploy.errors import BundleError, DataError
from gfldeploy.machine import describe_machine
from gfldeploy.tune.deploy_file import Deploy
from gfldeploy.tune.search import Bounds


@pytest.mark.parametrize("deploy", [DEPLOY, replace(DEPLOY, runner_up=None, knee=None, bounds=Bounds())])
def test_what_is_written_is_read_back(deploy: Deploy, tmp_path: Path) -> None:
    path = tmp_path / "new" / "deploy.yml"
    deploy.write(path)
    assert Deploy.read(path) == deploy
    assert list(yaml.safe_load(path.read_text())) == [
        *("schema", "created", "summary", "choice", "runner_up", "bounds", "knee", "search", "machine", "data"),
    ]
    assert deploy.bundle_path(path) == tmp_path / "new" / "models" / "int8"


def test_the_schema_before_is_read(tmp_path: Path) -> None:
    data = DEPLOY.to_dict()
    data["schema"] = 1
    for one in (data["choice"], data["runner_up"]):
        found = one["evidence"]
        one["evidence"] = {
            "images_per_s": found["network_images_per_s"],
            "latency_p50_ms": found["network_p50_ms"],
            "latency_ms": found["latency_p99_ms"],
            "latency_percent": 99,
            **{key: found[key] for key in ("memory_mb", "ap", "ap_drop", "ap_images", "runs", "started")},
        }
    path = tmp_path / "deploy.yml"
    path.write_text(yaml.safe_dump(data))
    read = Deploy.read(path)
    assert read.choice.evidence.images_per_s is None and read.choice.evidence.latency_p99_ms is None
    assert read.choice.evidence.network_p50_ms == EVIDENCE.network_p50_ms and read.knee is None
    assert replace(read.choice, evidence=EVIDENCE) == CHOICE
    for wrong in (3, {"evidence": 3}):
        path.write_text(yaml.safe_dump({**data, "choice": wrong}))
        with pytest.raises(DataError, match="choice"):
            Deploy.read(path)


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
            "a newer gfldeploy: schema 99, this one reads schema 1 to 2.*Update",
        ),
        (broken(lambda data: data.update(schema=0)), "an older gfldeploy.*Make it again with `gfldeploy tune`"),
        (broken(lambda data: data.update(more=1)), "it has unknown fields: more"),
        (broken(lambda data: data.pop("machine")), "it lacks machine"),
        (broken(lambda data: data["choice"].update(policy="random")), ": choice.policy must be one of single, in-or"),
        (broken(lambda data: data["choice"].update(batch_size="2")), ": choice.batch_size must be of type int"),
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
    with pytest.raises(DataError, match=r"cannot be read: No such file"):
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
