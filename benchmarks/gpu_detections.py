"""What a GPU detects, held against the CPU on every image: the detections that users get, and mAP.

    python benchmarks/gpu_detections.py --bundle demo/fp32 --data val.json --images 200 --machine nvidia-h100-80gb-hbm3

`gfldeploy predict` runs on the CPU in FP32, then on the GPU in FP32 at batch 1 (twice), 2 and 8, in TF32, and in FP16
at batch 1 (twice) and 8, each in a process of its own; and `Detector` on the GPU, in FP32 at batch 1. Detections are
matched one to one, best first: of one class, with the largest IoU, at least 0.5. All that NMS leaves is compared, from
the bundle's own score threshold up. "Bytes": whether coco.json is byte by byte that of the row named.

Writes results/MACHINE/checks/NAME_detections.json beside this script, and prints the rows. Exits with 1 where FP32 on
the GPU finds something else than the CPU, `Detector` something else than `predict`, or a command fails.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from gfldeploy import Bundle, Detector
from gfldeploy.accuracy import coco_accuracy, coco_results
from gfldeploy.files import read_json, write_json
from gfldeploy.images.coco import CocoDataset
from gfldeploy.machine import describe_machine
from gfldeploy.nms import pairwise_iou

HERE = Path(__file__).resolve().parent
ENGINE = "onnxruntime"
GPU = ("--device", "gpu", "--engine", ENGINE)
# By name: options of `predict`, and the row whose file could be the same, byte by byte.
RUNS: Mapping[str, tuple[Sequence[str], str | None]] = {
    "CPU FP32": (("--engine", ENGINE, "--batch-size", "1"), None),
    "FP32": ((*GPU, "--batch-size", "1"), None),
    "FP32, again": ((*GPU, "--batch-size", "1"), "FP32"),
    "FP32, batch 2": ((*GPU, "--batch-size", "2"), "FP32"),
    "FP32, batch 8": ((*GPU, "--batch-size", "8"), "FP32"),
    "TF32": ((*GPU, "--batch-size", "1", "--tf32"), "FP32"),
    "FP16": ((*GPU, "--batch-size", "1", "--precision", "fp16"), None),
    "FP16, again": ((*GPU, "--batch-size", "1", "--precision", "fp16"), "FP16"),
    "FP16, batch 8": ((*GPU, "--batch-size", "8", "--precision", "fp16"), "FP16"),
}
LEAST_IOU = 0.5
CONFIDENT = 0.4
# FP32 on two machines adds up in another order; what differs by more is an error.
FP32_SCORE, FP32_BOX_PX = 1e-3, 0.1
HEADER = (
    "| on the GPU | detections | not matched | of these 0.4 or more | scores off by | boxes off by, px | mAP | "
    "seconds | bytes |\n" + "|---" * 9 + "|"
)
Results = Sequence[dict[str, Any]]


@dataclass(frozen=True)
class Row:
    """The detections of a run against those of the CPU in FP32.

    `unmatched`: of both sides; `unmatched_confident`: those with a score of 0.4 or more. `score_max`, `box_max_px`: of
    those that are matched. `seconds`: of the whole command, its start included. `same_bytes`: whether its file is that
    of the run `compared_with`.
    """

    run: str
    detections: int
    unmatched: int
    unmatched_confident: int
    score_max: float
    box_max_px: float
    ap: float
    seconds: float
    compared_with: str | None
    same_bytes: bool | None

    @property
    def holds(self) -> bool:
        """Whether that is FP32 arithmetic in another order, and nothing else."""
        return not self.unmatched_confident and self.score_max <= FP32_SCORE and self.box_max_px <= FP32_BOX_PX

    def line(self) -> str:
        """As a row under `HEADER`."""
        same = "" if self.same_bytes is None else f"{'' if self.same_bytes else 'not '}those of {self.compared_with}"
        counts = f"{self.detections} | {self.unmatched} | {self.unmatched_confident}"
        return (
            f"| {self.run} | {counts} | {self.score_max:.1e} | {self.box_max_px:.1e} | {self.ap:.4f} | "
            f"{self.seconds:.1f} | {same} |"
        )


def predict(bundle: Path, data: Path, images: Path, options: Sequence[str], output: Path, seconds: float) -> str | None:
    """Run `gfldeploy predict`; why it failed, or None."""
    command = [sys.executable, "-m", "gfldeploy", "predict", str(bundle), str(images), "--data", str(data)]
    try:
        done = subprocess.run(
            [*command, *options, "--output", str(output)], capture_output=True, text=True, timeout=seconds
        )
    except subprocess.TimeoutExpired:
        return f"took more than {seconds:g} s"
    return None if done.returncode == 0 else done.stderr.strip()[-2000:]


def by_detector(bundle: Path, dataset: CocoDataset, **options: Any) -> Results:
    """What `Detector` finds, as `predict` writes it."""
    found: list[dict[str, Any]] = []
    with Detector(bundle, engine=ENGINE, **options) as detector:
        categories = dataset.class_to_category(detector.classes)
        paths = [image.path for image in dataset.images]
        for image, detections in zip(dataset.images, detector.detect(paths, threshold=0.0), strict=True):
            found += coco_results(image.id, detections, categories)
    return found


def pairs_of(found: Results, expected: Results) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """Those of one image, best first; each is in one pair at most."""
    if not found or not expected:
        return []
    corners = np.array(((1, 0, 1, 0), (0, 1, 0, 1), (0, 0, 1, 0), (0, 0, 0, 1)))
    ours, theirs = (np.array([one["bbox"] for one in side], np.float64) @ corners for side in (found, expected))
    ious = pairwise_iou(theirs, ours)
    here, there = (np.array([one["category_id"] for one in side]) for side in (found, expected))
    ious[there[:, None] != here[None]] = 0
    pairs = []
    for place in sorted(range(len(expected)), key=lambda place: -expected[place]["score"]):
        nearest = int(ious[place].argmax())
        if ious[place, nearest] >= LEAST_IOU:
            pairs.append((found[nearest], expected[place]))
            ious[:, nearest] = 0
    return pairs


def by_image(results: Results) -> Mapping[Any, Results]:
    """COCO's results, by image."""
    found: dict[Any, list[dict[str, Any]]] = {}
    for result in results:
        found.setdefault(result["image_id"], []).append(result)
    return found


