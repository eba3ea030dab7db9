"""What one NVIDIA GPU does with a detector, in a bounded time: run this where the GPU is, and keep what it writes.

    python benchmarks/gpu.py --dry-run                       # the same on the CPU in a minute: is everything in place?
    python benchmarks/gpu.py --minutes 30                    # the demo detector
    python benchmarks/gpu.py --minutes 30 --model gfl_r50    # GFL-R50 (random weights) at 800x1344

Bundles are made by `--prepare` (or by the first run) in the folder `--materials`, which needs PaddleDetection and
PaddleSlim. A machine with a GPU may have neither: prepare elsewhere, copy the folder, and run there; or give any
bundles of one detector with `--bundles FP32 INT8`. Images are generated: 384x640 and 640x384, which the demo detector
takes as 320x512 and 512x320, and the model zoo's 800x1333 rule as 800x1344 and 1344x800.

Every engine that can run on the GPU is measured in FP32 (in TF32 too), FP16 and INT8: at batch 1 to 32 on images of one
size, and at three of these batch sizes on images of both orientations, in batches of one size ("bucketed") and as they
come ("listed", padded to a square). Each is a process of its own, in which the engine is compared with the CPU before
it is timed. First come batch 1 and the largest, what the engines reach at best, then both orientations, the sizes
between, and mAP; engines that are built come after the others. Nothing is begun that would likely end after
`--minutes`. Stopped or out of time, it has written what it has, and the same command resumes.

Writes to results/MACHINE beside this script, or to `--output`: MODEL.json (images of one size) and MODEL_mixed.json
(both orientations) with .csv and .html as `gfldeploy bench` has them, MODEL_summary.md (routes, agreement with the CPU,
throughput, stages, the GPU meanwhile, and why a larger batch gains no more), checks/MODEL_doctor.json (`gfldeploy
doctor --json`). `--summary-of MODEL.json` writes the summary anew.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from textwrap import shorten

from gfldeploy import demo
from gfldeploy.batching.buckets import Order
from gfldeploy.bench.cell import STREAMS, Cell, Scenario, names
from gfldeploy.bench.columns import Column, text_of
from gfldeploy.bench.journal import Journal, journal_beside
from gfldeploy.bench.limits import alone, explain, explain_padding, line, stage_times
from gfldeploy.bench.matrix import Plan, plan
from gfldeploy.bench.report.page import machine_line, write_report
from gfldeploy.bench.results import BenchResults, CellResult
from gfldeploy.bench.runner import Data, Runner
from gfldeploy.bench.session import limits, nothing_to_run, open_bundles
from gfldeploy.bench.table import COLUMNS, FLAGS, Row, rows, write_csv
from gfldeploy.bench.timing import Settings
from gfldeploy.bundle import Bundle
from gfldeploy.demo.dataset import generate
from gfldeploy.doctor import diagnose
from gfldeploy.engines.base import Device, Obstacle, Precision
from gfldeploy.engines.cache import DEFAULT_ENGINE_CACHE
from gfldeploy.engines.hardware import (
    FIRST_WITH_TF32,
    compute_capabilities,
    gpu_models,
    nvidia_driver,
    usable_threads,
)
from gfldeploy.engines.registry import ENGINES, Capability, capabilities
from gfldeploy.errors import GfldeployError, MissingDependencyError, UsageError
from gfldeploy.files import write_json, write_text
from gfldeploy.images.coco import CocoDataset
from gfldeploy.images.decode import image_size
from gfldeploy.machine import Machine, describe_machine
from gfldeploy.progress import Progress, Silent
from gfldeploy.serialization import plain

HERE = Path(__file__).resolve().parent

PHOTO = 384, 640  # height and width of those in landscape
COMMAND = "benchmarks/gpu.py --prepare"
SCORED_IMAGES = 100
CALIBRATION_IMAGES = 16
# Batches of images of one size, and of both orientations: bucketed (offline) and listed.
UNIFORM: tuple[Scenario, ...] = STREAMS
MIXED: tuple[Scenario, ...] = (*STREAMS, "offline")
MIXED_SIZES = 3
PRECISIONS: Mapping[Device, tuple[Precision, ...]] = {"gpu": ("fp32", "fp16", "int8"), "cpu": ("fp32", "int8")}
# What a measurement takes besides the timing itself: to start, import an engine, decode, compare, build.
STARTUP_S = 15.0
OUT_OF_TIME = "the time was up", "run the same command again, which resumes"
FAILED_ALONE = "one image at a time failed", None
# Characters of a reason in the summary: libraries tell their whole state. The results have all of it.
REASON_WIDTH = 240


@dataclass(frozen=True)
class Job:
    """One call of the runner: to time a cell, or for one of its setup, the mAP or the peak of that."""

    cell: Cell
    mixed: bool = False
    accuracy: bool = False
    peak: bool = False

    def __str__(self) -> str:
        what = "mAP of " if self.accuracy else "peak of " if self.peak else ""
        return f"{what}{self.cell}{', both orientations' if self.mixed else ''}"


class TimeIsUpError(Exception):
    """Ends the measurements, and keeps the journal for the next run."""


class Lines(Silent):
    """Progress as lines on stderr, with the seconds since the start."""

    def __init__(self) -> None:
        self._start = time.monotonic()

    def stage(self, text: str) -> None:
        print(f"[{time.monotonic() - self._start:6.1f} s] {text}", file=sys.stderr, flush=True)

    def note(self, text: str) -> None:
        self.stage(f"Note: {text}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--machine", help="folder of results/ (default: the name of the GPU)")
    parser.add_argument("--minutes", type=float, default=30.0, help="begin nothing that would end later (default: 30)")
    parser.add_argument("--model", default="demo", help="demo, gfl_r50, or a name for your --bundles (default: demo)")
    parser.add_argument("--bundles", type=Path, nargs="+", default=[], metavar="DIR", help="of one detector")
    parser.add_argument("--data", type=Path, metavar="COCO.json", help="images with boxes, for mAP of your --bundles")
    parser.add_argument("--materials", type=Path, default=Path("gpu-materials"), metavar="DIR", help="of --prepare")
    parser.add_argument("--prepare", action="store_true", help="make bundles and images, and stop")
    parser.add_argument("--dry-run", action="store_true", help="everything on the CPU, briefly, to see that it works")
    parser.add_argument("--engines", nargs="+", choices=ENGINES, help="(default: all that the device has)")
    parser.add_argument("--batch-sizes", type=positive, nargs="+", default=[1, 2, 4, 8, 16, 32], metavar="N")
    parser.add_argument(
        "--images", type=positive, default=32, metavar="N", help="to time, both orientations (default: 32)"
    )
    parser.add_argument("--seconds", type=float, default=3.0, metavar="S", help="of timing a cell (default: 3)")
    parser.add_argument("--count", type=positive, default=30, metavar="N", help="inferences at least (default: 30)")
    parser.add_argument("--engine-cache", type=Path, default=DEFAULT_ENGINE_CACHE, metavar="DIR")
    parser.add_argument("--output", type=Path, metavar="DIR", help="in place of results/MACHINE beside this script")
    parser.add_argument("--summary-of", type=Path, metavar="MODEL.json", help="write its summary anew, and stop")
    args = parser.parse_args()
    if args.dry_run:
        args.batch_sizes, args.images, args.seconds, args.count = [1, 2], 4, 0.2, 2
        args.engines = args.engines or ["onnxruntime"]
        args.output = args.output or args.materials / "dry-run"
    try:
        if args.summary_of:
            write_summary(
                args.summary_of, [BenchResults.read(one) for one in (args.summary_of, mixed_file(args.summary_of))]
            )
            return
        if not (args.prepare or args.dry_run or nvidia_driver()):
            raise UsageError("no NVIDIA driver is loaded", "Run this where a GPU is, or with --prepare or --dry-run.")
        bundles, photos, scored = prepare(args, Lines())
        if args.prepare:
            print(f"{args.materials} is ready: copy it to the machine with the GPU, and run there:")
            print(f"    python benchmarks/gpu.py --materials {args.materials.name} --model {args.model} --minutes 30")
        else:
            print(measure(args, bundles, photos, scored, Lines()))
    except GfldeployError as error:
        raise SystemExit(f"Error: {error}") from error
    except OSError as error:
        raise SystemExit(f"Error: {error.filename}: {error.strerror}") from error
    except KeyboardInterrupt as error:
        raise SystemExit("Stopped: what was measured is written, and the same command resumes.") from error


def positive(text: str) -> int:
    """A whole number from 1. Raises `ValueError`."""
    if (number := int(text)) < 1:
        raise ValueError(f"{text} is less than 1")
    return number


def prepare(args: argparse.Namespace, progress: Progress) -> tuple[list[Path], list[Path], Path | None]:
    """Bundles, and COCO files of the images to time, of one size and of both orientations, and of those for mAP.

    What is not there yet is made.
    """
    folder = args.materials / args.model
    bundles: list[Path] = args.bundles
    if not bundles:
        bundles = [folder / name for name in ("fp32", "int8")]
        if not all((one / "manifest.json").is_file() for one in bundles):
            if args.model not in MAKERS:
                raise UsageError(f"no bundles of {args.model} are in {folder}", "Give them with --bundles.")
            progress.stage(f"making the bundles of {args.model}")
            try:
                MAKERS[args.model](folder, progress)
            except MissingDependencyError as error:
                elsewhere = "run this with --prepare where PaddleDetection is and copy the folder, or give --bundles"
                raise MissingDependencyError(error.problem, f"{error.remedy}. Or {elsewhere}.") from error
    val = generate(folder / "data", "val", SCORED_IMAGES)
    scored = args.data if args.bundles else val if args.model == "demo" else None
    return bundles, write_photos(val, folder / "photos", args.images), scored


def make_demo(folder: Path, progress: Progress) -> None:
    """The trained demo detector."""
    from gfldeploy.export.exporter import export_bundle
    from gfldeploy.quant.quantizer import quantize_bundle

    calib = generate(folder / "data", "calib", CALIBRATION_IMAGES)
    config, weights, fp32 = demo.config_path(), demo.weights_path(), folder / "fp32"
    export_bundle(config=config, weights=weights, output=fp32, force=True, command=COMMAND, progress=progress)
    quantize_bundle(
        fp32,
        data=calib,
        samples=CALIBRATION_IMAGES,
        output=folder / "int8",
        force=True,
        command=COMMAND,
        progress=progress,
    )


def make_r50(folder: Path, progress: Progress) -> None:
    """GFL-R50 with random weights, that of the other recipes."""
    subprocess.run([sys.executable, str(HERE / "materials.py"), "--output", str(folder)], check=True)


MAKERS: Mapping[str, Callable[[Path, Progress], None]] = {"demo": make_demo, "gfl_r50": make_r50}


def write_photos(annotations: Path, folder: Path, count: int) -> list[Path]:
    """Images cut out of others, half landscape and half portrait; COCO files of the first, and of both in turn."""
    sys.path.insert(0, str(HERE))
    from batch_padding import photographs

    (folder / "images").mkdir(parents=True, exist_ok=True)
    sources = [one.path for one in CocoDataset.load(annotations).images]
    made = photographs(sources, PHOTO, -(-count // 2), folder / "images")
    landscape, portrait = made[: len(made) // 2], made[len(made) // 2 :]
    turns = [path for pair in zip(landscape, portrait, strict=True) for path in pair][:count]
    files = []
    for name, paths in (("one_size", landscape), ("mixed", turns)):
        sizes = [image_size(path) for path in paths]
        images = [
            {"id": number, "file_name": path.name, "height": height, "width": width}
            for number, (path, (height, width)) in enumerate(zip(paths, sizes, strict=True), start=1)
        ]
        categories = [{"id": 1, "name": "any"}]
        write_json(folder / f"{name}.json", {"images": images, "annotations": [], "categories": categories})
        files.append(folder / f"{name}.json")
    return files


def measure(
    args: argparse.Namespace, bundles: Sequence[Path], photos: Sequence[Path], scored: Path | None, progress: Progress
) -> str:
    """Everything from the plan to the files; returns the summary."""
    device: Device = "cpu" if args.dry_run else "gpu"
    folder = args.output or HERE / "results" / (args.machine or machine_name(gpu_models()))
    output = folder / f"{args.model}.json"
    (folder / "checks").mkdir(parents=True, exist_ok=True)
    write_json(folder / "checks" / f"{args.model}_doctor.json", diagnose().to_dict())
    for told in routes(capabilities(), device):
        progress.stage(told)
    opened, sizes = open_bundles(bundles), breadth_first(sorted(set(args.batch_sizes)))
    settings = Settings(min_seconds=args.seconds, min_count=args.count, max_seconds=2 * args.seconds)
    machine = describe_machine()

    def part(file: Path, photos: Path, sizes: Sequence[int], scenarios: Sequence[Scenario]) -> Part:
        planned = plan_cells(opened, args.engines, sizes, device, scenarios)
        data = data_of(photos, scored, opened, 4 if args.dry_run else SCORED_IMAGES)
        return Part(planned, data, settings, machine, file)

    uniform = part(output, photos[0], sizes, UNIFORM)
    mixed = part(mixed_file(output), photos[1], sizes[:MIXED_SIZES], MIXED)
    if not uniform.planned.cells:
        raise nothing_to_run(uniform.planned)
    session = Session(uniform, mixed, time.monotonic() + 60 * args.minutes, progress)
    count = len(uniform.planned.cells) + len(mixed.planned.cells)
    progress.stage(f"{count} cells to measure, in {args.minutes:g} minutes at most; results go to {folder}")
    try:
        with (
            suppress(TimeIsUpError),
            journal_beside(uniform.output, "bench") as one,
            journal_beside(mixed.output, "bench") as other,
        ):
            session.run((one, other), args.engine_cache, accuracy=scored is not None)
    finally:
        for results, path in zip(session.write(), (uniform.output, mixed.output), strict=True):
            write_report(results, path.with_suffix(".html"))
            write_csv(results, path.with_suffix(".csv"))
    return summary(session.results())


def mixed_file(output: Path) -> Path:
    """Beside the results of images of one size, those of both orientations."""
    return output.with_name(f"{output.stem}_mixed.json")


def machine_name(models: Sequence[str]) -> str:
    """A folder's name for the GPU: "nvidia-h100-80gb-hbm3"."""
    return re.sub(r"[^a-z0-9]+", "-", models[0].lower()).strip("-") if models else "gpu"


