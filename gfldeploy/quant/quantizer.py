"""From an FP32 bundle and images to an INT8 bundle whose graphs were compared with the FP32 one on those images."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from gfldeploy import __version__
from gfldeploy.bundle import Bundle, Graph, Manifest, write_bundle
from gfldeploy.dependencies import require
from gfldeploy.engines.base import EngineOptions, ReportsPrecision
from gfldeploy.engines.registry import open_engine
from gfldeploy.errors import BundleError, DataError, EngineError, ParityError
from gfldeploy.files import check_target, sha256, write_json
from gfldeploy.images.coco import CocoDataset, list_images
from gfldeploy.images.decode import read_image
from gfldeploy.quant.agreement import Agreement, Reference, agreement
from gfldeploy.quant.calibration import Calibration, ConvRanges
from gfldeploy.quant.observer import observe_outputs
from gfldeploy.quant.ptq import run_ptq
from gfldeploy.quant.qdq import write_qdq_onnx

__all__ = ["DEFAULT_SAMPLES", "QuantizeRequest", "calibration_images", "quantize_bundle"]

DEFAULT_SAMPLES = 64

# Below this share of the FP32 detections found again, INT8 is not a little worse but broken: quantised box arithmetic
# finds next to none, a sound calibration nearly all.
_LEAST_AGREEMENT = 0.5
_AGREEMENT_IMAGES = 8

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class QuantizeRequest:
    """What to quantise: an FP32 `bundle`, on which `images`, with which of PaddleSlim's algorithms."""

    bundle: Path
    images: Sequence[Path]
    output: Path
    algorithm: str = "hist"
    force: bool = False
    threads: int = 1
    command: str = ""


def calibration_images(data: Path, images: Path | None, samples: int) -> list[Path]:
    """`samples` images, spread evenly over a COCO file's or a folder's. Raises `DataError` if there are fewer."""
    if samples < 1:
        raise ValueError(f"samples must be at least 1, not {samples}")
    paths = list_images(data) if data.is_dir() else [image.path for image in CocoDataset.load(data, images).images]
    if len(paths) < samples:
        raise DataError(
            f"{data} has {len(paths)} images, {samples} were asked for", f"Add images, or use --samples {len(paths)}."
        )
    return [paths[index * len(paths) // samples] for index in range(samples)]


def quantize_bundle(
    request: QuantizeRequest,
    report: Callable[[str], None] = lambda stage: None,
    progress: Progress = lambda label, done, total: None,
) -> Bundle:
    """Calibrate once, write the Paddle INT8 program and the QDQ ONNX file, compare both with FP32, publish.

    Raises `BundleError`, `DataError`, `EngineError`, `ParityError`, `OutputError`, `MissingDependencyError`.
    """
    source = Bundle.open(request.bundle)
    if source.manifest.precision != "fp32":
        raise BundleError(f"{request.bundle} is INT8 already", "Quantise the bundle that `gfldeploy export` wrote.")
    batch = source.manifest.inputs[0].shape[0]
    if batch not in (None, 1):
        raise BundleError(
            f"{request.bundle} has a fixed batch of {batch}, calibration runs image by image",
            "Export it with a free batch: --input-shape HxW.",
        )
    onnx_file, _ = source.graph("onnx")
    source.graph("paddle_program")
    check_target(request.output, force=request.force)
    for module, extra in (("paddle", "paddle"), ("paddleslim", "quant"), ("onnxruntime", "onnxruntime")):
        require(module, extra, "quantize")
    preprocess = source.manifest.preprocess
    report(f"checking {len(request.images)} calibration images")
    for path in request.images:
        read_image(path)

    def batches() -> list[NDArray[np.float32]]:
        return [preprocess.batch([preprocess(read_image(path))]) for path in request.images[:_AGREEMENT_IMAGES]]

    size = sum(record.bytes for record in source.manifest.files.values())
    with write_bundle(request.output, force=request.force, need_bytes=size) as (directory, manifests):
        report(f"calibrating with PaddleSlim ({request.algorithm})")
        (directory / "paddle").mkdir()
        found = run_ptq(
            source,
            list(request.images),
            request.algorithm,
            directory / "paddle",
            lambda done, total: progress("PaddleSlim", done, total),
        )
        report("observing the convolutions' outputs")
        outputs = observe_outputs(
            onnx_file,
            (preprocess.batch([preprocess(read_image(path))]) for path in request.images),
            len(request.images),
            request.threads,
            lambda done, total: progress("observing", done, total),
        )
        if unknown := sorted(set(found) - set(outputs)):
            raise EngineError(
                f"{onnx_file} has no convolution {unknown[0]}, the Paddle program does", "Export the bundle again."
            )
        calibration = Calibration(
            algorithm=request.algorithm,
            images={sha256(path): path.name for path in request.images},
            convolutions={
                name: ConvRanges(inputs, outputs[name], weights) for name, (inputs, weights) in found.items()
            },
        )
        write_json(directory / "calibration.json", calibration.to_dict())
        report("writing the QDQ ONNX graph")
        (directory / "onnx").mkdir()
        write_qdq_onnx(onnx_file, directory / "onnx/model.onnx", calibration)
        manifest = _manifest(source, request)
        bundle = Bundle(directory, manifest)
        report("comparing with FP32 on calibration images")
        checks = _compare(source, bundle, batches(), request.threads)
        write_json(
            directory / "parity.json",
            {
                "reference": "the FP32 ONNX graph in ONNX Runtime, on calibration images",
                "images": [path.name for path in request.images[:_AGREEMENT_IMAGES]],
                "engines": {name: check.to_dict() for name, check in checks.items()},
            },
        )
        (directory / "infer_cfg.yml").write_bytes((source.directory / "infer_cfg.yml").read_bytes())
        report(f"publishing {request.output}")
        manifests.append(manifest)
    return Bundle.open(request.output)


def _compare(source: Bundle, bundle: Bundle, batches: list[NDArray[np.float32]], threads: int) -> dict[str, Agreement]:
    """How far each INT8 engine is from FP32, and that it is not far. Raises `ParityError`."""
    nms = source.manifest.nms
    with open_engine("onnxruntime", source, EngineOptions("fp32", "cpu", threads)) as engine:
        references = [Reference.of(engine.infer({"image": batch}), nms) for batch in batches]
    checks = {}
    for name in ("onnxruntime", "paddle"):
        with open_engine(name, bundle, EngineOptions("int8", "cpu", threads)) as engine:
            found = agreement(references, [engine.infer({"image": batch}) for batch in batches], nms)
            if isinstance(engine, ReportsPrecision):
                found = replace(found, convolutions=engine.executed_precisions({"image": batches[0]}))
            checks[name] = found
        if found.detections_found < _LEAST_AGREEMENT:
            raise ParityError(
                f"INT8 in {name} finds only {found.detections_found:.0%} of what FP32 finds on the calibration images",
                "Calibrate on images like those you deploy on, with more --samples or another --algo.",
            )
    return checks


def _manifest(source: Bundle, request: QuantizeRequest) -> Manifest:
    return replace(
        source.manifest,
        name=f"{source.name}_int8",
        precision="int8",
        graphs={
            "paddle_program": Graph("paddle/model.pdmodel", "paddle/model.pdiparams"),
            "onnx": Graph("onnx/model.onnx"),
        },
        provenance={
            **source.manifest.provenance,
            "quantized": {
                "from": source.digest,
                "algorithm": request.algorithm,
                "images": len(request.images),
                "gfldeploy": __version__,
                "command": request.command,
            },
        },
        files={},
    )
