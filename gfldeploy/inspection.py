"""What a bundle holds, and whether it has changed: `gfldeploy inspect` and `gfldeploy verify`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from gfldeploy.bundle import END_TO_END, GOLDEN, Bundle, GraphName, TensorSpec
from gfldeploy.engines.base import Engine, EngineOptions
from gfldeploy.engines.detect import check_outputs
from gfldeploy.engines.hardware import usable_threads
from gfldeploy.engines.registry import DEFAULT_ENGINES, graph_for, load_graph, obstacle_to, open_engine
from gfldeploy.errors import ParityError
from gfldeploy.export import parity
from gfldeploy.export.golden import compare_golden, read_golden
from gfldeploy.files import StrPath
from gfldeploy.images.preprocess import Preprocess
from gfldeploy.macs import count_work
from gfldeploy.nms import NmsParams, postprocess
from gfldeploy.progress import SILENT, Progress
from gfldeploy.quant.agreement import Reference, agreement
from gfldeploy.quant.record import size_line
from gfldeploy.serialization import plain

# INT8 engines round differently; a damaged graph finds next to nothing of what the other engine's does.
_MIN_AGREEMENT = 0.5

# What `inspect` gives, for its schema; the last two are files of the bundle.
INSPECTED: Mapping[str, Any] = {
    "name": str,
    "precision": Literal["fp32", "int8"],
    "inputs": [str],
    "outputs": [str],
    "classes": [str],
    "candidates": int | Literal["all"],
    "notes": [str],
    "left_out": {str: str},
    "parameters": int,
    "macs": {"gmac": float | None, "at": str},
    "preprocess": Preprocess,
    "nms": NmsParams,
    "size_on_disk_mb": {str: float},
    "digest": str,
    "provenance": {str: Any},
    "parity": Mapping[str, Any] | None,
    "sensitivity": Mapping[str, Any] | None,
}


def inspect(bundle: StrPath, *, size: tuple[int, int] | None = None) -> dict[str, Any]:
    """Say what a bundle holds: inputs, outputs, classes, parameters, MACs, size, provenance, parity.

    Args:
        bundle: The directory of the bundle.
        size: Height and width in pixels of the image whose MACs are counted, padded as by the preprocessing; by default
            the largest image that the preprocessing makes.

    Returns:
        JSON-ready data.

    Raises:
        BundleError: The bundle is damaged.
    """
    if size is not None and min(size) < 1:
        raise ValueError(f"size must be at least 1x1, not {size!r}")
    bundle = Bundle.open(bundle)
    manifest = bundle.manifest
    height, width = size or _shapes(bundle)[-1][1:]
    pad = manifest.preprocess.pad_stride or 1
    height, width = -(-height // pad) * pad, -(-width // pad) * pad
    gmac = None  # without an ONNX graph to count MACs in
    if bundle.has_graph("onnx"):
        found = count_work(bundle.graph("onnx")[0], [(height, width)], manifest.strides)
        gmac = round(found[height, width].macs / 1e9, 3)
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
        "macs": {"gmac": gmac, "at": f"{height}x{width}"},
        "preprocess": plain(manifest.preprocess),
        "nms": plain(manifest.nms),
        "size_on_disk_mb": {
            name: round(sum(manifest.files[file].bytes for file in (graph.model, graph.params) if file) / 1e6, 2)
            for name, graph in manifest.graphs.items()
        },
        "digest": bundle.digest,
        "provenance": dict(manifest.provenance),
        "parity": bundle.record("parity.json"),
        "sensitivity": bundle.record("sensitivity.json"),
    }


def int8_lines(parity: Mapping[str, Any]) -> list[str]:
    """What `parity.json` of an INT8 bundle says of each engine, one or more lines each; none for an FP32 bundle.

    The convolutions that an engine ran, accuracy, speed, what was kept in float and other input sizes may be absent.
    """
    lines = []
    accuracy, speeds = parity.get("accuracy"), parity.get("speed", {})
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
    for one in parity.get("kept_float", ()):
        count = f" ({one['convolutions']} convolutions)" if one.get("convolutions", 1) > 1 else ""
        lines.append(f"kept in float: {one['name']}{count}, {one['why']}")
    return lines + [size_line(one) for one in parity.get("sizes", ())]


def verify(bundle: StrPath, *, threads: int | None = None, progress: Progress = SILENT) -> list[str]:
    """Hash every file of a bundle again, and compare its graphs with each other and with its golden picture.

    The graphs run in the first two engines that `bench` measures by default and that can run here. In FP32 their
    outputs are compared at the shapes of the export, in INT8 their detections. With one engine its graph is only run
    (Paddle's two FP32 graphs are compared), with none only the files are checked; a sentence tells what was left out.

    Args:
        bundle: The directory of the bundle.
        threads: CPU threads of one inference; by default all.
        progress: Told of the stages.

    Returns:
        What was found, a sentence each.

    Raises:
        BundleError: A file is damaged or has changed.
        ParityError: Graphs disagree.
        EngineError: An engine failed.
    """
    bundle = Bundle.open(bundle)
    progress.stage("hashing the files")
    bundle.verify_files()
    manifest = bundle.manifest
    lines = [f"{len(manifest.files)} files are as they were made"]
    obstacles = {name: obstacle_to(name, bundle, manifest.precision, "cpu") for name in DEFAULT_ENGINES}
    engines = [name for name, obstacle in obstacles.items() if obstacle is None][:2]
    options = EngineOptions(manifest.precision, "cpu", usable_threads() if threads is None else threads)
    with ExitStack() as stack:
        picture = None
        if GOLDEN in manifest.files:
            picture, line = read_golden(bundle)
            lines.append(line)
        if engines:
            progress.stage(f"{'comparing' if len(engines) > 1 else 'running'} the graphs in {' and '.join(engines)}")
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
        if picture is not None:
            lines += [compare_golden(bundle, picture, engine) for engine in opened]
            lines += [f"{graph}: {line}" for graph, line in _by_itself(bundle, picture, engines, options)]
    return lines + [f"not run in {name}: {obstacle.reason}" for name, obstacle in obstacles.items() if obstacle]


def _by_itself(
    bundle: Bundle, picture: NDArray[np.uint8], engines: Sequence[str], options: EngineOptions
) -> Iterator[tuple[GraphName, str]]:
    """The files that deploy by themselves, in the engines that run what is inside them."""
    for name in engines:
        graph = END_TO_END.get(graph_for(name, bundle.manifest.precision, "cpu"))
        if graph is not None and bundle.has_graph(graph):
            with load_graph(name, bundle, options, graph) as engine:
                yield graph, compare_golden(bundle, picture, engine)


def _compared(bundle: Bundle, first: Engine, second: Engine, graph: GraphName | None = None) -> list[str]:
    """`graph`: the one that the second engine runs, if its name does not tell."""
    name, graph = graph or second.name, graph or graph_for(second.name, "fp32", "cpu")
    batches = (parity.parity_images(shape, bundle.manifest.preprocess, seed=0) for shape in _shapes(bundle))
    found = [parity.compare(graph, second, images, first.infer({"image": images})) for images in batches]
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
    if result.detections_found < _MIN_AGREEMENT:
        raise ParityError(
            f"the INT8 graphs disagree: {second.name} finds {result.detections_found:.0%} of what {first.name} finds",
            "Quantise the bundle again.",
        )
    return [f"{first.name} and {second.name} in INT8: scores differ by {result.score_difference:.2g} on average"]


def _ran(bundle: Bundle, engine: Engine) -> str:
    """Run one image. Raises `EngineError` for outputs of no detector, NaN and infinity."""
    images = _one_image(bundle)
    scores, boxes = check_outputs(engine, engine.infer({"image": images}), len(images))
    postprocess(scores, boxes, [(1.0, 1.0)] * len(images), bundle.manifest.nms)
    return f"{engine.name} runs it: {scores.shape[1]} candidates of {scores.shape[2]} classes"


def _one_image(bundle: Bundle) -> NDArray[np.float32]:
    manifest = bundle.manifest
    _, height, width = _shapes(bundle)[0]
    return parity.parity_images((manifest.inputs[0].shape[0] or 1, height, width), manifest.preprocess, seed=0)


def _shapes(bundle: Bundle) -> list[tuple[int, int, int]]:
    """Those of `parity_shapes` for the bundle's input."""
    batch, _, height, width = bundle.manifest.inputs[0].shape
    return parity.parity_shapes(bundle.manifest.preprocess, (batch, height, width))


def _tensor(spec: TensorSpec) -> str:
    return f"{spec.name} {spec.dtype} [{', '.join('?' if size is None else str(size) for size in spec.shape)}]"