def plan_cells(
    bundles: Sequence[Bundle],
    engines: Sequence[str] | None,
    sizes: Sequence[int],
    device: Device,
    scenarios: Sequence[Scenario],
) -> Plan:
    """All cells in the order of the batch sizes, engines that are built for shapes last; FP32 in TF32 too
    on a GPU that has it."""
    if engines is None:
        engines = [name for name, spec in ENGINES.items() if not isinstance(spec.graph("fp32", device), Obstacle)]
    found = plan(bundles, engines, PRECISIONS[device], sizes, device, usable_threads(), scenarios)
    cells = list(found.cells)
    if device == "gpu" and max(compute_capabilities(), default=FIRST_WITH_TF32) >= FIRST_WITH_TF32:
        cells += [replace(cell, tf32=True) for cell in cells if cell.precision == "fp32"]
    cells.sort(key=lambda cell: (sizes.index(cell.batch_size), ENGINES[cell.engine].needs_shapes, cell.engine))

    def tells(cell: Cell) -> bool:
        return cell.batch_size > 1 or cell.scenario == "single-stream"  # batch 1 has no orders to tell apart

    skipped = tuple(one for one in found.skipped if tells(one.cell))
    return Plan(tuple(filter(tells, cells)), skipped, found.bundles)


def breadth_first(sizes: Sequence[int]) -> list[int]:
    """The first, the last, then the middle of what is between, and so on: a curve is seen early."""
    found = [*sizes[:1], *sizes[1:][-1:]]
    gaps = [list(sizes[1:-1])]
    while gaps:
        gap = gaps.pop(0)
        if gap:
            middle = len(gap) // 2
            found.append(gap[middle])
            gaps += [gap[:middle], gap[middle + 1 :]]
    return found


