"""Hold a bundle's file that deploys by itself against `predict`: the detections of every image, and mAP.

    python benchmarks/by_itself_detections.py --bundles demo/fp32 demo/int8 --data val.json --images 200

Four detectors run on the same images in ONNX Runtime and in OpenVINO:

    predict     `gfldeploy predict`, whose coco.json is read
    file        onnx/end_to_end.onnx in the engine's own Python package, as read from the disk: nothing of gfldeploy but
                decoding and resizing comes before it, and nothing after it
    graph       onnx/model.onnx, the graph inside the file, in the same way, with gfldeploy's preprocessing and NMS
    changed     the file as `eval --end-to-end` runs it: gfldeploy changes a graph before an engine loads it, for speed

"file" against "predict" is what whoever deploys the file gets. In INT8 the changes round otherwise: "file" against
"graph" leaves them out on both sides, and "changed" against "predict" has them on both.

Detections are matched one to one, best first: of one class, with the largest IoU, at least 0.5. "Same" are those with
an IoU of 0.999 and scores within 1e-4; in FP32 all must be, and mAP equal to four digits, or the exit code is 1. The
rows go to results/MACHINE/checks/by_itself_detections.json beside this script.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gfldeploy import Bundle, Detections, predict_images
from gfldeploy.accuracy import ap_difference, coco_accuracy, coco_results
from gfldeploy.engines.base import EngineOptions, installed_version
from gfldeploy.engines.hardware import usable_threads
from gfldeploy.engines.registry import load_graph
from gfldeploy.files import read_json, write_json
from gfldeploy.images.coco import CocoDataset
from gfldeploy.images.decode import read_image
from gfldeploy.machine import describe_machine
from gfldeploy.nms import pairwise_iou, postprocess

HERE = Path(__file__).resolve().parent
ENGINES = ("onnxruntime", "openvino")
LEAST_IOU, SAME_IOU, SAME_SCORE = 0.5, 0.999, 1e-4
HEADER = (
    "| bundle | engine | compared | detections | same | unmatched | score: mean, largest | IoU: median, least | "
    "mAP | mAP against |\n" + "|---" * 10 + "|"
)
# Of an image: its results in COCO's format.
Results = Mapping[Any, Sequence[dict[str, Any]]]
Run = Callable[[Mapping[str, NDArray[Any]]], Mapping[str, NDArray[Any]]]


@dataclass(frozen=True)
class Row:
    """The detections of one detector, and how they differ from another's.

    `unmatched`: of both sides. `score_mean`, `score_max`, `iou_median`, `iou_min`: of those that are matched. `ap`, and
    `ap_interval`: of the difference to `ap_against`, 95%.
    """

    bundle: str
    precision: str
    engine: str
    compared: str
    detections: int
    same: int
    unmatched: int
    score_mean: float
    score_max: float
    iou_median: float
    iou_min: float
    ap: float
    ap_against: float
    ap_interval: tuple[float, float]

    @property
    def holds(self) -> bool:
        """All detections are the same, and mAP to four digits."""
        return self.same == self.detections and not self.unmatched and f"{self.ap:.4f}" == f"{self.ap_against:.4f}"

    def line(self) -> str:
        """As a row under `HEADER`."""
        found = f"{self.detections} | {self.same} | {self.unmatched} | {self.score_mean:.1e}, {self.score_max:.1e}"
        ious = f"{self.iou_median:.6f}, {self.iou_min:.6f}"
        accuracy = f"{self.ap:.4f} | {self.ap_against:.4f}"
        return f"| {self.bundle} | {self.engine} | {self.compared} | {found} | {ious} | {accuracy} |"


def in_onnxruntime(model: Path, threads: int) -> Run:
    """The file as ONNX Runtime runs it."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(str(model), options, providers=["CPUExecutionProvider"])
    names = [one.name for one in session.get_outputs()]
    return lambda inputs: dict(zip(names, session.run(names, dict(inputs)), strict=True))


def in_openvino(model: Path, threads: int) -> Run:
    """The file as OpenVINO runs it, told not to use BF16 as the guide says."""
    import openvino

    settings = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": threads}
    compiled = openvino.Core().compile_model(str(model), "CPU", settings)
    names = [one.get_any_name() for one in compiled.outputs]
    return lambda inputs: {
        name: value.copy() for name, value in zip(names, compiled(dict(inputs)).values(), strict=True)
    }


PLAIN = {"onnxruntime": in_onnxruntime, "openvino": in_openvino}


def by_predict(bundle: Bundle, engine: str, data: Path, images: Path) -> Results:
    """What `predict` writes."""
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "predicted"
        predict_images(bundle.directory, [images], output=output, data=data, engine=engine)
        return by_image(read_json(output / "coco.json"))


def by_file(bundle: Bundle, run: Run, dataset: CocoDataset, category_ids: Sequence[Any]) -> Results:
    """What the file gives."""
    found = {}
    for image in dataset.images:
        outputs = run(bundle.manifest.preprocess.pixels_of([read_image(image.path)]))
        (count,) = outputs["count"].tolist()
        boxes, scores, classes = (outputs[name][0, :count] for name in ("boxes", "scores", "classes"))
        found[image.id] = coco_results(image.id, Detections(boxes, scores, classes.astype(np.int64)), category_ids)
    return found


