"""INT8 programs of the demo detector with convolutions in float, run by the engine that deploys them."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path

import demo_bundles
import numpy as np
import pytest
from calibration_file import calibration_from
from numpy.typing import NDArray

from gfldeploy.bundle import Bundle, Graph, GraphName
from gfldeploy.candidates import anchors_of, matched
from gfldeploy.engines.base import EngineOptions, Precision, count_precisions
from gfldeploy.engines.registry import graph_for
from gfldeploy.errors import EngineError
from gfldeploy.files import read_json
from gfldeploy.images.decode import read_image
from gfldeploy.quant.calibration import Calibration, ConvRanges, ConvUse
from gfldeploy.quant.observer import weight_ranges
from gfldeploy.quant.program import old_program_environment, write_program

pytestmark = [pytest.mark.slow, demo_bundles.needs_export, demo_bundles.needs_quant]

Outputs = Mapping[str, NDArray[np.float32]]
FILES = ("model.pdmodel", "model.pdiparams")


class Detector:
    """The demo detector in FP32, and its calibration."""

    def __init__(self, factory: pytest.TempPathFactory) -> None:
        self.fp32 = Bundle.open(demo_bundles.exported(factory))
        self.quantized = demo_bundles.quantized(factory)
        self.calibration = calibration_from(read_json(self.quantized / "calibration.json"))
        preprocess = self.fp32.manifest.preprocess
        picture = read_image(demo_bundles.pictures(factory) / "colour.jpg")
        self.image = preprocess.batch([preprocess(picture)])
        self.expected, _ = self.run(self.fp32, "fp32")

    def weight(self, path: str) -> str:
        return next(weight for weight, layer in self.fp32.layers().items() if layer == path)

    def run(self, bundle: Bundle, precision: Precision) -> tuple[Outputs, Mapping[str, int]]:
        from gfldeploy.engines.paddle_engine import PaddleEngine

        inputs, graph = {"image": self.image}, graph_for("paddle", precision, "cpu")
        with PaddleEngine(bundle, EngineOptions(precision, "cpu", 1), graph) as engine:
            return engine.infer(inputs), count_precisions(engine.executed_convolutions(inputs))

    def keeping(self, kept: Collection[ConvUse], folder: Path) -> tuple[Outputs, Mapping[str, int]]:
        write_program(self.fp32, self.calibration.keeping(kept), folder)
        return self.run(self.int8(folder), "int8")

    def int8(self, folder: Path) -> Bundle:
        """The program in `folder` as a bundle."""
        graphs: dict[GraphName, Graph] = {"paddle_program": Graph(*FILES)}
        return Bundle(folder, replace(self.fp32.manifest, precision="int8", graphs=graphs))


@pytest.fixture(scope="module")
def detector(tmp_path_factory: pytest.TempPathFactory) -> Detector:
    return Detector(tmp_path_factory)


def counts(int8: int, fp32: int) -> dict[str, int]:
    return {name: count for name, count in (("fp32", fp32), ("int8", int8)) if count}


def difference(one: Outputs, other: Outputs, name: str) -> float:
    """The largest, over the candidates that both chose."""
    here, there = matched(anchors_of(one, 0), anchors_of(other, 0))
    return float(np.abs(one[name][0, here] - other[name][0, there]).max())


PADDLESLIM = """
import json, sys
from pathlib import Path
import numpy as np
import paddle
from gfldeploy.quant.ptq import _quantization, _read_thresholds
bundle, image, output = map(Path, sys.argv[1:])
quantization = _quantization(bundle, lambda: iter([{"image": np.load(image)}]), 1, "abs_max")
thresholds = _read_thresholds(quantization.quantize(), paddle.static.global_scope())
quantization.save_quantized_model(str(output), model_filename="model.pdmodel")
(output / "thresholds.json").write_text(json.dumps(thresholds))
"""


def test_it_is_what_paddleslim_writes(detector: Detector, tmp_path: Path) -> None:
    theirs, ours = tmp_path / "theirs", tmp_path / "ours"
    theirs.mkdir()
    ours.mkdir()
    np.save(tmp_path / "image.npy", detector.image)
    arguments = (detector.fp32.directory, tmp_path / "image.npy", theirs)
    command = [sys.executable, "-c", PADDLESLIM, *map(str, arguments)]
    environment = {**os.environ, **old_program_environment(1), "PYTHONWARNINGS": "ignore"}
    subprocess.run(command, check=True, env=environment, capture_output=True)
    largest = weight_ranges(detector.fp32.graph("onnx")[0])
    thresholds = read_json(theirs / "thresholds.json")
    ranges = {name: ConvRanges(tuple(inputs), (), largest[name]) for name, inputs in thresholds.items()}
    write_program(detector.fp32, Calibration("abs_max", {}, ranges), ours)
    found, ran = detector.run(detector.int8(ours), "int8")
    expected, _ = detector.run(detector.int8(theirs), "int8")
    assert ran == {"int8": len(detector.calibration.uses)}
    for name, array in expected.items():
        np.testing.assert_array_equal(found[name], array)
    assert rounded_additions(ours) == rounded_additions(theirs) != set()


def rounded_additions(folder: Path) -> set[str]:
    """The outputs of the additions that read a rounded tensor."""
    from paddle.base.proto import framework_pb2

    (block,) = framework_pb2.ProgramDesc.FromString((folder / FILES[0]).read_bytes()).blocks
    return {
        op.outputs[0].arguments[0]
        for op in block.ops
        if op.type == "elementwise_add"
        and any(name.endswith(".dequantized") for slot in op.inputs for name in slot.arguments)
    }


def test_exactly_the_kept_uses_run_in_float(detector: Detector, tmp_path: Path) -> None:
    regression = detector.weight("head.gfl_head_reg")
    kept = {ConvUse(detector.weight("backbone.stem.conv"), 0), ConvUse(regression, 0), ConvUse(regression, 2)}
    total = len(detector.calibration.uses)
    found, ran = detector.keeping(kept, tmp_path)
    assert ran == counts(int8=total - 3, fp32=3)
    assert difference(found, detector.expected, "boxes") > 0.01


@pytest.mark.parametrize("part", [0, 1])
def test_float_and_int8_in_turns(detector: Detector, part: int, tmp_path: Path) -> None:
    """Float convolutions between INT8 ones and beside them, on one input and on both sides of residual additions."""
    uses = detector.calibration.uses
    kept = uses[part::2]
    found, ran = detector.keeping(kept, tmp_path)
    assert ran == counts(int8=len(uses) - len(kept), fp32=len(kept))
    assert difference(found, detector.expected, "scores") < 0.1


def test_everything_in_float_gives_what_fp32_gives(detector: Detector, tmp_path: Path) -> None:
    uses = detector.calibration.uses
    found, ran = detector.keeping(uses, tmp_path)
    assert ran == counts(int8=0, fp32=len(uses))
    assert difference(found, detector.expected, "scores") < 1e-5
    assert difference(found, detector.expected, "boxes") < 1e-2


def test_one_level_of_a_shared_convolution_in_int8(detector: Detector, tmp_path: Path) -> None:
    """The scores stay as they are, and so do the boxes of every other level."""
    level = 1
    alone = ConvUse(detector.weight("head.gfl_head_reg"), level)
    found, ran = detector.keeping(set(detector.calibration.uses) - {alone}, tmp_path)
    assert ran == counts(int8=1, fp32=len(detector.calibration.uses) - 1)
    assert difference(found, detector.expected, "scores") < 1e-5
    height, width = detector.image.shape[2:]
    cells = [-(-height // stride) * -(-width // stride) for stride in detector.fp32.manifest.strides]
    anchors = anchors_of(found, 0)
    np.testing.assert_array_equal(anchors, anchors_of(detector.expected, 0))
    moved = np.abs(found["boxes"] - detector.expected["boxes"])[0].max(axis=1)
    levels = np.searchsorted(np.cumsum(cells), anchors, side="right")
    for index in range(len(cells)):
        assert (moved[levels == index].max() > 1e-2) == (index == level), index


def test_files_are_the_same_each_time(detector: Detector, tmp_path: Path) -> None:
    kept = detector.calibration.uses[::3]
    contents = []
    for name, order in (("a", kept), ("b", kept[::-1])):
        (tmp_path / name).mkdir()
        write_program(detector.fp32, detector.calibration.keeping(order), tmp_path / name)
        contents.append([(tmp_path / name / file).read_bytes() for file in FILES])
    assert contents[0] == contents[1]


def test_what_is_refused(detector: Detector, tmp_path: Path) -> None:
    stem = detector.weight("backbone.stem.conv")
    for use in (ConvUse(stem, 1), ConvUse("conv2d_999.w_0", 0)):
        with pytest.raises(EngineError, match=f"no use {use.use} of {use.weight}") as caught:
            ranges = ConvRanges((1.0,) * (use.use + 1), (), (1.0,) * 24)
            write_program(detector.fp32, Calibration("abs_max", {}, {use.weight: ranges}), tmp_path)
        assert caught.value.remedy
    assert list(tmp_path.iterdir()) == []
    broken = tmp_path / "broken"
    broken.mkdir()
    model, parameters = ((detector.fp32.directory / "paddle" / name).read_bytes() for name in FILES)
    for contents in ((model, parameters[:-1]), (model, b""), (model, b"\xff" * 99), (b"\xff" * 99, parameters)):
        for name, content in zip(FILES, contents, strict=True):
            (broken / name).write_bytes(content)
        with pytest.raises(EngineError, match="no Paddle program") as caught:
            write_program(detector.int8(broken), detector.calibration, tmp_path)
        assert caught.value.remedy