def data_of(photos: Path, scored: Path | None, bundles: Sequence[Bundle], count: int) -> Data:
    """The images to time, and `count` of those for mAP."""
    timed = Data.load(photos, None, None, accuracy=False, accuracy_limit=None, bundles=bundles)
    if scored is None:
        return timed
    both = Data.load(scored, None, 1, accuracy=True, accuracy_limit=count, bundles=bundles)
    own = timed.description
    described = replace(both.description, timed_sha256=own.timed_sha256, timed_images=own.timed_images)
    return replace(both, images=timed.images, description=described)


@dataclass
class Part:
    """What is planned on one set of images, and what is known so far."""

    planned: Plan
    data: Data
    settings: Settings
    machine: Machine
    output: Path
    known: dict[Cell, CellResult] = field(default_factory=dict)

    def results(self, alone_known: Mapping[Cell, CellResult]) -> BenchResults:
        """What is known, and why the rest is not; mAP and peak of a setup are those of its cell in `alone_known`."""
        cells = []
        for cell in self.planned.cells:
            one, single = self.known.get(cell), alone_known.get(alone(cell))
            if one is None:
                one = CellResult(cell, "skipped", *OUT_OF_TIME)
            elif single and one.status == "ok":
                shared = single.accuracy, single.accuracy_reason, single.peak
                one = replace(one, accuracy=shared[0], accuracy_reason=shared[1], peak=shared[2])
            cells.append(one)
        created = datetime.now(UTC).isoformat(timespec="seconds")
        every = (*cells, *self.planned.skipped)
        return BenchResults(created, self.machine, self.data.description, self.settings, every)


