"""ONNX Runtime sessions whose inputs and outputs keep their memory on the device from one inference to the next.

What ONNX Runtime's Python API (1.20 to 1.32) can do on a GPU, and what it cannot:

- `OrtValue.update_inplace` copies into memory that stays where it is, and returns when the copy is done. It may run
  beside an inference of another thread, whose kernels are in a stream of their own: so copies and computing overlap
  here. To start a copy without waiting for it needs a stream object, which only newer versions give out.
- It allocates on the device, but no pinned host memory: that comes from the CUDA library that it has loaded. Of its
  packages for CPUs, only some give the device memory of a plug-in: without, nothing is bound, and results say so.
- A CUDA graph replays one input shape, in the memory and the thread that it was captured in. Before 1.31 a session with
  several of them, or with other inputs between its replays, computes nonsense (pull request 32121 of onnxruntime). So
  sessions with a graph see one shape and one thread only.

The device may also be "cpu": the same code then runs where there is no GPU.
"""

from __future__ import annotations

import ctypes
import threading
import time
import weakref
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gfldeploy.engines.base import CopyTimes, Tensors
from gfldeploy.errors import summary

# Input shapes that have memory on the device: at batch 8 one of 800x1344 takes 103 MB.
KEPT_SHAPES = 4
_ROOM_FOR = 4  # sessions as large as those so far must fit beside one more
_SPARES = 2  # for each: `upload` is one batch ahead
_TYPES = {"tensor(float)": np.float32, "tensor(float16)": np.float16, "tensor(int32)": np.int32}
_GRAPH_ID = ("gpu_graph_id", "1")
# Held by who captures a graph, and by who copies to the device or takes memory of CUDA's: CUDA ends the capture of one
# thread when another does that.
_CAPTURING = threading.RLock()
_MISTAKES = (AttributeError, NameError, TypeError)  # in this code: no reason to run without a graph

Key = tuple[tuple[str, str, tuple[int, ...]], ...]


class Uploaded(dict[str, NDArray[Any]]):
    """Inputs that are on the device already, in `on_device`."""

    def __init__(self, inputs: Tensors, on_device: dict[str, Any]) -> None:
        super().__init__(inputs)
        self.on_device = on_device


@dataclass
class _Bound:
    """What is bound for inputs of one shape.

    `bindings`: of the `sessions`; `outputs`: their names, for each. `values`: inputs and outputs on the device, by
    name. `spares`: memory for inputs that nothing reads now.
    """

    sessions: Sequence[Any]
    bindings: Sequence[Any]
    outputs: Sequence[Sequence[str]]
    values: dict[str, Any]
    spares: list[dict[str, Any]] = field(default_factory=list)

    @property
    def complete(self) -> bool:
        """Whether all outputs have their memory; else the first inference shows what shapes the others have."""
        return all(name in self.values for names in self.outputs for name in names)


