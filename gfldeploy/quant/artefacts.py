"""The graphs of an INT8 bundle, written from what a method of quantising gives."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace
from pathlib import Path

from gfldeploy.bundle import Bundle, Graph, GraphName
from gfldeploy.files import write_json
from gfldeploy.quant.calibration import Calibration, ConvUse
from gfldeploy.quant.program import write_program
from gfldeploy.quant.qdq import write_qdq_onnx
from gfldeploy.quant.tensorrt import write_tensorrt_onnx

GRAPHS: dict[GraphName, Graph] = {
    "paddle_program": Graph("paddle/model.pdmodel", "paddle/model.pdiparams"),
    "onnx": Graph("onnx/model.onnx"),
    "onnx_tensorrt": Graph("onnx/model_tensorrt.onnx"),
}


@dataclass(frozen=True)
class Quantized:
    """What a method of quantising gives. Which convolutions stay in float is decided after it, by measurement.

    `source`: the FP32 bundle with the weights that were quantised; a method that changes weights makes one of its own.
    `calibration`: the ranges of the same weights.
    """

    source: Bundle
    calibration: Calibration


def write_artefacts(quantized: Quantized, kept: Collection[ConvUse], directory: Path) -> Bundle:
    """Write the graphs and `calibration.json` of an INT8 bundle into the empty `directory`, `kept` left in float.

    What is returned can be run, but its manifest does not say yet what it is. Raises `EngineError`, `OutputError`.
    """
    for folder in ("paddle", "onnx"):
        (directory / folder).mkdir()
    calibration = quantized.calibration.keeping(kept)
    write_json(directory / "calibration.json", calibration.to_dict())
    write_program(quantized.source, calibration, directory / "paddle")
    onnx_file, _ = quantized.source.graph("onnx")
    write_qdq_onnx(onnx_file, directory / "onnx/model.onnx", calibration)
    write_tensorrt_onnx(onnx_file, directory / "onnx/model_tensorrt.onnx", calibration)
    return Bundle(directory, replace(quantized.source.manifest, precision="int8", graphs=GRAPHS, files={}))
