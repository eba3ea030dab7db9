"""OpenVINO: what it runs in which precision, its models for input shapes, its cache."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from qdq_model import IMAGE, USES, QdqModel

from gfldeploy.bundle import Bundle
from gfldeploy.engines import openvino_engine
from gfldeploy.engines.base import NOT_ASKED, EngineOptions, ExecutedConvolution, Precision
from gfldeploy.engines.openvino_engine import OpenVinoEngine
from gfldeploy.engines.openvino_graph import in_low_precision
from gfldeploy.engines.registry import capability, open_engine
from gfldeploy.errors import EngineError, OutputError

pytest.importorskip("openvino")
onnx = pytest.importorskip("onnx")

needs_bf16 = pytest.mark.skipif(not capability("openvino", "bf16", "cpu").works, reason="this CPU has no BF16")
needs_vnni = pytest.mark.skipif(
    capability("openvino", "int8", "cpu").note is not None, reason="this CPU has no fast INT8"
)


def image(height: int, width: int, seed: int = 0) -> dict[str, Any]:
    return {"image": np.random.default_rng(seed).standard_normal((1, 3, height, width), np.float32)}


def opened(bundle: Path, precision: Precision = "fp32", **options: Any) -> OpenVinoEngine:
    return OpenVinoEngine(Bundle.open(bundle), EngineOptions(precision, **options), "onnx")


def test_fp32_is_fp32_and_what_is_returned_is_kept(tiny_bundle: Path) -> None:
    with (
        opened(tiny_bundle) as engine,
        open_engine("onnxruntime", Bundle.open(tiny_bundle), EngineOptions()) as reference,
    ):
        given = image(64, 96)
        given["image"].flags.writeable = False  # as what is mapped from a file is
        first = engine.infer(given)
        kept = {name: array.copy() for name, array in first.items()}
        engine.infer(image(64, 96, seed=1))
        for name, array in reference.infer(image(64, 96)).items():
            np.testing.assert_allclose(first[name], array, atol=1e-5)
            np.testing.assert_array_equal(first[name], kept[name])
        assert engine.executed_convolutions(image(64, 96)) == (ExecutedConvolution("fp32", "weights", NOT_ASKED),)
        outputs, times = engine.infer_timed(image(64, 96))
        np.testing.assert_array_equal(outputs["boxes"], first["boxes"])
        assert times.inference_ms > 0
        share = engine.convolution_share(image(64, 96))
        assert share is not None and 0 < share <= 1


@needs_vnni
@pytest.mark.parametrize(
    ("model", "expected"),
    [
        (QdqModel(), {}),
        (QdqModel(weights=(0,), inputs=(0,)), {"a": "kept in float in the ONNX file"}),
        (QdqModel(inputs=(0,)), {"a": "its input is not quantised in the ONNX file"}),
        (
            QdqModel(weights=(1, 2), inputs=(1, 2)),
            dict.fromkeys(("s use 0", "s use 1"), "kept in float in the ONNX file"),
        ),
        # What ONNX Runtime leaves in float for want of a quantised output.
        (QdqModel(outputs=(2,)), {}),
    ],
)
def test_which_ran_in_float_and_why(
    model: QdqModel, expected: dict[str, str], tiny_bundle: Path, tmp_path: Path
) -> None:
    with OpenVinoEngine(model.bundle(tiny_bundle, tmp_path), EngineOptions("int8"), "onnx") as engine:
        found = engine.executed_convolutions(IMAGE)
    assert sorted(one.what for one in found) == list(USES)
    assert all((one.precision == "int8") == (one.why is None) for one in found)
    assert {one.what: one.why for one in found if one.why is not None} == expected


def write_integral(path: Path) -> None:
    """A convolution of the image, softmax over 17 channels, and the product with 0, 1, ... 16: a DFL integral."""
    constants = {
        "weights": np.random.default_rng(0).normal(0, 0.5, (17, 3, 1, 1)).astype(np.float32),
        "projection": np.arange(17, dtype=np.float32).reshape(17, 1),
        "flat": np.array([0, 17, -1], np.int64),
    }
    node = onnx.helper.make_node
    graph = onnx.helper.make_graph(
        [
            node("Conv", ["image", "weights"], ["map"], name="c"),
            node("Reshape", ["map", "flat"], ["rows"]),
            node("Transpose", ["rows"], ["logits"], perm=[0, 2, 1]),
            node("Softmax", ["logits"], ["probabilities"], axis=2),
            node("MatMul", ["probabilities", "projection"], ["boxes"]),
            node("Sigmoid", ["logits"], ["scores"]),
        ],
        "integral",
        [onnx.helper.make_tensor_value_info("image", 1, ["N", 3, "H", "W"])],
        [onnx.helper.make_tensor_value_info(name, 1, None) for name in ("scores", "boxes")],
        [onnx.numpy_helper.from_array(value, name) for name, value in constants.items()],
    )
    path.parent.mkdir(parents=True)
    onnx.save(onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 13)], ir_version=8), str(path))


@needs_bf16
def test_bf16_is_for_convolutions_and_the_integral_stays_fp32(tiny_bundle: Path, tmp_path: Path) -> None:
    write_integral(tmp_path / "onnx/model.onnx")
    bundle = Bundle(tmp_path, Bundle.open(tiny_bundle).manifest)
    inputs = image(16, 24)
    with OpenVinoEngine(bundle, EngineOptions("bf16"), "onnx") as engine:
        outputs = engine.infer(inputs)
        assert engine.executed_convolutions(inputs) == (ExecutedConvolution("bf16", "weights"),)
        assert in_low_precision(engine.runtime_model(inputs)) == []
    # The scores are sigmoids of the very logits that the integral is of.
    logits = np.log(outputs["scores"].astype(np.float64) / (1 - outputs["scores"].astype(np.float64)))
    weights = np.exp(logits - logits.max(2, keepdims=True))
    expected = (weights / weights.sum(2, keepdims=True)) @ np.arange(17).reshape(17, 1)
    np.testing.assert_allclose(outputs["boxes"], expected, atol=1e-3)


def test_the_most_common_shapes_have_models_of_their_own(tiny_bundle: Path) -> None:
    with opened(tiny_bundle) as engine:
        for width in (32, 64, 96, 128, 160, 192):
            engine.infer(image(32, width))
        own = {(1, 3, 32, width) for width in (32, 64, 96, 128)}
        assert set(engine.models) == own | {()}
        for _ in range(40):
            engine.infer(image(32, 160))
        assert (1, 3, 32, 160) in engine.models
        assert len(engine.models) == 5
        for _ in range(30):
            for height in range(32, 32 * 12, 32):
                engine.infer(image(height, 32))
        # Many shapes in turn: by now none displaces another, as each would be compiled all the time.
        before = set(engine.models)
        for _ in range(30):
            for height in range(32, 32 * 12, 32):
                engine.infer(image(height, 32))
        assert set(engine.models) == before


def test_shapes_that_are_known_beforehand_settle_what_runs_an_input(
    tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shapes = tuple((1, 32, 32 * k) for k in range(1, 7))
    given_back: list[str] = []
    monkeypatch.setattr(openvino_engine, "give_memory_back", lambda: given_back.append("to the system"))
    with opened(tiny_bundle, shapes=shapes) as engine:
        for _ in range(30):
            for width in (192, 160, 224):  # none of the four most common, however often it comes
                engine.infer(image(32, width))
        assert set(engine.models) == {()}
        for _ in range(10):
            engine.infer(image(32, 224))
        assert given_back, "the heap is trimmed after 100 inferences of the shared model"
        for batch, height, width in shapes:
            assert len(engine.infer(image(height, width))["scores"]) == batch
        assert set(engine.models) == {(), *((1, 3, 32, 32 * k) for k in range(1, 5))}


def test_what_is_prepared_is_loaded_before_the_first_image(tiny_bundle: Path) -> None:
    with opened(tiny_bundle, shapes=tuple((1, 32, 32 * k) for k in range(1, 7))) as engine:
        for width in (64, 192):  # of the four most common, and not
            engine.prepare((1, 32, width))
        before = dict(engine.models)
        assert set(before) == {(1, 3, 32, 64), ()}
        engine.infer(image(32, 64))
        engine.infer(image(32, 192))
        assert dict(engine.models) == before


def test_a_shape_of_a_few_images_has_no_model_of_its_own(tiny_bundle: Path) -> None:
    to_come = [(1, 32, 96), *[(1, 32, 32)] * 9, *[(2, 32, 64)] * 5]
    options = EngineOptions().expecting(to_come)
    assert (options.shapes, options.counts) == (((1, 32, 32), (2, 32, 64), (1, 32, 96)), (9, 5, 1))
    with OpenVinoEngine(Bundle.open(tiny_bundle), options, "onnx") as engine:
        for batch, height, width in set(to_come):
            engine.infer({"image": np.zeros((batch, 3, height, width), np.float32)})
        assert set(engine.models) == {(2, 3, 32, 64), ()}


def test_a_second_start_compiles_nothing(tiny_bundle: Path, tmp_path: Path) -> None:
    def start(**options: Any) -> tuple[dict[tuple[int, ...], bool], Any]:
        with opened(tiny_bundle, cache_dir=tmp_path / "cache", **options) as engine:
            outputs = engine.infer(image(64, 96))
            return dict(engine.models), outputs

    first, expected = start()
    second, outputs = start()
    assert first == {(1, 3, 64, 96): False}
    assert second == {(1, 3, 64, 96): True}
    np.testing.assert_array_equal(outputs["scores"], expected["scores"])
    assert start(threads=2)[0] == first
    for kept in (tmp_path / "cache").rglob("*.model"):  # the disk has other bits than were written
        content = bytearray(kept.read_bytes())
        content[len(content) // 2] ^= 1
        kept.write_bytes(content)
    third, outputs = start()
    assert third == first
    np.testing.assert_array_equal(outputs["scores"], expected["scores"])
    assert start()[0] == second
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="--engine-cache"):
        opened(tiny_bundle, cache_dir=tmp_path / "file")


def test_what_cannot_be_read_or_run_is_one_line(tiny_bundle: Path, tmp_path: Path) -> None:
    with opened(tiny_bundle) as engine, pytest.raises(EngineError, match=r"^OpenVINO failed: [^\n]*$"):
        engine.infer({"image": np.zeros((1, 4, 32, 32), np.float32)})
    (tmp_path / "onnx").mkdir()
    (tmp_path / "onnx/model.onnx").write_bytes(b"no model")
    with pytest.raises(EngineError, match=r"^OpenVINO cannot read [^\n]*$"):
        OpenVinoEngine(Bundle(tmp_path, Bundle.open(tiny_bundle).manifest), EngineOptions(), "onnx")


def test_a_fixed_shape(tiny_bundle: Path, tmp_path: Path) -> None:
    model = onnx.load(str(tiny_bundle / "onnx/model.onnx"))
    for dimension, size in zip(model.graph.input[0].type.tensor_type.shape.dim, (1, 3, 64, 96), strict=True):
        dimension.dim_value = size
    (tmp_path / "onnx").mkdir()
    onnx.save(model, str(tmp_path / "onnx/model.onnx"))
    with OpenVinoEngine(
        Bundle(tmp_path, replace(Bundle.open(tiny_bundle).manifest)), EngineOptions(), "onnx"
    ) as engine:
        assert engine.infer(image(64, 96))["boxes"].shape == (1, 96, 4)
        assert set(engine.models) == {()}
        with pytest.raises(EngineError, match="OpenVINO failed"):
            engine.infer(image(64, 64))


def test_signals_are_survived_by_a_process_that_has_closed_two_engines(tiny_bundle: Path) -> None:
    code = (
        "import numpy as np, signal, sys\n"
        "from gfldeploy.bundle import Bundle\n"
        "from gfldeploy.engines.base import EngineOptions\n"
        "from gfldeploy.engines.registry import open_engine\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "engines = [open_engine('openvino', Bundle.open(sys.argv[1]), EngineOptions('fp32')) for _ in range(2)]\n"
        "for engine in engines:\n"
        "    engine.infer({'image': np.zeros((1, 3, 64, 96), np.float32)})\n"
        "while engines:\n"
        "    engines.pop(0).close()\n"
        "del engine\n"
        "try:\n"
        "    signal.raise_signal(signal.SIGINT)\n"
        "except KeyboardInterrupt:\n"
        "    print('interrupted')\n"
    )
    done = subprocess.run([sys.executable, "-c", code, tiny_bundle], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "interrupted\n"), done.stderr


@pytest.mark.posix
def test_a_forked_process_is_told_and_does_not_wait(tiny_bundle: Path) -> None:
    with opened(tiny_bundle) as engine:
        engine.infer(image(64, 96))
        if (child := os.fork()) == 0:
            signal.signal(signal.SIGALRM, signal.SIG_DFL)
            signal.alarm(5)  # ends what waits
            try:
                engine.infer(image(64, 96))
            except EngineError as error:
                os._exit(0 if 'Start processes by "spawn"' in str(error) else 1)
            os._exit(2)
    assert os.waitpid(child, 0)[1] == 0
