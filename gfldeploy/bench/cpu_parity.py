"""Whether an engine gives what the CPU gives, on real images, before it is timed.

What `export` and `quantize` publish is compared in the engines that judge it, on the CPU. Whatever else runs a graph
(GPUs, an engine built of it on the user's machine, an engine of another package) is compared here, in `bench` with
the reference in a process of its own, so that memory and libraries of the process that is timed are its own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gfldeploy.bench.inputs import Batch
from gfldeploy.bench.results import Parity
from gfldeploy.bundle import Bundle
from gfldeploy.candidates import anchors_of, matched
from gfldeploy.engines.base import Engine, EngineOptions
from gfldeploy.engines.cache import engine_directory
from gfldeploy.engines.hardware import gpu_models, nvidia_driver
from gfldeploy.engines.nvidia_libraries import nvidia_packages
from gfldeploy.engines.registry import JUDGES, REFERENCE_ENGINE, is_compared, obstacle_to, open_engine
from gfldeploy.errors import EngineError, GfldeployError, OutputError, ParityError
from gfldeploy.export import half, parity
from gfldeploy.files import write_json, writing
from gfldeploy.quant.agreement import CONFIDENT, Reference, agreement
from gfldeploy.quant.gate import DEFAULT_MIN_AGREEMENT
from gfldeploy.quant.measurement import SimulatedTensorRT
from gfldeploy.serialization import plain

# Scores and boxes [1, K, ...] of one image, as engines give them.
Outputs = Mapping[str, NDArray[Any]]

# FP16, and TF32, which has as many bits of mantissa. Scores: twice what the FP16 file may differ by on the CPU, since a
# GPU may also add up in FP16. Boxes: relative to the longer side, and no less than a pixel; with all values rounded to
# FP16 on the CPU, those of the trained demo detector move by 0.0008 of it.
_HALF_SCORE = 2 * half.TOLERANCE.score
_HALF_BOX = 0.02
# INT8 on two engines rounds differently. Mean of scores and median of boxes: ten times and more what they are between
# ONNX Runtime, Paddle, OpenVINO and the simulated TensorRT on the demo detector (0.002 and 0.005). Detections: either
# may lose a tenth of FP32's (`quant.gate.DEFAULT_MIN_AGREEMENT`).
_INT8_SCORE = 0.03
_INT8_BOX = 0.05
_INT8_UNMATCHED = 2 * (1 - DEFAULT_MIN_AGREEMENT)
# NMS may decide otherwise on what differs by rounding alone: of a hundred detections in two.
_UNMATCHED = 0.02
_LEAST_BOX_PX = 1.0
# What is timed may be a graph that a GPU recorded, which replaces the first inferences of a shape.
_UNTIMED = 3
_REMEDY = "use another engine or precision, or other versions of the driver and the libraries (see `gfldeploy doctor`)"


def reference_engine(bundle: Bundle) -> str:
    """The engine that runs the bundle on the CPU, to compare others with. Raises `EngineError` where there is none."""
    refused = []
    for name in dict.fromkeys((REFERENCE_ENGINE, *JUDGES)):
        obstacle = obstacle_to(name, bundle, bundle.manifest.precision, "cpu")
        if obstacle is None:
            return name
        refused.append(f"{name}: {obstacle.reason}")
    raise EngineError(f"no engine that judges bundles can run it on the CPU here ({'; '.join(refused)})", None)


def open_reference(name: str, bundle: Bundle, threads: int) -> tuple[Engine, str]:
    """The bundle in the `reference_engine`, and what that is, in words.

    INT8 is simulated as TensorRT reads it where that can be: without the kernels for INT8, which saturate on CPUs
    without VNNI. Raises as `open_engine`.
    """
    options = EngineOptions(bundle.manifest.precision, "cpu", threads)
    if options.precision == "int8" and name == REFERENCE_ENGINE and bundle.has_graph("onnx_tensorrt"):
        simulated = SimulatedTensorRT(bundle, options)
        return simulated, f"INT8 as TensorRT reads it, simulated by {name} {simulated.version} on the CPU"
    engine = open_engine(name, bundle, options)
    return engine, f"{name} {engine.version} {options.precision} on the CPU"


def write_reference(path: Path, engine: Engine, batches: Sequence[Batch], fixed: bool) -> None:
    """Keep what the engine gives for the images of the batches that are compared.

    Each runs alone, padded as in its batch, so that a large batch costs no more than a small one; `fixed`: the network
    takes batches of one size alone. Raises `EngineError` and `OutputError`.
    """
    arrays = {}
    for batch, place in _compared(batches):
        tensor, row = (batch.tensor, place) if fixed else (batch.tensor[place : place + 1], 0)
        for name, values in engine.infer({"image": tensor}).items():
            arrays[f"{_key(batch, place)} {name}"] = values[row : row + 1]
    with writing(path):
        np.savez(path, **arrays)  # type: ignore[arg-type]  # for the stub, any name may be `allow_pickle`


def compare_with_cpu(engine: Engine, batches: Sequence[Batch], path: Path, by: str, bundle: Bundle) -> Parity:
    """Run the batches that are compared, and hold them against what `write_reference` kept in `path`.

    `by`: what ran that. Raises `EngineError` where they differ by more than the precision explains.
    """
    untimed = _UNTIMED if engine.options.device == "gpu" else 0
    ours, theirs = [], []
    with np.load(path) as kept:
        for _, some in groupby(_compared(batches), key=lambda one: id(one[0])):
            compared = list(some)
            tensor = compared[0][0].tensor
            for _ in range(untimed):
                engine.infer({"image": tensor})
            outputs = engine.infer({"image": tensor})
            for batch, place in compared:  # copies, so that the other images' outputs need not stay in memory
                ours.append({name: values[place : place + 1].copy() for name, values in outputs.items()})
                theirs.append({name: kept[f"{_key(batch, place)} {name}"] for name in outputs})
    measured, problems = measure_parity(ours, theirs, by, bundle, engine.options)
    if problems:
        raise EngineError(_in_words(measured, problems), _REMEDY)
    return measured


class CpuCheck:
    """Compares the first batch that an engine runs with the CPU, where it is used and not measured.

    An engine that is built for shapes is compared for each that it builds. What passed is noted in the folder of what
    was built, or in one of its own under the cache of the engine's options, and is not compared again there.
    """

    def __init__(self, name: str, engine: Engine, bundle: Bundle, note: Callable[[str], None]) -> None:
        """Of the engine `name` of the table; `note` is told why nothing could be compared."""
        self._name, self._engine, self._bundle, self._note = name, engine, bundle, note
        self._done: dict[Path | None, EngineError | None] = {}  # by what was built: why it is not to be used

    def __call__(self, tensor: NDArray[np.float32], outputs: Outputs, count: int) -> None:
        """The batch and what the engine gave for it; its first `count` rows are images.

        Raises `EngineError` where they differ by more than the precision explains.
        """
        directory = self._engine.directory
        if directory not in self._done:
            self._done[directory] = self._compare(tensor, outputs, count)
        if (error := self._done[directory]) is not None:
            raise error

    def _compare(self, tensor: NDArray[np.float32], outputs: Outputs, count: int) -> EngineError | None:
        options = self._engine.options
        if not is_compared(self._name, options.device):
            return None
        kept = self._kept()
        if kept is not None and kept.exists():
            return None
        manifest = self._bundle.manifest
        ours, theirs = [], []
        try:
            cpu, by = open_reference(reference_engine(self._bundle), self._bundle, options.threads)
            with cpu:
                for row in dict.fromkeys((0, count - 1)):
                    given = tensor if manifest.inputs[0].shape[0] else tensor[row : row + 1]
                    expected = cpu.infer({"image": given})
                    place = row if manifest.inputs[0].shape[0] else 0
                    theirs.append({name: values[place : place + 1] for name, values in expected.items()})
                    ours.append({name: values[row : row + 1] for name, values in outputs.items()})
        except GfldeployError as error:
            self._note(f"{self._name} was not compared with the CPU: {error.problem}")
            return None
        measured, problems = measure_parity(ours, theirs, by, self._bundle, options)
        if problems:
            problem = f"{self._name} {options.precision} on {options.device} {_in_words(measured, problems)}"
            return EngineError(problem, f"{_REMEDY[0].upper()}{_REMEDY[1:]}.")
        if kept is not None:
            with suppress(OutputError):
                write_json(kept, {"what": "compared with the CPU by gfldeploy", **plain(measured)})
        return None

    def _kept(self) -> Path | None:
        """The file that says that it passed."""
        engine, directory = self._engine, self._engine.directory
        if directory is None and engine.options.cache_dir is not None:
            machine = {"gpus": gpu_models(), "driver": nvidia_driver(), "libraries": nvidia_packages()}
            about = {**machine, "compared": self._bundle.manifest.preprocess.target_size}
            with suppress(OutputError):
                directory = engine_directory(engine.options.cache_dir, engine, self._bundle, **about)
        return None if directory is None else directory / "parity.json"


def measure_parity(
    ours: Sequence[Outputs], theirs: Sequence[Outputs], by: str, bundle: Bundle, options: EngineOptions
) -> tuple[Parity, list[str]]:
    """How far the outputs of an engine are from the reference's, image by image, and what is too far, in words.

    FP32 must be within what an export may differ by, twice, since either engine may: anchor by anchor. In FP16 and in
    TF32 every score, and the boxes of what scores 0.4 or more, must be near; in INT8 they must be near on average, and
    most detections the same.
    """
    unusable = [problem for pair in zip(ours, theirs, strict=True) if (problem := _unusable(*pair))]
    if unusable:
        return Parity(by, len(ours), 0, 0, 0.0, 0.0, 0.0, 0.0), unusable[:1]
    problems = [_lowered(ours, theirs)]
    exact = options.precision == "fp32" and not options.tf32
    nms = bundle.manifest.nms
    lost = agreement([Reference.of(one, nms) for one in theirs], ours, nms)
    extra = agreement([Reference.of(one, nms) for one in ours], theirs, nms)
    unmatched = max(round((1 - one.detections_found) * one.detections) for one in (lost, extra))
    boxes, relative = (np.concatenate(one) for one in zip(*map(_box_differences, ours, theirs), strict=True))
    score_max, box_max = lost.score_difference_max, float(boxes.max(initial=0))
    if exact:
        try:
            every = [parity.differences(*pair, 0, "it") for pair in zip(ours, theirs, strict=True)]
            score_max, box_max = (max(values) for values in zip(*every, strict=True))
        except ParityError as error:
            problems.append(error.problem)
        allowed = parity.Tolerance.recorded(bundle.record("parity.json")).times(2.0)
        far = [
            _too_far("scores by up to", score_max, allowed.score),
            _too_far("boxes by up to", box_max, allowed.box_px, " px"),
        ]
        problems += far
        if any(far) and score_max <= _HALF_SCORE and relative.max(initial=0) <= _HALF_BOX:
            problems.append("as of FP16 or TF32, which was not asked for")
    elif options.precision == "int8":
        typical = float(np.median(relative)) if len(relative) else 0.0
        problems += [
            _too_far("scores by a mean of", lost.score_difference, _INT8_SCORE),
            _too_far("boxes by a median of", 100 * typical, 100 * _INT8_BOX, " % of their longer side"),
        ]
    else:
        largest = float(relative.max(initial=0))
        problems += [
            _too_far("scores by up to", score_max, _HALF_SCORE),
            _too_far("boxes by up to", 100 * largest, 100 * _HALF_BOX, " % of their longer side"),
        ]
    counted = max(lost.detections, extra.detections)
    if unmatched > (max(_INT8_UNMATCHED * counted, 1) if options.precision == "int8" else _UNMATCHED * counted):
        problems.append(f"{unmatched} detections unmatched")
    median = float(np.median(boxes)) if len(boxes) else 0.0
    measured = Parity(by, len(ours), counted, unmatched, lost.score_difference, score_max, median, box_max)
    return measured, [one for one in problems if one]


def _compared(batches: Sequence[Batch]) -> list[tuple[Batch, int]]:
    """Which images are compared, by their batch and the place there: the first and the last of the first batch, and the
    first of a batch of another shape, or of the last batch."""
    first = batches[0]
    other = next((one for one in batches if one.formed.shape != first.formed.shape), batches[-1])
    chosen = {_key(*one): one for one in ((first, 0), (first, len(first.places) - 1), (other, 0))}
    return list(chosen.values())


def _key(batch: Batch, place: int) -> str:
    height, width = batch.formed.shape[2:]
    return f"{batch.places[place]} {height}x{width}"


def _in_words(measured: Parity, problems: Sequence[str]) -> str:
    images = f"{measured.images} image{'' if measured.images == 1 else 's'} against {measured.reference}"
    figures = (
        f": scores off by {measured.score_difference_max:.2g} and boxes by {measured.box_difference_max_px:.2g} px at "
        f"most, {measured.unmatched} of {measured.detections} detections unmatched"
    )
    return f"differs from the CPU: {'; '.join(problems)} ({images}{figures if measured.detections else ''})"


def _unusable(ours: Outputs, theirs: Outputs) -> str | None:
    for name, expected in theirs.items():
        if ours[name].shape != expected.shape:
            return f"{name} have the shape {list(ours[name].shape)}, not {list(expected.shape)}"
        if not np.isfinite(ours[name]).all():
            return f"{name} are NaN or infinite"
    return None


def _lowered(ours: Sequence[Outputs], theirs: Sequence[Outputs]) -> str | None:
    """That the decode ran in FP16, if it did: then FP16 holds every value, which of FP32 it holds one in 8192."""
    for name in ("boxes", "scores"):
        pairs = ((one[name], other[name]) for one, other in zip(ours, theirs, strict=True))
        if any(_held_by_half(found) == 1 and _held_by_half(expected) < 1 / 2 for found, expected in pairs):
            return f"{name} are rounded to FP16, so that their decode, which must be FP32, ran in FP16"
    return None


def _held_by_half(values: NDArray[np.float32]) -> float:
    """The share of the values that are the same in FP16."""
    with np.errstate(over="ignore"):
        return float(np.mean(values == values.astype(np.float16)))


def _box_differences(ours: Outputs, theirs: Outputs) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Of the candidates that score 0.4 or more in either: the largest of the four corners, in pixels, and relative to
    the longer side of the reference's box, where it is more than a pixel."""
    here, there = matched(anchors_of(ours, 0), anchors_of(theirs, 0))
    best = np.maximum(ours["scores"][0, here].max(axis=1), theirs["scores"][0, there].max(axis=1))
    here, there = here[best >= CONFIDENT], there[best >= CONFIDENT]
    boxes = theirs["boxes"][0, there].astype(np.float64)
    difference = np.abs(ours["boxes"][0, here] - boxes).max(axis=1, initial=0)
    sides = np.abs(boxes[:, 2:] - boxes[:, :2]).max(axis=1, initial=1)
    return difference, np.where(difference > _LEAST_BOX_PX, difference / sides, 0.0)


def _too_far(what: str, value: float, allowed: float, unit: str = "") -> str | None:
    return f"{what} {value:.3g}{unit} (allowed {allowed:.2g})" if value > allowed else None
