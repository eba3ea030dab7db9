"""What Paddle is told of the demo detector's programs for GPUs, by the programs alone."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import demo_bundles
import pytest

from gfldeploy.bundle import Bundle, GraphName
from gfldeploy.engines.base import EngineOptions, Precision
from gfldeploy.engines.paddle_engine import PaddleEngine
from gfldeploy.engines.paddle_program import decode_outputs, float_operators

pytestmark = [pytest.mark.slow, demo_bundles.needs_export]
# Those of the network for which Paddle 3.2 has a converter to TensorRT (op_teller.cc, convert/).
CONVERTED = {
    "conv2d", "depthwise_conv2d", "dequantize_linear", "elementwise_add", "group_norm", "nearest_interp_v2", "pool2d",
    "quantize_linear", "relu", "reshape2",
}  # fmt: skip


def operators(bundle: Path) -> tuple[list[Any], set[str]]:
    """The operators of the program, and what its decode gives."""
    from paddle.base.proto import framework_pb2

    model, _ = Bundle.open(bundle).graph("paddle_program")
    (block,) = framework_pb2.ProgramDesc.FromString(model.read_bytes()).blocks
    return [op for op in block.ops if op.type not in ("feed", "fetch")], set(decode_outputs(model))


def names(slots: Any) -> set[str]:
    return {name for slot in slots for name in slot.arguments}


@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_the_decode_is_all_that_no_convolution_needs(precision: str, request: pytest.FixtureRequest) -> None:
    ops, decode = operators(request.getfixturevalue("exported" if precision == "fp32" else "quantized"))
    network = [op for op in ops if names(op.outputs).isdisjoint(decode)]
    rest = [op for op in ops if not names(op.outputs).isdisjoint(decode)]
    assert {op.type for op in network} <= CONVERTED
    assert not {op.type for op in rest} & {"conv2d", "depthwise_conv2d", "quantize_linear"}
    assert not any(names(op.inputs) & decode for op in network), "nothing goes back into the network"
    assert {"softmax", "sigmoid", "top_k_v2"} <= {op.type for op in rest}


def test_boxes_are_not_computed_in_fp16(exported: Path) -> None:
    model, _ = Bundle.open(exported).graph("paddle")
    found = float_operators(model)
    assert {"add", "multiply", "softmax", "sigmoid", "group_norm"} <= found
    assert not {"conv2d", "relu", "nearest_interp"} & found
    assert found == {*found, *(f"pd_op.{name}" for name in found if not name.startswith("pd_op."))}


@pytest.mark.parametrize(
    ("precision", "graph", "half"),
    [("fp32", "paddle", False), ("fp16", "paddle", True), ("fp16", "paddle_program", False)],
)
def test_what_runs_outside_of_tensorrt(precision: Precision, graph: GraphName, half: bool, exported: Path) -> None:
    """The real Config takes the calls; without CUDA it says so and goes on."""
    from paddle import inference

    calls: dict[str, tuple[Any, ...]] = {}

    class Noting:
        def __init__(self, *files: str) -> None:
            self._config = inference.Config(*files)

        def __getattr__(self, method: str) -> Any:
            def call(*values: Any) -> None:
                calls[method] = values
                getattr(self._config, method)(*values)

            return call

    engine = PaddleEngine.__new__(PaddleEngine)
    engine.options = EngineOptions(precision, "gpu")
    bundle = Bundle.open(exported)
    engine._model, engine._params = bundle.graph(graph)
    engine._configure(SimpleNamespace(Config=Noting, PrecisionType=inference.PrecisionType), bundle, graph == "paddle")
    modes = inference.PrecisionType
    assert calls["enable_use_gpu"][2] == (modes.Half if half else modes.Float32)
    assert ("exp_disable_mixed_precision_ops" in calls) == half
