"""What a bundle holds, and whether it is still what it was: `gfldeploy inspect` and `gfldeploy verify`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from gfldeploy.bundle import Bundle, GraphName, TensorSpec
from gfldeploy.engines.base import Engine, EngineOptions
from gfldeploy.engines.registry import open_engine
from gfldeploy.errors import BundleError, ParityError
from gfldeploy.export import parity
from gfldeploy.files import read_json
from gfldeploy.macs import count_macs
from gfldeploy.quant.agreement import Reference, agreement

__all__ = ["describe", "int8_lines", "verify"]

# INT8 engines round differently from each other; a damaged graph finds next to nothing of what the other does.
_LEAST_AGREEMENT = 0.5


def describe(bundle: Bundle, size: tuple[int, int] | None = None) -> dict[str, Any]:
    """What a bundle holds, as JSON-ready data.

    `size`: height, width in pixels of the picture to count MACs at, which is padded as the preprocessing does; default:
    the largest picture that the preprocessing makes. Raises `BundleError`.
    """
    manifest = bundle.manifest
    shape = size or parity.parity_shapes(manifest.preprocess, _fixed(bundle))[-1][1:]
    pad = manifest.preprocess.pad_stride or 1
    shape = (-(-shape[0] // pad) * pad, -(-shape[1] // pad) * pad)
    return {
        "name": manifest.name,
        "precision": manifest.precision,
        "inputs": [_tensor(spec) for spec in manifest.inputs],
        "outputs": [_tensor(spec) for spec in manifest.outputs],
        "classes": list(manifest.classes),
        "candidates": manifest.candidates or "all",
        "notes": list(manifest.notes),
        "left_out": dict(manifest.left_out),
        "parameters": manifest.parameters,
        "macs": {"gmac": _gmac(bundle, *shape), "at": f"{shape[0]}x{shape[1]}"},
        "preprocess": manifest.preprocess.to_dict(),
        "nms": manifest.nms.to_dict(),
        "size_on_disk_mb": {
            name: round(sum(_size(bundle, path) for path in (graph.model, graph.params) if path) / 1e6, 2)
            for name, graph in manifest.graphs.items()
        },
        "digest": bundle.digest,
        "provenance": dict(manifest.provenance),
        "parity": _record(bundle, "parity.json"),
        "sensitivity": _record(bundle, "sensitivity.json"),
    }


def _gmac(bundle: Bundle, height: int, width: int) -> float | None:
    """10^9 MACs of one image; None where the bundle has no ONNX graph to count them in."""
    if not bundle.has_graph("onnx"):
        return None
    return round(count_macs(bundle.graph("onnx")[0], height, width, bundle.manifest.strides) / 1e9, 3)


def _record(bundle: Bundle, name: str) -> dict[str, Any] | None:
    """What this JSON file of the bundle says, or None where the bundle has none."""
    if name not in bundle.manifest.files:
        return None
    path = bundle.directory / name
    try:
        data = read_json(path)
    except (OSError, ValueError) as error:
        raise BundleError(f"{path} cannot be read: {error}", "Export the bundle again.") from error
    if not isinstance(data, dict):
        raise BundleError(f"{path} is no JSON object", "Export the bundle again.")
    return data


def int8_lines(parity: Mapping[str, Any]) -> list[str]:
    """What `parity.json` of an INT8 bundle says of each engine, one or more lines each; none for an FP32 bundle.

    Some records are optional: which convolutions an engine ran, the accuracy, the speed, what was kept in float.
    """
    lines = []
    accuracy = parity.get("accuracy")
    speeds = parity.get("speed", {})
    for name, one in parity.get("engines", {}).items():
        ran = one.get("convolutions")
        facts = [f"{ran.get('int8', 0)} of {sum(ran.values())} convolutions in int8"] if ran else []
        if one["detections"]:
            facts.append(f"{one['detections_found']:.1%} of {one['detections']} FP32 detections found again")
        else:
            facts.append("FP32 had no detections to find again")
        if accuracy and name in accuracy["engines"]:
            fp32, int8 = accuracy["fp32"], accuracy["engines"][name]
            facts.append(f"mAP {int8['ap']:.4f} (FP32 {fp32['ap']:.4f}) on {fp32['images']} images")
        if speed := speeds.get(name):
            times = f"{speed['int8_ms']:.1f} ms, FP32 {speed['fp32_ms']:.1f} ms"
            facts.append(f"{speed['ratio']:.2f} times as fast as FP32 ({times})")
        lines.append(f"{name}: {', '.join(facts)}")
        lines += [f"{name} not in int8: {reason}" for reason in one.get("not_int8", ())]
    return lines + [f"kept in float: {_kept(one)}" for one in parity.get("kept_float", ())]


def _kept(entry: Mapping[str, Any]) -> str:
    """A layer or group that was left in float on purpose, and why."""
    count = entry.get("convolutions", 1)
    return f"{entry['name']}{f' ({count} convolutions)' if count > 1 else ''}, {entry['why']}"


def verify(bundle: Bundle, threads: int, report: Callable[[str], None] = lambda stage: None) -> list[str]:
    """Hash every file again, then run the bundle's graphs against each other; returns what was found, line by line.

    FP32: ONNX Runtime against Paddle, at the shapes of the export; the older program in its place where the bundle has
    no ONNX graph, and nothing where it has neither. INT8: the detections of one engine among the other's.
    Raises `BundleError` for a changed file, `ParityError` for graphs that disagree.
    """
    report("hashing the files")
    bundle.verify_files()
    manifest = bundle.manifest
    lines = [f"{len(manifest.files)} files are as they were made"]
    shapes = parity.parity_shapes(manifest.preprocess, _fixed(bundle))
    options = EngineOptions(manifest.precision, "cpu", threads)
    other: GraphName = "onnx"
    if manifest.precision == "fp32" and not bundle.has_graph(other):
        other = "paddle_program"
        if not bundle.has_graph(other):
            return [*lines, "there is one graph only: nothing to compare it with"]
    report("comparing the graphs")
    with open_engine("paddle", bundle, options) as first, _second(bundle, other, options) as second:
        if manifest.precision == "fp32":
            found = []
            for shape in shapes:
                images = parity.parity_images(shape, manifest.preprocess, seed=0)
                expected = first.infer({"image": images})
                found.append(parity.compare(other, second, images, expected))
            # Each graph may be off by one tolerance, in opposite directions.
            parity.check(found, parity.Tolerance.recorded(_record(bundle, "parity.json")).times(2.0))
            name = "ONNX" if other == "onnx" else "The older program"
            return lines + [
                f"{name} and Paddle at {one.batch}x3x{one.height}x{one.width}: scores differ by at most "
                f"{one.max_score_difference:.2g}, boxes by {one.max_box_difference_px:.2g} px"
                for one in found
            ]
        images = parity.parity_images((1, *shapes[0][1:]), manifest.preprocess, seed=0)
        reference = Reference.of(first.infer({"image": images}), manifest.nms)
        result = agreement([reference], [second.infer({"image": images})], manifest.nms)
    if result.detections_found < _LEAST_AGREEMENT:
        raise ParityError(
            f"the INT8 graphs disagree: ONNX finds {result.detections_found:.0%} of what Paddle finds",
            "Quantise the bundle again.",
        )
    return [*lines, f"ONNX and Paddle INT8: scores differ by {result.score_difference:.2g} on average"]


def _second(bundle: Bundle, graph: GraphName, options: EngineOptions) -> Engine:
    """What the Paddle engine's graph is compared with."""
    if graph == "onnx":
        return open_engine("onnxruntime", bundle, options)
    from gfldeploy.engines.paddle_engine import PaddleEngine

    return PaddleEngine(bundle, options, graph)


def _fixed(bundle: Bundle) -> tuple[int | None, int | None, int | None]:
    batch, _, height, width = bundle.manifest.inputs[0].shape
    return batch, height, width


def _tensor(spec: TensorSpec) -> str:
    return f"{spec.name} {spec.dtype} [{', '.join('?' if size is None else str(size) for size in spec.shape)}]"


def _size(bundle: Bundle, path: str) -> int:
    return (Path(bundle.directory) / path).stat().st_size
