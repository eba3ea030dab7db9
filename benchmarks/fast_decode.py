"""What `--decode fast` of `gfldeploy predict` saves on images that are larger than the network's input, and what it
changes.

    python benchmarks/fast_decode.py --source demo/fp32 --data demo/data/val/annotations.json --machine epyc-2core

Enlarges the images of the data `--factors` times (bicubic, JPEG of quality 92) with their boxes, and runs them with
both ways of decoding. For each factor: mAP of both; milliseconds of decoding and preprocessing an image, interleaved,
the median over `--rounds` with the least and the most. Writes all to results/MACHINE/checks/NAME_fast_decode.json
beside this script. Enlarged images hold no detail that the original ones do not: photographs of that size may lose
more.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np

from gfldeploy.accuracy import coco_accuracy, coco_results
from gfldeploy.engines.base import Engine
from gfldeploy.engines.registry import open_engine
from gfldeploy.files import write_json
from gfldeploy.images.coco import CocoAnnotation, CocoDataset, CocoImage
from gfldeploy.images.preprocess import Preprocess
from gfldeploy.machine import describe_machine
from gfldeploy.predict.engine_selection import Choice, choose
from gfldeploy.predict.pipeline import detect_groups
from gfldeploy.predict.sources import picture_of
from gfldeploy.serialization import plain

HERE = Path(__file__).resolve().parent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", type=Path, required=True, help="a bundle or a deploy.yml")
    parser.add_argument("--data", type=Path, required=True, help="COCO annotations (.json), images/ beside them")
    parser.add_argument("--name", default="demo", help="of the results file")
    parser.add_argument("--machine", required=True, help="folder of results/ for this machine, such as epyc-2core")
    parser.add_argument("--factors", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--limit", type=int, default=100, metavar="L", help="images (default: 100)")
    parser.add_argument("--timed", type=int, default=20, metavar="T", help="of them for timing (default: 20)")
    parser.add_argument("--rounds", type=int, default=5, metavar="R")
    args = parser.parse_args()
    choice = choose(args.source)
    data = CocoDataset.load(args.data, limit=args.limit)
    rows = []
    with open_engine(choice.engine, choice.bundle, choice.options) as engine:
        for factor in args.factors:
            with tempfile.TemporaryDirectory() as folder:
                large = enlarged(data, factor, Path(folder))
                preprocess = choice.bundle.manifest.preprocess
                reductions = {preprocess.reduction(*image.size()) for image in large.images}
                row = {
                    "factor": factor, "reductions": sorted(reductions),
                    "ap": [accuracy(engine, choice, large, reduced) for reduced in (False, True)],
                    "ms": time_host(preprocess, [image.path for image in large.images[: args.timed]], args.rounds),
                }  # fmt: skip
            rows.append(row)
    output = HERE / "results" / args.machine / "checks" / f"{args.name}_fast_decode.json"
    output.parent.mkdir(parents=True, exist_ok=True)
    write_json(output, {"machine": plain(describe_machine()), "images": len(data.images), "rows": rows})
    print("| enlarged | decoded at | mAP exact | mAP fast | ms exact | ms fast |\n|---|---|---|---|---|---|")
    for row in rows:
        at = ", ".join(f"1/{one}" for one in row["reductions"])
        exact, fast = (spread(times) for times in row["ms"])
        print(f"| {row['factor']}x | {at} | {row['ap'][0]:.4f} | {row['ap'][1]:.4f} | {exact} | {fast} |")


def enlarged(data: CocoDataset, factor: int, folder: Path) -> CocoDataset:
    """The same images and boxes, so many times as large, in `folder`."""
    images = []
    for image in data.images:
        pixels = cv2.imread(str(image.path))
        large = cv2.resize(pixels, None, fx=factor, fy=factor, interpolation=cv2.INTER_CUBIC)
        path = folder / f"{image.id}.jpg"
        assert cv2.imwrite(str(path), large, [cv2.IMWRITE_JPEG_QUALITY, 92])
        images.append(CocoImage(image.id, path, *large.shape[:2]))
    boxes = tuple(scaled(one, factor) for one in data.annotations)
    return CocoDataset(tuple(images), data.categories, boxes)


def scaled(one: CocoAnnotation, factor: int) -> CocoAnnotation:
    x, y, width, height = (value * factor for value in one.bbox)
    return replace(one, bbox=(x, y, width, height), area=one.area * factor * factor)


def accuracy(engine: Engine, choice: Choice, data: CocoDataset, reduced: bool) -> float:
    manifest = choice.bundle.manifest
    labels = data.class_to_category(manifest.classes)
    pictures = [picture_of(image.path) for image in data.images]
    results = []
    for group in detect_groups(engine, manifest, pictures, batch_size=choice.batch_size, reduced=reduced):
        for found in group:
            assert found.detections is not None, found.error
            results += coco_results(data.images[found.index].id, found.detections, labels)
    return coco_accuracy(data, results).ap


def time_host(preprocess: Preprocess, paths: list[Path], rounds: int) -> list[list[float]]:
    """Milliseconds an image of decoding and preprocessing in each round: exact, and fast."""
    cv2.setNumThreads(1)
    pictures = [picture_of(path) for path in paths]
    times: list[list[float]] = [[], []]
    for _ in range(rounds):
        for reduced, found in enumerate(times):
            start = time.perf_counter()
            for picture in pictures:
                assert picture.size is not None
                factor = preprocess.reduction(*picture.size) if reduced else 1
                row = np.empty((3, *preprocess.input_size(*picture.size)), np.float32)
                preprocess.into(picture.read(factor), row, picture.size)
            found.append((time.perf_counter() - start) * 1e3 / len(paths))
    return times


def spread(values: list[float]) -> str:
    return f"{statistics.median(values):.3g} ({min(values):.3g} to {max(values):.3g})"


if __name__ == "__main__":
    main()
