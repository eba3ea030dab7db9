"""ONNX Runtime, on the CPU or on an NVIDIA GPU."""

from __future__ import annotations

import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gfldeploy.bundle import Bundle, GraphName
from gfldeploy.dependencies import require
from gfldeploy.engines.base import (
    NOT_ASKED,
    ClosesOnExit,
    CopyTimes,
    EngineOptions,
    ExecutedConvolution,
    ReportsPrecision,
    Tensors,
)
from gfldeploy.engines.ort_graph import convolutions
from gfldeploy.errors import EngineError

__all__ = ["OnnxRuntimeEngine"]

_PROVIDERS = {"cpu": ["CPUExecutionProvider"], "gpu": ["CUDAExecutionProvider"]}
_ERRORS_ONLY = 3


class OnnxRuntimeEngine(ClosesOnExit, ReportsPrecision):
    """`Engine` over an ONNX Runtime `InferenceSession`. FP32 and INT8 (QDQ) alike run the bundle's ONNX file."""

    name = "onnxruntime"

    def __init__(self, bundle: Bundle, options: EngineOptions, graph: GraphName = "onnx") -> None:
        """Load the graph. Raises `MissingDependencyError`, `BundleError` or `EngineError`."""
        self._model, _ = bundle.graph(graph)
        ort = require("onnxruntime", "onnxruntime", "the ONNX Runtime engine")
        self.version: str = ort.__version__
        self.options = options
        self._ort = ort
        self._outputs = [spec.name for spec in bundle.manifest.outputs]
        self._session: Any = self._open(self._session_options())

    def close(self) -> None:
        self._session = None

    def infer(self, inputs: Tensors) -> dict[str, NDArray[np.float32]]:
        try:
            arrays = self._session.run(self._outputs, dict(inputs))
        except Exception as error:
            raise self._failed(error) from error
        return dict(zip(self._outputs, arrays, strict=True))

    def infer_timed(self, inputs: Tensors) -> tuple[dict[str, NDArray[np.float32]], CopyTimes]:
        """On a GPU through bound inputs and outputs; on a CPU nothing is copied."""
        start = time.perf_counter()
        if self.options.device == "cpu":
            outputs = self.infer(inputs)
            return outputs, CopyTimes(0.0, (time.perf_counter() - start) * 1e3, 0.0)
        try:
            binding = self._session.io_binding()
            for name, array in inputs.items():
                value = self._ort.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(array), "cuda", 0)
                binding.bind_ortvalue_input(name, value)
            for name in self._outputs:
                binding.bind_output(name, "cuda")
            binding.synchronize_inputs()
            copied = time.perf_counter()
            self._session.run_with_iobinding(binding)
            binding.synchronize_outputs()
            ran = time.perf_counter()
            arrays = binding.copy_outputs_to_cpu()
        except Exception as error:
            raise self._failed(error) from error
        end = time.perf_counter()
        times = CopyTimes((copied - start) * 1e3, (ran - copied) * 1e3, (end - ran) * 1e3)
        return dict(zip(self._outputs, arrays, strict=True)), times

    def executed_convolutions(self, inputs: Tensors) -> tuple[ExecutedConvolution, ...]:
        """What the graph that ONNX Runtime optimised for itself runs; `inputs` make no difference to that."""
        import onnx

        with tempfile.TemporaryDirectory() as directory:
            path = Path(directory) / "optimized.onnx"
            options = self._session_options()
            options.optimized_model_filepath = str(path)
            self._open(options)
            found = convolutions(onnx.load(str(path)), onnx.load(str(self._model)))
        if self.options.precision == "fp32":
            return tuple(replace(one, why=NOT_ASKED) for one in found)
        return found

    @staticmethod
    def _failed(error: Exception) -> EngineError:
        return EngineError(
            f"ONNX Runtime failed: {error}", "Check the bundle with `gfldeploy verify`, or use fewer images at once."
        )

    def _session_options(self) -> Any:
        options = self._ort.SessionOptions()
        options.intra_op_num_threads = self.options.threads
        options.inter_op_num_threads = 1
        options.log_severity_level = _ERRORS_ONLY
        return options

    def _open(self, session_options: Any) -> Any:
        providers = _PROVIDERS[self.options.device]
        try:
            session = self._ort.InferenceSession(str(self._model), session_options, providers=providers)
        except Exception as error:
            raise EngineError(
                f"ONNX Runtime cannot load {self._model}: {error}", "Check the bundle with `gfldeploy verify`."
            ) from error
        if session.get_providers()[0] != providers[0]:
            # Without this, a machine whose CUDA libraries are missing silently measures its CPU.
            raise EngineError(
                f"ONNX Runtime fell back to {session.get_providers()[0]} instead of {providers[0]}",
                "Install the CUDA and cuDNN libraries that this onnxruntime-gpu was built for.",
            )
        return session