def by_graph(bundle: Bundle, run: Run, dataset: CocoDataset, category_ids: Sequence[Any]) -> Results:
    """What the graph inside gives, with preprocessing and NMS outside."""
    manifest, found = bundle.manifest, {}
    for image in dataset.images:
        tensor, scales = manifest.preprocess.batch_of([read_image(image.path)])
        outputs = run({"image": tensor})
        (detections,) = postprocess(outputs["scores"], outputs["boxes"], scales, manifest.nms)
        found[image.id] = coco_results(image.id, detections.named(manifest.classes), category_ids)
    return found


def by_image(results: Iterable[dict[str, Any]]) -> Results:
    """COCO's results, by image."""
    found: dict[Any, list[dict[str, Any]]] = {}
    for result in results:
        found.setdefault(result["image_id"], []).append(result)
    return found


def match(found: Sequence[dict[str, Any]], expected: Sequence[dict[str, Any]]) -> list[tuple[float, float]]:
    """Score difference and IoU of each pair, best first; each detection is in one pair at most."""
    if not found or not expected:
        return []
    ours, theirs = (
        np.array([one["bbox"] for one in side], np.float64)
        @ np.array(((1, 0, 1, 0), (0, 1, 0, 1), (0, 0, 1, 0), (0, 0, 0, 1)))
        for side in (found, expected)
    )
    ious = pairwise_iou(theirs, ours)
    ious[np.array([[one["category_id"] != other["category_id"] for one in found] for other in expected])] = 0
    pairs = []
    for place in sorted(range(len(expected)), key=lambda place: -expected[place]["score"]):
        nearest = int(ious[place].argmax())
        if ious[place, nearest] >= LEAST_IOU:
            pairs.append((abs(expected[place]["score"] - found[nearest]["score"]), float(ious[place, nearest])))
            ious[:, nearest] = 0
    return pairs


def compare(bundle: Bundle, engine: str, compared: str, found: Results, expected: Results, dataset: CocoDataset) -> Row:
    """Match the detections of every image, and measure both mAPs."""
    pairs, unmatched = [], 0
    for image in dataset.images:
        ours, theirs = found.get(image.id, ()), expected.get(image.id, ())
        pairs += (some := match(ours, theirs))
        unmatched += len(ours) + len(theirs) - 2 * len(some)
    flat, flat_expected = ([one for some in side.values() for one in some] for side in (found, expected))
    scores, ious = zip(*pairs, strict=True)
    categories = dataset.class_to_category(bundle.manifest.classes)
    return Row(
        bundle=bundle.directory.name,
        precision=bundle.manifest.precision,
        engine=engine,
        compared=compared,
        detections=len(flat_expected),
        same=sum(iou >= SAME_IOU and score <= SAME_SCORE for score, iou in pairs),
        unmatched=unmatched,
        score_mean=statistics.fmean(scores),
        score_max=max(scores),
        iou_median=statistics.median(ious),
        iou_min=min(ious),
        ap=coco_accuracy(dataset, flat, categories).ap,
        ap_against=coco_accuracy(dataset, flat_expected, categories).ap,
        ap_interval=ap_difference(dataset, flat, flat_expected)[1:],
    )


def first_images(data: Path, count: int, target: Path) -> None:
    """Write annotations of the first images alone, which `predict` takes all of."""
    content = read_json(data)
    content["images"] = content["images"][:count]
    kept = {image["id"] for image in content["images"]}
    content["annotations"] = [one for one in content["annotations"] if one["image_id"] in kept]
    write_json(target, content)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bundles", type=Path, nargs="+", required=True, metavar="BUNDLE")
    parser.add_argument("--data", type=Path, required=True, help="COCO annotations, with the images in images/ beside")
    parser.add_argument("--images", type=int, default=200)
    parser.add_argument("--machine", default="", help="the folder under results/")
    arguments = parser.parse_args()
    rows: list[Row] = []
    print(HEADER)
    with tempfile.TemporaryDirectory() as folder:
        data, images = Path(folder) / "annotations.json", arguments.data.resolve().parent / "images"
        first_images(arguments.data, arguments.images, data)
        dataset = CocoDataset.load(data, images, None)
        for bundle in map(Bundle.open, arguments.bundles):
            category_ids = dataset.class_to_category(bundle.manifest.classes)
            for engine in ENGINES:
                file, graph = (
                    detect(bundle, PLAIN[engine](bundle.graph(name)[0], usable_threads()), dataset, category_ids)
                    for detect, name in ((by_file, "end_to_end"), (by_graph, "onnx"))
                )
                predicted = by_predict(bundle, engine, data, images)
                options = EngineOptions(bundle.manifest.precision, "cpu", usable_threads())
                with load_graph(engine, bundle, options, "end_to_end") as whole:
                    changed = by_file(bundle, whole.infer, dataset, category_ids)
                for compared, found, expected in (
                    ("file, predict", file, predicted),
                    ("file, graph", file, graph),
                    ("changed, predict", changed, predicted),
                ):
                    rows.append(compare(bundle, engine, compared, found, expected, dataset))
                    print(rows[-1].line(), flush=True)
    if arguments.machine:
        versions = {name: installed_version(name) for name in ENGINES}
        output = HERE / "results" / arguments.machine / "checks" / "by_itself_detections.json"
        record = {"machine": asdict(describe_machine()), "versions": versions, "images": len(dataset.images)}
        write_json(output, {**record, "rows": list(map(asdict, rows))})
    if wrong := [row.line() for row in rows if row.precision == "fp32" and not row.holds]:
        sys.exit("these do not hold:\n" + "\n".join(wrong))


if __name__ == "__main__":
    main()
