"""Quantise in many ways and record what each costs and gives: the demo detector by mAP, the model zoo by closeness.

    python quant/compare.py demo --output DIR [--val-images N] [--variants NAME ...] [--results FILE]
    python quant/compare.py zoo --output DIR [--configs NAME ...] [--samples N] [--algo NAME] [--results FILE]

Every export and quantisation runs as a user would run it, in a process of its own, with DIR as its working directory.
DIR receives the generated images and the bundles; FILE the rows as JSON, written again after each of them. Rows that it
has already, from the same machine, software and settings, stay, but for those that are measured again.

`demo` measures mAP on generated labelled images, with nothing put back to float and no drop refused, but for the
calibrations on unsuitable images: those are to be refused, and the row holds the error. It exits with 1 if one was
published, or another refused. FILE is results/demo.json beside this script when all variants run, else none.

`zoo` takes random weights: time, memory, speed and size are those of the real ones, mAP there is none. FILE is
results/zoo.json beside this script. `largest_process_mb` is the peak resident memory, 10^6 bytes, of the largest
process of the quantize command, its children included: not the sum of those that run together.
"""

from __future__ import annotations

import argparse
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gfldeploy import demo
from gfldeploy.demo.dataset import generate
from gfldeploy.files import read_json, write_json
from gfldeploy.machine import describe_machine
from gfldeploy.quant.ptq import ALGORITHMS
from gfldeploy.serialization import plain

HERE = Path(__file__).resolve().parent
CONFIGS = HERE.parent / "configs" / "gfl"
ZOO = tuple(sorted(path.stem for path in CONFIGS.glob("gfl*.yml")))
CALIB_IMAGES = 64
BLACK_IMAGES = 32
# Of the distance of every pixel to mid grey.
CONTRAST = 0.3
# What the gate refuses by default.
MAX_DROP = "0.005"
# The FP32 graph that an INT8 graph takes the place of, where it has another name.
REPLACED = {"onnx_tensorrt": "onnx"}


@dataclass(frozen=True)
class Variant:
    """One way to quantise the demo detector. `images`: the folder under data/ that it is calibrated on."""

    name: str
    options: tuple[str, ...]
    images: str = "calib"

    @property
    def refused(self) -> bool:
        """Whether it is to be refused: calibrated on images unlike those it is for."""
        return self.images != "calib"

    def arguments(self) -> list[str]:
        """Of `gfldeploy`, to be run in DIR."""
        return [
            *("quantize", "fp32", "--data", f"data/{self.images}/images", *self.options),
            *("--samples", str(BLACK_IMAGES if self.images == "black" else CALIB_IMAGES)),
            *("--eval-data", "data/val/annotations.json", "--max-drop", MAX_DROP if self.refused else "1"),
            *("--no-fallback", "--output", self.name, "--force"),
        ]


STEM = ("--keep-float", "backbone.stem")
OUTPUTS = ("--keep-float", "head.gfl_head_*")
VARIANTS = (
    Variant("hist", ("--algo", "hist")),
    Variant("avg", ("--algo", "avg")),
    Variant("abs_max", ("--algo", "abs_max")),
    Variant("mse", ("--algo", "mse")),
    Variant("hist_stem_float", ("--algo", "hist", *STEM)),
    Variant("hist_outputs_float", ("--algo", "hist", *OUTPUTS)),
    Variant("hist_stem_outputs_float", ("--algo", "hist", *STEM, *OUTPUTS)),
    Variant("distill", ("--method", "distill")),
    Variant("black", ("--algo", "abs_max"), "black"),
    Variant("pale", ("--algo", "abs_max"), "pale"),
    Variant("hist_sensitivity", ("--algo", "hist", "--sensitivity")),
)


@dataclass(frozen=True)
class Ended:
    """How a `gfldeploy` command ended. `error`: the line it was refused with, None if it succeeded."""

    seconds: float
    largest_process_mb: float
    error: str | None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True, metavar="{demo,zoo}")

    trained = commands.add_parser("demo", help="the demo detector, by mAP")
    names = tuple(variant.name for variant in VARIANTS)
    trained.add_argument("--output", type=Path, required=True, help="directory for images and bundles")
    trained.add_argument("--val-images", type=int, default=500, metavar="N", help="images for mAP (default: 500)")
    trained.add_argument("--variants", nargs="+", choices=names, default=names, metavar="NAME", help=", ".join(names))
    trained.add_argument("--results", type=Path, help="JSON file to write")
    trained.set_defaults(run=run_demo)

    zoo = commands.add_parser("zoo", help="configs of the model zoo with random weights")
    zoo.add_argument("--output", type=Path, required=True, help="directory for images and bundles")
    zoo.add_argument(
        "--configs",
        nargs="+",
        choices=ZOO,
        default=("gfl_r18vd_1x_coco", "gfl_r50_fpn_1x_coco"),
        metavar="NAME",
        help=", ".join(ZOO),
    )
    zoo.add_argument("--samples", type=int, default=CALIB_IMAGES, metavar="N", help="calibration images (default: 64)")
    zoo.add_argument("--algo", choices=tuple(ALGORITHMS), default="hist", metavar="NAME", help=", ".join(ALGORITHMS))
    zoo.add_argument("--results", type=Path, default=HERE / "results" / "zoo.json", help="JSON file to write")
    zoo.set_defaults(run=run_zoo)

    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    args.run(args)