@dataclass
class Session:
    """What is measured, until when; what is known is written after each measurement.

    `seconds`: the longest measurement of an engine.
    """

    uniform: Part
    mixed: Part
    deadline: float
    progress: Progress
    seconds: dict[str, float] = field(default_factory=dict)

    def run(self, journals: Sequence[Journal], engine_cache: Path, accuracy: bool) -> None:
        """Measure everything. Raises `TimeIsUpError`."""
        runners = [
            Runner(
                part.planned.bundles, part.data, journal, limits(600.0), engine_cache, {"machine": plain(part.machine)}
            )
            for part, journal in zip((self.uniform, self.mixed), journals, strict=True)
        ]
        jobs, late = list(self.jobs(accuracy)), False
        for number, job in enumerate(jobs):
            cell, start = job.cell, time.monotonic()
            part, runner = (self.mixed, runners[1]) if job.mixed else (self.uniform, runners[0])
            expected = self.seconds.get(cell.engine, STARTUP_S + 4 * part.settings.max_seconds)
            if start + expected > self.deadline:  # those that are not built first may still be in time
                late = True
                continue
            first = self.uniform.known.get(alone(cell))
            if first and first.status == "failed":
                part.known.setdefault(cell, CellResult(cell, "skipped", *FAILED_ALONE))
                continue
            self.progress.stage(f"{number + 1}/{len(jobs)} {job}")
            part.known[cell] = runner.measure([cell], part.settings, accuracy=job.accuracy, peak=job.peak)[0]
            took = time.monotonic() - start
            self.seconds[cell.engine] = max(took, self.seconds.get(cell.engine, 0.0)) if took > 1 else expected
            self.write()
        if late:
            raise TimeIsUpError

    def jobs(self, accuracy: bool) -> Iterator[Job]:
        """In the order in which they are done."""
        cells, both = self.uniform.planned.cells, self.mixed.planned.cells
        first = [cell for cell in cells if cell == alone(cell)]
        ends = list(dict.fromkeys(cell.batch_size for cell in cells))[:2]
        yield from (Job(cell) for cell in cells if cell.batch_size in ends)
        yield from (Job(cell, peak=True) for cell in first)
        yield from (Job(cell, mixed=True) for cell in both if cell.batch_size in ends)
        yield from (Job(cell) for cell in cells if cell.batch_size not in ends)
        yield from (Job(cell, mixed=True) for cell in both if cell.batch_size not in ends)
        if accuracy:
            yield from (Job(cell, accuracy=True, peak=True) for cell in first)

    def results(self) -> list[BenchResults]:
        """Of images of one size, and of both orientations."""
        return [part.results(self.uniform.known) for part in (self.uniform, self.mixed)]

    def write(self) -> list[BenchResults]:
        """The results and their summary."""
        found = self.results()
        found[0].write(self.uniform.output)
        found[1].write(self.mixed.output)
        write_summary(self.uniform.output, found)
        return found


