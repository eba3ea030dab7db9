"""`deploy.yml`: what to deploy on this machine, what came second, and the figures behind it.

docs/formats.md has its history: files of older schemas are upgraded on reading.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gfldeploy.batching.buckets import Size
from gfldeploy.bench.cell import Cell
from gfldeploy.bench.compare import hardware_differences, software_differences
from gfldeploy.bench.estimates import Estimate
from gfldeploy.bench.results import DataDescription
from gfldeploy.bundle import Bundle
from gfldeploy.detection_options import AS_CONFIGURED, DetectionOptions
from gfldeploy.engines.base import EngineOptions, Shape
from gfldeploy.engines.registry import check_possible
from gfldeploy.engines.tensorrt import Profile, possible_shapes
from gfldeploy.errors import BundleError, DataError
from gfldeploy.files import StrPath
from gfldeploy.machine import Machine, describe_machine
from gfldeploy.serialization import FileFormat, Upgrade, Versioned, part
from gfldeploy.tune.knee import Knee
from gfldeploy.tune.search import Bounds

MOST_SHAPES = 16  # in the file


def _configurations(data: dict[str, Any], upgrade: Upgrade) -> dict[str, Any]:
    """The data with its choice and runner-up upgraded."""
    present = (key for key in ("choice", "runner_up") if data.get(key) is not None)
    return {**data, **{key: upgrade(dict(part(data, key))) for key in present}}


def _from_schema_1(data: dict[str, Any]) -> dict[str, Any]:
    """Schema 2 measures from file to boxes; before, speeds and latencies were of the network alone."""

    def upgraded(one: dict[str, Any]) -> dict[str, Any]:
        old = part(one, "evidence")
        kept = {name: value for name, value in old.items() if name not in ("latency_ms", "latency_percent")}
        network = {"network_images_per_s": old["images_per_s"], "network_p50_ms": old["latency_p50_ms"]}
        unknown = ("images_per_s", "latency_p50_ms", "latency_p99_ms", "latency_max_ms", "padded")
        return {**one, "evidence": {**kept, **network, **dict.fromkeys(unknown), "quick": False}}

    return {**_configurations(data, upgraded), "knee": None}


# The policies of schemas 1 and 2, as orders and scenarios.
_POLICIES = {
    "single": ("listed", "single-stream"),
    "in-order": ("listed", "multi-stream"),
    "grouped": ("bucketed", "offline"),
}


def _from_schema_2(data: dict[str, Any]) -> dict[str, Any]:
    """Schema 3 has a cell, as results have, and the knee's curve as pairs.

    The bundle's name in its manifest was not recorded before.
    """

    def upgraded(cell: dict[str, Any]) -> dict[str, Any]:
        path, digest, evidence = (cell.pop(name) for name in ("bundle", "digest", "evidence"))
        cell["order"], cell["scenario"] = _POLICIES[cell.pop("policy")]
        name = path.rpartition("/")[2]
        cell["bundle"] = {"name": name, "directory": name, "digest": digest}
        return {"path": path, "cell": cell, "evidence": evidence}

    knee = data["knee"] and {
        "batch_size": data["knee"]["batch_size"],
        "curve": [[point["batch_size"], point["images_per_s"]] for point in data["knee"]["curve"]],
    }
    return {**_configurations(data, upgraded), "knee": knee}


def _from_schema_3(data: dict[str, Any]) -> dict[str, Any]:
    """Its cells did not say whether FP32 was in TF32: the default."""
    return data


def _from_schema_4(data: dict[str, Any]) -> dict[str, Any]:
    """Its cells are all of the bundles' own input sizes: the default."""
    return data


def _from_schema_5(data: dict[str, Any]) -> dict[str, Any]:
    """Its cells are all of the networks alone: the default."""
    return data


def _from_schema_6(data: dict[str, Any]) -> dict[str, Any]:
    """It knew no `detection`, and its cells are all of whole images: the defaults."""
    return data


