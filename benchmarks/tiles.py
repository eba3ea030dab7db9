"""What tiles find in large pictures, what each rule of their merging is worth, and the time and memory they take.

    python benchmarks/tiles.py --bundle demo/int8 --machine epyc-2core

Makes scenes with the demo's generator: pictures of 3.7 megapixels with some 80 objects, most of them smaller than 32 by
32 pixels. Parts, any of which `--parts` chooses:

- ap: COCO mAP of whole scenes, and in tiles of several sizes, by `evaluate`.
- rules: in the first of these tiles, mAP, and precision and recall of what scores 0.5, with each rule left out.
- time: seconds of a scene from file to boxes in `Detector.stream`, all ways interleaved in every round.
- large: a file of 11,500 by 11,500 pixels and an array of 20,000 by 20,000 in tiles: seconds, and peak memory.

Prints a line for each, and writes results/MACHINE/checks/NAME_tiles.json beside this script; parts that are not chosen
keep what is there.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import cv2
import numpy as np
from numpy.typing import NDArray

from gfldeploy import Detector, evaluate
from gfldeploy.accuracy import coco_accuracy, coco_results
from gfldeploy.batching.buckets import Size, size_in_words
from gfldeploy.batching.tiles import InTiles, Region, Tiling, moved
from gfldeploy.bundle import Bundle
from gfldeploy.demo.dataset import generate
from gfldeploy.detections import Detections
from gfldeploy.engines.base import EngineOptions
from gfldeploy.engines.detect import found_in, inputs_of
from gfldeploy.engines.hardware import usable_threads
from gfldeploy.engines.registry import open_engine
from gfldeploy.files import read_json, write_json
from gfldeploy.images.coco import CocoDataset
from gfldeploy.images.decode import read_image
from gfldeploy.machine import describe_machine
from gfldeploy.nms import NmsParams, merge_tiles, pairwise_iou
from gfldeploy.serialization import plain

HERE = Path(__file__).resolve().parent
PARTS = ("ap", "rules", "time", "large")
SHOWN, MATCHED = 0.5, 0.5  # scores, IoU
SIDES = {"file": 11_500, "array": 20_000}

# What is in the regions of a scene, and (h, w) of the scene.
Parts: TypeAlias = tuple[Sequence[tuple[Region, Detections]], Size]


def size_of(text: str) -> Size:
    height, width = text.split("x")
    return int(height), int(width)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bundle", type=Path, required=True)
    parser.add_argument("--machine", required=True, help="folder of results/ for this machine, such as epyc-2core")
    parser.add_argument("--name", default="demo_int8", help="of the results file")
    parser.add_argument("--engine", default="openvino")
    parser.add_argument("--scenes", type=int, default=40)
    parser.add_argument("--data", type=Path, default=Path("tiles-data"), help="folder for the scenes")
    parser.add_argument("--tiles", type=size_of, nargs="+", default=[(320, 512), (480, 768), (800, 800)])
    parser.add_argument("--overlap", type=float, default=0.2)
    parser.add_argument("--timed", type=int, default=8, help="scenes that are timed")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--picture", type=Path, help=argparse.SUPPRESS)  # of a process of the part large
    parser.add_argument("--kind", choices=SIDES, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.picture:
        print(json.dumps(in_this_process(args)))
        return
    data = generate(args.data, "scenes", args.scenes)
    path = HERE / "results" / args.machine / "checks" / f"{args.name}_tiles.json"
    record = read_json(path) if path.exists() else {}
    record |= {"machine": plain(describe_machine()), "engine": args.engine, "overlap": args.overlap}
    measures: dict[str, Callable[[argparse.Namespace, Path], Any]] = {
        "ap": average_precisions, "rules": rules, "time": times, "large": large
    }  # fmt: skip
    for part in args.parts:
        record[part] = measures[part](args, data)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, record)
    print(f"wrote {path}")


def ways(args: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Whole, and each tile, by its name: the arguments."""
    tiles = {size_in_words(tile): {"tile": tile, "overlap": args.overlap} for tile in args.tiles}
    return {"whole": {}, **tiles}


