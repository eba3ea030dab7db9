"""`results.json`: raw samples with everything needed to judge them. docs/formats.md describes the schema."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from gfldeploy.accuracy import Accuracy
from gfldeploy.batching.latency import Point
from gfldeploy.bench.cell import Cell
from gfldeploy.bench.timing import Samples, Settings, Stages
from gfldeploy.machine import Machine
from gfldeploy.serialization import FileFormat, Versioned, part

Status = Literal["ok", "failed", "skipped"]
_SHAPE = re.compile(r"[1-9]\d{0,8}(x[1-9]\d{0,8}){3}", re.ASCII)


@dataclass(frozen=True)
class DataDescription:
    """What was measured on: the SHA-256 of the annotation file, and how many of its images.

    `timed_images` went through the timing, and `timed_sha256` is of their contents in order; `accuracy_images` is None
    where accuracy was not measured.
    """

    annotations_sha256: str
    timed_sha256: str
    timed_images: int
    accuracy_images: int | None

    def same_accuracy_images(self, other: DataDescription) -> bool:
        """Whether mAP is of the same images."""
        mine, its = ((one.annotations_sha256, one.accuracy_images) for one in (self, other))
        return mine == its


@dataclass(frozen=True)
class Idle:
    """The machine before a run: what other processes used, and how long the benchmark waited for them.

    `cpu_percent`: of all CPUs that may be used, 0 to 100. `gpu_percent`: None without a GPU in use. `gpu_memory_mb`:
    of its memory in use, 10^6 bytes; None where that is unknown.
    """

    cpu_percent: float
    gpu_percent: float | None
    waited_s: float
    gpu_memory_mb: float | None = None


@dataclass(frozen=True)
class Monitored:
    """The hardware while a run was timed; the k-th of each is the sample at `t_s[k]` seconds from its start.

    `cpu_percent`: of each CPU that the process may use, 0 to 100, by all processes. `cpu_mhz`: their mean frequency.
    `rss_mb`: resident memory of the process, 10^6 bytes. Of the GPU: `gpu_percent` (of the time in which any kernel
    ran, in the second before the sample), `gpu_memory_mb` (by all processes), `gpu_power_w` (of the board, mean of the
    second before the sample on most GPUs), `gpu_clock_mhz` (of its multiprocessors). A tuple is empty where the
    hardware does not tell. `gpu_most_clock_mhz`, `gpu_most_power_w`: the highest clock of its multiprocessors, and the
    limit of its power; None where unknown. `throttled`: why the hardware ran below full speed at any time, in words;
    empty if it did not. `overhead_percent`: processor time that the monitor itself took, of one CPU.
    """

    t_s: tuple[float, ...] = ()
    cpu_percent: tuple[tuple[float, ...], ...] = ()
    cpu_mhz: tuple[float, ...] = ()
    rss_mb: tuple[float, ...] = ()
    gpu_percent: tuple[float, ...] = ()
    gpu_memory_mb: tuple[float, ...] = ()
    gpu_power_w: tuple[float, ...] = ()
    gpu_clock_mhz: tuple[float, ...] = ()
    gpu_most_clock_mhz: float | None = None
    gpu_most_power_w: float | None = None
    throttled: tuple[str, ...] = ()
    overhead_percent: float = 0.0

    def __post_init__(self) -> None:
        if not all(self.cpu_percent):
            raise ValueError("cpu_percent must have a value of at least one CPU in each sample")


@dataclass(frozen=True)
class Traffic:
    """What the client of a server saw (`gfldeploy load`).

    `endings`: how many requests ended how: "200", "429 queue_full" (the status, and the code in the answer's JSON),
    "timed out", "refused" (no connection could be made), "closed" (before there was an answer), "malformed" (what came
    was no HTTP), "no connection" (as many as allowed were in use, so nothing was sent). `late_ms`: of each request, how
    long after its planned time it was sent: the delays of the client itself, which its latency includes.
    `most_connections`: open at once. `resent`: requests that a server did not answer on a connection that it closed
    just then, and that were sent again on another. `unasked`: connections on which something came that was no answer to
    a request, such as a second one. `client_cpu_percent`: processor time of the client, of one CPU.
    `loopback`: whether the server was on the client's machine, which is the one that the results describe.
    """

    endings: Mapping[str, int]
    late_ms: tuple[float, ...]
    most_connections: int
    resent: int
    unasked: int
    client_cpu_percent: float
    loopback: bool


@dataclass(frozen=True)
class Serving:
    """What became of the images that arrived at a server, besides the latencies of those that were answered.

    `requests`: images that arrived; `rejected`: of those, how many were not accepted; `failed`: how many of the others
    had no answer, or an error. `points`: latencies of batches before the first arrival, to which the adaptive policy's
    latency model is fitted. `most_kept`: an upper bound of the answers in time that any policy could give, with batches
    of the cell's size at most (`simulator.most_kept`), if no batch is faster than the fastest of the `points`; None
    over HTTP, where these are not known. `traffic`: over HTTP alone.
    """

    requests: int
    rejected: int
    points: tuple[Point, ...]
    most_kept: int | None
    failed: int = 0
    traffic: Traffic | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.rejected + self.failed < self.requests or not 0 <= (self.most_kept or 0) <= self.requests:
            raise ValueError("a server answers at least one request, and no more than there are")


@dataclass(frozen=True)
class Parity:
    """How far an engine is from the CPU, on a few of the images that it is timed on.

    `reference`: what ran on the CPU, in words; `images` were compared. `score_difference`, `score_difference_max`: mean
    and largest, absolute, over the candidates that both have. `box_difference_px`, `box_difference_max_px`: median and
    largest of a corner, over those with a score of 0.4 or more; in FP32 the largest is over all. `detections`: how many
    score 0.4 or more; `unmatched`: of those, without another of their class, half their score and an IoU of 0.5 on the
    other side (`quant.agreement`), counted on the side where it is more.
    """

    reference: str
    images: int
    detections: int
    unmatched: int
    score_difference: float
    score_difference_max: float
    box_difference_px: float
    box_difference_max_px: float


@dataclass(frozen=True)
class Run:
    """One process that measured one cell.

    `started`: UTC, ISO 8601. `load_s`: seconds to open the engine, the import of its library included; `build_s`: of
    those, to build a TensorRT engine or read it from the cache, None where none is; `first_inference_ms`: the very
    first one, before the warm-up; `peak_rss_mb`: the process's largest resident memory, 10^6 bytes, up to the end of
    the timing; `inputs_mb`: how much of that were the prepared batches.

    `samples` are of the network alone on prepared batches; `stages` of whole batches from file to boxes, after that;
    None where they were not measured, as in the server scenario. `shapes`: how many of the batches had which shape,
    such as "1x3x800x1216". `padding_ratio`: pixels of the batches by pixels of the images in them, 1.0 without padding.
    `mixed_batches`: how many of the batches held images of several input sizes; None where that was not recorded. In
    the server scenario all three are of the batches that were formed, and `serving` says the rest; it is None in the
    others but http, where of the engine only what the server tells is known: the rest is None, and `shapes` empty.

    `convolutions`: those of one inference, by the precision that they ran in; None where the engine cannot tell.
    `not_low_precision`: why some did not run in the INT8, BF16 or FP16 asked for, a line for each reason
    (`engines.base.reasons`); empty where FP32 was asked for, None where it was not recorded or the engine cannot tell.
    `delegated`: how much of the graph runs in TensorRT, and whether inferences replay CUDA graphs, in words; None where
    neither is asked for.

    `parity`: what came of comparing the engine with the CPU before it was timed; None where it was judged when the
    bundle was published, and where it could not be compared, for the reason `not_compared`.
    """

    started: str
    samples: Samples
    engine_version: str
    load_s: float | None
    first_inference_ms: float | None
    peak_rss_mb: float | None
    inputs_mb: float
    shapes: Mapping[str, int]
    padding_ratio: float | None
    idle: Idle | None
    stages: Stages | None = None
    build_s: float | None = None
    mixed_batches: int | None = None
    convolutions: Mapping[str, int] | None = None
    not_low_precision: tuple[str, ...] | None = None
    delegated: str | None = None
    monitored: Monitored | None = None
    serving: Serving | None = None
    parity: Parity | None = None
    not_compared: str | None = None

    def __post_init__(self) -> None:
        if not all(_SHAPE.fullmatch(shape) and count > 0 for shape, count in self.shapes.items()):
            raise ValueError("shapes must be such as 1x3x800x1216, each of at least one batch")
        if self.stages is not None and not self.shapes:
            raise ValueError("shapes must be those of the batches whose stages were timed")


@dataclass(frozen=True)
class Cost:
    """What one image costs, by arithmetic on the graph (`macs.py`): not measured, the same for every engine.

    `macs`: multiply-accumulates at the size of the image itself, mean over the timed images; `padded_macs`: at the size
    of the batch it was in. One MAC is two FLOPs. `traffic_mb`: memory traffic of the padded image, 10^6 bytes, with
    every convolution's input, output and weights read or written once in the precision asked for.
    """

    macs: float
    padded_macs: float
    traffic_mb: float


@dataclass(frozen=True)
class Peak:
    """What an engine reaches here on a graph of nothing but convolutions that suit it: a ceiling, not a promise.

    `gmac_per_s`: 10^9 multiply-accumulates a second; `memory_gb_per_s`: 10^9 bytes a second of a large copy, read and
    written, with as many threads; of a GPU, what its memory can move by its clock and the width of its bus. None where
    it could not be measured, for the `reason`.
    """

    gmac_per_s: float | None
    memory_gb_per_s: float | None
    reason: str | None


@dataclass(frozen=True)
class CellResult:
    """What became of one cell.

    `status` ok: it was measured, once in each round (`runs`); failed: the process of a round failed for the `reason`,
    `runs` are the earlier rounds; skipped: it cannot run here. `accuracy`, of the cell's bundle, engine, precision and
    device, is None where it was not measured; had it been asked for, `accuracy_reason` says why. `cost` is None where
    it could not be counted. `peak`: of the cell's engine, precision and device, with all its threads in one inference;
    None where it was not asked for.
    """

    cell: Cell
    status: Status
    reason: str | None = None
    remedy: str | None = None
    runs: tuple[Run, ...] = ()
    accuracy: Accuracy | None = None
    accuracy_reason: str | None = None
    cost: Cost | None = None
    peak: Peak | None = None

    def __post_init__(self) -> None:
        if (self.status == "ok") != (self.reason is None):
            raise ValueError("a cell has a reason unless its status is ok")
        if self.status == "ok" and not self.runs:
            raise ValueError("a cell with the status ok needs runs")
        if self.status == "skipped" and self.runs:
            raise ValueError("a skipped cell has no runs")
        if any((run.serving is None) == self.cell.is_server for run in self.runs):
            raise ValueError("runs of servers say what became of the requests, and no others do")
        over_http = [run.serving.traffic is not None for run in self.runs if run.serving]
        if any(one == (self.cell.scenario == "server") for one in over_http):
            raise ValueError("runs over HTTP say what their client saw, and no others do")

    @property
    def latency_ms(self) -> tuple[float, ...]:
        """The latencies of all rounds, in the order they were measured."""
        return tuple(value for run in self.runs for value in run.samples.latency_ms)

    @property
    def ap(self) -> float | None:
        """COCO's mAP; None where it was not measured, or is undefined (`defined_ap`)."""
        return defined_ap(self.accuracy)

    @property
    def file_ms(self) -> tuple[float, ...]:
        """The latencies of batches from file to boxes, of all rounds; none if a round has none."""
        stages = [run.stages for run in self.runs if run.stages and run.stages.end_to_end_ms]
        return tuple(value for one in stages for value in one.end_to_end_ms) if len(stages) == len(self.runs) else ()


def defined_ap(accuracy: Accuracy | None) -> float | None:
    """The mAP; None where there is none to compare with, as of data without objects, which pycocotools gives -1."""
    ap: float | None = accuracy.ap if accuracy else None
    return ap if ap is not None and ap >= 0 else None


def _from_schema_1(data: dict[str, Any]) -> dict[str, Any]:
    """It timed the network alone, for `min_seconds`, and stages of single images, which are no batches."""
    settings = {"max_seconds": part(data, "settings")["min_seconds"], "monitor_hz": 0.0, **data["settings"]}
    idle = {"cpu_percent": 0.0, "gpu_percent": None, "waited_s": 0.0}
    cells = []
    for cell in part(data, "cells", kind=list):
        size, runs = cell["batch_size"], []
        for run in part(cell, "runs", kind=list):
            kept = {key: value for key, value in run.items() if key not in Stages.__annotations__}
            samples = {"images": len(run["samples"]["latency_ms"]) * size, "stable": True, **run["samples"]}
            runs.append({**kept, "samples": samples, "started": data["created"], "shapes": {}, "idle": idle})
        scenario = size and ("multi-stream" if size > 1 else "single-stream")
        cells.append({**cell, "scenario": scenario, "rate": None, "runs": runs, "work": None})
    described = {"timed_sha256": "", **part(data, "data")}
    return {**data, "settings": settings, "data": described, "peaks": [], "cells": cells}


def _from_schema_2(data: dict[str, Any]) -> dict[str, Any]:
    """Its servers had no policies."""
    return {**data, "cells": [{"policy": None, **cell} for cell in part(data, "cells", kind=list)]}


def _from_schema_3(data: dict[str, Any]) -> dict[str, Any]:
    """It timed no batches as the offline scenario forms them, and of servers only full ones as listed."""
    cells = []
    for cell in part(data, "cells", kind=list):
        lost = {"stages": None} if cell["scenario"] in ("offline", "server") else {}
        cells.append({**cell, "runs": [{**run, **lost} for run in part(cell, "runs", kind=list)]})
    return {**data, "cells": cells}


def _from_schema_4(data: dict[str, Any]) -> dict[str, Any]:
    """It had the axes among the other fields of a cell, and peaks in a list of their own.

    Of a skipped cell, what the reason held for all of was null: it becomes a cell for each that the file has.
    """
    peaks = [(_taken(one, *_PEAK_AXES_4), one) for one in map(dict, part(data, "peaks", kind=list))]
    split = [(_taken(one, *_AXES_4), one) for one in map(dict, part(data, "cells", kind=list))]
    known = [axes for axes, _ in split if None not in (axes["bundle"], axes["batch_size"], axes["scenario"])]
    cells = []
    for axes, rest in split:
        peak = next((one for of, one in peaks if of.items() <= axes.items()), None) if rest["runs"] else None
        rest["cost"] = rest.pop("work")
        for cell in [axes] if axes in known else _expanded(axes, known):
            order = "bucketed" if cell["scenario"] == "offline" else "listed"
            cells.append({"cell": {**cell, "order": order}, **rest, "peak": peak})
    settings = _without("quick", part(data, "settings"))  # which follows from the others
    return {**_without("peaks", data), "settings": settings, "cells": cells}


_AXES_4 = ("bundle", "engine", "precision", "device", "threads", "batch_size", "scenario", "rate", "policy")
_PEAK_AXES_4 = ("engine", "precision", "device", "threads")


def _expanded(axes: dict[str, Any], known: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The axes with whatever is null in them as in those cells that are `known` whole."""
    given = {key: value for key, value in axes.items() if value is not None}
    if size := given.get("batch_size"):  # which no other cell of this bundle need have
        given |= {"scenario": "single-stream" if size == 1 else "multi-stream", "rate": None, "policy": None}
    found: list[dict[str, Any]] = []
    for one in known:
        if (cell := {**one, **given}) not in found:
            found.append(cell)
    return found


def _without(key: str, record: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in record.items() if name != key}


def _taken(record: dict[str, Any], *keys: str) -> dict[str, Any]:
    """These fields, removed from the record."""
    return {key: record.pop(key) for key in keys}


def _from_schema_5(data: dict[str, Any]) -> dict[str, Any]:
    """It did not say whether FP32 was in TF32, nor compare what ran with the CPU: the defaults."""
    return data


def _from_schema_6(data: dict[str, Any]) -> dict[str, Any]:
    """Its cells are all of the bundles' own input sizes: the default."""
    return data


def _from_schema_7(data: dict[str, Any]) -> dict[str, Any]:
    """It had nothing of servers over HTTP, and its cells are all of the networks alone: the defaults."""
    return data


def _from_schema_8(data: dict[str, Any]) -> dict[str, Any]:
    """Its cells are all of whole images: the default."""
    return data


_UPGRADES = {
    1: _from_schema_1, 2: _from_schema_2, 3: _from_schema_3, 4: _from_schema_4, 5: _from_schema_5, 6: _from_schema_6,
    7: _from_schema_7, 8: _from_schema_8,
}  # fmt: skip


@dataclass(frozen=True)
class BenchResults(Versioned):
    """The content of `results.json`. `created` is the UTC time of the end, in ISO 8601."""

    FORMAT = FileFormat("results", "gfldeploy bench", 9, _UPGRADES)

    created: str
    machine: Machine
    data: DataDescription
    settings: Settings
    cells: tuple[CellResult, ...]