_UPGRADES = {
    1: _from_schema_1,
    2: _from_schema_2,
    3: _from_schema_3,
    4: _from_schema_4,
    5: _from_schema_5,
    6: _from_schema_6,
}


@dataclass(frozen=True)
class Evidence:
    """What was measured of a configuration, with 95% intervals; their bounds are null where the samples support none.

    From file to boxes (decode, preprocess, network, NMS), one batch after the other in each stream, nothing
    overlapping: `images_per_s`, the median over whole passes through the timed images, `n` of them; of a batch
    `latency_p50_ms`, the median, `latency_p99_ms`, null where its samples are too few to know it
    (`measured.TAIL_COUNT`), and `latency_max_ms`, the largest of them. All null in files of schema 1.
    `network_images_per_s`, `network_p50_ms`: of the network alone on prepared batches. `quick`: measured too briefly
    for figures to be quoted. `padded`: whether batches held images of several sizes, which changes boxes and scores;
    null where that is not known. `memory_mb`: peak resident memory less the prepared inputs, 10^6 bytes. `ap`: COCO
    mAP, 0 to 1, of `ap_images` images; `ap_drop`: the FP32 bundle's less that; null where it was not measured. `runs`:
    processes that measured it, the first `started` then (UTC, ISO 8601).
    """

    images_per_s: Estimate | None
    latency_p50_ms: Estimate | None
    latency_p99_ms: Estimate | None
    latency_max_ms: float | None
    network_images_per_s: Estimate
    network_p50_ms: Estimate
    quick: bool
    padded: bool | None
    memory_mb: float
    ap: float | None
    ap_drop: float | None
    ap_images: int | None
    runs: int
    started: str


@dataclass(frozen=True)
class Configuration:
    """One way to deploy: a `cell`, its bundle's directory, `path`, relative to the file, and the `evidence`."""

    path: str
    cell: Cell
    evidence: Evidence

    def __post_init__(self) -> None:
        if Path(self.path).is_absolute():
            raise ValueError("path must be relative to the file")


@dataclass(frozen=True)
class SizeChoice:
    """What the choice's input size costs and gains, where there were several.

    `own_size`: of the choice's bundle, (height, width) in pixels. `speed`: images a second from file to boxes of the
    choice by those at the own size, in the same engine and precision, both measured at length; `ap_less`: mAP, 0 to 1,
    that the choice has less than there. Both null where the choice has the own size, or where that was not measured.
    `drops`: input sizes, the largest first, with the mAP that they lose in the choice's precision against the FP32
    bundle at its own size: those at which it was measured, in whichever engine.
    """

    own_size: Size
    speed: Estimate | None
    ap_less: float | None
    drops: tuple[tuple[Size, float], ...]

    def __post_init__(self) -> None:
        if any(min(size) < 1 for size in (self.own_size, *(size for size, _ in self.drops))):
            raise ValueError("input sizes must be of at least one pixel")


@dataclass(frozen=True)
class SearchRecord:
    """How the choice was found: of `cells` possible ones `measured` were, in `seconds` of the run that wrote the file.

    `reused`: of those measured, taken from results of `gfldeploy bench`. `complete`: not cut short by the time allowed.
    """

    cells: int
    measured: int
    reused: int
    seconds: float
    exhaustive: bool
    complete: bool


