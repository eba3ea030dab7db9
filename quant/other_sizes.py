"""Where INT8 holds that was calibrated at one input size: mAP of the demo detector at others, larger and smaller.

    python quant/other_sizes.py --output DIR [--sizes HxW ...] [--calibrate-at HxW ...] [--engines NAME ...]
                                [--val-images N] [--results FILE]

FP32 and INT8 run the same images at each of SIZES. INT8 is calibrated at the detector's own size, with nothing put back
to float, and, to see what that costs elsewhere, once more at each of the sizes of --calibrate-at, run at that size
alone: no calibration that must also serve other sizes can be expected to do better there. Differences of mAP have 95%
intervals, by resampling the images.

DIR receives images, graphs and detections; what is there already is used again. FILE is results/other_sizes.json beside
this script unless given; rows that it has already, from the same machine, software and settings, stay.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from shutil import copytree
from typing import Any

from gfldeploy import demo
from gfldeploy.accuracy import ap_difference, coco_accuracy, coco_results
from gfldeploy.batch_detection import detect_images
from gfldeploy.batching.buckets import Size
from gfldeploy.bundle import MANIFEST, Bundle, write_bundle
from gfldeploy.demo.dataset import generate
from gfldeploy.engines.base import EngineOptions
from gfldeploy.engines.registry import JUDGES, open_engine
from gfldeploy.export.exporter import export_bundle
from gfldeploy.files import read_json, write_json
from gfldeploy.images.coco import CocoDataset
from gfldeploy.images.decode import read_image
from gfldeploy.machine import describe_machine
from gfldeploy.quant import ptq
from gfldeploy.quant.artefacts import GRAPHS, Quantized, write_artefacts
from gfldeploy.quant.calibration import Calibration, ConvRanges
from gfldeploy.quant.method import MethodOptions
from gfldeploy.quant.observer import observe_outputs, of_scores, weight_ranges
from gfldeploy.quant.samples import calibration_images
from gfldeploy.serialization import plain

HERE = Path(__file__).resolve().parent
CALIB_IMAGES = 64
ALGORITHM = "hist"
SIZES = ("416x672", "320x512", "256x384", "224x320", "192x320")
THREADS = 2


def size_of(word: str) -> Size:
    height, width = map(int, word.split("x"))
    return height, width


def words(size: Size) -> str:
    return f"{size[0]}x{size[1]}"


@dataclass(frozen=True)
class Recipe:
    output: Path
    source: Bundle
    dataset: CocoDataset
    engines: tuple[str, ...]
    earlier: list[dict[str, Any]]

    def rows(self, sizes: list[Size], calibrate_at: list[Size]) -> Iterator[dict[str, Any]]:
        """A row for each size, calibration and engine."""
        own = self.source.manifest.preprocess.target_size
        for size in sizes:
            at = [own] if size == own or size not in calibrate_at else [own, size]
            for calibrated in at:
                for engine in self.engines:
                    key = {"size": words(size), "calibrated_at": words(calibrated), "engine": engine}
                    if same := [row for row in self.earlier if row.items() >= key.items()]:
                        yield same[0]
                        continue
                    fp32 = self.detections(self.source, size, "fp32", self.engines[0])
                    int8 = self.quantized(calibrated)
                    found = self.detections(int8, size, f"int8_{words(calibrated)}", engine)
                    difference, low, high = ap_difference(self.dataset, found, fp32)
                    yield {
                        **key,
                        "fp32": coco_accuracy(self.dataset, fp32).ap,
                        "int8": coco_accuracy(self.dataset, found).ap,
                        "difference": difference,
                        "interval": [low, high],
                    }

    def detections(self, bundle: Bundle, size: Size, name: str, engine: str) -> list[dict[str, Any]]:
        """What the bundle finds in the images at this size, in COCO's result format."""
        path = self.output / "detections" / f"{name}_{engine}_{words(size)}.json"
        if not path.exists():
            resized = bundle.at_size(size)
            manifest = resized.manifest
            categories = self.dataset.class_to_category(manifest.classes)
            rows: list[dict[str, Any]] = []
            paths = [image.path for image in self.dataset.images]
            singles = [(index,) for index in range(len(paths))]
            with open_engine(engine, resized, EngineOptions(manifest.precision, "cpu", THREADS)) as opened:
                for index, found in detect_images(opened, paths, manifest.preprocess, manifest.nms, singles):
                    rows += coco_results(self.dataset.images[index].id, found, categories)
            path.parent.mkdir(exist_ok=True)
            write_json(path, rows)
        return list(read_json(path))

    def quantized(self, size: Size) -> Bundle:
        """INT8 that was calibrated at this size."""
        target = self.output / f"int8_{words(size)}"
        if not target.exists():
            source = self.at_size(size)
            paths = calibration_images(self.output / "data/calib/annotations.json", None, CALIB_IMAGES)
            thresholds = ptq.calibrate(source, paths, ALGORITHM, MethodOptions(THREADS))
            onnx_file, preprocess = source.graph("onnx")[0], source.manifest.preprocess
            batches = (preprocess.batch([preprocess(read_image(path))]) for path in paths)
            outputs = observe_outputs(onnx_file, batches, THREADS, of_scores(source.layers()))
            weights = weight_ranges(onnx_file)
            ranges = {
                name: ConvRanges(tuple(inputs), outputs[name], weights[name]) for name, inputs in thresholds.items()
            }
            target.mkdir()
            write_artefacts(Quantized(source, Calibration(ALGORITHM, {}, ranges)), (), target)
        return Bundle(target, replace(self.source.manifest, precision="int8", graphs=GRAPHS, files={}))

    def at_size(self, size: Size) -> Bundle:
        """A bundle whose own input size this is: calibration reads it in a process of its own."""
        if size == self.source.manifest.preprocess.target_size:
            return self.source
        target = self.output / f"fp32_{words(size)}"
        if not target.exists():
            with write_bundle(target) as (directory, manifests):
                copytree(self.source.directory, directory, dirs_exist_ok=True)
                (directory / MANIFEST).unlink()
                manifests.append(replace(self.source.at_size(size).manifest, files={}))
        return Bundle.open(target)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="directory for images, graphs and detections")
    parser.add_argument("--sizes", nargs="+", default=SIZES, metavar="HxW", help=f"default: {' '.join(SIZES)}")
    parser.add_argument("--calibrate-at", nargs="*", default=SIZES, metavar="HxW", help="default: all of --sizes")
    parser.add_argument("--engines", nargs="+", choices=JUDGES, default=JUDGES, help=f"default: {' '.join(JUDGES)}")
    parser.add_argument("--val-images", type=int, default=500, metavar="N", help="images for mAP (default: 500)")
    parser.add_argument(
        "--results", type=Path, default=HERE / "results" / "other_sizes.json", help="JSON file to write"
    )
    args = parser.parse_args()
    generate(args.output / "data", "calib", CALIB_IMAGES)
    dataset = CocoDataset.load(generate(args.output / "data", "val", args.val_images))
    fp32 = args.output / "fp32"
    if not fp32.exists():
        export_bundle(config=demo.config_path(), weights=demo.weights_path(), output=fp32)
    machine = plain(describe_machine())
    settings = {"calib_images": CALIB_IMAGES, "val_images": args.val_images, "algo": ALGORITHM}
    before = read_json(args.results) if args.results.exists() else {}
    earlier = before["rows"] if (before.get("machine"), before.get("settings")) == (machine, settings) else []
    recipe = Recipe(args.output, Bundle.open(fp32), dataset, tuple(args.engines), earlier)
    rows = list(earlier)
    for row in recipe.rows([size_of(word) for word in args.sizes], [size_of(word) for word in args.calibrate_at]):
        low, high = row["interval"]
        print(
            f"{row['size']} {row['engine']} calibrated at {row['calibrated_at']}: FP32 {row['fp32']:.4f}, "
            f"INT8 {row['int8']:.4f}, {row['difference']:+.4f} ({low:+.4f} to {high:+.4f})",
            flush=True,
        )
        if row not in rows:
            rows.append(row)
        write_json(args.results, {"machine": machine, "settings": settings, "rows": rows})


if __name__ == "__main__":
    main()
