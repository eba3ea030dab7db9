"""INT8 programs as oneDNN runs them: a small network with what residual networks and GFL's head are made of."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

pytest.importorskip("paddle")

from gfldeploy.bundle import Bundle, Graph, Manifest, TensorSpec, write_bundle
from gfldeploy.engines import paddle_engine
from gfldeploy.engines.base import EngineOptions, count_precisions
from gfldeploy.engines.paddle_engine import PaddleEngine
from gfldeploy.engines.paddle_rewrite import rewrite_for_onednn
from gfldeploy.images.preprocess import Preprocess
from gfldeploy.nms import NmsParams
from gfldeploy.quant.calibration import Calibration, ConvRanges, ConvUse, OutputRange
from gfldeploy.quant.program import write_program

FILES = ("model.pdmodel", "model.pdiparams")
CHANNELS = 16
MANY = 10**6  # pixels: a map worth normalising in steps
IMAGE = np.random.default_rng(0).normal(0, 1, (2, 3, 24, 40)).astype(np.float32)


def network(paddle: Any, image: Any) -> tuple[Any, dict[str, tuple[Any, Any]]]:
    """Scores, and the input and output (after its ReLU) of each convolution by the name of its weight."""
    relu, seen = paddle.nn.functional.relu, {}

    def convolution(tensor: Any, kernel: int, active: bool, outputs: int = CHANNELS) -> Any:
        layer = paddle.nn.Conv2D(
            tensor.shape[1],
            outputs,
            kernel,
            padding=kernel // 2,
            weight_attr=paddle.nn.initializer.KaimingNormal(),
            bias_attr=paddle.nn.initializer.Normal(0.0, 0.5),
        )
        result = layer(tensor)
        result = relu(result) if active else result
        seen[layer.weight.name] = tensor, result
        return result

    stem = convolution(image, 3, active=True)
    inner = convolution(convolution(stem, 1, active=True), 1, active=False)
    block = relu(inner + convolution(stem, 1, active=False))  # both sides have a sign
    block = relu(block + convolution(convolution(block, 3, active=True), 1, active=False))
    head = convolution(block, 1, active=False)
    norm = paddle.nn.GroupNorm(4, CHANNELS, weight_attr=paddle.nn.initializer.Normal(1.0, 0.2))
    return convolution(relu(norm(head)), 3, active=False, outputs=8), seen


class Small:
    """The network as an FP32 bundle, with the ranges that `IMAGE` gives and what it is there."""

    def __init__(self, folder: Path) -> None:
        import paddle
        from paddle.pir_utils import OldIrGuard

        static = paddle.static
        with OldIrGuard():
            paddle.enable_static()
            try:
                program, start, scope = static.Program(), static.Program(), static.Scope()
                start.random_seed = program.random_seed = 3
                with static.scope_guard(scope), static.program_guard(program, start):
                    image = static.data("image", [-1, 3, -1, -1], "float32")
                    scores, seen = network(paddle, image)
                    executor = static.Executor(paddle.CPUPlace())
                    executor.run(start)
                    wanted = [scores, *(value for pair in seen.values() for value in pair)]
                    arrays = executor.run(program, {"image": IMAGE}, wanted)
                    flat = executor.run(program, {"image": IMAGE * 0}, [scores])
                    ranges = {}
                    for name, given, made in zip(seen, arrays[1::2], arrays[2::2], strict=True):
                        weight = np.array(scope.find_var(name).get_tensor())
                        largest = np.abs(weight).max(axis=(1, 2, 3))
                        found = OutputRange(float(made.min()), float(made.max()))
                        ranges[name] = ConvRanges((float(np.abs(given).max()),), (found,), tuple(largest.tolist()))
                    self.calibration = Calibration("abs_max", {}, ranges)
                    with write_bundle(folder, detector=False) as (directory, manifests):
                        prefix = str(directory / "model")
                        static.save_inference_model(prefix, [image], [scores], executor, program=program)
                        manifests.append(MANIFEST)
            finally:
                paddle.disable_static()
        self.fp32 = Bundle.open(folder, detector=False)
        self.expected, self.of_nothing = arrays[0], flat[0]

    def int8(self, folder: Path, *, ranges: bool = True, kept: frozenset[ConvUse] = frozenset()) -> Bundle:
        """Calibrated, in `folder`; without `ranges` as bundles were that did not note those of outputs."""
        calibration = self.calibration.keeping(kept)
        if not ranges:
            without = {name: replace(one, outputs=()) for name, one in calibration.convolutions.items()}
            calibration = replace(calibration, convolutions=without)
        folder.mkdir()
        write_program(self.fp32, calibration, folder)
        return Bundle(folder, replace(MANIFEST, precision="int8"))


MANIFEST = Manifest(
    name="small",
    precision="fp32",
    graphs={"paddle_program": Graph(*FILES)},
    inputs=(TensorSpec("image", "float32", (None, 3, None, None)),),
    outputs=(TensorSpec("scores", "float32", (None, 8, None, None)),),
    preprocess=Preprocess(target_size=(1000, 1000)),
    nms=NmsParams(score_threshold=0.05, nms_threshold=0.6, nms_top_k=100, keep_top_k=100),
    classes=("none",),
    score_channels=1,
    strides=(1,),
    reg_max=1,
    parameters=1,
    provenance={},
)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Small:
    return Small(tmp_path_factory.mktemp("small") / "fp32")


def run(bundle: Bundle, image: NDArray[np.float32] = IMAGE) -> tuple[NDArray[Any], dict[str, int]]:
    with PaddleEngine(bundle, EngineOptions("int8", "cpu", 1), "paddle_program") as engine:
        ran = count_precisions(engine.executed_convolutions({"image": image}))
        return engine.infer({"image": image})["scores"], dict(ran)


def error(found: NDArray[Any], expected: NDArray[Any]) -> float:
    return float(np.sqrt(np.mean((found - expected) ** 2) / np.mean(expected**2)))


@pytest.fixture
def as_written(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    with monkeypatch.context() as patch:
        patch.setattr(paddle_engine, "rewrite_for_onednn", lambda description, pixels: None)
        yield patch


def test_it_rounds_no_more_than_the_program_as_written(
    small: Small, tmp_path: Path, as_written: pytest.MonkeyPatch
) -> None:
    before, ran_before = run(small.int8(tmp_path / "before"))
    as_written.undo()
    for name, ranges in (("new", True), ("old", False)):
        found, ran = run(small.int8(tmp_path / name, ranges=ranges))
        assert ran == ran_before == {"int8": len(small.calibration.uses)}
        assert error(found, small.expected) < 1.5 * error(before, small.expected) < 0.1


def test_what_convolutions_take_in(small: Small, tmp_path: Path) -> None:
    with_ranges = operators(small.int8(tmp_path / "new"))
    without = operators(small.int8(tmp_path / "old", ranges=False))
    assert with_ranges["fused_conv2d"] == without["fused_conv2d"] == len(small.calibration.uses)
    assert not with_ranges["group_norm"] + without["group_norm"]
    # The normalisation's own addition alone; where ranges are missing, that of two convolutions too, and its ReLU.
    assert (with_ranges["elementwise_add"], without["elementwise_add"]) == (1, 2)
    assert without["relu"] == with_ranges["relu"] + 1
    assert operators(small.int8(tmp_path / "few"), pixels=100)["group_norm"] == 1


def operators(bundle: Bundle, pixels: int = MANY) -> Counter[str]:
    from paddle.base.proto import framework_pb2

    description = framework_pb2.ProgramDesc.FromString(bundle.graph("paddle_program")[0].read_bytes())
    rewrite_for_onednn(description, pixels)
    return Counter(op.type for op in description.blocks[0].ops)


def test_convolutions_kept_in_float_stay_so(small: Small, tmp_path: Path) -> None:
    uses = small.calibration.uses
    for part in (0, 1):
        kept = frozenset(uses[part::2])
        found, ran = run(small.int8(tmp_path / str(part), kept=kept))
        assert ran == {"int8": len(uses) - len(kept), "fp32": len(kept)}
        assert error(found, small.expected) < 0.1


def test_flat_maps_are_normalized(small: Small, tmp_path: Path) -> None:
    found, _ = run(small.int8(tmp_path / "int8"), IMAGE * 0)
    assert error(found, small.of_nothing) < 0.1
