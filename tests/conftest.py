"""What tests share: a tiny real detector and a tiny COCO dataset, made without Paddle; the bundles of the demo
detector; what tests need, and how they are shared out among processes."""

from __future__ import annotations

# First of all: libraries count the CPUs when they are loaded.
import share_cpus

# isort: split
import faulthandler
import functools
import importlib.util
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Generator, Iterator
from dataclasses import replace
from pathlib import Path

import cv2
import demo_bundles
import numpy as np
import psutil
import pytest
from demo_bundles import RunHere

from gfldeploy.bench import monitor, runner
from gfldeploy.bundle import Bundle, Graph, Manifest, TensorSpec, write_bundle
from gfldeploy.cli import main
from gfldeploy.engines.base import EngineOptions
from gfldeploy.engines.hardware import nvidia_driver
from gfldeploy.engines.registry import open_engine
from gfldeploy.export.end_to_end import write_end_to_end
from gfldeploy.export.golden import golden_picture, write_golden
from gfldeploy.export.parity import TOLERANCE
from gfldeploy.images.preprocess import Preprocess
from gfldeploy.nms import NmsParams
from gfldeploy.quant import speed

CLASSES = ("box", "ball")
SIZES = ((48, 80), (80, 48), (48, 80), (64, 64), (80, 48), (48, 72))  # height, width: landscape, portrait, square

NEEDS = {"needs_ppdet": "ppdet", "needs_paddleslim": "paddleslim"}  # by marker: the module
LONGEST = (  # files
    "test_demo_run",
    "test_interrupt",
    "test_quantize",
    "test_distill",
    "test_zoo_recipe",
    "test_backbones",
    "test_bad_input",
    "test_candidates_recipe",
    "test_gate",
    "test_export",
    "test_config",
)
# Whose slow tests run code that no fast one runs. In those of others coverage is not counted: tracing takes a third of
# their time.
COUNTED = ("export", "cli", "quant")  # folders
STDERR = pytest.StashKey[int]()
WORKER_GB = 3  # what a worker and a command that it runs take at most

