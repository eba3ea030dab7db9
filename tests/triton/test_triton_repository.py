"""The model repository that `gfldeploy triton` writes, and the models in it without Triton's server."""

from __future__ import annotations

import json
import runpy
import shutil
import struct
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import triton_stand_in as stand_in
from demo_bundles import RunHere
from sample_deploy import DEPLOY
from triton_stand_in import image_request

import gfldeploy
from gfldeploy import Bundle, Detector, EngineError, triton_repository
from gfldeploy.bench.cell import BundleIdentity
from gfldeploy.detection_options import DEFAULT_THRESHOLD, DetectionOptions
from gfldeploy.images.decode import decode_image
from gfldeploy.machine import describe_machine
from gfldeploy.tune.deploy_file import Deploy


@pytest.fixture
def triton(monkeypatch: pytest.MonkeyPatch) -> Any:
    module = stand_in.triton_module()
    monkeypatch.setitem(sys.modules, "triton_python_backend_utils", module)
    return module


@pytest.fixture
def images(tiny_coco: Path) -> list[bytes]:
    """Of three sizes, lying, upright and square."""
    return [path.read_bytes() for path in sorted((tiny_coco.parent / "images").iterdir())]


def arguments(model: Path, instances: int = 1) -> dict[str, str]:
    """What Triton hands to `initialize`."""
    config = {"instance_group": [{"count": instances}]}
    return {"model_repository": str(model), "model_version": "1", "model_config": json.dumps(config)}


def loaded(model: Path, instances: int = 1) -> Any:
    """The model as Triton loads it: by its file."""
    made = runpy.run_path(str(model / "1" / "model.py"))["TritonPythonModel"]()
    made.initialize(arguments(model, instances))
    return made


def deploy_for(bundle: Path, target: Path, **cell: Any) -> Path:
    """A `deploy.yml` about this bundle and machine."""
    identity = BundleIdentity("tiny", "tiny", Bundle.open(bundle).digest)
    chosen = replace(DEPLOY.choice.cell, bundle=identity, precision="fp32", threads=1, **cell)
    choice = replace(DEPLOY.choice, path=str(Path("..") / bundle.name), cell=chosen)
    replace(DEPLOY, choice=choice, machine=describe_machine()).write(target)
    return target


@pytest.fixture
def deploy(tiny_bundle: Path, tmp_path: Path) -> Path:
    shutil.copytree(tiny_bundle, tmp_path / "tiny")
    (tmp_path / "here").mkdir()
    return deploy_for(tmp_path / "tiny", tmp_path / "here" / "deploy.yml", streams=2)


def values_of(response: Any) -> dict[str, Any]:
    assert response.error is None, response.error.text
    return {tensor.name: tensor.as_numpy()[0] for tensor in response.output_tensors}


def test_the_repository_is_by_itself(tiny_bundle: Path, tmp_path: Path, run_here: RunHere) -> None:
    repository = tmp_path / "models"
    done = run_here("triton", tiny_bundle, "--output", repository, "--batch-size", 4, "--python-env", "/opt/env")
    assert (done.returncode, done.stdout) == (0, f"{repository}\n"), done.stderr
    copy = Bundle.open(repository / "tiny" / "1" / "bundle")
    copy.verify_files()
    assert copy.digest == Bundle.open(tiny_bundle).digest
    config = (repository / "tiny" / "config.pbtxt").read_text()
    for line in ("max_batch_size: 4", 'key: "EXECUTION_ENV_PATH" value: { string_value: "/opt/env" }'):
        assert line in config
    # A photograph, lying and upright; each file is a string element: its length, and the content of an image file.
    sizes = []
    for path in sorted((repository / "tiny" / "warmup").iterdir()):
        (length,) = struct.unpack_from("<I", path.read_bytes())
        content = path.read_bytes()[4:]
        assert len(content) == length
        sizes.append(decode_image(content).shape[:2])
        assert config.count(f'input_data_file: "{path.name}"') == 2, "for batches of 1 and of 4"
    assert sizes == [(64, 96), (96, 64)]


