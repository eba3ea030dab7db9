"""Time a bundle's file that deploys by itself against our preprocessing, network and NMS, and count what differs.

    python benchmarks/by_itself.py --bundle demo/fp32 --data val.json --images 200 --machine epyc-2core --name demo_fp32

Both run in the same engine and process, interleaved image by image, from decoded and resized pixels to boxes in pixels
of the original: one looks pixels up, pads, infers and goes through NMS in NumPy, the other infers once. The file also
runs as it is read without gfldeploy, which changes INT8 graphs before engines load them ("plain"). Medians and the
ratio of medians of each of five parts of the images; every detection of 0.1 or more is compared. The rows go to
results/MACHINE/checks/NAME_by_itself.json beside this script, where those of the same bundle stay that `--only` leaves
out.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import cv2
import numpy as np

from gfldeploy.bundle import Bundle
from gfldeploy.detections import Detections
from gfldeploy.engines.base import Engine, EngineOptions
from gfldeploy.engines.detect import detect_batch, given_detections
from gfldeploy.engines.hardware import usable_threads
from gfldeploy.engines.registry import load_graph
from gfldeploy.export.end_to_end_parity import missing_in
from gfldeploy.export.parity import Tolerance
from gfldeploy.files import read_json, write_json
from gfldeploy.images.coco import CocoDataset
from gfldeploy.images.decode import read_image
from gfldeploy.machine import describe_machine
from gfldeploy.quant.measurement import PlainOnnxRuntime, PlainOpenVino
from gfldeploy.serialization import plain

HERE = Path(__file__).resolve().parent
PARTS = 5
LEAST_SCORE = 0.1
ALLOWED = Tolerance(score=1e-4, box_px=0.1)
# The engine, and what runs the file in place of it.
ROWS = {
    "onnxruntime": ("onnxruntime", None),
    "onnxruntime, plain file": ("onnxruntime", PlainOnnxRuntime),
    "openvino": ("openvino", None),
    "openvino, plain file": ("openvino", PlainOpenVino),
}
HEADER = (
    "| engine | ours, ms | the file, ms | ratio (range) | detections | missing | score | box, px |\n" + "|---" * 8 + "|"
)


@dataclass(frozen=True)
class Row:
    """One engine: medians in milliseconds, the ratios of parts of the images, and how the detections differ."""

    engine: str
    ours_ms: float
    file_ms: float
    ratios: tuple[float, ...]
    detections: int
    missing: int
    score: float
    box_px: float

    def line(self) -> str:
        """As a row under `HEADER`."""
        ratio = f"{self.file_ms / self.ours_ms:.2f} ({min(self.ratios):.2f} to {max(self.ratios):.2f})"
        found = f"{self.detections} | {self.missing} | {self.score:.1e} | {self.box_px:.1e}"
        return f"| {self.engine} | {self.ours_ms:.1f} | {self.file_ms:.1f} | {ratio} | {found} |"


def compare(name: str, alone: Engine, whole: Engine, bundle: Bundle, images: Sequence[Path]) -> Row:
    """Run both on each image, interleaved."""
    manifest, ours_ms, file_ms = bundle.manifest, [], []
    count = missing = 0
    score = box = 0.0
    for number, path in enumerate(images):
        pixels = manifest.preprocess.pixels_of([read_image(path)])
        height, width = pixels["im_shape"][0].tolist()
        resized = np.ascontiguousarray(pixels["image"][0, :height, :width])
        y, x = pixels["scale_factor"][0].tolist()

        def ours(resized: np.ndarray = resized, scale: tuple[float, float] = (y, x)) -> Detections:
            """What `Preprocess.into` does after resizing, the network, and NMS."""
            preprocess = manifest.preprocess
            tensor = np.zeros((1, 3, *preprocess.padded_size(*resized.shape[:2])), np.float32)
            for channel, plane in enumerate(cv2.split(resized)):
                cv2.LUT(plane, preprocess.table[channel], dst=tensor[0, channel, : plane.shape[0], : plane.shape[1]])
            return detect_batch(alone, tensor, [scale], manifest.nms)[0].named(manifest.classes)

        def file(pixels: dict[str, np.ndarray] = pixels) -> Detections:
            return next(given_detections(whole.infer(pixels)))

        both: list[tuple[Callable[[], Detections], list[float]]] = [(ours, ours_ms), (file, file_ms)]
        found = {}
        for run, times in both if number % 2 else both[::-1]:
            if number == 0:
                run()  # compiles, and warms up
            start = time.perf_counter()
            found[run] = run()
            times.append((time.perf_counter() - start) * 1e3)
        expected = found[ours].at_least(LEAST_SCORE)
        count += len(expected)
        lacking, *differences = missing_in(found[file], expected, ALLOWED)
        missing, score, box = missing + lacking, max(score, differences[0]), max(box, differences[1])
    parts = [slice(part, None, PARTS) for part in range(PARTS)]
    ratios = tuple(statistics.median(file_ms[part]) / statistics.median(ours_ms[part]) for part in parts)
    return Row(name, statistics.median(ours_ms), statistics.median(file_ms), ratios, count, missing, score, box)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bundle", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True, help="COCO annotations")
    parser.add_argument("--images", type=int, default=200)
    parser.add_argument("--machine", default="", help="the folder under results/")
    parser.add_argument("--name", default="demo", help="how the file of results starts")
    parser.add_argument(
        "--only", nargs="+", choices=tuple(ROWS), default=tuple(ROWS), metavar="ROW", help=str(tuple(ROWS))
    )
    arguments = parser.parse_args()
    bundle = Bundle.open(arguments.bundle)
    images = [image.path for image in CocoDataset.load(arguments.data, None, arguments.images).images]
    options = EngineOptions(bundle.manifest.precision, "cpu", usable_threads())
    output = HERE / "results" / arguments.machine / "checks" / f"{arguments.name}_by_itself.json"
    about = {"machine": plain(describe_machine()), "bundle": bundle.digest}
    rows = {}
    if arguments.machine and output.exists():
        earlier = read_json(output)
        if {key: earlier[key] for key in about} == about:
            rows = {row["engine"]: row for row in earlier["rows"]}
    print(HEADER)
    for name in arguments.only:
        engine, given = ROWS[name]
        with (
            load_graph(engine, bundle, options, "onnx") as alone,
            given(bundle, options, "end_to_end")
            if given
            else load_graph(engine, bundle, options, "end_to_end") as whole,
        ):
            row = compare(name, alone, whole, bundle, images)
        print(row.line(), flush=True)
        rows[name] = asdict(row)
        if arguments.machine:
            write_json(output, {**about, "rows": [rows[name] for name in ROWS if name in rows]})


if __name__ == "__main__":
    main()
