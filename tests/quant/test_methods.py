"""A method of quantising is one entry of a table: a toy calibrates, passes the gate, and is in the command's help."""

from __future__ import annotations

import importlib
import json
from collections.abc import Sequence
from pathlib import Path

import demo_bundles
import onnx
import pytest
from click.testing import CliRunner

from gfldeploy.bundle import Bundle
from gfldeploy.cli import quantize as quantize_command
from gfldeploy.errors import UsageError
from gfldeploy.images.decode import read_image
from gfldeploy.quant import evaluation
from gfldeploy.quant.method import MethodOptions, QuantMethod, Thresholds
from gfldeploy.quant.methods import METHODS
from gfldeploy.quant.observer import observe_tensors
from gfldeploy.quant.quantizer import quantize_bundle


def smallest_and_largest(source: Bundle, images: Sequence[Path], algorithm: str, options: MethodOptions) -> Thresholds:
    """The toy of docs/extending/quantisation-method.md: the extremes of what convolutions read, by ONNX Runtime."""
    onnx_file, preprocess = source.graph("onnx")[0], source.manifest.preprocess
    convolutions = [node for node in onnx.load(str(onnx_file)).graph.node if node.op_type == "Conv"]
    batches = (preprocess.batch([preprocess(read_image(path))]) for path in images)
    ranges = observe_tensors(onnx_file, [node.input[0] for node in convolutions], batches, options.threads)
    thresholds: dict[str, list[float]] = {}
    for node in convolutions:
        found = ranges[node.input[0]]
        thresholds.setdefault(node.input[1], []).append(max(-found.low, found.high))
    return thresholds


TOY = QuantMethod("toy", "takes the extremes.", algorithms=("extremes",), calibrate=smallest_and_largest)


@pytest.mark.slow
@demo_bundles.needs_export
def test_a_toy_method_passes_the_gate(
    exported: Path, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(METHODS, "toy", TOY)
    monkeypatch.setattr(evaluation.Evaluator, "speeds", lambda *arguments: [])
    made = quantize_bundle(exported, data=pictures, output=tmp_path / "int8", method="toy", min_agreement=0, threads=1)
    assert made.manifest.provenance["quantized"]["algorithm"] == "extremes"
    parity = json.loads((made.directory / "parity.json").read_text())
    assert parity["method"] == "toy"
    for name in ("onnxruntime", "paddle"):
        assert list(parity["engines"][name]["convolutions"]) == ["int8"]
        assert parity["engines"][name]["score_difference"] < 0.01


def test_the_command_offers_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(METHODS, "toy", TOY)
    try:
        shown = CliRunner().invoke(importlib.reload(quantize_command).command, ["--help"], terminal_width=1000).output
    finally:
        monkeypatch.undo()
        importlib.reload(quantize_command)
    assert "ptq|distill|toy" in shown and "|extremes" in shown and "toy takes the extremes." in shown


def test_steps_need_a_method_that_trains(tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(METHODS, "toy", TOY)
    with pytest.raises(UsageError, match="--distill-steps needs --method distill"):
        quantize_bundle(tiny_bundle, data=tmp_path, output=tmp_path / "x", method="toy", distill_steps=3)
