"""Runs FP32 once, and then every INT8 candidate, on the same images in the engines that will deploy it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from gfldeploy.accuracy import Accuracy, accuracy_of, batch_shapes, measure_accuracy
from gfldeploy.batch_detection import DetectionJob, detect_on_ray
from gfldeploy.bundle import Bundle, GraphName, complete_bundle
from gfldeploy.cluster.ray_cluster import ClusterOptions
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
    if there are none. `cluster`: where mAP is measured; None for here.
    """

    source: Bundle
    images: Sequence[str]
    batches: Sequence[NDArray[np.float32]]
    references: Sequence[Reference]
    dataset: CocoDataset | None
    accuracy: Accuracy | None
    threads: int
    cluster: ClusterOptions | None = None

    @cached_property
    def int8_options(self) -> EngineOptions:
        """Of engines that are measured. They know the shapes to come, so that what ran before makes no difference."""
        options = EngineOptions("int8", "cpu", self.threads)
        if self.dataset is None:
            return options
        return options.expecting(batch_shapes(self.dataset, self.source.manifest.preprocess, 1, "listed"))

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
        cluster: ClusterOptions | None = None,
    ) -> Self:
        """Run FP32 on `images`, to compare detections, and on `dataset`, if given, for mAP.

        Raises `DataError` for images or labels that cannot be used, and `EngineError`.
        """
        manifest = source.manifest
        batches = [manifest.preprocess.batch([manifest.preprocess(read_image(path))]) for path in images]
        with open_engine(REFERENCE_ENGINE, source, EngineOptions("fp32", "cpu", threads)) as engine:
            references = [Reference.of(engine.infer({"image": batch}), manifest.nms) for batch in batches]
            names = [path.name for path in images]
            found = cls(source, names, batches, references, dataset, None, threads, cluster)
            return replace(found, accuracy=found._accuracy(engine, source, "mAP of FP32", progress))

    def measure(self, bundle: Bundle, label: str, progress: Progress = SILENT) -> dict[str, Int8Measurement]:
        """Run the INT8 `bundle` in every engine and, simulated, as TensorRT reads it. `label`: what progress calls it.

        Raises `EngineError`, and `ParityError` for NaN.
        """
        found = {}
        for name in int8_engines():
            with open_engine(name, bundle, self.int8_options) as engine:
                found[name] = self.measured(engine, bundle, name, label, progress)
                ran = engine.executed_convolutions({"image": self.batches[0]})
                told = replace(found[name].agreement, convolutions=count_precisions(ran), not_int8=reasons(ran))
                found[name] = replace(found[name], agreement=told)
        with SimulatedTensorRT(bundle, self.int8_options) as engine:
            found[SIMULATED_TENSORRT] = self.measured(engine, bundle, SIMULATED_TENSORRT, label, progress)
        return found

    def measured(
        self, engine: Engine, bundle: Bundle, name: str, label: str, progress: Progress = SILENT
    ) -> Int8Measurement:
        """Run an engine in which an INT8 bundle is loaded. Raises as `measure`."""
        outputs = (engine.infer({"image": batch}) for batch in self.batches)
        agreed = agreement(self.references, outputs, self.source.manifest.nms)
        return Int8Measurement(agreed, self._accuracy(engine, bundle, f"mAP of {label} in {name}", progress))

    def _accuracy(self, engine: Engine, bundle: Bundle, label: str, progress: Progress) -> Accuracy | None:
        """Of an engine in which the bundle is loaded; None without a dataset."""
        dataset, manifest = self.dataset, self.source.manifest
        if dataset is None:
            return None
        if self.cluster is None:
            how = manifest.preprocess, manifest.nms, manifest.classes
            return measure_accuracy(engine, dataset, *how, progress=progress, label=label)
        paths = [image.path for image in dataset.images]
        with complete_bundle(bundle) as whole:
            detect = partial(detect_on_ray, self.cluster, DetectionJob.of(engine, whole), whole, paths, progress)
            return accuracy_of(detect, dataset, manifest.preprocess, manifest.classes, progress=progress, label=label)


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