def average_precisions(args: argparse.Namespace, data: Path) -> dict[str, Any]:
    found = {}
    for name, way in ways(args).items():
        found[name] = evaluate(args.bundle, data=data, engine=args.engine, **way).accuracy.to_dict()
        print(name, {key: round(value, 4) for key, value in found[name].items()}, flush=True)
    return found


def rules(args: argparse.Namespace, data: Path) -> dict[str, Any]:
    """With all rules, without some, and with that of SAHI for any two boxes."""
    bundle, dataset = Bundle.open(args.bundle), CocoDataset.load(data)
    nms, classes = bundle.manifest.nms, bundle.manifest.classes
    every = list(regions_of(args, bundle, dataset))
    merges: dict[str, Callable[[Parts], Detections]] = {
        "all rules": lambda parts: merge_tiles(*moved(*parts), nms),
        "no tiles": lambda parts: parts[0][-1][1],
        "without the whole image": lambda parts: merge_tiles(*moved(parts[0][:-1], parts[1]), nms),
        "NMS alone": lambda parts: merged_as(parts, nms, cut=False),
        "any box may be a part": lambda parts: merged_as(parts, nms, cut=True),
    }
    found = {}
    for name, merge in merges.items():
        start = time.perf_counter()
        merged = [merge(parts) for parts in every]
        merge_ms = (time.perf_counter() - start) / len(every) * 1e3
        found[name] = {**measured(dataset, classes, merged), "merge_ms": merge_ms}
        print(name, {key: round(value, 4) for key, value in found[name].items()}, flush=True)
    return {"tile": size_in_words(args.tiles[0]), **found}


def merged_as(parts: Parts, nms: NmsParams, *, cut: bool) -> Detections:
    """As if all boxes ended at an edge inside the image, or none."""
    found, marks = moved(*parts)
    return merge_tiles(found, [np.full_like(mark, cut) for mark in marks], nms)


def regions_of(args: argparse.Namespace, bundle: Bundle, dataset: CocoDataset) -> Iterable[Parts]:
    cut = InTiles(Tiling(args.tiles[0], args.overlap), 1)
    manifest = bundle.manifest
    with open_engine(args.engine, bundle, EngineOptions(manifest.precision, threads=usable_threads())) as engine:
        for one in dataset.images:
            image = read_image(one.path)
            size = image.shape[0], image.shape[1]
            found: list[tuple[Region, Detections]] = []
            for regions, _ in cut.batches(size, manifest.preprocess):
                inputs, scales = inputs_of(engine, [region.of(image) for region in regions], manifest.preprocess)
                each = found_in(engine, engine.infer(inputs), scales, manifest.nms)
                found += zip(regions, (one.named(manifest.classes) for one in each), strict=True)
            yield found, size


def measured(dataset: CocoDataset, classes: Sequence[str], found: Sequence[Detections]) -> dict[str, float]:
    """COCO's AP, and precision and recall of what is shown, each object found once."""
    categories = dataset.class_to_category(classes)
    results = [
        row for image, one in zip(dataset.images, found, strict=True) for row in coco_results(image.id, one, categories)
    ]
    accuracy = coco_accuracy(dataset, results, categories)
    right = shown = 0
    for image, one in zip(dataset.images, found, strict=True):
        objects = [item for item in dataset.annotations if item.image_id == image.id]
        boxes = np.array([[x, y, x + w, y + h] for x, y, w, h in (item.bbox for item in objects)], np.float32)
        best = one.at_least(SHOWN)
        shown += len(best)
        free = [True] * len(objects)
        for overlaps, category in zip(pairwise_iou(best.boxes, boxes), best.classes.tolist(), strict=True):
            fitting = [
                place
                for place, item in enumerate(objects)
                if free[place] and item.category_id == categories[category] and overlaps[place] > MATCHED
            ]
            if fitting:
                free[max(fitting, key=lambda place: float(overlaps[place]))] = False
                right += 1
    kept = ("ap", "ap_small", "ap_medium", "ap_large")
    return {
        **{key: float(value) for key, value in accuracy.to_dict().items() if key in kept},
        "precision": right / max(shown, 1),
        "recall": right / len(dataset.annotations),
    }


