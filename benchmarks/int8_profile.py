"""Where the time of one INT8 inference goes, by operator: what convolutions take, and what stands between them.

    python benchmarks/int8_profile.py --bundle INT8 --engine onnxruntime --size 800x1216 --name gfl_r50 \
        --machine epyc-2core

In each round the engine's peak is measured (a stack of plain convolutions, as `gfldeploy bench` does), then inferences
of one input; in ONNX Runtime the same also of the bundle's graph as it is written, which the engine rewrites otherwise.
With `--data annotations.json` (COCO, images/ beside it), the mAP of both is measured, and the difference. Then the
engine's own profiler times every operator of a few more. Prints how near the network comes to the peak, what the rest
of the time is spent on, and the convolutions that lose most; writes it all to
results/MACHINE/checks/NAME_ENGINE_int8_profile.json beside this script.

An engine is a function in `PROFILERS` that times its operators, and the group that each of its names belongs to in
`GROUPS`.
"""

from __future__ import annotations

import argparse
import math
import multiprocessing
import re
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from gfldeploy.accuracy import ap_difference, coco_accuracy, coco_results
from gfldeploy.batch_detection import detect_images
from gfldeploy.bench.roofline import measure_peak
from gfldeploy.bundle import Bundle, Manifest
from gfldeploy.engines.base import Engine, EngineOptions, Tensors
from gfldeploy.engines.hardware import usable_threads
from gfldeploy.engines.onednn import LoggedPrimitive
from gfldeploy.engines.registry import open_engine
from gfldeploy.files import scratch_directory, write_json
from gfldeploy.images.coco import CocoDataset
from gfldeploy.machine import describe_machine
from gfldeploy.macs import count_work
from gfldeploy.serialization import plain

HERE = Path(__file__).resolve().parent
CONVOLUTIONS = "convolutions"
_SLOWEST = 8  # convolutions that the results name
_LEAST_MS = 0.5  # of a kind that they name
# What an operator is there for, by the engine's own name for it; the others are "other".
GROUPS: Mapping[str, frozenset[str]] = {
    CONVOLUTIONS: frozenset({"QLinearConv", "ConvInteger", "Conv", "FusedConv", "NhwcFusedConv", "convolution"}),
    "layout conversions": frozenset({"Transpose", "ReorderInput", "ReorderOutput", "reorder of layout"}),
    "type conversions": frozenset({"QuantizeLinear", "DequantizeLinear", "Cast", "reorder of type"}),
    "normalisation": frozenset(
        {
            "InstanceNormalization",
            "GroupNormalization",
            "FusedMatMul",
            "ReduceMean",
            "Mul",
            "Sub",
            "Div",
            "Sqrt",
            "Scan",
            # Of Paddle's program as oneDNN runs it: next to nothing else there is of these kinds.
            "binary",
            "reduction",
            "pooling",
        }
    ),
    "additions": frozenset({"Add", "QLinearAdd"}),
    "pooling and resizing": frozenset(
        {"MaxPool", "NhwcMaxPool", "QLinearAveragePool", "AveragePool", "Resize", "resampling"}
    ),
}


@dataclass(frozen=True)
class Operator:
    """One operator of the graph that runs.

    `kind`: the engine's name of it. `ms`: mean of one inference. `output`: the shape of what it gives, as the engine
    tells it. `macs`: multiply-accumulates of a convolution, without padding; None of anything else.
    """

    kind: str
    name: str
    ms: float
    output: tuple[int, ...]
    macs: int | None

    @property
    def group(self) -> str:
        """One of `GROUPS`, or "other"."""
        if self.kind.endswith(" by channel"):
            return "normalisation"
        return next((group for group, kinds in GROUPS.items() if self.kind in kinds), "other")


@dataclass(frozen=True)
class Kind:
    """The `count` operators of one kind together: `ms` of one inference."""

    group: str
    name: str
    count: int
    ms: float


@dataclass(frozen=True)
class Round:
    """`peak_gmac_per_s`: of the engine on plain convolutions; `inference_ms`: of the network right after.

    `as_written_ms`: of the graph as the bundle has it; none where the engine runs no other.
    """

    peak_gmac_per_s: float
    inference_ms: tuple[float, ...]
    as_written_ms: tuple[float, ...] = ()

    def percent(self, macs: int) -> float:
        """What the network reaches of the peak, whose inference takes `macs` multiply-accumulates."""
        return 100 * macs / statistics.median(self.inference_ms) / 1e6 / self.peak_gmac_per_s