class BoundSessions:
    """Sessions that run one after the other on one device, each reading by name the inputs and what earlier ones gave.

    `open_sessions`: opens them, with CUDA graphs if its argument says so. `device`: "cpu" or "cuda". `outputs`: of the
    last session. `cuda_graph`: all inputs will have one shape, so have it replayed as a CUDA graph. Where that is
    refused or fails, or inputs of another shape come, the sessions are opened without, and `no_graph` says why.

    One thread at a time may infer, and one may upload. Raises what `open_sessions` raises.
    """

    def __init__(
        self,
        ort: Any,
        open_sessions: Callable[[bool], Sequence[Any]],
        device: str,
        outputs: Sequence[str],
        cuda_graph: bool = False,
    ) -> None:
        self._ort = ort
        self._opener = open_sessions
        self._device = device
        self._outputs = outputs
        self._bound: OrderedDict[Key, _Bound] = OrderedDict()
        self._memory = threading.Lock()  # held to look at or change `_bound` and its spares
        self._graph_thread: ThreadPoolExecutor | None = None
        self._sessions: Sequence[Any] = ()
        self.no_graph: str | None = None
        self.unbound = _why_unbound(ort, device)
        if cuda_graph and self.unbound is None:
            try:
                self._sessions = self._open(True)
                self._graph_thread = ThreadPoolExecutor(1, "gfldeploy-cuda-graph")
            except _MISTAKES:
                raise
            except Exception as error:  # noqa: BLE001 - what else is wrong shows again without a graph
                self.no_graph = summary(error)
        self._sessions = self._sessions or self._open(False)

    @property
    def shapes(self) -> int:
        """How many input shapes have memory on the device."""
        return len(self._bound)

    @property
    def uses_graph(self) -> bool:
        return self._graph_thread is not None

    @property
    def graph_note(self) -> str | None:
        """In words, whether inferences replay a CUDA graph; None where none was asked for and all else is as usual."""
        if self.unbound is not None:
            return f"nothing bound on the GPU: {self.unbound}"
        return "a CUDA graph" if self.uses_graph else self.no_graph and f"no CUDA graph: {self.no_graph}"

    def close(self) -> None:
        """Free the sessions and the memory."""
        if self._graph_thread is not None:
            self._graph_thread.shutdown()
        self._bound.clear()
        self._sessions = ()

    def infer_timed(self, inputs: Tensors) -> tuple[dict[str, NDArray[Any]], CopyTimes]:
        """The outputs, which are the caller's, and the times of the copies and of the inference between them.

        The input copy of what `upload` gave is hardly any. Raises what ONNX Runtime raises; the inference after that
        begins with new memory.
        """
        if not self._sessions:  # they could not be opened anew when the graph had failed: that again, or its reason
            self._sessions = self._open(False)
        if self.unbound is not None:
            return self._infer_unbound(inputs)
        key = _key(inputs)
        if self._graph_thread is not None and self._bound and key not in self._bound:
            self._give_up_graph("inputs of several shapes came")
        if self._graph_thread is None:
            return self._infer(key, inputs)
        try:
            return self._graph_thread.submit(self._infer, key, inputs).result()
        except _MISTAKES:
            raise
        except Exception as error:  # noqa: BLE001 - raised below, unless it was the graph that failed
            self._give_up_graph(summary(error))
            return self._infer(key, inputs)

    def upload(self, inputs: Tensors) -> Tensors:
        """Copy inputs to the device, while another thread may infer; what comes back is for one `infer_timed`."""
        if self.unbound is not None:
            return inputs
        if self.uses_graph and not _copies_between_values(self._ort):
            return inputs  # the graph reads its own memory, which is in use
        with self._memory:
            bound = self._bound.get(_key(inputs))
            values = bound.spares.pop() if bound and bound.spares else None
        with _CAPTURING:
            values = values or self._allocate(inputs)
            _copy(inputs, values)
        return Uploaded(inputs, values)

    def _open(self, cuda_graph: bool) -> Sequence[Any]:
        with _CAPTURING:
            return self._opener(cuda_graph)

    def _give_up_graph(self, why: str) -> None:
        """Open the sessions anew: some versions replay a captured graph whatever the inputs are."""
        self.no_graph = why
        if self._graph_thread is not None:
            self._graph_thread.shutdown()
        self._graph_thread = None
        with self._memory:
            self._bound.clear()
        self._sessions = ()  # before the new ones take memory
        self._sessions = self._open(False)

    def _infer(self, key: Key, inputs: Tensors) -> tuple[dict[str, NDArray[Any]], CopyTimes]:
        start = time.perf_counter()
        bound = self._bound.get(key)
        try:
            with nullcontext() if bound or not self.uses_graph else _CAPTURING:
                bound = bound or self._bind(inputs)
                self._fill(bound, inputs)
                copied = time.perf_counter()
                _run(self._ort, bound, _GRAPH_ID if self.uses_graph else None)
                ran = time.perf_counter()
            arrays = bound.bindings[-1].copy_outputs_to_cpu()
        except Exception:
            with self._memory:
                self._bound.pop(key, None)
            raise
        with self._memory:
            self._bound[key] = bound
            self._bound.move_to_end(key)
            while len(self._bound) > KEPT_SHAPES:
                self._bound.popitem(last=False)
        times = CopyTimes.between(start, copied, ran, time.perf_counter())
        return dict(zip(self._outputs, arrays, strict=True)), times

    def _infer_unbound(self, inputs: Tensors) -> tuple[dict[str, NDArray[Any]], CopyTimes]:
        """ONNX Runtime copies by itself, which counts as part of the inference."""
        start = time.perf_counter()
        arrays: dict[str, NDArray[Any]] = dict(inputs)
        for session in self._sessions:
            names = self._outputs if session is self._sessions[-1] else _names(session.get_outputs())
            read = {name: arrays[name] for name in _names(session.get_inputs())}
            arrays |= dict(zip(names, session.run(names, read), strict=True))
        ran = time.perf_counter()
        return {name: arrays[name] for name in self._outputs}, CopyTimes.between(start, start, ran, ran)

    def _bind(self, inputs: Tensors) -> _Bound:
        """Memory for inputs of this shape, and for all outputs where a graph needs them beforehand."""
        bound = self._bind_to(self._sessions, inputs, {})
        if bound.complete or not self.uses_graph:
            return bound
        rehearsal = self._bind_to(self._open(False), inputs, {})
        self._fill(rehearsal, inputs)
        _run(self._ort, rehearsal, None)
        return self._bind_to(self._sessions, inputs, rehearsal.values)

    def _bind_to(self, sessions: Sequence[Any], inputs: Tensors, like: Mapping[str, Any]) -> _Bound:
        """Bind what is known of the outputs: from the files and the inputs, and from values `like` them."""
        values = dict(inputs.on_device if isinstance(inputs, Uploaded) else self._allocate(inputs))
        sizes: dict[str, int] = {}
        for one in sessions[0].get_inputs():
            sizes |= dict(zip(map(str, one.shape), inputs[one.name].shape, strict=True))
        bindings = []
        for session in sessions:
            binding = session.io_binding()
            for one in session.get_inputs():
                if one.name in values:
                    binding.bind_ortvalue_input(one.name, values[one.name])
            declared = {one.name: one for one in session.get_outputs()}
            for name in self._outputs if session is sessions[-1] else declared:
                kind, shape = declared[name].type, [sizes.get(str(size), size) for size in declared[name].shape]
                if name in like:
                    kind, shape = like[name].data_type(), like[name].shape()
                if kind in _TYPES and all(isinstance(size, int) for size in shape):
                    values[name] = self._empty(shape, _TYPES[kind])
                    binding.bind_ortvalue_output(name, values[name])
                else:
                    binding.bind_output(name, self._device, 0)
            bindings.append(binding)
        named = [self._outputs if session is sessions[-1] else _names(session.get_outputs()) for session in sessions]
        return _Bound(sessions, bindings, named, values)

    def _fill(self, bound: _Bound, inputs: Tensors) -> None:
        if not isinstance(inputs, Uploaded):
            _copy(inputs, bound.values)
            return
        spare = inputs.on_device
        if any(bound.values[name] is not value for name, value in spare.items()):
            if self.uses_graph:
                # What was uploaded for other sessions is copied from the host where values cannot be copied.
                _copy(spare if _copies_between_values(self._ort) else dict(inputs), bound.values)
            else:
                spare = {name: bound.values[name] for name in spare}
                bound.values |= inputs.on_device
                for session, binding in zip(bound.sessions, bound.bindings, strict=True):
                    for name in inputs.on_device.keys() & _names(session.get_inputs()):
                        binding.bind_ortvalue_input(name, bound.values[name])
            with self._memory:
                bound.spares = [*bound.spares, spare][-_SPARES:]

    def _allocate(self, inputs: Tensors) -> dict[str, Any]:
        return {name: self._empty(array.shape, array.dtype) for name, array in inputs.items()}

    def _empty(self, shape: Sequence[int | None], dtype: Any) -> Any:
        return self._ort.OrtValue.ortvalue_from_shape_and_type(list(shape), dtype, self._device, 0)