def test_only_what_gfldeploy_wrote_is_replaced(tiny_bundle: Path, tmp_path: Path, run_here: RunHere) -> None:
    words = ("triton", tiny_bundle, "--output", tmp_path / "models")
    assert run_here(*words).returncode == 0
    assert "exists already" in run_here(*words).stderr
    assert run_here(*words, "--name", "other", "--force").returncode == 0
    assert [path.name for path in sorted((tmp_path / "models").iterdir())] == ["other", "triton.json"]
    compiled = tmp_path / "models" / "other" / "1" / "__pycache__" / "model.cpython-312.pyc"
    compiled.parent.mkdir()
    compiled.touch()  # as Triton leaves it
    assert run_here(*words, "--name", "other", "--force").returncode == 0
    assert not compiled.exists()
    (tmp_path / "models" / "mine").mkdir()
    assert "holds mine, which gfldeploy did not write" in run_here(*words, "--force").stderr
    assert (tmp_path / "models" / "other").exists()


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("--name", "../up"), "cannot be the name of a model"),
        (("--python-env", "env"), "is no absolute path"),
        (("--engine", "paddle"), "has no paddle graph"),
        (("--engine", "openvino", "--precision", "fp16"), "gfldeploy's FP16 file is for GPUs"),
        (("--precision", "int8"), "is FP32"),
        (("--tf32",), "TF32 is a format of GPUs"),
        (("--input-size", "60x90"), None),
        (("--backend", "onnxruntime"), "has no end_to_end graph"),
        (("--backend", "onnxruntime", "--engine", "openvino"), "does not run the engine openvino"),
    ],
)
def test_what_no_machine_runs_is_refused(
    tiny_bundle: Path, tmp_path: Path, run_here: RunHere, words: tuple[str, ...], told: str | None
) -> None:
    done = run_here("triton", tiny_bundle, "--output", tmp_path / "models", *words)
    if told is None:
        assert done.returncode == 0, done.stderr
        return
    assert done.returncode == 2
    assert told in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_deploy_yml_decides(deploy: Path, tmp_path: Path, triton: Any) -> None:
    repository = triton_repository(deploy, output=tmp_path / "models")
    config = (repository / "tiny" / "config.pbtxt").read_text()
    assert "max_batch_size: 2" in config
    assert "kind: KIND_CPU count: 2" in config, "a stream becomes an instance"
    assert "grey_64x96, batch 2" in config
    assert Deploy.read(repository / "tiny" / "1" / "deploy.yml").choice.path == "bundle"
    shutil.rmtree(deploy.parent)
    made = loaded(repository / "tiny", 2)
    assert "as deploy.yml says" in triton.Logger.lines[0]
    assert "batch 2, 1 thread" in triton.Logger.lines[0]
    made.finalize()


def test_what_is_given_goes_before_deploy_yml(deploy: Path, tmp_path: Path) -> None:
    repository = triton_repository(deploy, output=tmp_path / "models", engine="openvino", batch_size=8, instances=3)
    config = (repository / "tiny" / "config.pbtxt").read_text()
    assert "max_batch_size: 8" in config
    assert "count: 3" in config
    settings = json.loads((repository / "tiny" / "1" / "gfldeploy.json").read_text())
    assert settings["threads"] is None, "those of another engine say nothing"
    with pytest.raises(gfldeploy.BundleError, match="is not the bundle that was tuned"):
        other = replace(Deploy.read(deploy).choice.cell.bundle, digest="0" * 64)
        changed = Deploy.read(deploy)
        cell = replace(changed.choice.cell, bundle=other)
        replace(changed, choice=replace(changed.choice, cell=cell)).write(deploy)
        triton_repository(deploy, output=tmp_path / "others")


def test_detections_are_those_of_detector(tiny_bundle: Path, tmp_path: Path, triton: Any, images: list[bytes]) -> None:
    model = triton_repository(tiny_bundle, output=tmp_path / "models", batch_size=8) / "tiny"
    made = loaded(model)
    with Detector(tiny_bundle) as detector:
        for threshold in (None, 0.0, 0.99):
            expected = detector.detect(images, threshold=DEFAULT_THRESHOLD if threshold is None else threshold)
            responses = made.execute([image_request(image, threshold=threshold) for image in images])
            for one, response in zip(expected, responses, strict=True):
                values = values_of(response)
                assert np.array_equal(values["boxes"], one.boxes)
                assert np.array_equal(values["scores"], one.scores)
                assert values["classes"].tolist() == one.classes.tolist()
                assert [name.decode() for name in values["names"]] == one.names
                assert values["count"].tolist() == [len(one)]
                assert (len(one) > 0) == (threshold != 0.99)
    (response,) = made.execute([image_request(images[0], outputs=["count"])])
    assert list(values_of(response)) == ["count"]
    made.finalize()


