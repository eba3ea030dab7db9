"""From an FP32 bundle and images to an INT8 bundle that was measured against the FP32 one before it is published."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from gfldeploy import __version__
from gfldeploy.accuracy import Accuracy
from gfldeploy.bundle import Bundle, Graph, Manifest, write_bundle
from gfldeploy.dependencies import require
from gfldeploy.engines.registry import capability
from gfldeploy.errors import BundleError, EngineError, ParityError
from gfldeploy.files import check_target, write_json
from gfldeploy.images.coco import CocoDataset
from gfldeploy.images.decode import read_image
from gfldeploy.quant.calibration import Calibration, ConvRanges, OutputRange
from gfldeploy.quant.gate import Candidate, Limits, best, failure, unjudgeable
from gfldeploy.quant.measurement import INT8_ENGINES, Yardstick
from gfldeploy.quant.observer import observe_outputs
from gfldeploy.quant.ptq import algorithms_of, run_ptq
from gfldeploy.quant.qdq import write_qdq_onnx
from gfldeploy.quant.samples import digests, refuse_overlap, spread
from gfldeploy.quant.tensorrt import write_tensorrt_onnx

__all__ = ["QuantizeRequest", "quantize_bundle"]

_AGREEMENT_IMAGES = 8

Report = Callable[[str], None]
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class QuantizeRequest:
    """What to quantise: an FP32 `bundle`, on which `images`, with which of PaddleSlim's algorithms, or `auto`.

    `evaluation`: labelled images to measure mAP on, none of them among `images`. `limits`: what is not published.
    """

    bundle: Path
    images: Sequence[Path]
    output: Path
    algorithm: str = "hist"
    evaluation: CocoDataset | None = None
    limits: Limits = field(default_factory=Limits)
    force: bool = False
    threads: int = 1
    command: str = ""


def quantize_bundle(
    request: QuantizeRequest,
    report: Report = lambda stage: None,
    progress: Progress = lambda label, done, total: None,
) -> Bundle:
    """Calibrate, write the Paddle INT8 program and the QDQ ONNX file, measure both against FP32, publish.

    With `auto` that is done with several algorithms and the best is published. Raises `BundleError`, `DataError`,
    `EngineError`, `ParityError`, `OutputError`, `UnsupportedError`, `MissingDependencyError`.
    """
    algorithms = algorithms_of(request.algorithm)
    source = _checked(request)
    for note in {capability(engine, "int8", "cpu").note for engine in INT8_ENGINES}:
        if note:
            report(f"note: {note}")
    report(f"checking {len(request.images)} calibration images")
    for path in request.images:
        read_image(path)
    calibrated_on = digests(request.images)
    if request.evaluation is not None:
        request.evaluation.class_to_category(source.manifest.classes)
        refuse_overlap(calibrated_on, request.evaluation)

    size = sum(record.bytes for record in source.manifest.files.values())
    need = size * len(algorithms)
    with write_bundle(request.output, force=request.force, need_bytes=need) as (directory, manifests):
        report("running FP32 on calibration images" if request.evaluation is None else "measuring FP32")
        compared = spread(request.images, _AGREEMENT_IMAGES)
        yardstick = Yardstick.of(source, compared, request.evaluation, request.threads, progress)
        if problem := unjudgeable(yardstick.detections, yardstick.accuracy, request.limits):
            raise problem
        report("observing the convolutions' outputs")
        observed = _observe(source, request, progress)
        candidates = []
        for algorithm in algorithms:
            # Inside the unfinished bundle, so that whatever ends the run removes them too.
            bundle = Bundle(directory / algorithm, _manifest(source, request, algorithm))
            try:
                report(f"calibrating with PaddleSlim ({algorithm})")
                _calibrate(source, bundle, Calibration(algorithm, calibrated_on, {}), request, observed, progress)
                report(f"comparing {algorithm} with FP32 in {' and '.join(INT8_ENGINES)}")
                candidates.append(Candidate(algorithm, yardstick.measure(bundle, algorithm, progress)))
            except (EngineError, ParityError) as error:
                report(f"{algorithm} failed")
                candidates.append(Candidate(algorithm, {}, error))
        chosen = best(candidates, yardstick.accuracy, request.limits)
        if problem := failure(chosen.engines, yardstick.accuracy, request.limits):
            raise problem
        _keep(directory, chosen.algorithm, algorithms)
        record = _parity(request, [path.name for path in compared], candidates, chosen, yardstick.accuracy)
        write_json(directory / "parity.json", record)
        (directory / "infer_cfg.yml").write_bytes((source.directory / "infer_cfg.yml").read_bytes())
        report(f"publishing {request.output} ({chosen.algorithm})")
        manifests.append(_manifest(source, request, chosen.algorithm))
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
    source.graph("onnx")
    source.graph("paddle_program")
    check_target(request.output, force=request.force)
    for module, extra in (("paddle", "paddle"), ("paddleslim", "quant"), ("onnxruntime", "onnxruntime")):
        require(module, extra, "quantize")
    return source


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


def _calibrate(
    source: Bundle,
    bundle: Bundle,
    blank: Calibration,
    request: QuantizeRequest,
    observed: Mapping[str, tuple[OutputRange, ...]],
    progress: Progress,
) -> None:
    """Write the graphs and `calibration.json` of `bundle`: `blank` with its ranges filled in."""
    onnx_file, _ = source.graph("onnx")
    for folder in ("paddle", "onnx"):
        (bundle.directory / folder).mkdir(parents=True)
    found = run_ptq(
        source,
        list(request.images),
        blank.algorithm,
        bundle.directory / "paddle",
        lambda done, total: progress(f"PaddleSlim {blank.algorithm}", done, total),
    )
    if unknown := sorted(set(found) - set(observed)):
        raise EngineError(
            f"{onnx_file} has no convolution {unknown[0]}, the Paddle program does", "Export the bundle again."
        )
    ranges = {name: ConvRanges(inputs, observed[name], weights) for name, (inputs, weights) in found.items()}
    calibration = replace(blank, convolutions=ranges)
    write_json(bundle.directory / "calibration.json", calibration.to_dict())
    write_qdq_onnx(onnx_file, bundle.directory / "onnx/model.onnx", calibration)
    write_tensorrt_onnx(onnx_file, bundle.directory / "onnx/model_tensorrt.onnx", calibration)


def _keep(directory: Path, chosen: str, algorithms: Sequence[str]) -> None:
    """Move the chosen candidate's files up into `directory`; remove the other candidates."""
    for path in (directory / chosen).iterdir():
        path.rename(directory / path.name)
    for algorithm in algorithms:
        shutil.rmtree(directory / algorithm)