def run_demo(args: argparse.Namespace) -> None:
    """Quantise the demo detector in every way of `VARIANTS` that was asked for."""
    chosen = [variant for variant in VARIANTS if variant.name in args.variants]
    results = args.results or (HERE / "results" / "demo.json" if len(chosen) == len(VARIANTS) else None)
    generate(args.output / "data", "calib", CALIB_IMAGES)
    generate(args.output / "data", "val", args.val_images)
    write_black(args.output / "data" / "black" / "images")
    write_pale(args.output / "data" / "calib" / "images", args.output / "data" / "pale" / "images")
    export(args.output, "fp32", demo.config_path(), "--weights", str(demo.weights_path()))
    settings = {"calib_images": CALIB_IMAGES, "black_images": BLACK_IMAGES, "val_images": args.val_images}
    rows = earlier(results, settings, "variant", [variant.name for variant in chosen])
    for variant in chosen:
        rows.append(demo_row(variant, gfldeploy(variant.arguments(), args.output), args.output))
        print(line(variant.name, rows[-1]), flush=True)
        record(results, settings, rows)
    if surprises := [row["variant"] for row in rows if (row["refused"] is not None) != row["to_be_refused"]]:
        sys.exit(f"not as it should be: {', '.join(surprises)}")


def run_zoo(args: argparse.Namespace) -> None:
    """Export configs with random weights and quantise them."""
    generate(args.output / "data", "calib", args.samples)
    settings = {"samples": args.samples, "algo": args.algo, "random_weights": 0}
    rows = earlier(args.results, settings, "config", args.configs)
    for name in args.configs:
        export(args.output, name, CONFIGS / f"{name}.yml", "--random-weights", "0")
        arguments = [
            *("quantize", name, "--data", "data/calib/images", "--samples", str(args.samples), "--algo", args.algo),
            *("--min-agreement", "0", "--output", f"{name}_int8", "--force"),
        ]
        rows.append(zoo_row(name, arguments, gfldeploy(arguments, args.output), args.output))
        print(line(name, rows[-1]), flush=True)
        record(args.results, settings, rows)
    if refused := [row["config"] for row in rows if row["refused"] is not None]:
        sys.exit(f"not quantised: {', '.join(refused)}")


def demo_row(variant: Variant, ended: Ended, directory: Path) -> dict[str, Any]:
    """What became of `variant`, whose bundle and the FP32 one are in `directory`."""
    row = {
        "variant": variant.name,
        "command": command_text(variant.arguments()),
        "to_be_refused": variant.refused,
        "refused": ended.error,
        "seconds": round(ended.seconds, 1),
    }
    if ended.error is not None:
        return row
    row |= measured(directory / "fp32", directory / variant.name)
    if (ranking := directory / variant.name / "sensitivity.json").exists():
        row["sensitivity"] = read_json(ranking)
    return row


def zoo_row(name: str, arguments: Sequence[str], ended: Ended, directory: Path) -> dict[str, Any]:
    """What became of config `name`, whose bundles are `directory`/`name` and the same with `_int8`."""
    row = {
        "config": name,
        "command": command_text(arguments),
        "refused": ended.error,
        "seconds": round(ended.seconds, 1),
        "largest_process_mb": round(ended.largest_process_mb),
    }
    return row if ended.error is not None else row | measured(directory / name, directory / f"{name}_int8")


def measured(fp32: Path, int8: Path) -> dict[str, Any]:
    """What the JSON files of an INT8 bundle, and of the FP32 one that it is made of, say of it.

    `map` is None without labels; `convolutions` has the engines that can tell; `speed` is on one calibration image.
    """
    parity = read_json(int8 / "parity.json")
    accuracy = parity.get("accuracy")
    return {
        "map": accuracy
        and {"fp32": accuracy["fp32"]["ap"]} | {name: one["ap"] for name, one in accuracy["engines"].items()},
        "convolutions": {
            name: {"int8": one["convolutions"].get("int8", 0), "total": sum(one["convolutions"].values())}
            for name, one in parity["engines"].items()
            if one["convolutions"]
        },
        "closeness": {
            name: {key: one[key] for key in ("score_difference", "score_difference_max", "detections_found")}
            for name, one in parity["engines"].items()
        },
        "fp32_detections": max(one["detections"] for one in parity["engines"].values()),
        "kept_float": parity.get("kept_float", []),
        "speed": parity["speed"],
        "bytes": graph_bytes(read_json(fp32 / "manifest.json"), read_json(int8 / "manifest.json")),
    }