def test_what_deploy_yml_turns_is_turned_in_triton(
    deploy: Path, tiny_bundle: Path, tmp_path: Path, triton: Any, images: list[bytes]
) -> None:
    detection = DetectionOptions(class_thresholds={"ball": 0.01}, score_threshold=0.001, threshold=0.95)
    replace(Deploy.read(deploy), detection=detection).write(deploy)
    made = loaded(triton_repository(deploy, output=tmp_path / "models") / "tiny")
    with Detector(tiny_bundle, **detection.given) as detector:
        for threshold in (None, 0.015, 0.5):
            expected = detector.detect(images, threshold=threshold)
            responses = made.execute([image_request(image, threshold=threshold) for image in images])
            names = [[name.decode() for name in values_of(response)["names"]] for response in responses]
            assert names == [one.names for one in expected]
            assert (threshold == 0.5) == ("ball" not in names[0]) and (threshold is None) == ("box" not in names[0])
        mixed = made.execute([image_request(images[0]), image_request(images[0], threshold=0.5)])
        assert [set(values_of(one)["names"].tolist()) for one in mixed] == [{b"ball"}, {b"box"}]
    made.finalize()
    # What another request gets, which asks for many boxes that score more, takes no room from the balls.
    few = replace(detection, nms_threshold=1.0, keep_top_k=2)
    with Detector(tiny_bundle, **few.given) as made._detector:
        mixed = made.execute([image_request(images[0]), image_request(images[0], threshold=0.01)])
    assert [values_of(one)["names"].tolist() for one in mixed] == [[b"ball"] * 2, [b"box"] * 2]
    with pytest.raises(gfldeploy.UsageError, match=r"deploy.yml says threshold, class_thresholds, score_threshold"):
        triton_repository(deploy, output=tmp_path / "others", backend="onnxruntime")


def test_an_image_that_cannot_be_used_fails_alone(
    tiny_bundle: Path, tmp_path: Path, triton: Any, images: list[bytes]
) -> None:
    made = loaded(triton_repository(tiny_bundle, output=tmp_path / "models", batch_size=8) / "tiny")
    requests = [
        image_request(images[0]),
        image_request(b"no image"),
        image_request(images[1][: len(images[1]) // 2]),
        image_request(images[0], images[1]),
        image_request(images[0], threshold=2.0),
        image_request(images[0], threshold=float("nan")),
        image_request(images[0], cancelled=True),
        image_request(b""),
        image_request(images[1]),
    ]
    responses = made.execute(requests)
    told = [response.error and (response.error.code, response.error.text) for response in responses]
    assert told[0] is told[-1] is None
    expected = ("not an image", "truncated", "has 2 images", "threshold is [2.0]", "[nan]", "cancelled", "empty")
    for (code, text), part in zip(told[1:-1], expected, strict=True):
        assert part in text
        assert code == ("cancelled" if part == "cancelled" else "invalid")
    alone = [values_of(made.execute([request])[0]) for request in (requests[0], requests[-1])]
    for response, values in zip((responses[0], responses[-1]), alone, strict=True):
        assert np.array_equal(values_of(response)["boxes"], values["boxes"])
    made.finalize()


def test_an_engine_that_fails_on_one_image_answers_the_others(
    tiny_bundle: Path, tmp_path: Path, triton: Any, images: list[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    made = loaded(triton_repository(tiny_bundle, output=tmp_path / "models", batch_size=8) / "tiny")
    infer = made._detector._engine.infer

    def fails(inputs: Any) -> Any:
        if inputs["image"].shape[2] > inputs["image"].shape[3]:
            raise EngineError("out of memory")
        return infer(inputs)

    monkeypatch.setattr(made._detector._engine, "infer", fails)
    lying, upright, *_ = images
    responses = made.execute([image_request(lying), image_request(upright), image_request(lying)])
    assert [response.error and (response.error.code, response.error.text) for response in responses] == [
        None,
        ("internal", "out of memory"),
        None,
    ]
    monkeypatch.setattr(made._detector._engine, "infer", lambda inputs: 1 / 0)
    (response,) = made.execute([image_request(lying)])
    assert response.error.code == "internal"
    assert "division by zero" in response.error.text
    assert "ZeroDivisionError" in triton.Logger.lines[-1]
    made.finalize()


def test_a_changed_bundle_is_never_served(tiny_bundle: Path, tmp_path: Path, triton: Any) -> None:
    model = triton_repository(tiny_bundle, output=tmp_path / "models") / "tiny"
    file = model / "1" / "bundle" / "onnx" / "model.onnx"
    content = bytearray(file.read_bytes())
    place = content.index(b"\x00\x00\x40\x42")  # 48 as float: a corner of the box
    content[place + 2] ^= 1
    file.write_bytes(content)
    with pytest.raises(stand_in.TritonModelException, match="has changed since the bundle was made"):
        loaded(model)
    settings = model / "1" / "gfldeploy.json"
    settings.write_text(settings.read_text().replace(Bundle.open(tiny_bundle).digest, "0" * 64))
    with pytest.raises(stand_in.TritonModelException, match="another bundle than the one"):
        loaded(model)


def test_without_gfldeploy_the_error_says_what_to_install(
    tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = triton_repository(tiny_bundle, output=tmp_path / "models") / "tiny"
    monkeypatch.setitem(sys.modules, "gfldeploy.triton.model", None)
    with pytest.raises(ModuleNotFoundError, match="Install gfldeploy and an engine in Triton's Python environment"):
        runpy.run_path(str(model / "1" / "model.py"))