def write_summary(path: Path, found: Sequence[BenchResults]) -> None:
    """Beside the results in `path`."""
    write_text(path.with_name(f"{path.stem}_summary.md"), summary(found))


def routes(found: Iterable[Capability], device: Device) -> list[str]:
    """For each engine, what it runs on the device here, and why it does not run the rest."""
    lines = []
    by_engine: dict[str, list[Capability]] = defaultdict(list)
    for one in found:
        if one.device == device and one.precision in PRECISIONS[device]:
            by_engine[one.engine].append(one)
    for name, some in by_engine.items():
        runs = ", ".join(one.precision for one in some if one.works) or "nothing"
        why: dict[tuple[str | None, str | None], list[str]] = defaultdict(list)
        for one in some:
            if not one.works:
                why[one.reason, one.remedy].append(one.precision)
        told = "".join(f"; not {', '.join(which)}: {reason} ({remedy})" for (reason, remedy), which in why.items())
        lines.append(f"{name} runs {runs}{told}")
    return lines


def summary(found: Sequence[BenchResults]) -> str:
    """The results of images of one size, and of both orientations, as a page of Markdown; all of it is computed."""
    (every, both), results = ([rows(one) for one in found], found[0])
    measured, tried = [row for row in every if row.ok], [*every, *both]
    possible = [row for row in tried if row.result.status != "skipped" or row.result.reason == OUT_OF_TIME[0]]
    waiting = any(row.result.status == "skipped" for row in possible)
    more = f" ({OUT_OF_TIME[0]}: {OUT_OF_TIME[1]})" if waiting else ""
    where = ", ".join(dict.fromkeys(results.machine.gpus)) or results.machine.cpu
    parts = [
        f"# {' and '.join(sorted({row.cell.bundle.name for row in every}))} on {where}",
        f"{machine_line(results.machine, results.created)}. {sum(row.ok for row in tried)} of {len(possible)} cells "
        f"measured{more}, {results.settings.min_seconds:g} s for each timing.",
        *([f"{FLAGS['quick'].capitalize()}."] if results.settings.quick else []),
    ]

    def section(title: str, about: str, body: str) -> None:
        if body:
            parts.extend(filter(None, (f"## {title}", about, body)))

    section("What ran, and what did not", "", "\n".join(f"- {told}" for told in ran(tried)))
    about = "The largest differences of each, over all batch sizes; no configuration that differs by more than its "
    section("Against the CPU", f"{about}precision explains is timed.", parity([row for row in tried if row.ok]))
    for title, value in (
        ("Images a second, the network alone", lambda row: row.images_per_s),
        ("Images a second, from file to boxes, one batch after the other", lambda row: row.file_images_per_s),
    ):
        section(title, "", curve(every, both, value))
    section("Why a larger batch gains no more", "", "\n".join(f"- {told}" for told in explain(measured)))
    section("What mixed orientations cost", "", "\n".join(f"- {told}" for told in explain_padding(both)))
    about = "Milliseconds of one image in batches of one size, one stage after the other."
    section("Stages from file to boxes", about, markdown(STAGE_COLUMNS, by_setup(measured)))
    about = "While the network runs alone, on images of one size."
    section("The hardware meanwhile", about, markdown(HARDWARE_COLUMNS, by_setup(measured)))
    flags = dict.fromkeys(flag for row in tried for flag in row.flags)
    section("Flags", "", "\n".join(f"- {flag}: {FLAGS[flag]}" for flag in flags))
    return "\n\n".join(parts) + "\n"