def _parity(
    request: QuantizeRequest,
    compared: Sequence[str],
    candidates: Sequence[Candidate],
    chosen: Candidate,
    fp32: Accuracy | None,
) -> dict[str, Any]:
    """`parity.json`: what was measured of the chosen candidate, and the table of those tried where there were more."""
    data: dict[str, Any] = {
        "reference": "the FP32 ONNX graph in ONNX Runtime, on calibration images",
        "images": list(compared),
        "limits": asdict(request.limits),
        "engines": {name: one.agreement.to_dict() for name, one in chosen.engines.items()},
    }
    if fp32 is not None:
        data["accuracy"] = {
            "fp32": fp32.to_dict(),
            "engines": {name: one.accuracy.to_dict() for name, one in chosen.engines.items() if one.accuracy},
        }
    if len(candidates) > 1:
        data["algorithms"] = {"chosen": chosen.algorithm, "tried": [one.to_dict() for one in candidates]}
    return data


def _manifest(source: Bundle, request: QuantizeRequest, algorithm: str) -> Manifest:
    return replace(
        source.manifest,
        name=f"{source.name}_int8",
        precision="int8",
        graphs={
            "paddle_program": Graph("paddle/model.pdmodel", "paddle/model.pdiparams"),
            "onnx": Graph("onnx/model.onnx"),
            "onnx_tensorrt": Graph("onnx/model_tensorrt.onnx"),
        },
        provenance={
            **source.manifest.provenance,
            "quantized": {
                "from": source.digest,
                "algorithm": algorithm,
                "images": len(request.images),
                "gfldeploy": __version__,
                "command": request.command,
            },
        },
        files={},
    )