def as_written(name: str, bundle: Bundle, options: EngineOptions) -> Engine | None:
    """An engine that runs the bundle's graph as it is; None where the recipe knows none."""
    if name != "onnxruntime":
        return None
    from gfldeploy.engines.ort_engine import OnnxRuntimeEngine

    class AsWritten(OnnxRuntimeEngine):
        def _source(self) -> str:
            return str(self._model)

    return AsWritten(bundle, options, "onnx")


def onnxruntime_operators(engine: Engine, inputs: Tensors, runs: int) -> list[Operator]:
    """From ONNX Runtime's profile; convolutions by the weights in the graph that it optimised."""
    import onnx

    from gfldeploy.engines.ort_engine import OnnxRuntimeEngine
    from gfldeploy.engines.ort_rewrite import BY_CHANNEL

    assert isinstance(engine, OnnxRuntimeEngine)
    with scratch_directory() as directory:
        path = directory / "optimized.onnx"
        events = engine.profile(inputs, runs + 1, path)
        graph = onnx.load(str(path)).graph
    constants = {tensor.name: tuple(tensor.dims) for tensor in graph.initializer}
    kernels = {
        node.name: constants[name]
        for node in graph.node
        if node.op_type in GROUPS[CONVOLUTIONS]
        for name in node.input
        if len(constants.get(name, ())) == 4
    }
    # The first inference also allocates.
    second = sorted(event["ts"] for event in events if event["name"] == "model_run")[1]
    spent: dict[tuple[str, str, tuple[int, ...]], float] = defaultdict(float)
    for event in events:
        if event.get("cat") == "Node" and event["name"].endswith("_kernel_time") and event["ts"] >= second:
            if event["args"]["op_name"] == "Scan":
                continue  # its time is that of the nodes inside, which have events of their own
            (output, *_) = event["args"].get("output_type_shape") or [{"": []}]
            name = event["name"].removesuffix("_kernel_time")
            kind = event["args"]["op_name"] + (" by channel" if name.startswith(BY_CHANNEL) else "")
            spent[kind, name, tuple(*output.values())] += event["dur"] / 1e3 / runs
    return [
        Operator(kind, name, ms, output, math.prod(output) * math.prod(kernels[name][1:]) if name in kernels else None)
        for (kind, name, output), ms in spent.items()
    ]


def paddle_operators(engine: Engine, inputs: Tensors, runs: int) -> list[Operator]:
    """From oneDNN's log of its primitives, and what Paddle's own kernels take besides, group normalisation included."""
    from gfldeploy.engines.paddle_engine import PaddleEngine

    assert isinstance(engine, PaddleEngine)
    logged = [engine.profile(inputs) for _ in range(runs + 1)][1:]
    operators = []
    for same in zip(*(primitives for primitives, _ in logged), strict=True):
        ms = statistics.fmean(one.ms for one in same)
        operators.append(_primitive(same[0], ms))
    outside = statistics.fmean(took for _, took in logged) - sum(one.ms for one in operators)
    return [*operators, Operator("outside of oneDNN", "", outside, (), None)]


def _primitive(one: LoggedPrimitive, ms: float) -> Operator:
    if one.kind == "reorder":
        types = re.findall(r"(?:src|dst):(\w+)", one.tensors)
        kind = f"reorder of {'layout' if len(set(types)) == 1 else 'type'}"
        return Operator(kind, one.tensors, ms, (), None)
    sizes = {name: int(value) for name, value in re.findall(r"(mb|g|ic|oc|oh|ow|kh|kw)(\d+)", one.shape)}
    if one.kind != "convolution" or not {"mb", "oc", "oh", "ow"} <= sizes.keys():
        return Operator(one.kind, one.shape, ms, (), None)
    output = (sizes["mb"], sizes["oc"], sizes["oh"], sizes["ow"])
    macs = math.prod(output) * sizes["ic"] // sizes.get("g", 1) * sizes["kh"] * sizes["kw"]
    return Operator(one.kind, f"{one.implementation} {one.shape}", ms, output, macs)


