"""What an engine promises, held by every engine and precision that runs on a GPU.

Without a GPU the same tests run on a tiny detector, so that they are known to work: one engine on the CPU, and what the
engine does on a GPU with the provider and the memory of the CPU. On a machine with a GPU: `pytest -n 0 -m gpu`, with
`-k ENGINE` if the CUDA libraries of two engines clash in one process. Where PaddleDetection is not installed, give the
demo's bundles as GFLDEPLOY_MADE=gpu-materials/demo (see `demo_bundles.MADE`).
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from numpy.typing import NDArray

from gfldeploy.bench.cpu_parity import measure_parity
from gfldeploy.bench.inputs import Batch, Formed, placed
from gfldeploy.bench.timing import HostMemory, time_batch
from gfldeploy.bundle import Bundle
from gfldeploy.engines import ort_binding, ort_engine
from gfldeploy.engines.base import PRECISIONS, Device, Engine, EngineOptions, Obstacle, Precision, Shape
from gfldeploy.engines.detect import detect_batch
from gfldeploy.engines.hardware import nvidia_driver
from gfldeploy.engines.ort_engine import PROVIDERS, OnnxRuntimeEngine, Providers
from gfldeploy.engines.registry import ENGINES, capability, open_engine
from gfldeploy.errors import EngineError
from gfldeploy.images.decode import read_image
from gfldeploy.predict.pipeline import detect_groups
from gfldeploy.predict.sources import picture_of

pytest.importorskip("onnxruntime")

Outputs = dict[str, NDArray[Any]]

IMAGES = 6
SECOND_PASS_MB = 32  # what may be allocated for shapes that came before: libraries' own bookkeeping
SIMULATED = "simulated"
WITH_GRAPH = ("onnxruntime", SIMULATED)  # engines that replay all of the FP32 and FP16 graphs as a CUDA graph


class SimulatedGpu(OnnxRuntimeEngine):
    """All that the engine does on a GPU, with the provider and the memory of the CPU."""

    memory = "cpu"

    def _choose_providers(self, bundle: Bundle) -> Providers:
        return [(PROVIDERS["cpu"], {})]


def settings() -> Iterator[Any]:
    """Every engine and precision for GPUs, and what runs without one."""
    yield pytest.param(("onnxruntime", "fp32", "cpu"), id="onnxruntime-fp32-cpu")
    yield pytest.param((SIMULATED, "fp32", "gpu"), id="onnxruntime-fp32-simulated")
    for name, spec in ENGINES.items():
        for precision in PRECISIONS:
            if not isinstance(spec.graph(precision, "gpu"), Obstacle):
                marks = [pytest.mark.gpu, pytest.mark.slow, pytest.mark.needs_ppdet]
                marks += [pytest.mark.needs_paddleslim] if precision == "int8" else []
                yield pytest.param((name, precision, "gpu"), id=f"{name}-{precision}-gpu", marks=marks)


@dataclass(frozen=True)
class Setting:
    """An engine, what it runs, the images with their inputs [1, 3, H, W], and what the CPU gives for them."""

    engine: str
    precision: Precision
    device: Device
    bundle: Bundle
    images: Sequence[Path]
    inputs: Sequence[NDArray[np.float32]]
    expected: Sequence[Outputs]
    cache: Path

    def options(self, shapes: Sequence[Shape]) -> EngineOptions:
        return EngineOptions(self.precision, self.device, 2, self.cache, tuple(dict.fromkeys(shapes)))

    def open(self, *shapes: Shape) -> Engine:
        """For these shapes, or those of all inputs, alone and two by two."""
        all_shapes = [(batch, *one.shape[2:]) for one in self.inputs for batch in (1, 2)]
        options = self.options(shapes or all_shapes)
        if self.engine == SIMULATED:
            return SimulatedGpu(self.bundle, options, "onnx")
        return open_engine(self.engine, self.bundle, options)

    @property
    def on_gpu(self) -> bool:
        return self.device == "gpu" and self.engine != SIMULATED

    def right(self, found: Sequence[Outputs], expected: Sequence[Outputs] | None = None) -> list[str]:
        """What is wrong with the outputs for the images, by the rules of `bench`; nothing if all is well."""
        expected = self.expected if expected is None else expected
        return measure_parity(found, expected[: len(found)], "the CPU", self.bundle, self.options(()))[1]


@pytest.fixture(scope="module", params=settings())
def setting(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Setting:
    engine, precision, device = request.param
    on_gpu = device == "gpu" and engine != SIMULATED
    if on_gpu and (reason := capability(engine, precision, device).reason):
        pytest.skip(reason)
    if on_gpu:
        folder = request.getfixturevalue("calibrated" if precision == "int8" else "trained")
        images = sorted((request.getfixturevalue("labelled") / "val").rglob("*.jpg"))[:IMAGES]
    else:
        folder = request.getfixturevalue("tiny_bundle")
        images = sorted((request.getfixturevalue("tiny_coco").parent / "images").glob("*.jpg"))
    bundle = Bundle.open(folder)
    preprocess = bundle.manifest.preprocess
    inputs = [preprocess.batch([preprocess(read_image(path))]) for path in images]
    with open_engine("onnxruntime", bundle, EngineOptions("int8" if precision == "int8" else "fp32")) as reference:
        expected = [reference.infer({"image": one}) for one in inputs]
    cache = tmp_path_factory.mktemp("engines")
    return Setting(engine, precision, device, bundle, images, inputs, expected, cache)


@pytest.fixture(scope="module", autouse=True)
def no_cuda_for_the_simulated() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        if nvidia_driver() is None:
            patch.setattr(ort_engine, "load_libraries", lambda _: None, raising=False)
        yield


@pytest.fixture(scope="module")
def engine(setting: Setting) -> Iterator[Engine]:
    with setting.open() as opened:
        yield opened


def test_it_gives_what_the_cpu_gives(setting: Setting, engine: Engine) -> None:
    found = [engine.infer({"image": one}) for one in setting.inputs]
    assert setting.right(found) == []


def test_arrays_are_the_caller_s(setting: Setting, engine: Engine) -> None:
    kept = [engine.infer({"image": one}) for one in setting.inputs]
    copies = [{name: array.copy() for name, array in one.items()} for one in kept]
    for one in reversed(setting.inputs):
        engine.infer({"image": one})
    for found, copy in zip(kept, copies, strict=True):
        assert all(np.array_equal(found[name], copy[name]) for name in copy)


def test_batches_and_shapes_by_turns(setting: Setting, engine: Engine) -> None:
    for _ in range(3):
        for one, expected in zip(setting.inputs, setting.expected, strict=True):
            pair = engine.infer({"image": np.concatenate([one, one])})
            for place in (0, 1):
                found = {name: array[place : place + 1] for name, array in pair.items()}
                assert setting.right([found], [expected]) == []
            assert setting.right([engine.infer({"image": one})], [expected]) == []


def test_the_parts_of_an_inference_are_timed(setting: Setting, engine: Engine) -> None:
    _, times = engine.infer_timed({"image": setting.inputs[0]})
    assert times.inference_ms > 0 and min(times.input_copy_ms, times.output_copy_ms) >= 0
    assert setting.device == "cpu" or times.input_copy_ms > 0


def test_an_error_leaves_it_usable(setting: Setting, engine: Engine) -> None:
    batch, channels, height, width = setting.inputs[0].shape
    with pytest.raises(EngineError) as caught:
        engine.infer({"image": np.zeros((batch, channels + 1, height, width), np.float32)})
    assert "\n" not in str(caught.value)
    assert setting.right([engine.infer({"image": setting.inputs[0]})]) == []


def test_another_thread_uploads_what_comes_next(setting: Setting, engine: Engine) -> None:
    """As `predict` does it; in the end detections are those of one image after the other."""
    uploaded: list[Any] = []
    thread = threading.Thread(target=lambda: uploaded.append(engine.upload({"image": setting.inputs[1]})))
    thread.start()
    first = engine.infer({"image": setting.inputs[0]})
    thread.join()
    assert setting.right([first, engine.infer(uploaded[0])]) == []
    manifest = setting.bundle.manifest
    pictures = map(picture_of, setting.images)
    groups = list(
        detect_groups(engine, manifest, pictures, batch_size=2)
    )  # to its end: the engine is its own meanwhile
    for found in (one for group in groups for one in group):
        picture = read_image(setting.images[found.index])
        tensor, scales = manifest.preprocess.batch_of([picture])
        (alone,) = detect_batch(engine, tensor, scales, manifest.nms)
        assert found.detections is not None and len(found.detections) == len(alone)
        np.testing.assert_allclose(found.detections.scores, alone.scores, atol=0.01)


def test_host_memory_is_pinned(setting: Setting, engine: Engine) -> None:
    memory = engine.host_array(1000)
    memory[:] = 1
    assert memory.dtype == np.float32 and memory.shape == (1000,)
    runtime = ort_binding._cuda_runtime()
    if setting.on_gpu and setting.engine.startswith("onnxruntime") and runtime is not None:
        flags = ctypes.c_uint()
        assert runtime.cudaHostGetFlags(ctypes.byref(flags), ctypes.c_void_p(memory.ctypes.data)) == 0


def test_the_memory_of_a_benchmark_is_used_again_on_a_gpu(setting: Setting, engine: Engine) -> None:
    memory = HostMemory(engine)
    tensor, _ = setting.bundle.manifest.preprocess.batch_of([read_image(setting.images[0])], memory)
    assert np.array_equal(tensor, setting.inputs[0])
    assert np.shares_memory(memory(tensor.size), tensor) == (setting.device == "gpu")
    time_batch(engine, setting.images[:2], setting.bundle, memory)
    batch = Batch(setting.inputs[0], (0,), Formed(setting.inputs[0].shape, 0, False))
    there = placed(batch, engine).tensor
    assert np.array_equal(there, batch.tensor) and (there is batch.tensor) == (setting.device == "cpu")


def used_mb(on_gpu: bool) -> float:
    if not on_gpu:
        return float(psutil.Process().memory_info().rss) / 1e6
    import pynvml

    pynvml.nvmlInit()
    return float(pynvml.nvmlDeviceGetMemoryInfo(pynvml.nvmlDeviceGetHandleByIndex(0)).used) / 1e6


def test_memory_over_many_shapes_is_bounded(setting: Setting) -> None:
    largest = max(setting.inputs, key=lambda one: one.size)
    sizes = [(1, largest.shape[2] - 32 * cut, largest.shape[3] - 32 * (cut % 2)) for cut in range(2)]
    shapes = [*((batch, *size) for _, *size in sizes for batch in (1, 2, 3, 4)), *sizes]
    with setting.open(*shapes) as engine:
        after = []
        for _ in range(3):
            for batch, height, width in shapes:
                engine.infer({"image": np.zeros((batch, 3, height, width), np.float32)})
            after.append(used_mb(setting.on_gpu))
        assert after[2] - after[1] < SECOND_PASS_MB


def test_the_second_start_builds_nothing(setting: Setting) -> None:
    shape = (1, *setting.inputs[0].shape[2:])
    with setting.open(shape) as first:
        folder = first.directory
        found = first.infer({"image": setting.inputs[0]})
    if folder is None:
        pytest.skip(f"{setting.engine} builds nothing")
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}
    assert before, "what it built is kept"
    with setting.open(shape) as second:
        assert second.directory == folder
        assert setting.right([second.infer({"image": setting.inputs[0]})], [found]) == []
    after = {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}
    assert after.keys() == before.keys()
    engines = [path for path in after if path.suffix in (".engine", ".onnx", ".trt")]
    assert all(after[path] == before[path] for path in engines)


def test_a_cuda_graph_gives_the_same(setting: Setting) -> None:
    """The first shape alone is known; then another comes."""
    shape = setting.inputs[0].shape
    same = [
        (one, expected) for one, expected in zip(setting.inputs, setting.expected, strict=True) if one.shape == shape
    ]
    other = next(place for place, one in enumerate(setting.inputs) if one.shape != shape)
    with setting.open((1, *shape[2:])) as engine:
        for one, expected in same * 3:
            assert setting.right([engine.infer({"image": one})], [expected]) == []
        if setting.device == "gpu" and setting.engine in WITH_GRAPH:
            assert engine.cuda_graph == "a CUDA graph"
        graph = engine.cuda_graph
        found = engine.infer({"image": setting.inputs[other]})
        assert setting.right([found], [setting.expected[other]]) == []
        assert setting.right([engine.infer({"image": same[0][0]})], [same[0][1]]) == []
        if setting.engine in ENGINES and ENGINES[setting.engine].needs_shapes:
            return  # another engine was built for the other shape
        assert engine.cuda_graph == graph, "the other shape has sessions without one"


def test_two_shapes_have_a_session_each(setting: Setting) -> None:
    if setting.engine not in WITH_GRAPH or setting.device == "cpu":
        pytest.skip("the engine has no CUDA graphs")
    pairs = list(zip(setting.inputs, setting.expected, strict=True))
    two = list(dict.fromkeys(one.shape for one in setting.inputs))[:2]
    with setting.open(*((1, *shape[2:]) for shape in two)) as engine:
        for one, expected in [pair for pair in pairs * 2 if pair[0].shape in two]:
            assert setting.right([engine.infer(engine.upload({"image": one}))], [expected]) == []
        assert engine.cuda_graph == "2 x a CUDA graph"


def test_without_room_for_several_sessions_there_is_one(tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    image = np.random.default_rng(0).random((1, 3, 64, 96), np.float32)
    with OnnxRuntimeEngine(Bundle.open(tiny_bundle), EngineOptions(), "onnx") as reference:
        expected = reference.infer({"image": image})
    options = EngineOptions(device="gpu", shapes=((1, 64, 96), (1, 96, 64)))
    with SimulatedGpu(Bundle.open(tiny_bundle), options, "onnx") as engine:
        of_its_own = engine._on_gpu[1, 64, 96]

        def no_room(*_: object) -> None:
            raise RuntimeError("CUDA error: out of memory")

        monkeypatch.setattr(of_its_own, "infer_timed", no_room)
        for _ in range(2):
            found = engine.infer({"image": image})
            assert all(np.array_equal(found[name], expected[name]) for name in expected)
        assert engine.cuda_graph == "no CUDA graph: CUDA error: out of memory"
        assert list(engine._on_gpu) == [None]


def test_a_shape_that_comes_back_has_a_session_of_its_own(tiny_bundle: Path) -> None:
    random = np.random.default_rng(0)
    images = [random.random((1, 3, *size), np.float32) for size in ((64, 96), (96, 64), (64, 64))]
    with OnnxRuntimeEngine(Bundle.open(tiny_bundle), EngineOptions(), "onnx") as reference:
        expected = [reference.infer({"image": one}) for one in images]
    with SimulatedGpu(Bundle.open(tiny_bundle), EngineOptions(device="gpu"), "onnx") as engine:
        for place, own in ((0, 0), (0, 0), (1, 0), (0, 1), (2, 1), (1, 2), (0, 2)):
            found = engine.infer(engine.upload({"image": images[place]}))
            assert all(np.array_equal(found[name], expected[place][name]) for name in found)
            assert len(engine._on_gpu) == 1 + own
        assert engine.cuda_graph == "2 x a CUDA graph"


def test_an_input_that_is_wrong_costs_no_graph(tiny_bundle: Path) -> None:
    options = EngineOptions(device="gpu", shapes=((1, 64, 96),))
    with SimulatedGpu(Bundle.open(tiny_bundle), options, "onnx") as engine:
        engine.infer({"image": np.zeros((1, 3, 64, 96), np.float32)})
        with pytest.raises(EngineError):
            engine.infer({"image": np.zeros((1, 4, 64, 96), np.float32)})
        assert engine.cuda_graph == "a CUDA graph"


def test_what_ran_is_said(setting: Setting, engine: Engine) -> None:
    """In TensorRT: which parts; elsewhere: which convolutions, where the library can tell."""
    assert engine.version
    if setting.engine.startswith("onnxruntime-tensorrt"):
        assert engine.delegated and engine.delegated.startswith("1 part in TensorRT")
    if setting.engine == "onnxruntime-tensorrt":
        assert engine.delegated and ", 0 nodes outside" in engine.delegated
        assert engine.delegated.endswith(", the decode in CUDA") == (setting.precision == "fp16")
    elif setting.engine in WITH_GRAPH:
        ran = {one.precision for one in engine.executed_convolutions({"image": setting.inputs[0]})}
        assert ran == {setting.precision}


def test_every_engine_for_gpus_is_tested() -> None:
    tested = {one.values[0][0] for one in settings() if one.values[0][2] == "gpu"}
    assert tested - {SIMULATED} == {
        name for name, spec in ENGINES.items() if not isinstance(spec.runs["gpu"], Obstacle)
    }
