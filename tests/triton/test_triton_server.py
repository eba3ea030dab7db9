"""The model repository in Triton's real server, by its own clients, over HTTP and gRPC."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from demo_bundles import ROOT, imported

from gfldeploy import Bundle, Detector, triton_repository
from gfldeploy.bundle import Graph, write_bundle
from gfldeploy.engines.detect import given_detections
from gfldeploy.export.end_to_end import write_end_to_end

pytestmark = pytest.mark.slow  # it installs an environment
PARSE = """
import sys
from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2
for path in sys.argv[1:]:
    found = text_format.Parse(open(path).read(), model_config_pb2.ModelConfig())
    print(found.name, found.backend or found.platform, found.max_batch_size, len(found.ensemble_scheduling.step))
"""


@pytest.fixture(scope="module")
def recipe() -> Iterator[ModuleType]:
    with imported(ROOT / "benchmarks" / "triton_server.py") as module:
        yield module


@pytest.fixture(scope="module")
def environment(recipe: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    try:
        installed: Path = recipe.install(tmp_path_factory.mktemp("triton"))
    except recipe.CannotInstallError as error:
        pytest.skip(f"Triton cannot be installed: {error}")
    return installed


@pytest.fixture(scope="module")
def whole(tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny bundle with the file that deploys by itself."""
    target, own = tmp_path_factory.mktemp("whole") / "whole", Bundle.open(tiny_bundle).manifest
    with write_bundle(target) as (directory, manifests):
        shutil.copytree(tiny_bundle / "onnx", directory / "onnx")
        manifest = replace(own, name="whole", graphs={**own.graphs, "end_to_end": Graph("onnx/end_to_end.onnx")})
        write_end_to_end(directory / "onnx/model.onnx", directory / "onnx/end_to_end.onnx", manifest)
        manifests.append(manifest)
    return target


@pytest.fixture(scope="module")
def ensemble(whole: Path, environment: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("ensemble") / "models"
    return triton_repository(whole, output=target, backend="onnxruntime", batch_size=4, python_env=str(environment))


@pytest.fixture(scope="module")
def server(
    recipe: ModuleType, tiny_bundle: Path, ensemble: Path, environment: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Any]:
    folder = tmp_path_factory.mktemp("served")
    repository = triton_repository(
        tiny_bundle, output=folder / "models", batch_size=4, instances=2, threads=1, python_env=str(environment)
    )
    # The wheel has no backend for the network of the ensemble.
    shutil.copytree(ensemble / "whole_preprocess", repository / "whole_preprocess")
    with recipe.serving(environment, repository, folder) as running:
        yield running


@pytest.fixture(scope="module")
def files(tiny_coco: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """18 images, of three input sizes, and two that cannot be used."""
    good = sorted((tiny_coco.parent / "images").iterdir()) * 3
    folder = tmp_path_factory.mktemp("bad")
    (folder / "text.jpg").write_text("no image")
    (folder / "cut.jpg").write_bytes(good[0].read_bytes()[:400])
    return [*good[:5], folder / "text.jpg", *good[5:], folder / "cut.jpg"]


@pytest.mark.parametrize("protocol", ["http", "grpc"])
def test_detections_are_those_of_detector(server: Any, tiny_bundle: Path, files: list[Path], protocol: str) -> None:
    for threshold in (0.0, 0.99, None):
        answers = server.ask(protocol, "tiny", files, threshold)
        with Detector(tiny_bundle, engine="onnxruntime") as detector:
            expected = list(detector.stream(files, threshold=0.5 if threshold is None else threshold))
        assert len(answers) == len(expected) == 20
        for found, answer in zip(expected, answers, strict=True):
            if found.detections is None:
                assert "400" in answer["status"] or "INVALID_ARGUMENT" in answer["status"]
                assert "not an image" in answer["error"] or "truncated" in answer["error"]
                continue
            assert "error" not in answer, answer
            boxes = np.array(answer["boxes"], np.float32).reshape(-1, 4)
            assert np.array_equal(boxes, found.detections.boxes)
            assert np.array_equal(np.array(answer["scores"], np.float32), found.detections.scores)
            assert answer["classes"] == found.detections.classes.tolist()
            assert answer["names"] == found.detections.names
            assert answer["count"] == [len(found.detections)]
            assert (len(found.detections) == 0) == (threshold == 0.99)


@pytest.mark.parametrize("protocol", ["http", "grpc"])
def test_what_is_prepared_becomes_the_same_detections(
    server: Any, whole: Path, files: list[Path], protocol: str
) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    session = onnxruntime.InferenceSession(whole / "onnx/end_to_end.onnx", providers=["CPUExecutionProvider"])
    good = files[:4]
    with Detector(whole, engine="onnxruntime") as detector:
        expected = detector.detect(good, threshold=0)
    kinds = {"image": np.uint8, "im_shape": np.int32, "scale_factor": np.float32}
    for one, answer in zip(expected, server.ask(protocol, "whole_preprocess", good), strict=True):
        inputs = {name: np.array([answer[name]], kind) for name, kind in kinds.items()}
        assert all(side % 32 == 0 for side in inputs["image"].shape[1:3]), "so that Triton may batch it with others"
        names = [output.name for output in session.get_outputs()]
        (found,) = given_detections(dict(zip(names, session.run(names, inputs), strict=True)))
        assert found.classes.tolist() == one.classes.tolist()
        assert np.allclose(found.boxes, one.boxes, atol=1e-3)
        assert np.allclose(found.scores, one.scores, atol=1e-6)


def test_the_ensemble_is_what_triton_reads(ensemble: Path, environment: Path) -> None:
    configs = sorted(ensemble.glob("*/config.pbtxt"))
    done = subprocess.run(
        [environment / "bin" / "python", "-c", PARSE, *configs], capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines() == [
        "whole ensemble 4 2",
        "whole_network onnxruntime 4 0",
        "whole_preprocess python 4 0",
    ]
