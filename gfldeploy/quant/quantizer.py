"""From an FP32 bundle and images to an INT8 bundle that was measured against the FP32 one before it is published."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal, get_args

from gfldeploy.accuracy import check_measurable
from gfldeploy.bundle import LAYERS, Bundle, write_bundle
from gfldeploy.engines.dependencies import TOOL_CHAINS, require
from gfldeploy.engines.registry import capability
from gfldeploy.errors import BundleError, EngineError, ParityError, UnsupportedError
from gfldeploy.files import check_apart, check_target, write_json
from gfldeploy.images.coco import CocoDataset
from gfldeploy.images.decode import read_image
from gfldeploy.quant.artefacts import Quantized
from gfldeploy.quant.calibration import Calibration, ConvRanges, ConvUse, OutputRange
from gfldeploy.quant.distill import DEFAULT_STEPS, Distilled, run_distill
from gfldeploy.quant.evaluation import EvaluatedBundle, Evaluator
from gfldeploy.quant.gate import Candidate, GateLimits, best, unjudgeable
from gfldeploy.quant.groups import match
from gfldeploy.quant.measurement import Fp32Reference, int8_engines
from gfldeploy.quant.observer import observe_outputs
from gfldeploy.quant.ptq import algorithms_of, run_ptq
from gfldeploy.quant.record import algorithms_record, int8_manifest, parity_record
from gfldeploy.quant.samples import digests, evaluation_record, refuse_overlap, spread
from gfldeploy.quant.sensitivity import macs_shares, sensitivity_record

__all__ = ["METHODS", "Method", "QuantizeRequest", "quantize_bundle"]

Method = Literal["ptq", "distill"]
METHODS: tuple[Method, ...] = get_args(Method)

_AGREEMENT_IMAGES = 8
_DISTILLED = "distilled"
_COPIED = ("infer_cfg.yml", LAYERS)

Report = Callable[[str], None]
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class QuantizeRequest:
    """What to quantise: an FP32 `bundle`, on which `images`, with which of PaddleSlim's algorithms, or `auto`.

    `method`: `ptq` calibrates; `distill` also fine-tunes the weights for `distill_steps`, starting from the best
    calibration, and publishes whichever of the two is measured to be better.
    `evaluation`: labelled images to measure mAP on, none of them among `images`; `annotations`: the file that they are
    from, for the record. `limits`: what is not published. `keep_float`: patterns of layers or groups that stay in
    float. `fallback`: put groups back to float if the limits do not hold otherwise. `sensitivity`: rank the groups even
    if they hold.
    """

    bundle: Path
    images: Sequence[Path]
    output: Path
    algorithm: str = "hist"
    method: Method = "ptq"
    distill_steps: int = DEFAULT_STEPS
    evaluation: CocoDataset | None = None
    annotations: Path | None = None
    limits: GateLimits = field(default_factory=GateLimits)
    keep_float: tuple[str, ...] = ()
    fallback: bool = True
    sensitivity: bool = False
    force: bool = False
    threads: int = 1
    command: str = ""


def quantize_bundle(
    request: QuantizeRequest,
    report: Report = lambda stage: None,
    progress: Progress = lambda label, done, total: None,
) -> Bundle:
    """Calibrate, write the graphs, measure them against FP32, put groups back to float if need be, publish.

    With `auto` that is done with several algorithms, and the best goes on. Raises `BundleError`, `DataError`,
    `EngineError`, `ParityError`, `OutputError`, `UnsupportedError`, `MissingDependencyError`.
    """
    algorithms = algorithms_of(request.algorithm)
    source = _checked(request)
    for note in {capability(engine, "int8", "cpu").note for engine in int8_engines()}:
        if note:
            report(f"note: {note}")
    asked = _asked(source, request.keep_float)
    report(f"checking {len(request.images)} calibration images")
    for path in request.images:
        read_image(path)
    calibrated_on = digests(request.images)
    evaluated_on: dict[str, str] = {}
    if request.evaluation is not None:
        match = request.evaluation.match(source.manifest.classes)
        check_measurable(request.evaluation, match.category_ids)
        for note in (*request.evaluation.notes, *match.notes):
            report(f"note: {note}")
        evaluated_on = digests([image.path for image in request.evaluation.images])
        refuse_overlap(calibrated_on, evaluated_on)

    size = sum(record.bytes for record in source.manifest.files.values())
    need = size * (len(algorithms) + (3 if request.method == "distill" else 1))
    with write_bundle(request.output, force=request.force, need_bytes=need) as (directory, manifests):
        report("running FP32 on calibration images" if request.evaluation is None else "measuring FP32")
        compared = spread(request.images, _AGREEMENT_IMAGES)
        fp32_reference = Fp32Reference.of(source, compared, request.evaluation, request.threads, progress)
        if problem := unjudgeable(fp32_reference.detections, fp32_reference.accuracy, request.limits):
            raise problem
        # Inside the unfinished bundle, so that whatever ends the run removes it too.
        (directory / "work").mkdir()
        evaluator = Evaluator(
            source, fp32_reference, request.limits, directory / "work", request.threads, report, progress
        )
        evaluated: dict[str, EvaluatedBundle] = {}
        candidates = []

        def attempt(
            label: str, algorithm: str, weights: Bundle, observed: Mapping[str, tuple[OutputRange, ...]]
        ) -> None:
            try:
                report(f"calibrating with PaddleSlim ({label})")
                blank = Calibration(algorithm, calibrated_on, {})
                program = evaluator.scratch / label / "program"
                quantized = _calibrate(weights, program, blank, request, observed, progress)
                report(f"comparing {label} with FP32 in {', '.join(int8_engines())}, and its TensorRT file")
                evaluated[label] = evaluator.evaluate(quantized, asked, label)
                candidates.append(Candidate(label, evaluated[label].engines))
            except (EngineError, ParityError) as error:
                report(f"{label} failed")
                candidates.append(Candidate(label, {}, error))

        report("observing the convolutions' outputs")
        observed = _observe(source, request, progress)
        for algorithm in algorithms:
            attempt(algorithm, algorithm, source, observed)
        chosen = best(candidates, fp32_reference.accuracy, request.limits, len(asked))
        distilled: Distilled | None = None
        if request.method == "distill":
            start = evaluated[chosen.algorithm].quantized.calibration
            report(f"distilling FP32 into weights for INT8, {request.distill_steps} steps from {chosen.algorithm}")
            distilled = _distil(source, start, evaluator.scratch / _DISTILLED, request, progress)
            observed = _observe(distilled.bundle, request, progress)
            attempt(f"{chosen.algorithm}, {_DISTILLED}", start.algorithm, distilled.bundle, observed)
            chosen = best(candidates, fp32_reference.accuracy, request.limits, len(asked))
        evaluation = evaluator.settle(evaluated[chosen.algorithm], request.fallback, request.sensitivity)
        record = parity_record(evaluation, fp32_reference, request.limits, evaluator.speeds(evaluation.evaluated))
        if request.evaluation is not None:
            record["evaluation"] = evaluation_record(request.annotations, evaluated_on)
        if len(candidates) > 1:
            record["algorithms"] = algorithms_record(candidates, chosen)
        if distilled is not None:
            record["distillation"] = distilled.to_dict()
        if evaluation.ranked:
            write_json(directory / "sensitivity.json", sensitivity_record(evaluation.ranked, fp32_reference.images))
        for path in evaluation.evaluated.bundle.directory.iterdir():
            path.rename(directory / path.name)
        shutil.rmtree(evaluator.scratch)
        write_json(directory / "parity.json", record)
        for name in _COPIED:
            shutil.copyfile(source.directory / name, directory / name)
        report(f"publishing {request.output} ({chosen.algorithm})")
        manifests.append(int8_manifest(source, chosen.algorithm, len(request.images), request.command))
    return Bundle.open(request.output)


def _checked(request: QuantizeRequest) -> Bundle:
    """The FP32 bundle, once it is clear that it can be quantised here and the result written."""
    source = Bundle.open(request.bundle)
    if source.manifest.precision != "fp32":
        raise BundleError(f"{request.bundle} is INT8 already", "Quantise the bundle that `gfldeploy export` wrote.")
    batch = source.manifest.inputs[0].shape[0]
    if batch not in (None, 1):
        raise BundleError(
            f"{request.bundle} has a fixed batch of {batch}, calibration runs image by image",
            "Export it with a free batch: --input-shape HxW.",
        )
    for graph in ("onnx", "paddle_program"):
        if why := source.manifest.left_out.get(graph):
            raise UnsupportedError(
                f"{request.bundle} cannot be quantised, which needs its {graph} graph: {why}", "Deploy it in float."
            )
        source.graph(graph)
    check_target(request.output, force=request.force)
    check_apart(request.output, [request.bundle], request.bundle)
    source.layers()
    for module in TOOL_CHAINS["quantize"].modules:
        require(module, "quantize")
    return source


def _asked(source: Bundle, patterns: tuple[str, ...]) -> frozenset[ConvUse]:
    """What the patterns keep in float. Raises `UnsupportedError` where that is everything."""
    if not patterns:
        return frozenset()
    uses = tuple(macs_shares(source))
    asked = match(source.layers(), uses, patterns)
    if len(asked) == len(uses):
        raise UnsupportedError("--keep-float leaves no convolution to run in INT8", "Give narrower patterns.")
    return asked


def _observe(source: Bundle, request: QuantizeRequest, progress: Progress) -> dict[str, tuple[OutputRange, ...]]:
    """The range of every convolution's output: the same for every algorithm."""
    preprocess = source.manifest.preprocess
    return observe_outputs(
        source.graph("onnx")[0],
        (preprocess.batch([preprocess(read_image(path))]) for path in request.images),
        len(request.images),
        request.threads,
        lambda done, total: progress("observing", done, total),
    )


