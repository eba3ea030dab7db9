"""The manifest and `parity.json` of an INT8 bundle."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from gfldeploy import __version__
from gfldeploy.accuracy import Accuracy
from gfldeploy.batching.buckets import size_in_words
from gfldeploy.bundle import Bundle, Manifest
from gfldeploy.quant.end_to_end import EndToEndFiles
from gfldeploy.quant.evaluation import Evaluation, SizeEvaluation
from gfldeploy.quant.gate import (
    PLAIN_ONNX_RUNTIME,
    PLAIN_OPENVINO,
    SIMULATED_TENSORRT,
    Candidate,
    GateLimits,
    Int8Measurement,
)
from gfldeploy.quant.groups import groups
from gfldeploy.quant.measurement import Fp32Reference
from gfldeploy.quant.speed import Speed
from gfldeploy.serialization import plain

_NOTES = {
    SIMULATED_TENSORRT: "onnx/model_tensorrt.onnx in ONNX Runtime on the CPU, float between Q and DQ: no TensorRT ran",
    PLAIN_ONNX_RUNTIME: "the graph as onnx/end_to_end.onnx has it, in ONNX Runtime without gfldeploy",
    PLAIN_OPENVINO: "the graph as onnx/end_to_end.onnx has it, in OpenVINO without gfldeploy",
}


def int8_manifest(source: Bundle, graphs: Manifest, algorithm: str, images: int, command: str) -> Manifest:
    """The manifest of an INT8 bundle made of `source` with `images` calibration images; its files are not in it yet.

    `graphs`: one that has its graphs, and says why it lacks some.
    """
    return replace(
        source.manifest,
        name=f"{source.name}_int8",
        precision="int8",
        graphs=graphs.graphs,
        left_out=graphs.left_out,
        provenance={
            **source.manifest.provenance,
            "quantized": {
                "from": source.digest,
                "algorithm": algorithm,
                "images": images,
                "gfldeploy": __version__,
                "command": command,
            },
        },
        files={},
    )


def parity_record(
    evaluation: Evaluation,
    fp32_reference: Fp32Reference,
    limits: GateLimits,
    speeds: Sequence[Speed],
    end_to_end: EndToEndFiles,
) -> dict[str, Any]:
    """`parity.json` of an INT8 bundle: the measurements, the layers in float with the reason, and the speed."""
    evaluated, fp32 = evaluation.evaluated, fp32_reference.accuracy
    data: dict[str, Any] = {
        "reference": "the FP32 ONNX graph in ONNX Runtime, on calibration images",
        "images": list(fp32_reference.images),
        "limits": plain(limits),
        **_measured({**evaluated.engines, **end_to_end.judged}, fp32),
        "end_to_end": plain(end_to_end.compared),
    }
    if evaluated.kept:
        data["kept_float"] = _kept_float(evaluation)
    if evaluation.steps:
        data["fallback"] = _fallback(evaluation, speeds)
    data["speed"] = {speed.engine: speed.to_dict() for speed in speeds}
    return data


def size_record(evaluation: SizeEvaluation) -> dict[str, Any]:
    """An entry of `sizes` in `parity.json`: the input size, why INT8 does not hold there, if so, and the figures."""
    problem = evaluation.problem
    return {
        "size": list(evaluation.size),
        "problem": problem.problem if problem else None,
        **_measured(evaluation.engines, evaluation.accuracy),
    }


def size_line(record: Mapping[str, Any]) -> str:
    """What such an entry says: whether INT8 holds at the size, by which figures, or why it does not."""
    size = size_in_words(record["size"])
    if record["problem"] is not None:
        return f"at {size} INT8 does not hold: {record['problem']}"
    if accuracy := record.get("accuracy"):
        fp32 = accuracy["fp32"]
        found = [f"{name} {one['ap']:.4f}" for name, one in accuracy["engines"].items()]
        figures = f"mAP {', '.join(found)} (FP32 {fp32['ap']:.4f}) on {fp32['images']} images"
    else:
        engines = record.get("engines", {})
        found = [f"{name} {one['detections_found']:.1%}" for name, one in engines.items()]
        count = max((one["detections"] for one in engines.values()), default=0)
        figures = f"of {count} FP32 detections found again: {', '.join(found)}"
    return f"at {size} INT8 holds: {figures}"


def algorithms_record(candidates: Sequence[Candidate], chosen: Candidate) -> dict[str, Any]:
    """The table of the algorithms that were tried, before any fallback."""
    return {"chosen": chosen.algorithm, "tried": [one.to_dict() for one in candidates]}


def _measured(engines: Mapping[str, Int8Measurement], fp32: Accuracy | None) -> dict[str, Any]:
    """What was measured of each engine, and, with labels, the accuracies."""
    notes = {name: {"note": _NOTES[name]} if name in _NOTES else {} for name in engines}
    data: dict[str, Any] = {"engines": {name: plain(one.agreement) | notes[name] for name, one in engines.items()}}
    if fp32 is not None:
        data["accuracy"] = {
            "fp32": fp32.to_dict(),
            "engines": {name: one.accuracy.to_dict() for name, one in engines.items() if one.accuracy},
        }
    return data


def _kept_float(evaluation: Evaluation) -> list[dict[str, Any]]:
    """The layers that the user asked for, then the groups that went back to float, by name and with the reason."""
    quantized = evaluation.evaluated.quantized
    layers, uses = quantized.source.layers(), quantized.calibration.uses
    asked = evaluation.evaluated.kept.difference(*(group.uses for group in evaluation.groups))
    # A convolution that pyramid levels share is only named as a whole if all of its uses were asked for.
    part_of = {use: group.name for group in groups(layers, uses) for use in group.uses}
    in_part = {use.weight for use in uses if use not in asked}
    names = Counter(
        part_of[use] if use.weight in in_part else layers.get(use.weight, use.weight) for use in sorted(asked)
    )
    return [{"name": name, "convolutions": count, "why": "asked for"} for name, count in names.items()] + [
        {"name": one.name, "convolutions": one.convolutions, "why": "to hold the gate"} for one in evaluation.groups
    ]


def _fallback(evaluation: Evaluation, speeds: Sequence[Speed]) -> dict[str, Any]:
    """The first failure, the attempts after it, and the cost: milliseconds of an image before and after."""
    before, *steps = evaluation.steps
    return {
        "before": before.to_dict(),
        "steps": [step.to_dict() for step in steps],
        "cost": {
            speed.engine: {"all_int8_ms": speed.all_int8_ms, "int8_ms": speed.int8_ms}
            for speed in speeds
            if speed.all_int8_ms is not None
        },
    }
