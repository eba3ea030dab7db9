"""What ONNX Runtime says of the convolutions that it runs in INT8, and of those that it does not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from qdq_model import IMAGE, USES, QdqModel

from gfldeploy.bundle import Bundle
from gfldeploy.engines.base import NOT_ASKED, EngineOptions, ExecutedConvolution, installed_version
from gfldeploy.engines.ort_engine import OnnxRuntimeEngine
from gfldeploy.engines.ort_graph import convolutions
from gfldeploy.errors import EngineError

pytest.importorskip("onnxruntime")
onnx = pytest.importorskip("onnx")


def floats(engine: OnnxRuntimeEngine) -> dict[str, str | None]:
    """The reason of each convolution that ran in float; all are found, and by their names."""
    found = engine.executed_convolutions(IMAGE)
    assert sorted(one.what for one in found) == list(USES)
    assert all((one.precision == "int8") == (one.why is None) for one in found)
    return {one.what: one.why for one in found if one.why is not None}


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        (QdqModel(), {}),
        # Newer versions quantise a float weight themselves if the input and the output are quantised.
        (QdqModel(weights=(0,), inputs=(0,)), {"a": "kept in float in the ONNX file"}),
        (QdqModel(weights=(2,), outputs=(2,)), {"s use 1": "kept in float in the ONNX file"}),
        (
            QdqModel(weights=(1, 2), inputs=(1, 2)),
            {
                "a": "its output is also read in float in the ONNX file",
                "s use 0": "kept in float in the ONNX file",
                "s use 1": "kept in float in the ONNX file",
            },
        ),
        (QdqModel(inputs=(0,)), {"a": "its input is not quantised in the ONNX file"}),
        (QdqModel(outputs=(2,)), {"s use 1": "its output is not quantised in the ONNX file"}),
        (QdqModel(relu_zero=128), {"a": "quantised in the ONNX file, but not fused by ONNX Runtime"}),
        (QdqModel(read_twice=True), {"s use 0": "its output is also read in float in the ONNX file"}),
    ],
)
def test_which_ran_in_float_and_why(
    model: QdqModel, expected: dict[str, str], tiny_bundle: Path, tmp_path: Path
) -> None:
    assert floats(OnnxRuntimeEngine(model.bundle(tiny_bundle, tmp_path), EngineOptions("int8"), "onnx")) == expected


def test_more_threads_than_any_machine_runs() -> None:
    with pytest.raises(EngineError, match=r"1,000,000,000,000,000,000 threads are more than [\d,]+"):
        EngineOptions(threads=10**18)


def test_uses_that_nothing_tells_apart_have_the_name_of_their_weight(tiny_bundle: Path, tmp_path: Path) -> None:
    bundle = QdqModel(named=False).bundle(tiny_bundle, tmp_path)
    found = OnnxRuntimeEngine(bundle, EngineOptions("int8"), "onnx").executed_convolutions(IMAGE)
    assert found == tuple(ExecutedConvolution("int8", name) for name in ("a", "s", "s"))


def test_a_bias_in_float_is_a_reason_only_if_the_engine_leaves_it_so() -> None:
    def graph(*nodes: Any) -> Any:
        zero = onnx.numpy_helper.from_array(np.zeros(4, np.float32), "bias")
        return onnx.helper.make_model(onnx.helper.make_graph(list(nodes), "g", [], [], [zero]))

    node = onnx.helper.make_node
    around = (
        node("DequantizeLinear", ["x.q", "scale"], ["x"]),
        node("DequantizeLinear", ["w.q", "scale"], ["w"]),
        node("QuantizeLinear", ["y", "scale"], ["y.q"]),
    )
    source = graph(*around, node("Conv", ["x", "w", "bias"], ["y"], name="c"))
    (left,) = convolutions(source, source)
    assert left == ExecutedConvolution("fp32", "w", "its bias is not int32 in the ONNX file")
    quantized = graph(
        *around,
        node("DequantizeLinear", ["bias.q", "scale"], ["bias.dq"]),
        node("Conv", ["x", "w", "bias.dq"], ["y"], name="c"),
    )
    (left,) = convolutions(quantized, source)
    assert left.why == "quantised in the ONNX file, but not fused by ONNX Runtime"


def test_fp32(tiny_bundle: Path) -> None:
    with OnnxRuntimeEngine(Bundle.open(tiny_bundle), EngineOptions(), "onnx") as engine:
        assert engine.executed_convolutions(IMAGE) == (ExecutedConvolution("fp32", "weights", NOT_ASKED),)


@pytest.mark.skipif(installed_version("onnxruntime-gpu") is not None, reason="onnxruntime-gpu is installed")
def test_the_cpu_is_not_measured_in_the_place_of_the_gpu(tiny_bundle: Path) -> None:
    with pytest.raises(EngineError) as raised:
        OnnxRuntimeEngine(Bundle.open(tiny_bundle), EngineOptions("fp32", "gpu"), "onnx")
    assert str(raised.value) == (
        "ONNX Runtime has no CUDAExecutionProvider: onnxruntime-gpu is not installed. "
        'Run: pip uninstall -y onnxruntime && pip install "onnxruntime-gpu[cuda,cudnn]"'
    )


def test_of_a_failure_the_node_and_the_reason_are_told() -> None:
    """As cuDNN's is: a line, then pages of JSON."""
    said = "Failed to initialize CUDNN Frontend: CUDNN_STATUS_NOT_SUPPORTED"
    where = "Error in execution: Non-zero status code returned while running Conv node. Name:'Conv.0' Status Message: "
    error = RuntimeError(f"{where}{said} with the cudnn frontend json:\n{{'nodes': [{'0, ' * 900}]}}")
    assert OnnxRuntimeEngine._detail(error) == f"Conv Conv.0: {said}"
    assert OnnxRuntimeEngine._detail(ValueError("no such input")) == "no such input"