def _distil(
    source: Bundle, start: Calibration, output: Path, request: QuantizeRequest, progress: Progress
) -> Distilled:
    """A method of quantising, up to the calibration of the weights that it gives."""
    return run_distill(
        source,
        list(request.images),
        start,
        output,
        request.distill_steps,
        request.threads,
        lambda done, total: progress(_DISTILLED, done, total),
    )


def _calibrate(
    source: Bundle,
    program: Path,
    blank: Calibration,
    request: QuantizeRequest,
    observed: Mapping[str, tuple[OutputRange, ...]],
    progress: Progress,
) -> Quantized:
    """A method of quantising: PaddleSlim's post-training quantisation with the algorithm and images of `blank`."""
    program.mkdir(parents=True)
    found = run_ptq(
        source,
        list(request.images),
        blank.algorithm,
        program,
        request.threads,
        lambda done, total: progress(f"PaddleSlim {blank.algorithm}", done, total),
    )
    if unknown := sorted(set(found) - set(observed)):
        raise EngineError(
            f"{source.graph('onnx')[0]} has no convolution {unknown[0]}, the Paddle program does",
            "Export the bundle again.",
        )
    ranges = {name: ConvRanges(inputs, observed[name], weights) for name, (inputs, weights) in found.items()}
    return Quantized(source, program, replace(blank, convolutions=ranges))