os.environ.pop("COLUMNS", None)  # pytest gives its workers one: tables would be cut to it
# Where it is set, as in many container images, each of hundreds of processes compiles all that it imports:
# PaddleDetection takes 10 s then, and 3 s as bytecode.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
sys.dont_write_bytecode = False


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int:
    """How many processes `-n auto` means: one for each CPU that we may use, and for which there is memory."""
    return max(min(share_cpus.CPUS, psutil.virtual_memory().available // (WORKER_GB * 10**9)), 1)


def pytest_configure(config: pytest.Config) -> None:
    config.stash[STDERR] = os.dup(2)  # before it is captured


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    # Paddle takes crashes over when it is imported, and tells of them where pytest captures it: nobody would know why.
    faulthandler.disable()
    faulthandler.enable(item.config.stash[STDERR])


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
    """Pause coverage, where it is measured, for all of a slow test: pytest-cov's `no_cover` leaves its fixtures in."""
    coverage = sys.modules.get("coverage")
    measured = coverage and coverage.Coverage.current()
    if measured is None or item.get_closest_marker("slow") is None or item.path.parent.name in COUNTED:
        return (yield)
    measured.stop()
    try:
        return (yield)
    finally:
        measured.start()


@pytest.hookimpl(tryfirst=True)  # before `-m` chooses
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        assert isinstance(item, pytest.Function)
        for marker, module in NEEDS.items():
            if marker in item.fixturenames:
                item.add_marker(marker)
            made = demo_bundles.MADE and item.get_closest_marker("gpu")
            if item.get_closest_marker(marker) and not installed(module) and not made:
                item.add_marker(pytest.mark.skip(f"{module} is not installed"))
        if item.get_closest_marker("gpu") and nvidia_driver() is None:
            item.add_marker(pytest.mark.skip("no NVIDIA driver is loaded"))
    if share_cpus.WORKER is not None:
        # Files with slow tests first: no worker begins a long one when the others have nothing left.
        slow = {item.path for item in items if item.get_closest_marker("slow")}
        order = {name: place for place, name in enumerate(LONGEST)}
        items.sort(key=lambda item: (order.get(item.path.stem, len(order)), item.path not in slow))


@functools.cache
def installed(module: str) -> bool:
    # Asked without importing: that takes seconds, and ppdet prints.
    return importlib.util.find_spec(module) is not None


@pytest.fixture(autouse=True)
def folder_stays() -> Iterator[None]:
    """The current directory, which a worker of a cluster changes to that of its command, also in a test's process."""
    before = Path.cwd()
    yield
    os.chdir(before)


@pytest.fixture(scope="session")
def needs_ppdet() -> None:
    """Marks the tests of every fixture that asks for it."""


@pytest.fixture(scope="session")
def needs_paddleslim() -> None:
    """Marks the tests of every fixture that asks for it."""


@pytest.fixture(scope="session", autouse=True)
def impatient() -> Iterator[None]:
    """Measure at once, though others keep the machine busy, and no longer than it takes to have a number."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runner, "wait_until_idle", functools.partial(monitor.wait_until_idle, patience_s=0))
        patch.setattr(
            speed, "interleaved_medians", functools.partial(speed.interleaved_medians, min_rounds=1, min_seconds=0)
        )
        yield


@pytest.fixture
def run_here(capfd: pytest.CaptureFixture[str]) -> RunHere:
    """As `demo_bundles.run`, but in this process: Paddle is loaded once, and can be patched."""

    def run(*arguments: object) -> subprocess.CompletedProcess[str]:
        capfd.readouterr()
        words = list(map(str, arguments))
        with pytest.raises(SystemExit) as stopped:
            main(words)
        code = stopped.value.code
        assert isinstance(code, int)
        return subprocess.CompletedProcess(words, code, *capfd.readouterr())

    return run


def write_tiny_onnx(path: Path) -> None:
    """One convolution of stride 8, whose 6 channels are 2 class scores and the 4 corners of a box.

    The box is 0, 0, 48, 48 (network-input pixels) everywhere, class "box" scores about 0.88 and "ball" about 0.02.
    """
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    weights = np.zeros((6, 3, 3, 3), np.float32)
    weights[:2] = np.random.default_rng(0).normal(0, 0.001, (2, 3, 3, 3))
    constants = {
        "weights": weights,
        "bias": np.array([2, -4, 0, 0, 48, 48], np.float32),
        "flat": np.array([0, 6, -1], np.int64),
        "split": np.array([2, 4], np.int64),
    }
    nodes = [
        helper.make_node("Conv", ["image", "weights", "bias"], ["map"], strides=[8, 8], pads=[1, 1, 1, 1]),
        helper.make_node("Reshape", ["map", "flat"], ["rows"]),
        helper.make_node("Transpose", ["rows"], ["anchors"], perm=[0, 2, 1]),
        helper.make_node("Split", ["anchors", "split"], ["logits", "boxes"], axis=2),
        helper.make_node("Sigmoid", ["logits"], ["scores"]),
    ]
    graph = helper.make_graph(
        nodes,
        "tiny",
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, ["N", 3, "H", "W"])],
        [
            helper.make_tensor_value_info("scores", TensorProto.FLOAT, ["N", "A", 2]),
            helper.make_tensor_value_info("boxes", TensorProto.FLOAT, ["N", "A", 4]),
        ],
        [numpy_helper.from_array(value, name) for name, value in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)
    onnx.checker.check_model(model)
    path.parent.mkdir(parents=True)
    onnx.save(model, str(path))


def write_tiny_bundle(target: Path) -> Path:
    """Write an FP32 bundle with an ONNX graph only; returns its directory."""
    with write_bundle(target) as (directory, manifests):
        write_tiny_onnx(directory / "onnx" / "model.onnx")
        manifests.append(
            Manifest(
                name="tiny",
                precision="fp32",
                graphs={"onnx": Graph("onnx/model.onnx")},
                inputs=(TensorSpec("image", "float32", (None, 3, None, None)),),
                outputs=(
                    TensorSpec("scores", "float32", (None, None, 2)),
                    TensorSpec("boxes", "float32", (None, None, 4)),
                ),
                preprocess=Preprocess(target_size=(64, 96), pad_stride=32),
                nms=NmsParams(score_threshold=0.05, nms_threshold=0.6, nms_top_k=100, keep_top_k=100),
                classes=CLASSES,
                score_channels=2,
                strides=(8,),
                reg_max=16,
                parameters=168,
                provenance={},
            )
        )
    return target


@pytest.fixture(scope="session")
def tiny_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of an FP32 bundle with an ONNX graph only. Read it, do not change it."""
    return write_tiny_bundle(tmp_path_factory.mktemp("bundles") / "tiny")


@pytest.fixture(scope="session")
def tiny_whole(tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny bundle with the file that deploys by itself and a golden picture. Read it, do not change it."""
    pytest.importorskip("onnxruntime")
    source, target = Bundle.open(tiny_bundle), tmp_path_factory.mktemp("whole") / "tiny"
    with write_bundle(target) as (directory, manifests):
        shutil.copytree(tiny_bundle / "onnx", directory / "onnx")
        graphs = {**source.manifest.graphs, "end_to_end": Graph("onnx/end_to_end.onnx")}
        made = Bundle(directory, replace(source.manifest, graphs=graphs, files={}))
        write_end_to_end(made.graph("onnx")[0], made.graph("end_to_end")[0], made.manifest)
        with open_engine("onnxruntime", made, EngineOptions()) as engine:
            write_golden(made, golden_picture(None), engine, TOLERANCE)
        manifests.append(made.manifest)
    return target


@pytest.fixture(scope="session")
def tiny_coco(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A COCO annotation file with six JPEG images in `images/` beside it. Read it, do not change it.

    Each has one "box" exactly where the detector of `tiny_bundle` finds one, so that its mAP is 1.
    """
    directory = tmp_path_factory.mktemp("coco")
    (directory / "images").mkdir()
    preprocess = Preprocess(target_size=(64, 96), pad_stride=32)
    random = np.random.default_rng(1)
    images, annotations = [], []
    for number, (height, width) in enumerate(SIZES, start=1):
        picture = random.integers(0, 256, (height, width, 3), np.uint8)
        assert cv2.imwrite(str(directory / "images" / f"{number}.jpg"), picture)
        images.append({"id": number, "file_name": f"{number}.jpg", "height": height, "width": width})
        side = 48 / preprocess.scales(height, width)[0]
        annotations.append(
            {"id": number, "image_id": number, "category_id": 1, "bbox": [0, 0, side, side], "iscrowd": 0}
        )
    categories = [{"id": number, "name": name} for number, name in enumerate(CLASSES, start=1)]
    path = directory / "annotations.json"
    path.write_text(json.dumps({"images": images, "annotations": annotations, "categories": categories}))
    return path


@pytest.fixture(scope="session")
def exported(needs_ppdet: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`demo_bundles.exported`. Read it, do not change it."""
    return demo_bundles.exported(tmp_path_factory)


@pytest.fixture(scope="session")
def trained(needs_ppdet: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`demo_bundles.trained`. Read it, do not change it."""
    return demo_bundles.trained(tmp_path_factory)


@pytest.fixture(scope="session")
def quantized(needs_ppdet: None, needs_paddleslim: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`demo_bundles.quantized`. Read it, do not change it."""
    return demo_bundles.quantized(tmp_path_factory)


@pytest.fixture(scope="session")
def labelled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`demo_bundles.labelled`. Read it, do not change it."""
    return demo_bundles.labelled(tmp_path_factory)


@pytest.fixture(scope="session")
def calibrated(needs_ppdet: None, needs_paddleslim: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`demo_bundles.calibrated`. Read it, do not change it."""
    return demo_bundles.calibrated(tmp_path_factory)


@pytest.fixture(scope="session")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`demo_bundles.pictures`: a folder of images of every kind that is read. Read it, do not change it."""
    return demo_bundles.pictures(tmp_path_factory)
