"""A tiny graph with Q/DQ pairs, whole or with some of them missing."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gfldeploy.bundle import Bundle

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

    def bundle(self, tiny_bundle: Path, folder: Path) -> Bundle:
        """The INT8 bundle that it could be part of."""
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
        return Bundle(folder, manifest)
