"""Runs FP32 once and every INT8 candidate after it on the same images, in the engines that deploy it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Self

import numpy as np
from numpy.typing import NDArray

from gfldeploy.accuracy import Accuracy, evaluate
from gfldeploy.bundle import Bundle
from gfldeploy.engines.base import Engine, EngineOptions, ReportsPrecision
from gfldeploy.engines.registry import open_engine
from gfldeploy.images.coco import CocoDataset
from gfldeploy.images.decode import read_image
from gfldeploy.quant.agreement import Reference, agreement
from gfldeploy.quant.gate import Measured

__all__ = ["INT8_ENGINES", "Yardstick"]

INT8_ENGINES = ("onnxruntime", "paddle")

Progress = Callable[[str, int, int], None]


class Yardstick:
    """What FP32 in ONNX Runtime gives, and how far an INT8 bundle is from it.

    `detections`: how many FP32 has, of those that are compared. `accuracy`: of FP32 on the evaluation images, or None
    if there are none.
    """

    def __init__(
        self,
        source: Bundle,
        batches: Sequence[NDArray[np.float32]],
        references: Sequence[Reference],
        dataset: CocoDataset | None,
        accuracy: Accuracy | None,
        threads: int,
    ) -> None:
        self.detections = sum(reference.confident for reference in references)
        self.accuracy = accuracy
        self._source = source
        self._batches = batches
        self._references = references
        self._dataset = dataset
        self._threads = threads

    @classmethod
    def of(
        cls,
        source: Bundle,
        images: Sequence[Path],
        dataset: CocoDataset | None,
        threads: int,
        progress: Progress = lambda label, done, total: None,
    ) -> Self:
        """Run FP32 on `images`, to compare detections, and on `dataset`, if given, for mAP.

        Raises `DataError` for images or labels that cannot be used, and `EngineError`.
        """
        manifest = source.manifest
        batches = [manifest.preprocess.batch([manifest.preprocess(read_image(path))]) for path in images]
        with open_engine("onnxruntime", source, EngineOptions("fp32", "cpu", threads)) as engine:
            references = [Reference.of(engine.infer({"image": batch}), manifest.nms) for batch in batches]
            accuracy = None if dataset is None else _accuracy(engine, source, dataset, "mAP of FP32", progress)
        return cls(source, batches, references, dataset, accuracy, threads)

    def measure(
        self, bundle: Bundle, label: str, progress: Progress = lambda label, done, total: None
    ) -> dict[str, Measured]:
        """Run the INT8 `bundle` in every engine. `label` is what progress calls it. Raises `ParityError` for NaN."""
        nms = self._source.manifest.nms
        found = {}
        for name in INT8_ENGINES:
            with open_engine(name, bundle, EngineOptions("int8", "cpu", self._threads)) as engine:
                outputs = [engine.infer({"image": batch}) for batch in self._batches]
                agreed = agreement(self._references, outputs, nms)
                if isinstance(engine, ReportsPrecision):
                    agreed = replace(agreed, convolutions=engine.executed_precisions({"image": self._batches[0]}))
                accuracy = None
                if self._dataset is not None:
                    accuracy = _accuracy(engine, self._source, self._dataset, f"mAP of {label} in {name}", progress)
            found[name] = Measured(agreed, accuracy)
        return found


def _accuracy(engine: Engine, bundle: Bundle, dataset: CocoDataset, label: str, progress: Progress) -> Accuracy:
    manifest = bundle.manifest
    return evaluate(
        engine,
        dataset,
        manifest.preprocess,
        manifest.nms,
        manifest.classes,
        progress=lambda done, total: progress(label, done, total),
    )