def pinned_array(values: int) -> NDArray[np.float32]:
    """Uninitialised memory that the operating system leaves in its place, by the CUDA library loaded in this process.

    Without such a library, or where it refuses, plain memory, which CUDA copies through a buffer of its own.
    """
    address = ctypes.c_void_p()
    runtime = _cuda_runtime()
    size = values * np.dtype(np.float32).itemsize
    if runtime is None or not size:
        return np.empty(values, np.float32)
    with _CAPTURING:
        if runtime.cudaHostAlloc(ctypes.byref(address), ctypes.c_size_t(size), 0):
            return np.empty(values, np.float32)
    memory = (ctypes.c_float * values).from_address(address.value or 0)
    weakref.finalize(memory, runtime.cudaFreeHost, address).atexit = False  # CUDA frees it all then
    return np.frombuffer(memoryview(memory), np.float32)


class DeviceMemory:
    """How much of the GPU's memory is free, by the CUDA library loaded in this process."""

    def __init__(self) -> None:
        self._at_first = self._free()

    def has_room(self, count: int) -> bool:
        """Whether as much is free as several more of `count` things need that were made since; yes where nobody knows.

        Others may be larger than those so far.
        """
        free = self._free()
        if free is None or self._at_first is None:
            return True
        return free > _ROOM_FOR * (self._at_first - free) / max(count, 1)

    @staticmethod
    def _free() -> int | None:
        free, total = ctypes.c_size_t(), ctypes.c_size_t()
        runtime = _cuda_runtime()
        if runtime is None or runtime.cudaMemGetInfo(ctypes.byref(free), ctypes.byref(total)):
            return None
        return free.value


