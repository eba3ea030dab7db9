"""What mixed orientations cost a batch, and what bucketing by size gives back.

    python benchmarks/batch_padding.py --bundle r50_int8 --data annotations.json --precision int8 --photos 427x640 \\
        --name gfl_r50_int8 --machine epyc-2core

Of the data, images of the most common landscape and of the most common portrait input size, as many of each, in turn;
with `--photos`, any landscape and portrait images, cropped and resized to photographs of that height and width and of
the same turned upright: 427x640 is 3:2, which the 800x1333 rule makes 800x1216 and 1216x800, the classic case of 1.52.
Interleaved, `--rounds` times: batch 1; and of each batch size the images listed (padded to a common size), bucketed,
and those of each orientation alone (as their mean). Prints images a second and the ratios that matter, of the network
and from file to boxes, each the median over the rounds with the smallest and the largest; writes all passes to
results/MACHINE/checks/NAME_padding.json beside this script.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import cv2

from gfldeploy.analysis.sweep import Pass, input_sizes, run_pass
from gfldeploy.batching.buckets import Order, Size
from gfldeploy.bench.timing import time_batch
from gfldeploy.bundle import Bundle
from gfldeploy.engines.base import EngineOptions
from gfldeploy.engines.hardware import usable_threads
from gfldeploy.engines.registry import open_engine
from gfldeploy.files import write_json
from gfldeploy.images.coco import CocoDataset
from gfldeploy.machine import describe_machine
from gfldeploy.serialization import plain

HERE = Path(__file__).resolve().parent
# Orders of images of both orientations, or one orientation alone.
WAYS = ("listed", "bucketed", "landscape", "portrait")
Leg = tuple[int, str]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bundle", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True, help="COCO annotations (.json), images/ beside them")
    parser.add_argument("--engine", default="onnxruntime")
    parser.add_argument("--precision", default="fp32")
    parser.add_argument("--name", required=True, help="of the results file and in the table")
    parser.add_argument("--machine", required=True, help="folder of results/ for this machine, such as epyc-2core")
    parser.add_argument("--photos", type=photo_size, metavar="HxW", help="make the images photographs of this size")
    parser.add_argument("--images", type=int, default=16, metavar="I", help="half of each orientation (default: 16)")
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[2, 4, 8])
    parser.add_argument("--rounds", type=int, default=3, metavar="R")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        measure(args, Path(folder))


def measure(args: argparse.Namespace, folder: Path) -> None:
    """`folder`: for photographs."""
    bundle = Bundle.open(args.bundle)
    paths = [image.path for image in CocoDataset.load(args.data).images]
    if args.photos:
        paths = photographs(paths, args.photos, args.images // 2, folder)
    landscape, portrait, sizes = choose(bundle, paths, args.images // 2)
    options = EngineOptions(args.precision, "cpu", usable_threads())
    mixed = [path for pair in zip(landscape, portrait, strict=True) for path in pair]
    with open_engine(args.engine, bundle, options) as engine:

        def once(leg: Leg) -> Pass:
            batch_size, way = leg
            paths, inputs = {"landscape": (landscape, sizes[:1]), "portrait": (portrait, sizes[1:])}.get(
                way, (mixed, sizes)
            )
            inputs = inputs * (len(paths) // len(inputs))
            order: Order = "bucketed" if way == "bucketed" else "listed"
            return run_pass(engine, paths, bundle, inputs, batch_size, order)

        legs: list[Leg] = [(1, "listed"), *((size, way) for size in args.batch_sizes for way in WAYS)]
        for size in (1, *args.batch_sizes):  # warm up every shape
            for paths in (mixed[:size], landscape[:size], portrait[:size]):
                time_batch(engine, [paths[k % len(paths)] for k in range(size)], bundle)
        passes: dict[Leg, list[Pass]] = {leg: [] for leg in legs}
        for number in range(args.rounds):
            turn = number * len(legs) // args.rounds
            for leg in legs[turn:] + legs[:turn]:
                passes[leg].append(once(leg))
    output = HERE / "results" / args.machine / "checks" / f"{args.name}_padding.json"
    output.parent.mkdir(parents=True, exist_ok=True)
    record = {
        "machine": plain(describe_machine()), "engine": args.engine, "precision": args.precision,
        "sizes": sizes, "photos": args.photos,
        "legs": [{"batch_size": leg[0], "way": leg[1], "rounds": plain(passes[leg])} for leg in legs],
    }  # fmt: skip
    write_json(output, record)
    shown = " and ".join(f"{height}x{width}" for height, width in sizes)
    print(f"Images of {shown}, padded together {passes[args.batch_sizes[0], 'listed'][0].padding:.2f}x\n")
    print(table(passes))


def photo_size(text: str) -> Size:
    """Height and width of a landscape photograph."""
    height, width = map(int, text.split("x"))
    if not 0 < height < width:
        raise ValueError("the width must be larger than the height")
    return height, width


def photographs(paths: Sequence[Path], size: Size, count: int, folder: Path) -> list[Path]:
    """So many landscape and as many portrait images of these, with their middle cropped and resized to the size."""
    written: dict[Size, list[Path]] = {size: [], size[::-1]: []}
    for path in paths:
        image = cv2.imread(str(path))
        height, width = image.shape[:2]
        wanted = size if width > height else size[::-1]
        if width == height or len(written[wanted]) == count:
            continue
        scale = min(height / wanted[0], width / wanted[1])
        cut = [max(int(side * scale), 1) for side in wanted]
        top, left = (height - cut[0]) // 2, (width - cut[1]) // 2
        target = folder / f"{len(written[wanted])}_{wanted[0]}x{wanted[1]}.jpg"
        crop = image[top : top + cut[0], left : left + cut[1]]
        cv2.imwrite(str(target), cv2.resize(crop, wanted[::-1], interpolation=cv2.INTER_AREA))
        written[wanted].append(target)
    return [path for some in written.values() for path in some]


def choose(bundle: Bundle, paths: Sequence[Path], count: int) -> tuple[list[Path], list[Path], tuple[Size, Size]]:
    """So many images of the most common landscape and portrait input sizes, and these sizes."""
    sizes = input_sizes(paths, bundle)
    counts = Counter(sizes)
    if not {size[1] > size[0] for size in counts if size[0] != size[1]} == {True, False}:
        raise SystemExit("there must be landscape and portrait images")
    wide = max((size for size in counts if size[1] > size[0]), key=lambda size: counts[size])
    tall = max((size for size in counts if size[0] > size[1]), key=lambda size: (size == wide[::-1], counts[size]))
    chosen = [[path for path, size in zip(paths, sizes, strict=True) if size == one][:count] for one in (wide, tall)]
    if min(map(len, chosen)) < count:
        raise SystemExit(f"there are only {[len(some) for some in chosen]} images of {wide} and {tall}: lower --images")
    return chosen[0], chosen[1], (wide, tall)


def table(passes: dict[Leg, list[Pass]]) -> str:
    """Images a second by batch size and order, and the ratios that are judged."""
    head = ("batch", "listed", "bucketed", "alone", "bucketed / listed", "bucketed / alone", "bucketed / batch 1")
    lines = []
    for name, what in (("inference_ms", "The network"), ("end_to_end_ms", "From file to boxes")):
        ms = {leg: [float(getattr(one, name)) for one in found] for leg, found in passes.items()}
        lines += [f"{what}, images a second:", "", f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
        lines.append(f"| 1 | {rate(ms[1, 'listed'])} | | | | | |")
        for size in dict.fromkeys(leg[0] for leg in passes if leg[0] > 1):
            listed, bucketed, wide, tall = (ms[size, way] for way in WAYS)
            alone = [(a + b) / 2 for a, b in zip(wide, tall, strict=True)]
            rates = [rate(one) for one in (listed, bucketed, alone)]
            ratios = [ratio(bucketed, one) for one in (listed, alone, ms[1, "listed"])]
            lines.append(f"| {size} | {' | '.join(rates + ratios)} |")
        lines.append("")
    return "\n".join(lines)


def rate(ms: list[float]) -> str:
    return f"{1e3 / statistics.median(ms):.3g}"


def ratio(ms: list[float], base: list[float]) -> str:
    """How many times as fast."""
    found = [b / a for a, b in zip(ms, base, strict=True)]
    return f"{statistics.median(found):.2f} ({min(found):.2f} to {max(found):.2f})"


if __name__ == "__main__":
    main()