def compare(
    run: str,
    seconds: float,
    found: Results,
    expected: Results,
    dataset: CocoDataset,
    twin: tuple[str, bool] | None,
) -> Row:
    """Match the detections of every image, and measure mAP."""
    pairs, lone = [], []
    here, there = by_image(found), by_image(expected)
    for image in dataset.images:
        ours, theirs = here.get(image.id, ()), there.get(image.id, ())
        pairs += (some := pairs_of(ours, theirs))
        paired = {id(one) for pair in some for one in pair}
        lone += [one for one in (*ours, *theirs) if id(one) not in paired]
    return Row(
        run=run,
        detections=len(found),
        unmatched=len(lone),
        unmatched_confident=sum(one["score"] >= CONFIDENT for one in lone),
        score_max=max((abs(one["score"] - other["score"]) for one, other in pairs), default=0.0),
        box_max_px=max(
            (float(np.abs(np.subtract(one["bbox"], other["bbox"])).max()) for one, other in pairs), default=0.0
        ),
        ap=coco_accuracy(dataset, found).ap,
        seconds=seconds,
        compared_with=twin and twin[0],
        same_bytes=twin and twin[1],
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bundle", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True, help="COCO annotations (.json), images/ beside them")
    parser.add_argument("--images", type=int, default=200, metavar="N")
    parser.add_argument("--machine", required=True, help="folder of results/")
    parser.add_argument("--name", default="demo", help="of the results file (default: demo)")
    parser.add_argument("--timeout", type=float, default=120.0, metavar="S", help="of a command (default: 120)")
    args = parser.parse_args()
    rows: list[Row] = []
    failed: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        data, images = folder / "annotations.json", args.data.resolve().parent / "images"
        content = read_json(args.data)
        content["images"] = content["images"][: args.images]
        kept = {image["id"] for image in content["images"]}
        content["annotations"] = [one for one in content["annotations"] if one["image_id"] in kept]
        write_json(data, content)
        dataset = CocoDataset.load(data, images, None)
        files: dict[str, Path] = {}
        print(HEADER)
        for number, (run, (options, twin)) in enumerate(RUNS.items()):
            output, start = folder / str(number), time.monotonic()
            if (why := predict(args.bundle, data, images, options, output, args.timeout)) is not None:
                failed[run] = why
                print(f"{run}: {why}", file=sys.stderr, flush=True)
                if not files:
                    break
                continue
            seconds = time.monotonic() - start
            files[run] = output / "coco.json"
            reference = files["CPU FP32"]
            same = (twin, files[run].read_bytes() == files[twin].read_bytes()) if twin in files else None
            rows.append(compare(run, seconds, read_json(files[run]), read_json(reference), dataset, same))
            print(rows[-1].line(), flush=True)
        if "FP32" in files:
            start = time.monotonic()
            found = by_detector(args.bundle, dataset, device="gpu")
            seconds = time.monotonic() - start
            same = ("FP32", list(found) == read_json(files["FP32"]))
            rows.append(compare("`Detector`, FP32", seconds, found, read_json(files["CPU FP32"]), dataset, same))
            print(rows[-1].line(), flush=True)
    bundle = Bundle.open(args.bundle)
    write_json(
        HERE / "results" / args.machine / "checks" / f"{args.name}_detections.json",
        {
            "machine": asdict(describe_machine()),
            "bundle": {"name": bundle.name, "digest": bundle.digest},
            "images": len(dataset.images),
            "rows": list(map(asdict, rows)),
            "failed": failed,
        },
    )
    if failed or any(not row.holds for row in rows if "FP32" in row.run):
        sys.exit("these do not hold: " + ", ".join([*failed, *(row.run for row in rows if not row.holds)]))


if __name__ == "__main__":
    main()