def times(args: argparse.Namespace, data: Path) -> dict[str, Any]:
    """Seconds of a scene, the median of the rounds and all of them."""
    paths = [image.path for image in CocoDataset.load(data, None, args.timed).images]
    streams = usable_threads()
    given = {"engine": args.engine, "threads": 1, "streams": streams}
    detectors = {name: Detector(args.bundle, **given, **way) for name, way in ways(args).items()}
    seconds: dict[str, list[float]] = {name: [] for name in detectors}
    for number in range(args.rounds + 1):
        for name, detector in detectors.items():
            start = time.perf_counter()
            for _ in detector.stream(paths):
                pass
            if number:  # after the warm-up
                seconds[name].append((time.perf_counter() - start) / len(paths))
    found: dict[str, Any] = {}
    for name, some in seconds.items():
        way = ways(args)[name]
        sizes = [read_image(path).shape[:2] for path in paths]
        inputs = [len(Tiling(way["tile"], args.overlap).regions(*size)) if way else 1 for size in sizes]
        found[name] = {
            "inputs": statistics.fmean(inputs),
            "seconds": statistics.median(some),
            "rounds": some,
            "times_whole": statistics.median(a / b for a, b in zip(some, seconds["whole"], strict=True)),
        }
        print(name, {key: round(value, 4) for key, value in found[name].items() if key != "rounds"}, flush=True)
        detectors[name].close()
    return {"scenes": len(paths), "streams": streams, **found}


def large(args: argparse.Namespace, data: Path) -> dict[str, Any]:
    """A file of nearly as many pixels as files may have, and an array of more, each in a process of its own."""
    scene = CocoDataset.load(data).images[0].path
    picture = args.data / f"{SIDES['file']}.jpg"
    if not picture.exists():
        assert cv2.imwrite(str(picture), tiled(scene, SIDES["file"])[..., ::-1])
    found = {}
    for kind, path in (("file", picture), ("array", scene)):
        again = [sys.executable, __file__, "--bundle", args.bundle, "--machine", args.machine, "--engine", args.engine]
        tile = ["--tiles", size_in_words(args.tiles[0]), "--overlap", args.overlap]
        command = [*again, *tile, "--picture", path, "--kind", kind]
        answer = subprocess.run(list(map(str, command)), check=True, capture_output=True, text=True).stdout
        found[kind] = json.loads(answer.splitlines()[-1])
        print(kind, found[kind], flush=True)
    return found


def tiled(scene: Path, side: int) -> NDArray[np.uint8]:
    """A square picture of this side, of copies of a scene."""
    image = read_image(scene)
    tall, wide = (-(-side // one) for one in image.shape[:2])
    return np.tile(image, (tall, wide, 1))[:side, :side]


def in_this_process(args: argparse.Namespace) -> dict[str, Any]:
    tiling, side = Tiling(args.tiles[0], args.overlap), SIDES[args.kind]
    given = {"threads": 1, "streams": usable_threads(), "tile": tiling.tile, "overlap": tiling.overlap}
    with Detector(args.bundle, engine=args.engine, **given) as detector:
        detector.detect(np.zeros((800, 1200, 3), np.uint8))
        before_mb = peak_mb()
        image = args.picture if args.kind == "file" else np.ascontiguousarray(tiled(args.picture, side))
        start = time.perf_counter()
        (found,) = detector.detect(image)
        seconds = time.perf_counter() - start
    return {
        "side": side,
        "inputs": len(tiling.regions(side, side)),
        "detections": len(found),
        "seconds": seconds,
        "pixels_mb": side * side * 3 / 1e6,
        "peak_mb_before": before_mb,
        "peak_mb": peak_mb(),
    }


def peak_mb() -> float:
    (kilobytes,) = re.findall(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text(encoding="utf-8"))
    return int(kilobytes) * 1024 / 1e6


if __name__ == "__main__":
    main()
