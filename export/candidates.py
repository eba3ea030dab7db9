"""What choosing candidates in the graph does to mAP: the demo detector with several K against all of its anchors.

    python export/candidates.py --output DIR [--images N] [--candidates K ...] [--precisions NAME ...] [--results FILE]

Exports the demo detector once for each K and once with `all`, quantises it where INT8 is asked for, each as a user
would, and runs ONNX Runtime over N generated images (`val`), and over pictures made of nine of these that have one
size (`crowds`): 20,000 to 30,000 anchors and some 60 objects each, at the scale that the detector is for. DIR receives
images and bundles, FILE the rows (default: results/candidates.json beside this script). A row says how far mAP is from
that of all anchors, how many images have the same detections (classes, scores to 1e-5, boxes to 0.01 px), and of how
many the detections themselves say that some may be missing. Exits with 1 if mAP at the default K differs by more than
0.0005, or if an image has other detections though they say that all are there.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from gfldeploy import demo
from gfldeploy.accuracy import coco_accuracy, coco_results
from gfldeploy.bundle import Bundle
from gfldeploy.candidates import DEFAULT_CANDIDATES
from gfldeploy.demo.dataset import generate
from gfldeploy.detections import Detections
from gfldeploy.engines.base import EngineOptions
from gfldeploy.engines.detect import detect_batch
from gfldeploy.engines.registry import open_engine
from gfldeploy.files import write_json
from gfldeploy.images.coco import CocoDataset
from gfldeploy.images.decode import read_image
from gfldeploy.machine import describe_machine
from gfldeploy.serialization import plain

HERE = Path(__file__).resolve().parent
CHOICES = ("100", "300", str(DEFAULT_CANDIDATES), "3000")
ALL = "all"
SIDE = 3  # images along each side of a crowd
CALIB_IMAGES = 32
MOST_DIFFERENCE = 0.0005


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="directory for images and bundles")
    parser.add_argument("--images", type=int, default=500, metavar="N")
    parser.add_argument("--candidates", nargs="+", default=CHOICES, metavar="K")
    parser.add_argument("--precisions", nargs="+", choices=("fp32", "int8"), default=("fp32", "int8"), metavar="NAME")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--results", type=Path, default=HERE / "results" / "candidates.json")
    args = parser.parse_args()
    generate(args.output / "data", "calib", CALIB_IMAGES)
    generate(args.output / "data", "val", args.images)
    val = args.output / "data" / "val" / "annotations.json"
    data = {"val": (val, 1)}
    if crowds := write_crowds(val, args.output / "data" / "crowds"):
        data["crowds"] = (crowds, SIDE)
    rows: list[dict[str, Any]] = []
    for precision in args.precisions:
        exact: dict[str, list[Detections]] = {}
        for candidates in (ALL, *args.candidates):
            bundle = make(args.output, candidates, precision)
            for name, (file, scale) in data.items():
                dataset = CocoDataset.load(file)
                found = detect(bundle, dataset, scale, args.threads)
                row = {
                    "precision": precision,
                    "data": name,
                    "candidates": candidates,
                    **compared(bundle, dataset, found, exact.setdefault(name, found)),
                }
                row["difference"] = row["ap"] - next(
                    one["ap"] for one in [*rows, row] if (one["precision"], one["data"]) == (precision, name)
                )
                rows.append(row)
                print(line(row), flush=True)
    args.results.parent.mkdir(parents=True, exist_ok=True)
    write_json(args.results, {"machine": plain(describe_machine()), "rows": rows})
    if any(abs(row["difference"]) > MOST_DIFFERENCE for row in rows if row["candidates"] == str(DEFAULT_CANDIDATES)):
        sys.exit(f"mAP at {DEFAULT_CANDIDATES} candidates differs by more than {MOST_DIFFERENCE}")
    if any(row["wrong"] for row in rows):
        sys.exit("an image lacks detections and does not say so")


def line(row: dict[str, Any]) -> str:
    return (
        f"{row['precision']} {row['data']:6} {row['candidates']:>5}  mAP {row['ap']:.4f} ({row['difference']:+.5f})  "
        f"the same detections in {row['same']} of {row['images']} images, {row['incomplete']} may lack some"
    )


def make(directory: Path, candidates: str, precision: str) -> Bundle:
    """The bundle of the demo detector, made where it is not there."""
    fp32, int8 = (directory / f"{name}_{candidates}" for name in ("fp32", "int8"))
    if not fp32.exists():
        weights = ("--config", str(demo.config_path()), "--weights", str(demo.weights_path()))
        gfldeploy("export", *weights, "--candidates", candidates, "--output", str(fp32))
    if precision == "int8" and not int8.exists():
        images = ("--data", str(directory / "data/calib/annotations.json"), "--samples", str(CALIB_IMAGES))
        gfldeploy("quantize", str(fp32), *images, "--output", str(int8))
    return Bundle.open(int8 if precision == "int8" else fp32)


def gfldeploy(*arguments: str) -> None:
    subprocess.run([sys.executable, "-m", "gfldeploy", *arguments], check=True, stdout=subprocess.DEVNULL)


def detect(bundle: Bundle, dataset: CocoDataset, scale: int, threads: int) -> list[Detections]:
    """The detections of each image, resized to `scale` times the size that the bundle is for."""
    manifest = bundle.manifest
    height, width = manifest.preprocess.target_size
    preprocess = replace(manifest.preprocess, target_size=(height * scale, width * scale))
    found = []
    with open_engine("onnxruntime", bundle, EngineOptions(manifest.precision, "cpu", threads)) as engine:
        for image in dataset.images:
            prepared = preprocess(read_image(image.path))
            found += detect_batch(engine, preprocess.batch([prepared]), [prepared.scale], manifest.nms)
    return found


def compared(
    bundle: Bundle, dataset: CocoDataset, found: Sequence[Detections], exact: Sequence[Detections]
) -> dict[str, Any]:
    """mAP, how many images have the detections of `exact`, how many may lack some, and of how many that is wrong."""
    labels = dataset.class_to_category(bundle.manifest.classes)
    pairs = list(zip(dataset.images, found, strict=True))
    alike = [same(one, other) for one, other in zip(found, exact, strict=True)]
    results = [row for image, detections in pairs for row in coco_results(image.id, detections, labels)]
    return {
        "images": len(pairs),
        "objects": len(dataset.annotations),
        "ap": coco_accuracy(dataset, results).ap,
        "same": sum(alike),
        "incomplete": sum(one.may_lack_below > 0 for one in found),
        "wrong": sum(not one.may_lack_below and not equal for one, equal in zip(found, alike, strict=True)),
    }


def same(one: Detections, other: Detections) -> bool:
    return (
        np.array_equal(one.classes, other.classes)
        and np.allclose(one.scores, other.scores, rtol=0, atol=1e-5)
        and np.allclose(one.boxes, other.boxes, rtol=0, atol=0.01)
    )


def write_crowds(annotations: Path, directory: Path) -> Path | None:
    """Pictures of `SIDE` x `SIDE` images of one size, as a COCO data set; None if there are not that many of any."""
    import cv2

    dataset = CocoDataset.load(annotations)
    by_size: dict[tuple[int, int], list[Any]] = defaultdict(list)
    for image in dataset.images:
        by_size[image.size()].append(image)
    objects = defaultdict(list)
    for item in dataset.annotations:
        objects[item.image_id].append(item)
    each = SIDE * SIDE
    images: list[dict[str, Any]] = []
    boxes: list[dict[str, Any]] = []
    (directory / "images").mkdir(parents=True, exist_ok=True)
    for (height, width), alike in by_size.items():
        for start in range(0, len(alike) - each + 1, each):
            number = len(images) + 1
            tiles = alike[start : start + each]
            pixels = [read_image(image.path) for image in tiles]
            rows = [np.concatenate(pixels[at : at + SIDE], axis=1) for at in range(0, each, SIDE)]
            name = f"{number:04d}.png"
            picture = np.ascontiguousarray(np.concatenate(rows)[..., ::-1])  # OpenCV writes BGR
            if not cv2.imwrite(str(directory / "images" / name), picture):
                sys.exit(f"cannot write {directory / 'images' / name}")
            images.append({"id": number, "file_name": name, "height": SIDE * height, "width": SIDE * width})
            for at, image in enumerate(tiles):
                for item in objects[image.id]:
                    x, y, *size = item.bbox
                    boxes.append(
                        {
                            "id": len(boxes) + 1,
                            "image_id": number,
                            "category_id": item.category_id,
                            "bbox": [x + at % SIDE * width, y + at // SIDE * height, *size],
                            "area": item.area,
                            "iscrowd": int(item.crowd),
                        }
                    )
    if not images:
        return None
    categories = [{"id": one.id, "name": one.name} for one in dataset.categories]
    path = directory / "annotations.json"
    path.write_text(json.dumps({"images": images, "annotations": boxes, "categories": categories}), encoding="utf-8")
    return path


if __name__ == "__main__":
    main()
