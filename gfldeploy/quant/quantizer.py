"""From an FP32 bundle and images to an INT8 bundle that was measured against the FP32 one before it is published."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gfldeploy.accuracy import check_measurable
from gfldeploy.batching.buckets import Size
from gfldeploy.bundle import GOLDEN, LAYERS, Bundle, write_bundle
from gfldeploy.cluster.ray_cluster import ClusterOptions
from gfldeploy.engines.base import EngineOptions
from gfldeploy.engines.dependencies import TOOL_CHAINS, require
from gfldeploy.engines.hardware import usable_threads
from gfldeploy.engines.registry import REFERENCE_ENGINE, capability, open_engine
from gfldeploy.errors import BundleError, EngineError, ParityError, UnsupportedError, UsageError
from gfldeploy.export import half
from gfldeploy.export.golden import golden_picture, read_golden, write_golden
from gfldeploy.files import StrPath, check_apart, check_target, write_json
from gfldeploy.images.coco import CocoDataset
from gfldeploy.images.decode import read_image
from gfldeploy.progress import SILENT, Progress
from gfldeploy.quant.artefacts import Quantized
from gfldeploy.quant.calibration import Calibration, ConvRanges, ConvUse
from gfldeploy.quant.end_to_end import add_end_to_end
from gfldeploy.quant.evaluation import EvaluatedBundle, Evaluator
from gfldeploy.quant.gate import DEFAULT_MAX_DROP, DEFAULT_MIN_AGREEMENT, Candidate, GateLimits, best, unjudgeable
from gfldeploy.quant.groups import match
from gfldeploy.quant.measurement import Fp32Reference, int8_engines
from gfldeploy.quant.method import DEFAULT_STEPS, MethodOptions, QuantMethod, Refined
from gfldeploy.quant.methods import METHODS
from gfldeploy.quant.observer import observe_outputs, of_scores, weight_ranges
from gfldeploy.quant.record import algorithms_record, int8_manifest, parity_record, size_line, size_record
from gfldeploy.quant.samples import calibration_images, digests, evaluation_record, refuse_overlap, spread
from gfldeploy.quant.sensitivity import macs_shares
from gfldeploy.quant.sensitivity import to_record as sensitivity_record

_AGREEMENT_IMAGES = 8
_FEW_IMAGES = 16  # to calibrate on, without labels to judge by
_COPIED = ("infer_cfg.yml", LAYERS)


def quantize_bundle(
    bundle: StrPath,
    *,
    data: StrPath,
    output: StrPath,
    images: StrPath | None = None,
    algo: str | None = None,
    method: str = "ptq",
    distill_steps: int | None = None,
    samples: int | None = None,
    input_sizes: Sequence[Size] = (),
    eval_data: StrPath | None = None,
    eval_images: StrPath | None = None,
    eval_limit: int | None = None,
    max_drop: float | None = None,
    min_agreement: float | None = None,
    keep_float: Sequence[str] = (),
    fallback: bool = True,
    sensitivity: bool = False,
    threads: int | None = None,
    ray: str | None = None,
    workers: int | None = None,
    force: bool = False,
    command: str = "",
    progress: Progress = SILENT,
) -> Bundle:
    """Make an INT8 bundle from an FP32 one, and publish it only if it loses little.

    Calibrates, writes the graphs, measures them against FP32, and puts groups of convolutions back to float if need be.

    Args:
        bundle: The FP32 bundle.
        data: A folder of images to calibrate on, or COCO annotations.
        output: The directory of the INT8 bundle.
        images: The folder of the annotations' images, by default `images` beside them.
        algo: The algorithm of the method, or "auto" for the best of several.
        method: "ptq" calibrates; "distill" also fine-tunes the weights, starting from the best calibration, and
            publishes whichever of the two is measured to be better.
        distill_steps: Steps of fine-tuning, 200 by default.
        samples: How many images to calibrate on, evenly spread; by default up to 64.
        input_sizes: Input sizes (height, width) in pixels, as in `Bundle.at_size`, at which INT8 is judged besides the
            bundle's own. What was found is in the bundle's `parity.json`: where INT8 does not hold, `Detector` and
            `predict_images` refuse it. The own size alone decides about publishing.
        eval_data: COCO annotations of other images, to measure mAP on.
        eval_images: The folder of their images, by default `images` beside them.
        eval_limit: Measure mAP on the first images only.
        max_drop: The mAP that INT8 may lose in any engine, absolute; 0.005 by default. Needs `eval_data`.
        min_agreement: Without `eval_data`: the smallest share of the FP32 detections that INT8 must find again; 0.9 by
            default, 0 publishes unjudged.
        keep_float: Patterns of layers or groups that stay in float, with `*` and `?`.
        fallback: Put the most sensitive groups back to float where INT8 loses too much, instead of failing.
        sensitivity: Rank the groups by what INT8 does in each, even if nothing is lost.
        threads: CPU threads; all available by default.
        ray: The address of a Ray cluster whose machines measure mAP on `eval_data`, or "local" for one on this machine;
            the same mAP as here with the same threads. They find the images at the same paths.
        workers: How many processes measure there; by default as many as there is room for.
        force: Replace an existing bundle at `output`.
        command: The command line that the bundle records.
        progress: Is told what is done.

    Returns:
        The INT8 bundle at `output`.

    Raises:
        UsageError: Options contradict each other.
        BundleError: The bundle cannot be used, or not at one of the `input_sizes`.
        DataError: Images or annotations cannot be used.
        UnsupportedError: This bundle, method or algorithm does not quantise.
        EngineError: Calibration or an engine failed, or too little ran in INT8.
        ParityError: INT8 loses too much.
        OutputError: The output cannot be written.
        MissingDependencyError: A package is not installed.
    """
    bundle, output = Path(bundle), Path(output)
    chosen_method = _method(method, distill_steps)
    algorithms = chosen_method.algorithms_of(algo)
    if eval_data is None:
        for option, value in (("eval_images", eval_images), ("eval_limit", eval_limit), ("max_drop", max_drop)):
            if value is not None:
                raise UsageError(f"--{option.replace('_', '-')} needs --eval-data", "Give both, or neither.")
    elif min_agreement is not None:
        raise UsageError("--min-agreement is for quantising without --eval-data", "With it, use --max-drop.")
    if ray is not None and eval_data is None:
        raise UsageError("--ray is for measuring mAP and needs --eval-data", "Give both, or neither.")
    limits = GateLimits(
        DEFAULT_MAX_DROP if max_drop is None else max_drop,
        DEFAULT_MIN_AGREEMENT if min_agreement is None else min_agreement,
    )
    threads = usable_threads() if threads is None else threads
    cluster = ClusterOptions.of(ray, workers, None, EngineOptions("int8", "cpu", threads))
    paths = calibration_images(Path(data), Path(images) if images else None, samples)
    evaluation = None
    if eval_data is not None:
        evaluation = CocoDataset.load(Path(eval_data), Path(eval_images) if eval_images else None, eval_limit)
    source = _checked(bundle, output, chosen_method, force)
    for note in {capability(engine, "int8", "cpu").note for engine in int8_engines()}:
        if note:
            progress.note(note)
    asked = _asked(source, keep_float)
    others = [size for size in dict.fromkeys(input_sizes) if source.at_size(size) is not source]
    progress.stage(f"checking {len(paths)} calibration images")
    for path in paths:
        height, width, _ = read_image(path).shape
        source.manifest.preprocess.resized_size(height, width, path)
    calibrated_on = digests(paths)
    evaluated_on: dict[str, str] = {}
    if evaluation is not None:
        matched = evaluation.match(source.manifest.classes)
        check_measurable(evaluation, matched.category_ids)
        for note in (*evaluation.notes, *matched.notes):
            progress.note(note)
        evaluated_on = digests([image.path for image in evaluation.images])
        refuse_overlap(calibrated_on, evaluated_on)

    size = sum(record.bytes for record in source.manifest.files.values())
    need = size * (len(algorithms) + (3 if chosen_method.refine else 1))
    with (
        cluster.connected() if cluster else nullcontext(),
        write_bundle(output, force=force, need_bytes=need) as (directory, manifests),
    ):
        progress.stage("running FP32 on calibration images" if evaluation is None else "measuring FP32")
        compared = spread(paths, _AGREEMENT_IMAGES)
        fp32_reference = Fp32Reference.of(source, compared, evaluation, threads, progress, cluster)
        if problem := unjudgeable(fp32_reference.detections, fp32_reference.accuracy, limits):
            raise problem
        if evaluation is None and len(paths) < _FEW_IMAGES:
            few = "1 image" if len(paths) == 1 else f"{len(paths)} images"
            progress.note(
                f"INT8 is fitted to {few}, and judged by nothing else: calibrate on 32 to 64 like those you deploy on, "
                "or give labelled ones with --eval-data"
            )
        # Inside the unfinished bundle, so that whatever ends the run removes it too.
        (directory / "work").mkdir()
        evaluator = Evaluator(fp32_reference, limits, directory / "work", progress)
        run = _Attempts(chosen_method, paths, calibrated_on, evaluator, asked, distill_steps or DEFAULT_STEPS)
        run.calibrate(source, algorithms)
        refined = run.refine() if chosen_method.refine else None
        chosen = run.best()
        result = evaluator.settle(run.evaluated[chosen.algorithm], fallback, sensitivity)
        record: dict[str, Any] = {"method": method}
        speeds = evaluator.speeds(result.evaluated)
        end_to_end = add_end_to_end(result, evaluator)
        record |= parity_record(result, fp32_reference, limits, speeds, end_to_end)
        if others:
            judged = [size_record(evaluator.at_size(result.evaluated, size, compared)) for size in others]
            for one in judged:
                (progress.stage if one["problem"] is None else progress.note)(size_line(one))
            record["sizes"] = judged
        if evaluation is not None:
            record["evaluation"] = evaluation_record(Path(eval_data) if eval_data else None, evaluated_on)
        if len(run.candidates) > 1:
            record["algorithms"] = algorithms_record(run.candidates, chosen)
        if refined is not None:
            record |= refined.record
        if result.ranked:
            write_json(directory / "sensitivity.json", sensitivity_record(result.ranked, fp32_reference.images))
        for path in result.evaluated.bundle.directory.iterdir():
            path.rename(directory / path.name)
        shutil.rmtree(evaluator.scratch)
        write_json(directory / "parity.json", record)
        made = Bundle(directory, end_to_end.bundle.manifest)
        with open_engine(REFERENCE_ENGINE, made, EngineOptions("int8", "cpu", threads)) as engine:
            write_golden(made, _golden_picture(source), engine, half.TOLERANCE)
        for name in _COPIED:
            shutil.copyfile(source.directory / name, directory / name)
        progress.stage(f"publishing {output} ({chosen.algorithm})")
        manifests.append(int8_manifest(source, end_to_end.bundle.manifest, chosen.algorithm, len(paths), command))
    return Bundle.open(output)


def _golden_picture(source: Bundle) -> NDArray[np.uint8]:
    """That of the FP32 bundle; older ones have none."""
    return golden_picture(read_golden(source)[0] if GOLDEN in source.manifest.files else None)


def _method(name: str, distill_steps: int | None) -> QuantMethod:
    method = METHODS.get(name)
    if method is None:
        raise UnsupportedError(f"there is no method {name!r}", f"Choose from: {', '.join(METHODS)}.")
    if distill_steps is not None and method.refine is None:
        refining = ", ".join(one.name for one in METHODS.values() if one.refine)
        raise UsageError(f"--distill-steps needs --method {refining}", "Give both, or neither.")
    return method


def _checked(directory: Path, output: Path, method: QuantMethod, force: bool) -> Bundle:
    """The FP32 bundle, once it is clear that it can be quantised here and the result written."""
    source = Bundle.open(directory)
    if source.manifest.precision != "fp32":
        raise BundleError(f"{directory} is INT8 already", "Quantise the bundle that `gfldeploy export` wrote.")
    batch = source.manifest.inputs[0].shape[0]
    if batch not in (None, 1):
        raise BundleError(
            f"{directory} has a fixed batch of {batch}, calibration runs image by image",
            "Export it with a free batch: --input-shape HxW.",
        )
    for graph in ("onnx", "paddle_program"):
        if why := source.manifest.left_out.get(graph):
            raise UnsupportedError(
                f"{directory} cannot be quantised, which needs its {graph} graph: {why}", "Deploy it in float."
            )
        source.graph(graph)
    check_target(output, force=force)
    check_apart(output, [directory], directory)
    source.layers()
    for module in (*(library.module for library in TOOL_CHAINS["quantize"].libraries), *method.packages):
        require(module, "quantize")
    return source


def _asked(source: Bundle, patterns: Sequence[str]) -> frozenset[ConvUse]:
    """What the patterns keep in float. Raises `UnsupportedError` where that is everything."""
    if not patterns:
        return frozenset()
    uses = tuple(macs_shares(source))
    asked = match(source.layers(), uses, patterns)
    if len(asked) == len(uses):
        raise UnsupportedError("--keep-float leaves no convolution to run in INT8", "Give narrower patterns.")
    return asked


@dataclass
class _Attempts:
    """What was calibrated in one run and measured, or why not."""

    method: QuantMethod
    images: Sequence[Path]
    calibrated_on: Mapping[str, str]
    evaluator: Evaluator
    asked: frozenset[ConvUse]
    steps: int
    evaluated: dict[str, EvaluatedBundle] = field(default_factory=dict)
    candidates: list[Candidate] = field(default_factory=list)

    @property
    def threads(self) -> int:
        return self.evaluator.fp32_reference.threads

    def best(self) -> Candidate:
        """Raises the first error if nothing could be measured."""
        limits, fp32 = self.evaluator.limits, self.evaluator.fp32_reference.accuracy
        return best(self.candidates, fp32, limits, len(self.asked))

    def calibrate(self, weights: Bundle, algorithms: Sequence[str], suffix: str = "") -> None:
        """Calibrate the FP32 bundle `weights` with each algorithm, and measure the result."""
        progress = self.evaluator.progress
        progress.stage("observing the convolutions' outputs")
        onnx_file, preprocess = weights.graph("onnx")[0], weights.manifest.preprocess

        def batches() -> Iterator[NDArray[np.float32]]:
            for done, path in enumerate(self.images):
                progress.step("observing", done, len(self.images))
                yield preprocess.batch([preprocess(read_image(path))])

        outputs = observe_outputs(onnx_file, batches(), self.threads, of_scores(weights.layers()))
        largest = weight_ranges(onnx_file)
        for algorithm in algorithms:
            label = algorithm + suffix
            try:
                progress.stage(f"calibrating ({label})")
                thresholds = self.method.calibrate(weights, self.images, algorithm, self._options)
                if unknown := sorted(set(thresholds) - set(outputs)):
                    raise EngineError(
                        f"{onnx_file} has no convolution {unknown[0]}, the Paddle program does",
                        "Export the bundle again.",
                    )
                ranges = {
                    name: ConvRanges(tuple(inputs), outputs[name], largest[name]) for name, inputs in thresholds.items()
                }
                quantized = Quantized(weights, Calibration(algorithm, self.calibrated_on, ranges))
                progress.stage(f"comparing {label} with FP32 in {', '.join(int8_engines())}, and its TensorRT file")
                self.evaluated[label] = self.evaluator.evaluate(quantized, self.asked, label)
                self.candidates.append(Candidate(label, self.evaluated[label].engines))
            except (EngineError, ParityError) as error:
                progress.stage(f"{label} failed: {error.problem}")
                self.candidates.append(Candidate(label, {}, error))

    def refine(self) -> Refined:
        """Change the weights, starting from the best calibration, and calibrate them with the same algorithm."""
        assert self.method.refine is not None
        chosen = self.best().algorithm
        start = self.evaluated[chosen].quantized
        self.evaluator.progress.stage(f"{self.method.name}: {self.steps} steps from {chosen}")
        output = self.evaluator.scratch / self.method.name
        refined = self.method.refine(start.source, self.images, start.calibration, output, self._options)
        self.calibrate(refined.bundle, [start.calibration.algorithm], f", {refined.label}")
        return refined

    @property
    def _options(self) -> MethodOptions:
        return MethodOptions(self.threads, self.steps, self.evaluator.progress)