def _cuda_runtime() -> ctypes.CDLL | None:
    """NVIDIA's runtime library, if an execution provider has loaded it."""
    try:
        loaded = Path("/proc/self/maps").read_text(encoding="utf-8", errors="replace").split()
        return ctypes.CDLL(next(word for word in loaded if Path(word).name.startswith("libcudart.so")))
    except (OSError, StopIteration):
        return None


def _why_unbound(ort: Any, device: str) -> str | None:
    """Why no memory of the device can be had; None if it can.

    A package for CPUs has none of its own: it depends on what its version does with the memory of a plug-in.
    """
    try:
        ort.OrtValue.ortvalue_from_shape_and_type([1], np.float32, device, 0).update_inplace(np.zeros(1, np.float32))
    except Exception as error:  # noqa: BLE001 - it is one reason or another
        return summary(error)
    return None


def _run(ort: Any, bound: _Bound, graph: tuple[str, str] | None) -> None:
    """Run the sessions, and keep the memory that ONNX Runtime took for outputs that had none.

    Each run ends when the stream of its session is done. Waiting for the device would be to wait for other threads'
    copies too.
    """
    options = ort.RunOptions()
    if graph:
        options.add_run_config_entry(*graph)
    complete = bound.complete
    for session, binding, names in zip(bound.sessions, bound.bindings, bound.outputs, strict=True):
        if not complete:
            for name in _names(session.get_inputs()):
                binding.bind_ortvalue_input(name, bound.values[name])
        session.run_with_iobinding(binding, options)
        if not complete:
            for name, value in zip(names, binding.get_outputs(), strict=True):
                bound.values[name] = value
                binding.bind_ortvalue_output(name, value)


def _names(declared: Sequence[Any]) -> list[str]:
    return [one.name for one in declared]


def _copy(inputs: Any, values: dict[str, Any]) -> None:
    """Copy `inputs`, arrays or values on the device, to where the `values` are."""
    for name, source in inputs.items():
        values[name].update_inplace(np.ascontiguousarray(source) if isinstance(source, np.ndarray) else source)


def _copies_between_values(ort: Any) -> bool:
    """Whether this version of ONNX Runtime copies from one value to another."""
    value = ort.OrtValue.ortvalue_from_numpy(np.zeros(1, np.float32))
    try:
        value.update_inplace(value)
    except (TypeError, RuntimeError, AttributeError):
        return False
    return True


def _key(inputs: Tensors) -> Key:
    return tuple((name, array.dtype.str, array.shape) for name, array in sorted(inputs.items()))
