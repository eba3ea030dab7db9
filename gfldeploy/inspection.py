"""What a bundle holds, and whether it is still what it was: `gfldeploy inspect` and `gfldeploy verify`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gfldeploy.bundle import Bundle, GraphName, TensorSpec
from gfldeploy.engines.base import Engine, EngineOptions
from gfldeploy.engines.registry import DEFAULT_ENGINES, graph_for, load_graph, obstacle_to, open_engine
from gfldeploy.errors import ParityError
from gfldeploy.export import parity
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
        "parity": bundle.record("parity.json"),
        "sensitivity": bundle.record("sensitivity.json"),
    }


def _gmac(bundle: Bundle, height: int, width: int) -> float | None:
    """10^9 MACs of one image; None where the bundle has no ONNX graph to count them in."""
    if not bundle.has_graph("onnx"):
        return None
    return round(count_macs(bundle.graph("onnx")[0], height, width, bundle.manifest.strides) / 1e9, 3)


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

    In the first two engines of those that `bench` measures by default that are installed and have a graph. FP32: their
    outputs, at the shapes of the export; INT8: the detections of one among the other's. With one engine its graph is
    run (Paddle's two FP32 graphs against each other), with none only the files are checked; what was not compared is
    said.
    Raises `BundleError` for a changed file, `ParityError` for graphs that disagree.
    """
    report("hashing the files")
    bundle.verify_files()
    manifest = bundle.manifest
    lines = [f"{len(manifest.files)} files are as they were made"]
    engines, refused = _engines(bundle)
    options = EngineOptions(manifest.precision, "cpu", threads)
    with ExitStack() as stack:
        if engines:
            report(f"{'comparing' if len(engines) > 1 else 'running'} the graphs in {' and '.join(engines)}")
        graphs = [graph_for(name, manifest.precision, "cpu") for name in engines]
        opened = [stack.enter_context(open_engine(name, bundle, options)) for name in engines]
        if len(opened) == 2:
            compared = _compared if manifest.precision == "fp32" else _compared_int8
            lines += compared(bundle, *opened)
        elif graphs == ["paddle"] and bundle.has_graph("paddle_program"):
            program = stack.enter_context(load_graph(engines[0], bundle, options, "paddle_program"))
            lines += _compared(bundle, opened[0], program, "paddle_program")
        elif opened:
            lines += [_ran(bundle, opened[0]), "its outputs were not compared: no second engine can run it here"]
        else:
            lines.append("no graph was run: no engine can run one here")
    return lines + [f"not run in {name}: {reason}" for name, reason in refused.items()]


def _engines(bundle: Bundle) -> tuple[list[str], dict[str, str]]:
    """The engines to verify in, two at most, and why those that come before or would have been the second cannot."""
    precision = bundle.manifest.precision
    engines: list[str] = []
    refused: dict[str, str] = {}
    for name in DEFAULT_ENGINES:
        if obstacle := obstacle_to(name, bundle, precision, "cpu"):
            refused[name] = obstacle.reason
        elif len(engines) < 2:
            engines.append(name)
    return engines, refused


def _compared(bundle: Bundle, first: Engine, second: Engine, graph: GraphName | None = None) -> list[str]:
    """`graph`: what the second engine runs, where that is not what its name says."""
    manifest = bundle.manifest
    name, graph = graph or second.name, graph or graph_for(second.name, "fp32", "cpu")
    found = []
    for shape in parity.parity_shapes(manifest.preprocess, _fixed(bundle)):
        images = parity.parity_images(shape, manifest.preprocess, seed=0)
        expected = first.infer({"image": images})
        found.append(parity.compare(graph, second, images, expected))
    # Each graph may be off by one tolerance, in opposite directions.
    parity.check(found, parity.Tolerance.recorded(bundle.record("parity.json")).times(2.0))
    return [
        f"{first.name} and {name} at {one.batch}x3x{one.height}x{one.width}: scores differ by at most "
        f"{one.max_score_difference:.2g}, boxes by {one.max_box_difference_px:.2g} px"
        for one in found
    ]


def _compared_int8(bundle: Bundle, first: Engine, second: Engine) -> list[str]:
    images, nms = _one_image(bundle), bundle.manifest.nms
    reference = Reference.of(first.infer({"image": images}), nms)
    result = agreement([reference], [second.infer({"image": images})], nms)
    if result.detections_found < _LEAST_AGREEMENT:
        raise ParityError(
            f"the INT8 graphs disagree: {second.name} finds {result.detections_found:.0%} of what {first.name} finds",
            "Quantise the bundle again.",
        )
    return [f"{first.name} and {second.name} in INT8: scores differ by {result.score_difference:.2g} on average"]


def _ran(bundle: Bundle, engine: Engine) -> str:
    """Run one image. Raises `ParityError` for what no detector gives."""
    outputs = engine.infer({"image": _one_image(bundle)})
    scores, boxes = outputs["scores"], outputs["boxes"]
    if scores.ndim != 3 or boxes.shape != (*scores.shape[:2], 4):
        problem = f"scores {list(scores.shape)} and boxes {list(boxes.shape)}"
    elif not (np.isfinite(scores).all() and np.isfinite(boxes).all()):
        problem = "NaN or infinity"
    else:
        return f"{engine.name} runs it: {scores.shape[1]} candidates of {scores.shape[2]} classes"
    raise ParityError(f"{engine.name} gives {problem}", "Export the bundle again.")


def _one_image(bundle: Bundle) -> NDArray[np.float32]:
    manifest = bundle.manifest
    shape = parity.parity_shapes(manifest.preprocess, _fixed(bundle))[0]
    return parity.parity_images((manifest.inputs[0].shape[0] or 1, *shape[1:]), manifest.preprocess, seed=0)


def _fixed(bundle: Bundle) -> tuple[int | None, int | None, int | None]:
    batch, _, height, width = bundle.manifest.inputs[0].shape
    return batch, height, width


def _tensor(spec: TensorSpec) -> str:
    return f"{spec.name} {spec.dtype} [{', '.join('?' if size is None else str(size) for size in spec.shape)}]"


def _size(bundle: Bundle, path: str) -> int:
    return (Path(bundle.directory) / path).stat().st_size
