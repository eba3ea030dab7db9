"""What ONNX Runtime says of the convolutions that it runs in INT8, and of those that it does not."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gfldeploy.bundle import Bundle
from gfldeploy.engines.base import NOT_ASKED, EngineOptions, ExecutedConvolution, ReportsPrecision
from gfldeploy.engines.ort_engine import OnnxRuntimeEngine
from gfldeploy.engines.ort_graph import convolutions

pytest.importorskip("onnxruntime")
onnx = pytest.importorskip("onnx")

IMAGE = {"image": np.zeros((1, 3, 32, 32), np.float32)}
# Of the three convolutions: a (with a ReLU), then s, which is used twice.
USES = ("a", "s use 0", "s use 1")


class QdqModel:
    """image -> Conv a -> ReLU -> Conv s -> Conv s -> scores, with Q/DQ pairs where ONNX Runtime wants them.

    Not quantised are: the weights, inputs and outputs of the convolutions whose numbers are in `weights`, `inputs`,
    `outputs`. ONNX Runtime drops the ReLU, and runs `a` in INT8, where `relu_zero` is 0: then quantisation clips as it.
    """

    def __init__(
        self,
        weights: tuple[int, ...] = (),
        inputs: tuple[int, ...] = (),
        outputs: tuple[int, ...] = (),
        named: bool = True,
        read_twice: bool = False,
        relu_zero: int = 0,
    ) -> None:
        self.nodes: list[Any] = []
        self.constants: dict[str, Any] = {
            "scale": np.float32(0.1),
            "zero": np.uint8(128),
            "zero of t0": np.uint8(relu_zero),
        }
        random = np.random.default_rng(0)
        tensor = self.quantized("image") if 0 not in inputs else "image"
        for number, name in enumerate(("a", "s", "s")):
            size = (16, 3 if name == "a" else 16, 3, 3)
            source = f"t{number - 1}" if number in inputs and number else tensor
            self.constants[f"b{number}.q"] = np.zeros(16, np.int32)
            self.constants["bias scale"] = np.float32(0.001)
            self.add("DequantizeLinear", [f"b{number}.q", "bias scale"], f"b{number}.dq")
            if number in weights:
                weight = name
                self.constants.setdefault(name, random.normal(0, 0.1, size).astype(np.float32))
            else:
                weight = f"{name}.dq"
                self.constants.setdefault(f"{name}.q", random.integers(-127, 127, size).astype(np.int8))
                if not any(weight in node.output for node in self.nodes):
                    self.constants["weight scale"] = np.float32(0.01)
                    self.add("DequantizeLinear", [f"{name}.q", "weight scale"], weight)
            bias = f"b{number}.dq" if number not in weights else f"b{number}"
            if number in weights:
                self.constants[bias] = np.zeros(16, np.float32)
            made = f"t{number}" if number else "before relu"
            self.add("Conv", [source, weight, bias], made, name=f"node {number}" if named else "", pads=[1, 1, 1, 1])
            if number == 0:
                self.add("Relu", [made], "t0")
            tensor = f"t{number}" if number in outputs else self.quantized(f"t{number}")
        self.add("Neg", [tensor], "scores")
        self.add("Exp", ["t1" if read_twice else "image"], "boxes")

    def add(self, kind: str, inputs: list[str], output: str, name: str = "", **attributes: object) -> None:
        self.nodes.append(onnx.helper.make_node(kind, inputs, [output], name=name, **attributes))

    def quantized(self, name: str) -> str:
        parameters = ["scale", "zero of t0" if name == "t0" else "zero"]
        self.add("QuantizeLinear", [name, *parameters], f"{name}.q8")
        self.add("DequantizeLinear", [f"{name}.q8", *parameters], f"{name}.dq")
        return f"{name}.dq"

    def engine(self, tiny_bundle: Path, folder: Path) -> OnnxRuntimeEngine:
        """Loaded as the INT8 bundle that it could be part of."""
        values = [onnx.helper.make_tensor_value_info(name, 1, None) for name in ("scores", "boxes")]
        graph = onnx.helper.make_graph(
            self.nodes,
            "qdq",
            [onnx.helper.make_tensor_value_info("image", 1, ["N", 3, "H", "W"])],
            values,
            [onnx.numpy_helper.from_array(np.asarray(value), name) for name, value in self.constants.items()],
        )
        model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 13)], ir_version=8)
        (folder / "onnx").mkdir(parents=True)
        onnx.save(model, str(folder / "onnx/model.onnx"))
        manifest = replace(Bundle.open(tiny_bundle).manifest, precision="int8")
        return OnnxRuntimeEngine(Bundle(folder, manifest), EngineOptions("int8"))


def floats(engine: OnnxRuntimeEngine) -> dict[str, str | None]:
    """The reason of each convolution that ran in float; all are found, and by their names."""
    found = engine.executed_convolutions(IMAGE)
    assert sorted(one.what for one in found) == list(USES)
    assert engine.executed_precisions(IMAGE).get("int8", 0) == sum(one.why is None for one in found)
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
    assert floats(model.engine(tiny_bundle, tmp_path)) == expected


def test_uses_that_nothing_tells_apart_have_the_name_of_their_weight(tiny_bundle: Path, tmp_path: Path) -> None:
    found = QdqModel(named=False).engine(tiny_bundle, tmp_path).executed_convolutions(IMAGE)
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
    with OnnxRuntimeEngine(Bundle.open(tiny_bundle), EngineOptions()) as engine:
        assert isinstance(engine, ReportsPrecision)
        assert engine.executed_convolutions(IMAGE) == (ExecutedConvolution("fp32", "weights", NOT_ASKED),)
        assert engine.executed_precisions(IMAGE) == {"fp32": 1}
