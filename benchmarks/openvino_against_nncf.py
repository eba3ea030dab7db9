"""Compare INT8 in OpenVINO: the bundle's Q/DQ file with what NNCF makes of the same FP32 ONNX file, interleaved.

    pip install nncf
    python benchmarks/openvino_against_nncf.py --bundle demo/fp32 --int8 demo/int8 --machine epyc-2core --name demo \\
        --calib demo/data/calib/annotations.json --demo-images 6000

NNCF calibrates on the first `--samples` images of `--calib` with its defaults, the decode left in float as its guides
advise for what follows a detector's head. Both files run in the same engine with the same settings. Printed are: how
many times as fast as NNCF's ours is, the median over interleaved rounds and in brackets the least and the largest of
one round; mAP of FP32 and both, and the differences with their 95% intervals over images; how many operators of each
kind run in which precision. All of it goes to results/MACHINE/checks/NAME_nncf.json beside this script.

mAP of a few hundred images moves by more than the two INT8 differ. `--demo-images` has so many generated, the first of
them the demo's own.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gfldeploy.accuracy import ap_difference, coco_accuracy, coco_results
from gfldeploy.batch_detection import detect_images
from gfldeploy.bundle import Bundle, Graph, Manifest
from gfldeploy.demo.dataset import generate
from gfldeploy.engines.base import EngineOptions
from gfldeploy.engines.hardware import usable_threads
from gfldeploy.engines.openvino_engine import OpenVinoEngine
from gfldeploy.files import write_json
from gfldeploy.images.coco import CocoDataset
from gfldeploy.images.decode import read_image
from gfldeploy.machine import describe_machine

HERE = Path(__file__).resolve().parent
_WARMUP = 3


@dataclass(frozen=True)
class Race:
    """Median milliseconds of each round, of one input shape."""

    shape: tuple[int, ...]
    ours_ms: tuple[float, ...]
    nncf_ms: tuple[float, ...]

    @property
    def ratios(self) -> list[float]:
        """How many times as fast as NNCF's ours is, round by round."""
        return [nncf / ours for ours, nncf in zip(self.ours_ms, self.nncf_ms, strict=True)]

    def row(self, name: str) -> str:
        """Of the table that is printed."""
        ratios = self.ratios
        return (
            f"| {name} | {'x'.join(map(str, self.shape))} | {statistics.median(self.ours_ms):.1f} "
            f"| {statistics.median(self.nncf_ms):.1f} "
            f"| {statistics.median(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f}) |"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bundle", type=Path, required=True, metavar="FP32", help="the FP32 bundle")
    parser.add_argument("--int8", type=Path, required=True, help="the INT8 bundle made of it")
    parser.add_argument("--calib", type=Path, required=True, help="COCO annotations (.json), images/ beside them")
    labelled = parser.add_mutually_exclusive_group(required=True)
    labelled.add_argument("--data", type=Path, help="the same, for the shapes and mAP")
    labelled.add_argument("--demo-images", type=int, metavar="N", help="so many of the demo's instead of --data")
    parser.add_argument("--machine", required=True, help="folder of results/ for this machine, such as epyc-2core")
    parser.add_argument("--name", required=True, help="of the results file and in the table")
    parser.add_argument("--samples", type=int, default=32, metavar="N", help="for NNCF (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=9, metavar="R", help="(default: %(default)s)")
    parser.add_argument("--runs", type=int, default=20, metavar="N", help="inferences a round (default: %(default)s)")
    parser.add_argument("--no-accuracy", action="store_true", help="for random weights")
    args = parser.parse_args()
    bundle = Bundle.open(args.bundle)
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        data = args.data or generate(Path(folder), "val", args.demo_images)
        dataset = CocoDataset.load(data, None, None)
        shapes = most_common_shapes(bundle, dataset)
        theirs = nncf_bundle(bundle, args.calib, args.samples, Path(folder))
        options = EngineOptions("int8", "cpu", usable_threads())
        engines = {
            name: stack.enter_context(OpenVinoEngine(one, options, "onnx"))
            for name, one in {"ours": Bundle.open(args.int8), "nncf": theirs}.items()
        }
        races = [race(engines, shape, args.rounds, args.runs) for shape in shapes]
        operators = {name: count_operators(engine, shapes[0]) for name, engine in engines.items()}
        accuracy: dict[str, Any] = {}
        if not args.no_accuracy:
            engines["fp32"] = stack.enter_context(OpenVinoEngine(bundle, replace(options, precision="fp32"), "onnx"))
            accuracy = compare(engines, dataset, bundle.manifest)
    print("| model | input | ours ms | NNCF ms | ours is faster by |\n|---|---|---|---|---|")
    for one in races:
        print(one.row(args.name))
    print("\n" + (describe(accuracy) if accuracy else "mAP: not measured"))
    print("\n| operator | inside, out | ours | NNCF |\n|---|---|---|---|")
    for key in sorted(set(operators["ours"]) | set(operators["nncf"])):
        kind, precision = key.split(" ", 1)
        print(f"| {kind} | {precision} | {operators['ours'].get(key, 0)} | {operators['nncf'].get(key, 0)} |")
    output = HERE / "results" / args.machine / "checks" / f"{args.name}_nncf.json"
    output.parent.mkdir(parents=True, exist_ok=True)
    record = {"machine": asdict(describe_machine()), "races": [asdict(one) for one in races]} | accuracy
    write_json(output, record | {"operators": operators})


def compare(engines: Mapping[str, OpenVinoEngine], dataset: CocoDataset, manifest: Manifest) -> dict[str, Any]:
    """mAP of each engine, and by how much that of the first is higher than that of each other one."""
    category_ids = dataset.class_to_category(manifest.classes)
    paths = [image.path for image in dataset.images]
    batches = [(index,) for index in range(len(paths))]
    found = {
        name: [
            row
            for index, one in detect_images(engine, paths, manifest.preprocess, manifest.nms, batches)
            for row in coco_results(dataset.images[index].id, one, category_ids)
        ]
        for name, engine in engines.items()
    }
    first, *others = found
    return {
        "images": len(dataset.images),
        "ap": {name: coco_accuracy(dataset, results).ap for name, results in found.items()},
        "ap_differences": {name: ap_difference(dataset, found[first], found[name]) for name in others},
    }


def describe(accuracy: Mapping[str, Any]) -> str:
    """A line on what `compare` gives."""
    ap = ", ".join(f"{name} {value:.4f}" for name, value in accuracy["ap"].items())
    differences = "; ".join(
        f"ours less {name} {value:+.4f} ({low:+.4f} to {high:+.4f})"
        for name, (value, low, high) in accuracy["ap_differences"].items()
    )
    return f"mAP on {accuracy['images']} images: {ap}; {differences}"


def nncf_bundle(source: Bundle, calib: Path, samples: int, folder: Path) -> Bundle:
    """NNCF's INT8 of the FP32 ONNX file of `source`, as a bundle of OpenVINO's own format in `folder`."""
    import nncf
    import openvino

    preprocess = source.manifest.preprocess
    images = CocoDataset.load(calib, None, samples).images
    model = openvino.Core().read_model(str(source.graph("onnx")[0]))
    quantized = nncf.quantize(
        model,
        nncf.Dataset(images, lambda image: {"image": preprocess.batch([preprocess(read_image(image.path))])}),
        subset_size=len(images),
        ignored_scope=nncf.IgnoredScope(names=behind_convolutions(model)),
    )
    openvino.save_model(quantized, folder / "nncf.xml", compress_to_fp16=False)
    return Bundle(folder, replace(source.manifest, precision="int8", graphs={"onnx": Graph("nncf.xml")}))


def behind_convolutions(model: Any) -> list[str]:
    """The names of the operators that no convolution comes after, constants aside."""
    before: set[str] = set()
    for node in reversed(model.get_ordered_ops()):
        if "Convolution" in node.get_type_name() or node.get_friendly_name() in before:
            before |= {value.get_node().get_friendly_name() for value in node.input_values()}
    skipped = {"Constant", "Parameter", "Result"}
    return [
        node.get_friendly_name()
        for node in model.get_ordered_ops()
        if node.get_type_name() not in skipped
        and "Convolution" not in node.get_type_name()
        and node.get_friendly_name() not in before
    ]


def most_common_shapes(bundle: Bundle, dataset: CocoDataset, most: int = 2) -> list[tuple[int, ...]]:
    """The most frequent input shapes of one image."""
    preprocess = bundle.manifest.preprocess
    found = Counter((1, 3, *preprocess.input_size(*image.size())) for image in dataset.images)
    return [shape for shape, _ in found.most_common(most)]


def race(engines: Mapping[str, OpenVinoEngine], shape: tuple[int, ...], rounds: int, runs: int) -> Race:
    """Time both in rounds interleaved; who begins alternates."""
    image: NDArray[np.float32] = np.random.default_rng(0).standard_normal(shape, np.float32)
    medians: dict[str, list[float]] = {name: [] for name in engines}
    for engine in engines.values():
        for _ in range(_WARMUP):
            engine.infer({"image": image})
    for number in range(rounds):
        for name in list(engines)[:: 1 if number % 2 else -1]:
            medians[name].append(statistics.median(_times(engines[name], image, runs)))
    return Race(shape, tuple(medians["ours"]), tuple(medians["nncf"]))


def count_operators(engine: OpenVinoEngine, shape: Sequence[int]) -> dict[str, int]:
    """How many of each kind ran in which precision, inside and of its output: {"Convolution u8 -> u8": 111}."""
    runtime = engine.runtime_model({"image": np.zeros(shape, np.float32)})
    told = [{key: str(value.astype(str)) for key, value in node.get_rt_info().items()} for node in runtime.get_ops()]
    counted = Counter(
        f"{one['layerType']} {one['runtimePrecision']} -> {one.get('outputPrecisions', '')}"
        for one in told
        if one["layerType"] not in ("Const", "Input", "Output")
    )
    return dict(sorted(counted.items()))


def _times(engine: OpenVinoEngine, image: NDArray[np.float32], runs: int) -> list[float]:
    """Milliseconds of each of so many inferences."""
    found = []
    for _ in range(runs):
        start = time.perf_counter()
        engine.infer({"image": image})
        found.append((time.perf_counter() - start) * 1e3)
    return found


if __name__ == "__main__":
    main()
