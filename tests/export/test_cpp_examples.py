"""The C++ programs of examples/cpp are built as their README says, and print the golden detections."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import NamedTuple

import cv2
import demo_bundles
import pytest

from gfldeploy.bundle import GOLDEN, Bundle
from gfldeploy.engines.base import EngineOptions
from gfldeploy.engines.registry import load_graph
from gfldeploy.export.golden import PICTURE, detect
from gfldeploy.images.decode import read_image

pytestmark = pytest.mark.slow  # OpenVINO's headers take a compiler several seconds
SOURCE = demo_bundles.ROOT / "examples/cpp"
PROGRAMS = ("detect_openvino", "detect_onnxruntime")
HEADERS = {"nlohmann/json.hpp": "nlohmann-json3-dev", "png.h": "libpng-dev", "turbojpeg.h": "libturbojpeg0-dev"}
ROUNDED = (6e-5, 0.006)  # score, px: printed with 4 and 2 digits


class Line(NamedTuple):
    name: str
    score: float
    box: list[float]


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder with the programs that can be built here."""
    openvino = pytest.importorskip("openvino")
    onnxruntime = pytest.importorskip("onnxruntime")
    for tool in ("cmake", "g++"):
        if shutil.which(tool) is None:
            pytest.skip(f"{tool} is not installed")
    for header, package in HEADERS.items():
        command = ["g++", "-fsyntax-only", "-include", header, "-x", "c++", os.devnull]
        looked = subprocess.run(command, capture_output=True)
        if looked.returncode:
            pytest.skip(f"{header} is not installed (Debian: {package})")
    folder = tmp_path_factory.mktemp("cpp")
    # The wheel has no name for its library that a linker looks for.
    (library,) = Path(onnxruntime.__file__).parent.glob("capi/libonnxruntime.so*")
    for name in ("libonnxruntime.so", "libonnxruntime.so.1"):
        (folder / name).symlink_to(library)
    settings = {"OpenVINO_DIR": Path(openvino.__file__).parent / "cmake", "ONNXRUNTIME": folder / "libonnxruntime.so"}
    build = folder / "build"
    configure = ["cmake", "-S", SOURCE, "-B", build, "-DCMAKE_CXX_FLAGS=-Wall -Wextra"]
    for arguments in (
        [*configure, *(f"-D{name}={value}" for name, value in settings.items())],
        ["cmake", "--build", build],
    ):
        ended = run(*arguments)
        assert ended.returncode == 0, ended.stdout + ended.stderr
        assert f"{SOURCE}" not in ended.stderr  # no warnings about ours
    return build


def program(built: Path, name: str) -> Path:
    path = built / name
    if name == "detect_onnxruntime" and not path.exists():
        pytest.skip("ONNX Runtime's C++ headers are not installed (Debian 13: libonnxruntime-dev)")
    return path


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(list(map(str, arguments)), capture_output=True, text=True)


def lines(*arguments: object) -> list[Line]:
    ended = run(*arguments)
    assert ended.returncode == 0, ended.stderr
    rows = [row.rsplit(" ", 5) for row in ended.stdout.splitlines()]
    return [Line(name, float(score), [float(corner) for corner in box]) for name, score, *box in rows]


def same(found: Line, name: str, score: float, box: list[float], allowed: tuple[float, float]) -> bool:
    score_error, box_error = (one + rounded for one, rounded in zip(allowed, ROUNDED, strict=True))
    apart = max(abs(one - other) for one, other in zip(found.box, box, strict=True))
    return found.name == name and abs(found.score - score) <= score_error and apart <= box_error


@pytest.mark.parametrize("name", PROGRAMS)
@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_they_print_the_golden_detections(
    built: Path, name: str, precision: str, request: pytest.FixtureRequest
) -> None:
    bundle: Path = request.getfixturevalue({"fp32": "trained", "int8": "calibrated"}[precision])
    record = json.loads((bundle / GOLDEN).read_text())
    expected, tolerance = record["detections"], record["tolerance"]
    allowed = tolerance["score"], tolerance["box_px"]
    model, picture = bundle / "onnx/end_to_end.onnx", bundle / PICTURE
    found = lines(program(built, name), model, picture, max(expected[-1]["score"] - allowed[0], 0) - 1e-3)
    missing = [
        one
        for one in expected
        if not any(same(line, one["class"], one["score"], one["box"], allowed) for line in found)
    ]
    assert expected
    assert len(missing) <= (0 if precision == "fp32" else tolerance["missing"] * len(expected)), missing


@pytest.mark.parametrize("name", PROGRAMS)
def test_a_jpeg_is_decoded_and_resized_as_by_predict(built: Path, name: str, trained: Path, tmp_path: Path) -> None:
    picture = cv2.imread(str(trained / PICTURE))
    assert picture is not None
    path = tmp_path / "turned.jpg"  # another shape than the golden picture's
    cv2.imwrite(str(path), cv2.rotate(picture, cv2.ROTATE_90_CLOCKWISE)[:-31])
    bundle = Bundle.open(trained)
    with load_graph("onnxruntime", bundle, EngineOptions(), "end_to_end") as engine:
        (expected,) = detect(bundle, read_image(path), engine)[:1]
    best = expected.named(bundle.manifest.classes).at_least(0.1)
    found = lines(program(built, name), trained / "onnx/end_to_end.onnx", path, 0.099)
    assert len(best) > 0
    for names, score, box in zip(best.names, best.scores.tolist(), best.boxes.tolist(), strict=True):
        assert any(same(line, names, score, box, (1e-4, 0.1)) for line in found)


@pytest.mark.parametrize("name", PROGRAMS)
def test_what_cannot_be_read_is_said(built: Path, name: str, trained: Path, tmp_path: Path) -> None:
    model, picture = trained / "onnx/end_to_end.onnx", tmp_path / "picture"
    assert cv2.imwrite(str(tmp_path / "whole.jpg"), cv2.imread(str(trained / PICTURE)))
    jpeg = (tmp_path / "whole.jpg").read_bytes()
    for content in (b"", b"GIF89a", jpeg[: len(jpeg) // 2]):
        picture.write_bytes(content)
        ended = run(program(built, name), model, picture)
        assert (ended.returncode, ended.stdout) == (1, "")
        assert ended.stderr.startswith("Error: ")
    for arguments in ((), (trained / "onnx/model.onnx", trained / PICTURE)):
        ended = run(program(built, name), *arguments)
        assert (ended.returncode, ended.stdout) == (1, "")
        assert ended.stderr.startswith("Error: give ")
