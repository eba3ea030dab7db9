"""Runs FP32 once, and then every INT8 candidate, on the same images in the engines that will deploy it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from gfldeploy.accuracy import Accuracy, measure_accuracy
from gfldeploy.bundle import Bundle, GraphName
from gfldeploy.engines.base import Engine, EngineOptions, count_precisions, reasons
from gfldeploy.engines.openvino_engine import OpenVinoEngine
from gfldeploy.engines.ort_engine import OnnxRuntimeEngine
from gfldeploy.engines.registry import JUDGES, REFERENCE_ENGINE, capability, open_engine
from gfldeploy.images.coco import CocoDataset
from gfldeploy.images.decode import read_image
from gfldeploy.progress import SILENT, Progress
from gfldeploy.quant.agreement import Reference, agreement
from gfldeploy.quant.gate import PLAIN_ONNX_RUNTIME, PLAIN_OPENVINO, SIMULATED_TENSORRT, Int8Measurement


def int8_engines() -> tuple[str, ...]:
    """The engines in which INT8 must hold to be published here: the judges that are installed."""
    return tuple(name for name in JUDGES if capability(name, "int8", "cpu").works)


@dataclass(frozen=True)
class Fp32Reference:
    """The outputs of FP32 in ONNX Runtime, to measure INT8 bundles against.

    `images`: names of the images that are compared; `batches` [1, 3, H, W] and `references`: each of them as the
    network's input, and what FP32 gives for it. `dataset`: the evaluation images, and `accuracy` of FP32 on them; None
    if there are none.
    """

    source: Bundle
    images: Sequence[str]
    batches: Sequence[NDArray[np.float32]]
    references: Sequence[Reference]
    dataset: CocoDataset | None
    accuracy: Accuracy | None
    threads: int

    @property
    def detections(self) -> int:
        """How many FP32 has on the images that are compared."""
        return sum(reference.confident for reference in self.references)

    @classmethod
    def of(
        cls,
        source: Bundle,
        images: Sequence[Path],
        dataset: CocoDataset | None,
        threads: int,
        progress: Progress = SILENT,
    ) -> Self:
        """Run FP32 on `images`, to compare detections, and on `dataset`, if given, for mAP.

        Raises `DataError` for images or labels that cannot be used, and `EngineError`.
        """
        manifest = source.manifest
        batches = [manifest.preprocess.batch([manifest.preprocess(read_image(path))]) for path in images]
        with open_engine(REFERENCE_ENGINE, source, EngineOptions("fp32", "cpu", threads)) as engine:
            references = [Reference.of(engine.infer({"image": batch}), manifest.nms) for batch in batches]
            accuracy = None if dataset is None else _accuracy(engine, source, dataset, "mAP of FP32", progress)
        names = [path.name for path in images]
        return cls(source, names, batches, references, dataset, accuracy, threads)

    def measure(self, bundle: Bundle, label: str, progress: Progress = SILENT) -> dict[str, Int8Measurement]:
        """Run the INT8 `bundle` in every engine and, simulated, as TensorRT reads it. `label`: what progress calls it.

        Raises `EngineError`, and `ParityError` for NaN.
        """
        options = EngineOptions("int8", "cpu", self.threads)
        found = {}
        for name in int8_engines():
            with open_engine(name, bundle, options) as engine:
                found[name] = self.measured(engine, name, label, progress)
                ran = engine.executed_convolutions({"image": self.batches[0]})
                told = replace(found[name].agreement, convolutions=count_precisions(ran), not_int8=reasons(ran))
                found[name] = replace(found[name], agreement=told)
        with SimulatedTensorRT(bundle, options) as engine:
            found[SIMULATED_TENSORRT] = self.measured(engine, SIMULATED_TENSORRT, label, progress)
        return found

    def measured(self, engine: Engine, name: str, label: str, progress: Progress = SILENT) -> Int8Measurement:
        """Run an engine of an INT8 bundle. Raises as `measure`."""
        outputs = (engine.infer({"image": batch}) for batch in self.batches)
        agreed = agreement(self.references, outputs, self.source.manifest.nms)
        accuracy = None
        if self.dataset is not None:
            accuracy = _accuracy(engine, self.source, self.dataset, f"mAP of {label} in {name}", progress)
        return Int8Measurement(agreed, accuracy)


class SimulatedTensorRT(OnnxRuntimeEngine):
    """The TensorRT file in ONNX Runtime on the CPU: Q and DQ round as written, and everything between them is float.

    TensorRT multiplies and adds up the same integers, exactly; its own roundings besides are left out.
    """

    name = SIMULATED_TENSORRT

    def __init__(self, bundle: Bundle, options: EngineOptions, graph: GraphName = "onnx_tensorrt") -> None:
        """Load the graph. Raises `MissingDependencyError`, `BundleError` or `EngineError`."""
        super().__init__(bundle, options, graph)

    def _session_options(self) -> Any:
        options = super()._session_options()
        # It would fuse some convolutions into its own INT8 kernels, and round their biases for that.
        options.add_session_config_entry("session.disable_quant_qdq", "1")
        return options


class PlainOnnxRuntime(OnnxRuntimeEngine):
    """A file in ONNX Runtime as it is, for those who deploy it without gfldeploy."""

    name = PLAIN_ONNX_RUNTIME
    rewrites = False


class PlainOpenVino(OpenVinoEngine):
    """A file in OpenVINO as it is, for those who deploy it without gfldeploy."""

    name = PLAIN_OPENVINO
    rewrites = False


def _accuracy(engine: Engine, bundle: Bundle, dataset: CocoDataset, label: str, progress: Progress) -> Accuracy:
    manifest = bundle.manifest
    return measure_accuracy(
        engine,
        dataset,
        manifest.preprocess,
        manifest.nms,
        manifest.classes,
        progress=progress,
        label=label,
    )