PROFILERS: Mapping[str, Callable[[Engine, Tensors, int], list[Operator]]] = {
    "onnxruntime": onnxruntime_operators,
    "paddle": paddle_operators,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bundle", type=Path, required=True, metavar="INT8", help="the INT8 bundle")
    parser.add_argument("--engine", choices=PROFILERS, required=True)
    parser.add_argument("--size", required=True, metavar="HEIGHTxWIDTH", help="of the network's input")
    parser.add_argument("--batch-size", type=int, default=1, metavar="N")
    parser.add_argument("--name", required=True, help="of the results file")
    parser.add_argument("--machine", required=True, help="folder of results/ for this machine, such as epyc-2core")
    parser.add_argument("--data", type=Path, metavar="FILE", help="COCO annotations, to compare mAP")
    parser.add_argument("--rounds", type=int, default=3, metavar="R")
    parser.add_argument("--runs", type=int, default=5, metavar="N", help="inferences in each round, and in the profile")
    args = parser.parse_args()
    height, width = map(int, args.size.split("x"))
    bundle = Bundle.open(args.bundle)
    options = EngineOptions("int8", "cpu", usable_threads(), shapes=((args.batch_size, height, width),))
    image = np.random.default_rng(0).standard_normal((args.batch_size, 3, height, width), np.float32)
    graph, _ = bundle.graph("onnx")
    one_image = count_work(graph, [(height, width)], bundle.manifest.strides)[height, width].macs
    macs = one_image * args.batch_size
    accuracy: dict[str, Any] = {}
    with open_engine(args.engine, bundle, options, options.shapes) as engine:
        plainly = as_written(args.engine, bundle, options)
        engine.infer({"image": image})
        rounds = [measure(engine, plainly, options, {"image": image}, args.runs) for _ in range(args.rounds)]
        if args.data and plainly is not None:
            accuracy = compare(engine, plainly, CocoDataset.load(args.data, None, None), bundle.manifest)
        operators = PROFILERS[args.engine](engine, {"image": image}, args.runs)
        written = PROFILERS[args.engine](plainly, {"image": image}, args.runs) if plainly is not None else []
        version = engine.version
    slowest = sorted((one for one in operators if one.macs), key=lambda one: -one.ms)
    show(rounds, operators, macs)
    if written:
        print(f"\nThe graph as it is written, ms by its own profile: {by_group(written)}")
    output = HERE / "results" / args.machine / "checks" / f"{args.name}_{args.engine}_int8_profile.json"
    output.parent.mkdir(parents=True, exist_ok=True)
    record: dict[str, Any] = {
        "machine": plain(describe_machine()),
        "bundle": {"name": bundle.name, "digest": bundle.digest},
        "engine": {"name": args.engine, "version": version, "threads": options.threads},
        "input": list(image.shape),
        "macs": macs,
        "rounds": plain(rounds),
        "accuracy": accuracy,
        "kinds": plain([kind for kind in kinds(operators) if kind.ms >= _LEAST_MS]),
        "kinds_as_written": plain([kind for kind in kinds(written) if kind.ms >= _LEAST_MS]),
        "slowest_convolutions": plain(slowest[:_SLOWEST]),
    }
    write_json(output, record)


def kinds(operators: Iterable[Operator]) -> list[Kind]:
    """Operators summed by kind, the longest first."""
    found: dict[tuple[str, str], list[float]] = defaultdict(list)
    for one in operators:
        found[one.group, one.kind].append(one.ms)
    summed = (Kind(group, name, len(each), sum(each)) for (group, name), each in found.items())
    return sorted(summed, key=lambda kind: -kind.ms)


def by_group(operators: Iterable[Operator]) -> str:
    """The milliseconds of each group, the longest first."""
    found: dict[str, float] = defaultdict(float)
    for one in operators:
        found[one.group] += one.ms
    return ", ".join(f"{group} {ms:.1f}" for group, ms in sorted(found.items(), key=lambda item: -item[1]))


def measure(engine: Engine, plainly: Engine | None, options: EngineOptions, inputs: Tensors, runs: int) -> Round:
    """The peak in a process of its own, then so many inferences here."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        peak = pool.submit(measure_peak, engine.name, options, 2.0).result()
    if peak.gmac_per_s is None:
        raise SystemExit(peak.reason)
    return Round(peak.gmac_per_s, times(engine, inputs, runs), times(plainly, inputs, runs) if plainly else ())


def times(engine: Engine, inputs: Tensors, runs: int) -> tuple[float, ...]:
    """Milliseconds of each of so many inferences, after one more."""
    found = []
    engine.infer(inputs)
    for _ in range(runs):
        start = time.perf_counter()
        engine.infer(inputs)
        found.append((time.perf_counter() - start) * 1e3)
    return tuple(found)


def compare(engine: Engine, plainly: Engine, dataset: CocoDataset, manifest: Manifest) -> dict[str, Any]:
    """mAP of both, and by how much the first's is higher, with its 95% interval over images."""
    category_ids = dataset.class_to_category(manifest.classes)
    paths = [image.path for image in dataset.images]
    batches = [(index,) for index in range(len(paths))]
    ours, written = (
        [
            row
            for index, one in detect_images(each, paths, manifest.preprocess, manifest.nms, batches)
            for row in coco_results(dataset.images[index].id, one, category_ids)
        ]
        for each in (engine, plainly)
    )
    ap = {name: coco_accuracy(dataset, found).ap for name, found in {"ours": ours, "as_written": written}.items()}
    difference = ap_difference(dataset, ours, written)
    print(f"mAP on {len(dataset.images)} images: {ap}, difference {difference}")
    return {"images": len(dataset.images), "ap": ap, "ap_difference": difference}


def show(rounds: Sequence[Round], operators: Sequence[Operator], macs: int) -> None:
    """Print the share of the peak, where the time goes, and the convolutions that are slowest for their work."""
    percents = [one.percent(macs) for one in rounds]
    took = statistics.median(ms for one in rounds for ms in one.inference_ms)
    peak = statistics.median(one.peak_gmac_per_s for one in rounds)
    print(
        f"{macs / 1e9:.1f} GMAC in {took:.1f} ms: {statistics.median(percents):.0f}% "
        f"({min(percents):.0f} to {max(percents):.0f}) of the peak of {peak:.0f} GMAC/s"
    )
    if all(one.as_written_ms for one in rounds):
        ratios = [statistics.median(one.as_written_ms) / statistics.median(one.inference_ms) for one in rounds]
        low, high = min(ratios), max(ratios)
        print(f"{statistics.median(ratios):.3f} ({low:.3f} to {high:.3f}) times as fast as the graph as it is written")
    # In a profile each operator also takes the time of its event, and the machine may have another clock.
    scale = took / sum(one.ms for one in operators)
    print(f"\n| of {took:.1f} ms | ms | share | operators |\n|---|---|---|---|")
    print(f"| convolutions at the peak | {macs / peak / 1e6:.1f} | {100 * macs / peak / 1e6 / took:.1f}% | |")
    spent: dict[str, list[Kind]] = defaultdict(list)
    for kind in kinds(operators):
        spent[kind.group].append(kind)
    totals = {group: scale * sum(kind.ms for kind in each) for group, each in spent.items()}
    for group in sorted(spent, key=lambda one: (one != CONVOLUTIONS, -totals[one])):
        ms, name = totals[group], group
        if group == CONVOLUTIONS:
            ms, name = ms - macs / peak / 1e6, "convolutions, beyond that"
        parts = (f"{kind.count} {kind.name} {kind.ms * scale:.1f}" for kind in spent[group] if kind.ms >= took / 1000)
        print(f"| {name} | {ms:.1f} | {100 * ms / took:.1f}% | {', '.join(parts)} |")
    print("\n| convolution | gives | ms | of the peak | ms lost |\n|---|---|---|---|---|")
    convolutions = [(one.ms * scale, one.macs / peak / 1e6, one) for one in operators if one.macs]
    for ms, least, one in sorted(convolutions, key=lambda item: item[1] - item[0])[:10]:
        shape = "x".join(map(str, one.output))
        print(f"| {one.name} | {shape} | {ms:.2f} | {100 * least / ms:.0f}% | {ms - least:.2f} |")


if __name__ == "__main__":
    main()