def ran(every: Sequence[Row]) -> Iterator[str]:
    """A line for each engine that ran, and for each reason why something did not."""
    cells = [row.cell for row in every]
    for setup in dict.fromkeys(alone(row.cell) for row in every if row.ok):
        (row, *_) = (row for row in every if row.ok and alone(row.cell) == setup)
        run = row.result.runs[-1]
        facts = [f"version {run.engine_version}", *filter(None, [run.delegated])]
        if row.cell.precision != "fp32" and row.low_precision:
            facts.append(f"{row.low_precision} convolutions in less than FP32")
        if run.build_s is not None:
            facts.append(f"built or read from the cache in {run.build_s:.0f} s")
        if row.ap is not None:
            facts.append(f"mAP {row.ap:.4f}")
        yield f"{setup.setup(cells)} ran: {', '.join(facts)}"
    reasons: dict[str, list[Cell]] = defaultdict(list)
    for row in every:
        if row.note:
            reasons[shorten(row.note, REASON_WIDTH, placeholder=" ...")].append(row.cell)
    for note, some in reasons.items():
        yield f"{names(some, cells)}: {note}"


def parity(measured: Sequence[Row]) -> str:
    """How far each setup is from the CPU."""
    lines = [["", "images compared", "with", "scores off by", "boxes off by, px", "detections not found again"]]
    cells = [row.cell for row in measured]
    for setup in dict.fromkeys(map(alone, cells)):
        mine = [row.parity for row in measured if alone(row.cell) == setup and row.parity]
        if mine:
            lines.append(
                [
                    *(setup.setup(cells), str(sum(one.images for one in mine)), mine[0].reference),
                    f"{max(one.score_difference_max for one in mine):.2g}",
                    f"{max(one.box_difference_max_px for one in mine):.2g}",
                    f"{sum(one.unmatched for one in mine)} of {sum(one.detections for one in mine)}",
                ]
            )
    return table(lines) if len(lines) > 1 else ""