@dataclass(frozen=True)
class Deploy(Versioned):
    """The content of `deploy.yml`: the `choice` and the `runner_up`, None where nothing else kept the bounds.

    `created`: UTC, ISO 8601. `summary`: one paragraph in plain words. `bounds`: what was asked for. `knee`: of the
    choice's engine, precision, input size, threads and order; None where a single batch size was measured. `search`:
    how the choice was found; `machine`, `data`: where and on what. `shapes`: (batch, height, width) of the network's
    inputs that the choice makes of all images that were used, at its input size, the most common first, for engines
    that are built for shapes; at most 16, the last two of which then bound those that are left out. Empty in files of
    earlier schemas. `sizes`: what the choice's input size costs and gains; None where there was one input size alone.
    `detection`: what users turn of NMS and of what is shown, None for nothing; the evidence is of the config's own NMS.
    """

    FORMAT = FileFormat("a deploy file", "gfldeploy tune", 7, _UPGRADES, yaml=True)

    created: str
    summary: str
    choice: Configuration
    runner_up: Configuration | None
    bounds: Bounds
    knee: Knee | None
    search: SearchRecord
    machine: Machine
    data: DataDescription
    shapes: tuple[Shape, ...] = ()
    sizes: SizeChoice | None = None
    detection: DetectionOptions | None = None

    def __post_init__(self) -> None:
        if len(self.shapes) > MOST_SHAPES:
            raise ValueError(f"shapes must be at most {MOST_SHAPES}, not {len(self.shapes)}")
        if self.choice.cell.tiling is not None:
            raise ValueError("the choice's tiling must be null: tiles are asked for by `--tile`, or Detector's `tile`")
        most = self.choice.cell.batch_size
        if wrong := [shape for shape in self.shapes if min(shape) < 1 or shape[0] > most]:
            raise ValueError(f"shapes must be of 1 to {most} images with pixels, not {list(wrong[0])}")

    def check(self, bundle: Bundle, machine: Machine) -> tuple[str, ...]:
        """Raise where the choice does not hold: `BundleError` for another bundle, `DataError` for other hardware.

        Returns what is installed in other versions than where it was tuned: the choice may hold, its figures need not.
        """
        tuned = self.choice.cell.bundle
        if bundle.digest != tuned.digest:
            raise BundleError(
                f"{bundle.directory} is not the bundle that was tuned, {tuned.directory}: its manifest has the SHA-256 "
                f"{bundle.digest[:12]}, not {tuned.digest[:12]}",
                "Give the bundle that was tuned, or run `gfldeploy tune` on this one.",
            )
        sized = bundle.at_size(self.choice.cell.input_size)
        possible = Profile.spanning([(1, 1, 1), *possible_shapes(sized.manifest, self.choice.cell.batch_size)])
        if impossible := [shape for shape in self.shapes if not possible.covers(shape)]:
            problem = f"{bundle.directory} makes no input of {'x'.join(map(str, impossible[0]))} of any image"
            raise BundleError(problem, "Run `gfldeploy tune` again.")
        if differences := list(hardware_differences(self.machine, machine)):
            raise DataError(
                f"the choice was made on another machine: {'; '.join(map(str, differences))}",
                "Run `gfldeploy tune` on this one.",
            )
        return tuple(map(str, software_differences(self.machine, machine)))

    def bundle_path(self, path: Path) -> Path:
        """Where the choice's bundle is, `path` being that of the file."""
        return path.parent / self.choice.path


def check_deploy(path: StrPath, bundle: StrPath | None = None) -> tuple[str, ...]:
    """Check that the choice in a `deploy.yml` holds for this machine and for its bundle, and can run.

    Args:
        path: The `deploy.yml` that `tune_bundles` wrote.
        bundle: The directory of the bundle; by default where the file says.

    Returns:
        What is installed in other versions than where it was tuned: the choice may hold, its figures need not.

    Raises:
        BundleError: The bundle is damaged, or not the one that was tuned.
        DataError: The file cannot be read, or was made on another machine.
        UnsupportedError: The bundle does not run in this engine and precision here.
        UsageError: What the file turns of NMS cannot be.
    """
    path = Path(path)
    deploy = Deploy.read(path)
    opened, cell = Bundle.open(bundle or deploy.bundle_path(path)), deploy.choice.cell
    changes = deploy.check(opened, describe_machine())
    check_possible(cell.engine, opened, EngineOptions(cell.precision, cell.device, cell.threads, streams=cell.streams))
    opened.manifest.turned(deploy.detection or AS_CONFIGURED)
    return changes
