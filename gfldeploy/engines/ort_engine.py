"""ONNX Runtime, on the CPU or on an NVIDIA GPU."""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gfldeploy.bundle import Bundle, GraphName
from gfldeploy.engines.base import NOT_ASKED, CopyTimes, Engine, EngineOptions, ExecutedConvolution, Tensors
from gfldeploy.engines.dependencies import require
from gfldeploy.engines.ort_graph import convolutions
from gfldeploy.errors import EngineError
from gfldeploy.files import scratch_directory

PROVIDERS = {"cpu": "CPUExecutionProvider", "gpu": "CUDAExecutionProvider"}
_ERRORS_ONLY = 3


class OnnxRuntimeEngine(Engine):
    """`Engine` over an ONNX Runtime `InferenceSession`. FP32 and INT8 (QDQ) alike run the bundle's ONNX file."""

    name = "onnxruntime"
    title = "ONNX Runtime"
    libraries = "CUDA and cuDNN"

    def __init__(self, bundle: Bundle, options: EngineOptions, graph: GraphName) -> None:
        """Load the graph. Raises `MissingDependencyError`, `BundleError` or `EngineError`."""
        super().__init__(bundle, options, graph)
        self._ort = require("onnxruntime", "the ONNX Runtime engine")
        self.version: str = self._ort.__version__
        self._providers = self._choose_providers(bundle)
        self._session: Any = self._open(self._session_options())

    def close(self) -> None:
        self._session = None

    def infer_timed(self, inputs: Tensors) -> tuple[dict[str, NDArray[Any]], CopyTimes]:
        """On a GPU through bound inputs and outputs; on a CPU nothing is copied."""
        start = copied = time.perf_counter()
        with self._explained():
            if self.options.device == "cpu":
                arrays = self._session.run(self._outputs, dict(inputs))
                ran = end = time.perf_counter()
            else:
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
                end = time.perf_counter()
        return dict(zip(self._outputs, arrays, strict=True)), CopyTimes.between(start, copied, ran, end)

    def executed_convolutions(self, inputs: Tensors) -> tuple[ExecutedConvolution, ...]:
        """From the graph that ONNX Runtime optimised; it is the same for all inputs."""
        import onnx

        with scratch_directory() as directory:
            path = directory / "optimized.onnx"
            options = self._session_options()
            options.optimized_model_filepath = str(path)
            self._open(options)
            found = convolutions(onnx.load(str(path)), onnx.load(str(self._model)))
        if self.options.precision == "fp32":
            return tuple(replace(one, why=NOT_ASKED) for one in found)
        return found

    def convolution_share(self, inputs: Tensors) -> float | None:
        """From ONNX Runtime's profile, in a session of its own; None on a GPU, where it times only the launches."""
        if self.options.device == "gpu":
            return None
        return convolution_share(self._profile(inputs, self._share_runs))

    def _profile(self, inputs: Tensors, runs: int) -> list[dict[str, Any]]:
        with scratch_directory() as directory:
            options = self._session_options()
            options.enable_profiling = True
            options.profile_file_prefix = str(directory / "profile")
            session = self._open(options)
            for _ in range(runs):
                session.run(self._outputs, dict(inputs))
            events: list[dict[str, Any]] = json.loads(Path(session.end_profiling()).read_text(encoding="utf-8"))
        return events

    def _session_options(self) -> Any:
        return session_options(self._ort, self.options.threads)

    def _open(self, session_options: Any) -> Any:
        with self._explained(f"cannot load {self._model}"):
            session = self._ort.InferenceSession(str(self._model), session_options, providers=self._providers)
        used, wanted = session.get_providers()[0], self._providers[0][0]
        if used != wanted:
            # Without this, a machine whose CUDA libraries are missing silently measures its CPU.
            raise EngineError(
                f"ONNX Runtime fell back to {used} instead of {wanted}",
                f"Install the {self.libraries} libraries that this onnxruntime-gpu was built for.",
            )
        return session

    def _choose_providers(self, bundle: Bundle) -> list[tuple[str, dict[str, str]]]:
        """The execution providers with their options, the one that must not be missing first."""
        return [(PROVIDERS[self.options.device], {})]


def session_options(ort: Any, threads: int) -> Any:
    """The session options of every session; `ort`: the `onnxruntime` module."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = _ERRORS_ONLY
    return options


def convolution_share(events: Iterable[Mapping[str, Any]]) -> float | None:
    """The share of the nodes' time that convolutions took, by an ONNX Runtime profile; None without nodes.

    The first inference counts too: its share differs little, and its events cannot be told from the others.
    """
    spent: Counter[bool] = Counter()
    for event in events:
        name = event.get("args", {}).get("op_name")
        if event.get("cat") == "Node" and name:
            spent["Conv" in name] += event.get("dur", 0)
    return spent[True] / spent.total() if spent.total() else None