def graph_bytes(fp32: dict[str, Any], int8: dict[str, Any]) -> dict[str, dict[str, float]]:
    """Bytes of each INT8 graph, parameters included, and of the FP32 graph it replaces, from the two manifests."""

    def size(manifest: dict[str, Any], name: str) -> int:
        graph = manifest["graphs"][name]
        return sum(manifest["files"][path]["bytes"] for path in (graph["model"], graph["params"]) if path)

    sizes = {name: (size(int8, name), size(fp32, REPLACED.get(name, name))) for name in int8["graphs"]}
    return {name: {"int8": ours, "fp32": base, "share": round(ours / base, 4)} for name, (ours, base) in sizes.items()}


def line(name: str, row: dict[str, Any]) -> str:
    """A row for people."""
    start = f"{name:32} {row['seconds']:7.1f} s"
    if "largest_process_mb" in row:
        start += f"  {row['largest_process_mb']} MB"
    if row["refused"] is not None:
        return f"{start}  refused: {row['refused']}"
    facts = [f"{engine} mAP {ap:.4f}" for engine, ap in (row["map"] or {}).items()]
    facts += [f"{engine} {ran['int8']}/{ran['total']} in int8" for engine, ran in row["convolutions"].items()]
    if row["map"] is None:
        facts += [f"{engine} scores {one['score_difference']:.2g} off" for engine, one in row["closeness"].items()]
    facts += [f"{engine} {one['ratio']:.2f}x" for engine, one in row["speed"].items()]
    facts += [f"{graph} {one['share']:.0%} of FP32" for graph, one in row["bytes"].items()]
    return f"{start}  {', '.join(facts)}"


def earlier(results: Path | None, settings: dict[str, Any], key: str, again: Sequence[str]) -> list[dict[str, Any]]:
    """The rows that `results` has of the same machine and settings, without those whose `key` is measured `again`."""
    if results is None or not results.exists():
        return []
    content = read_json(results)
    if (content["machine"], content["settings"]) != (plain(describe_machine()), settings):
        return []
    return [row for row in content["rows"] if row[key] not in again]


def record(results: Path | None, settings: dict[str, Any], rows: list[dict[str, Any]]) -> None:
    """Write what there is so far: a later variant may take hours."""
    if results is not None:
        results.parent.mkdir(parents=True, exist_ok=True)
        write_json(results, {"machine": plain(describe_machine()), "settings": settings, "rows": rows})


def export(directory: Path, output: str, config: Path, *weights: str) -> None:
    arguments = ["export", "--config", str(config.resolve()), *weights, "--output", output, "--force"]
    subprocess.run([sys.executable, "-m", "gfldeploy", *arguments], cwd=directory, check=True)


def gfldeploy(arguments: Sequence[str], directory: Path) -> Ended:
    """Run a command in `directory`. Exits where it is no refusal but a crash, an interruption or a wrong option."""
    error = ""
    started = time.perf_counter()
    command = [sys.executable, "-m", "gfldeploy", *arguments]
    with subprocess.Popen(command, cwd=directory, stderr=subprocess.PIPE, text=True, errors="replace") as process:
        assert process.stderr is not None
        for text in process.stderr:
            sys.stderr.write(text)
            if text.startswith("Error: "):
                error = text.removeprefix("Error: ").strip()
        # Of the process and of every child that it waited for, the largest: getrusage would mix in earlier commands.
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode not in (0, 2) or "--help`" in error:
        sys.exit(f"`{command_text(arguments)}` ended with exit code {process.returncode}")
    seconds = time.perf_counter() - started
    return Ended(seconds, usage.ru_maxrss * 1024 / 1e6, error if process.returncode else None)


def command_text(arguments: Sequence[str]) -> str:
    """A command for the record; every path in it is relative to DIR."""
    return shlex.join(["gfldeploy", *arguments])


def write_black(folder: Path) -> None:
    """`BLACK_IMAGES` JPEGs with nothing on them."""
    import cv2
    import numpy as np

    folder.mkdir(parents=True, exist_ok=True)
    for index in range(BLACK_IMAGES):
        write_jpeg(cv2, folder / f"{index:06d}.jpg", np.zeros((480, 640, 3), np.uint8))


def write_pale(source: Path, folder: Path) -> None:
    """The images of `source` with their contrast cut."""
    import cv2
    import numpy as np

    folder.mkdir(parents=True, exist_ok=True)
    for path in sorted(source.glob("*.jpg")):
        image = cv2.imread(str(path))
        write_jpeg(cv2, folder / path.name, np.rint(128 + CONTRAST * (image.astype(np.float32) - 128)).astype(np.uint8))


def write_jpeg(cv2: Any, path: Path, image: Any) -> None:
    if not cv2.imwrite(str(path), image, [cv2.IMWRITE_JPEG_QUALITY, 95]):
        sys.exit(f"cannot write {path}")


if __name__ == "__main__":
    main()