def curve(uniform: Sequence[Row], mixed: Sequence[Row], value: Callable[[Row], float | None]) -> str:
    """Setups by batch size, on images of one size and of both orientations."""
    tried = [row for row in (*uniform, *mixed) if row.result.status != "skipped"]
    sizes = sorted({row.cell.batch_size for row in tried})
    lines = [["", "images", *(f"batch {size}" for size in sizes)]]
    cells = [row.cell for row in tried]
    ways: list[tuple[str, Sequence[Row], Order]] = [
        ("one size", uniform, "listed"),
        ("both orientations, bucketed", mixed, "bucketed"),
        ("both orientations, padded", mixed, "listed"),
    ]
    for setup in dict.fromkeys(map(alone, cells)):
        for number, (what, of, order) in enumerate(ways):
            mine = line([row for row in of if row in tried and alone(row.cell) == setup], order)
            # Batch 1 has no orders to tell apart.
            found = {row.cell.batch_size: outcome(row, value) for row in mine if number < 2 or row.cell.batch_size > 1}
            name = "" if number else setup.setup(cells)
            lines += [[name, what, *(found.get(size, "") for size in sizes)]] if found else []
    return table(lines) if cells else ""


def outcome(row: Row, value: Callable[[Row], float | None]) -> str:
    """The value, or what went wrong in a word."""
    if row.ok:
        return text_of(value(row))
    return "differs" if (row.result.reason or "").startswith("differs from the CPU") else "failed"


def by_setup(measured: Sequence[Row]) -> list[Row]:
    """Setup by setup, by batch size."""
    setups = list(dict.fromkeys(alone(row.cell) for row in measured))
    return sorted(measured, key=lambda row: (setups.index(alone(row.cell)), row.cell.batch_size))


def _stage(name: str) -> Callable[[Row], float | None]:
    return lambda row: getattr(times, name) if (times := stage_times(row)) else None


_NAMES = [column for column in COLUMNS if column.key in ("engine", "precision", "tf32", "batch_size")]
STAGE_COLUMNS: list[Column[Row]] = [
    *_NAMES,
    Column("decode", "decode", _stage("decode_ms")),
    Column("preprocess", "preprocess", _stage("preprocess_ms")),
    Column("input", "to the device", _stage("input_copy_ms")),
    Column("gb", "GB/s", _stage("input_gb_per_s"), digits=1),
    Column("network", "network", _stage("inference_ms")),
    Column("output", "from the device", _stage("output_copy_ms")),
    Column("nms", "NMS", _stage("postprocess_ms")),
    Column("all", "all", _stage("end_to_end_ms")),
]
_HARDWARE = ("gpu_memory_mb", "gpu_percent", "gpu_clock_mhz", "gpu_power_w", "joules_per_image", "gmac_per_s")
HARDWARE_COLUMNS: list[Column[Row]] = [
    *_NAMES,
    *(column for column in COLUMNS if column.key in (*_HARDWARE, "percent_of_peak", "percent_of_bandwidth", "flags")),
]


def markdown(columns: Sequence[Column[Row]], shown: Sequence[Row]) -> str:
    """Those columns that say something, as a table."""
    kept = [column for column in columns if column.shown(shown)]
    if len(kept) <= len(_NAMES) - 1:
        return ""
    return table([[column.title for column in kept], *([column.text(row, False) for column in kept] for row in shown)])


def table(lines: Sequence[Sequence[str]]) -> str:
    """The first line is the header."""
    head, *body = (f"| {' | '.join(words)} |" for words in lines)
    return "\n".join([head, f"|{'---|' * len(lines[0])}", *body])


if __name__ == "__main__":
    main()
