"""Inputs and outputs bound on a device once for each shape, on the device "cpu": the code is the same for GPUs."""

from __future__ import annotations

import shutil
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from gfldeploy.engines import ort_binding
from gfldeploy.engines.ort_binding import KEPT_SHAPES, BoundSessions, pinned_array

ort = pytest.importorskip("onnxruntime")
onnx = pytest.importorskip("onnx")

OUTPUTS = ("scores", "boxes")
SHAPES = [(1, 64, 96), (2, 96, 64), (3, 64, 64), (1, 32, 32), (1, 96, 96), (2, 32, 64)]
Arrays = dict[str, NDArray[np.float32]]


@pytest.fixture(scope="module")
def model(tiny_bundle: Path) -> Path:
    return tiny_bundle / "onnx" / "model.onnx"


def opened(*models: Path) -> Sequence[Any]:
    return [ort.InferenceSession(str(one), providers=["CPUExecutionProvider"]) for one in models]


def bound(*models: Path, cuda_graph: bool = False) -> BoundSessions:
    return BoundSessions(ort, lambda graph: opened(*models), "cpu", OUTPUTS, cuda_graph)


def image(shape: tuple[int, int, int], seed: int = 0) -> Arrays:
    batch, height, width = shape
    return {"image": np.random.default_rng(seed).random((batch, 3, height, width), np.float32)}


def run(model: Path, inputs: Arrays) -> Arrays:
    (session,) = opened(model)
    return dict(zip(OUTPUTS, session.run(OUTPUTS, inputs), strict=True))


def equal(one: Arrays, other: Arrays) -> bool:
    return one.keys() == other.keys() and all(np.array_equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("uploaded", [False, True, None], ids=["copied", "uploaded", "alternating"])
def test_the_results_of_a_plain_run_whatever_the_shapes(model: Path, uploaded: bool | None) -> None:
    sessions = bound(model)
    kept = []
    for number, shape in enumerate([*SHAPES, *SHAPES[::-1], *SHAPES[:1] * 3]):
        inputs = image(shape, number)
        first = number % 2 == 0 if uploaded is None else uploaded
        found, times = sessions.infer_timed(sessions.upload(inputs) if first else inputs)
        kept.append((found, run(model, inputs)))
        assert min(times.input_copy_ms, times.inference_ms, times.output_copy_ms) >= 0
        assert sessions.shapes <= KEPT_SHAPES
    assert all(equal(found, expected) for found, expected in kept), "no inference overwrote the results of another"


def test_what_was_uploaded_does_not_change_with_the_caller_s_memory_or_with_the_next_upload(model: Path) -> None:
    sessions = bound(model)
    first, second = image(SHAPES[0], 1), image(SHAPES[0], 2)
    expected = [run(model, first), run(model, second)]
    for _ in range(3):
        given = {"image": first["image"].copy()}
        waiting = [sessions.upload(given), sessions.upload(second)]
        given["image"][:] = 0
        assert [equal(sessions.infer_timed(one)[0], result) for one, result in zip(waiting, expected, strict=True)]


def test_another_thread_uploads_meanwhile(model: Path) -> None:
    sessions = bound(model)
    inputs = [image(SHAPES[number % 3], number) for number in range(30)]
    expected = [run(model, one) for one in inputs]
    ready: list[Any] = []
    turn = threading.Semaphore(0)

    def upload() -> None:
        for one in inputs:
            ready.append(sessions.upload(one))
            turn.release()

    thread = threading.Thread(target=upload)
    thread.start()
    for number, result in enumerate(expected):
        turn.acquire()
        assert equal(sessions.infer_timed(ready[number])[0], result)
    thread.join()


def test_memory_is_kept_for_the_shapes_that_came_last(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sessions = bound(model)
    made: list[Sequence[int]] = []
    plain = ort.OrtValue.ortvalue_from_shape_and_type

    def counted(shape: Sequence[int], *others: Any) -> Any:
        made.append(shape)
        return plain(shape, *others)

    monkeypatch.setattr(ort.OrtValue, "ortvalue_from_shape_and_type", counted)
    for shape in SHAPES[:KEPT_SHAPES] * 3:
        sessions.infer_timed(image(shape))
    assert len(made) == KEPT_SHAPES, "an input each, once; the file does not say how many boxes there are"
    sessions.infer_timed(image(SHAPES[0]))  # so that the second is the one that was not used for longest
    sessions.infer_timed(image(SHAPES[KEPT_SHAPES]))
    assert len(made) == KEPT_SHAPES + 1
    sessions.infer_timed(image(SHAPES[0]))
    assert len(made) == KEPT_SHAPES + 1
    sessions.infer_timed(image(SHAPES[1]))
    assert len(made) == KEPT_SHAPES + 2


def test_an_error_leaves_it_usable(model: Path) -> None:
    sessions = bound(model)
    good = image(SHAPES[0])
    expected = run(model, good)
    sessions.infer_timed(good)
    several: list[dict[str, Any]] = [
        {"image": np.zeros((1, 4, 64, 96), np.float32)},
        {"image": good["image"].astype(np.float64)},
        {},
    ]
    for wrong in several:
        with pytest.raises(Exception, match=r"(?i)image|dimension|type"):
            sessions.infer_timed(wrong)
        assert equal(sessions.infer_timed(good)[0], expected)


def cut(model: Path, directory: Path) -> list[Path]:
    """The network, and the rest."""
    parts = {"network": (["image"], ["map"]), "rest": (["map"], list(OUTPUTS))}
    for name, (read, given) in parts.items():
        onnx.utils.extract_model(str(model), str(directory / f"{name}.onnx"), read, given)
    return [directory / f"{name}.onnx" for name in parts]


def test_sessions_one_after_the_other(model: Path, tmp_path: Path) -> None:
    sessions = bound(*cut(model, tmp_path))
    for number, shape in enumerate([*SHAPES, *SHAPES]):
        inputs = image(shape, number)
        found, _ = sessions.infer_timed(sessions.upload(inputs) if number % 3 else inputs)
        assert equal(found, run(model, inputs))


@pytest.mark.skipif("CUDAExecutionProvider" in ort.get_available_providers(), reason="this package has CUDA's memory")
def test_without_memory_of_the_device_onnx_runtime_copies_by_itself(model: Path, tmp_path: Path) -> None:
    for models in ([model], cut(model, tmp_path)):
        sessions = BoundSessions(ort, lambda graph, models=models: opened(*models), "cuda", OUTPUTS, cuda_graph=True)  # type: ignore[misc]
        for number, shape in enumerate(SHAPES[:2]):
            inputs = image(shape, number)
            found, times = sessions.infer_timed(sessions.upload(inputs))
            assert equal(found, run(model, inputs)) and times.inference_ms > 0
        assert (sessions.graph_note or "").startswith(
            "nothing bound on the GPU: Can't allocate memory on the CUDA device"
        )


# --- CUDA graphs, as far as a CPU can tell ----------------------------------------------------------------------------


def fixed(model: Path, target: Path) -> Path:
    """The same network for inputs of the first shape, so that its file says what shapes the outputs have."""
    from onnx.tools import update_model_dims

    (batch, height, width), places = SHAPES[0], SHAPES[0][1] // 8 * (SHAPES[0][2] // 8)
    changed = update_model_dims.update_inputs_outputs_dims(
        onnx.load(str(model)),
        {"image": [batch, 3, height, width]},
        {"scores": [batch, places, 2], "boxes": [batch, places, 4]},
    )
    onnx.save(changed, str(target))
    return target


class Opening:
    """Opens sessions, and notes whether with CUDA graphs; those with them may be broken in some way."""

    def __init__(self, *models: Path, refused: bool = False, fails: bool = False) -> None:
        self.models, self.refused, self.fails = models, refused, fails
        self.graphs: list[bool] = []

    def __call__(self, cuda_graph: bool) -> Sequence[Any]:
        self.graphs.append(cuda_graph)
        if cuda_graph and self.refused:
            raise RuntimeError("This session cannot use the graph capture feature\nmore")
        sessions = opened(*self.models)
        if cuda_graph and self.fails:
            sessions[0].run_with_iobinding = self._capture
        return sessions

    def _capture(self, *_: object) -> None:
        raise RuntimeError("CUDA error 900: operation not permitted when stream is capturing")


def test_one_shape_has_a_graph_in_a_thread_of_its_own(model: Path, tmp_path: Path) -> None:
    opening = Opening(fixed(model, tmp_path / "fixed.onnx"))
    sessions = BoundSessions(ort, opening, "cpu", OUTPUTS, cuda_graph=True)
    inferred_in: list[str] = []
    plain = sessions._sessions[0].run_with_iobinding
    graph_ids: list[str] = []

    def noted(binding: Any, options: Any) -> None:
        inferred_in.append(threading.current_thread().name)
        graph_ids.append(options.get_run_config_entry("gpu_graph_id"))
        plain(binding, options)

    sessions._sessions[0].run_with_iobinding = noted
    for number in range(4):
        inputs = image(SHAPES[0], number)
        found, _ = sessions.infer_timed(sessions.upload(inputs) if number > 1 else inputs)
        assert equal(found, run(model, inputs))
    assert len(set(inferred_in)) == 1 and inferred_in[0].startswith("gfldeploy-cuda-graph")
    assert set(graph_ids) == {"1"}
    assert opening.graphs == [True] and sessions.graph_note == "a CUDA graph"
    sessions.close()
    assert not any(thread.name.startswith("gfldeploy-cuda-graph") for thread in threading.enumerate())


def test_shapes_of_outputs_that_the_files_do_not_tell_are_found_without_the_graph(model: Path, tmp_path: Path) -> None:
    opening = Opening(*cut(model, tmp_path))
    sessions = BoundSessions(ort, opening, "cpu", OUTPUTS, cuda_graph=True)
    for number in range(3):
        inputs = image(SHAPES[0], number)
        assert equal(sessions.infer_timed(inputs)[0], run(model, inputs))
    assert opening.graphs == [True, False] and sessions.graph_note == "a CUDA graph"


def test_another_shape_ends_the_graph(model: Path, tmp_path: Path) -> None:
    opening = Opening(fixed(model, tmp_path / "fixed.onnx"))
    sessions = BoundSessions(ort, opening, "cpu", OUTPUTS, cuda_graph=True)
    sessions.infer_timed(image(SHAPES[0]))
    opening.models = (model,)
    waiting = sessions.upload(image(SHAPES[0], 1))
    for shape in SHAPES[:3]:
        assert equal(sessions.infer_timed(image(shape))[0], run(model, image(shape)))
    assert opening.graphs == [True, False]
    assert sessions.graph_note == "no CUDA graph: inputs of several shapes came"
    assert equal(sessions.infer_timed(waiting)[0], run(model, image(SHAPES[0], 1))), "uploaded before it ended"


@pytest.mark.parametrize(
    ("broken", "why"),
    [
        ({"refused": True}, "This session cannot use the graph capture feature"),
        ({"fails": True}, "CUDA error 900: operation not permitted when stream is capturing"),
    ],
)
def test_where_a_graph_is_not_possible_it_runs_without_and_says_why(
    model: Path, tmp_path: Path, broken: dict[str, bool], why: str
) -> None:
    opening = Opening(fixed(model, tmp_path / "fixed.onnx"), **broken)
    sessions = BoundSessions(ort, opening, "cpu", OUTPUTS, cuda_graph=True)
    for number in range(3):
        inputs = image(SHAPES[0], number)
        assert equal(sessions.infer_timed(inputs)[0], run(model, inputs))
    assert opening.graphs == [True, False] and sessions.graph_note == f"no CUDA graph: {why}"


def test_where_cuda_breaks_half_way_every_inference_says_why(model: Path, tmp_path: Path) -> None:
    opening = Opening(fixed(model, tmp_path / "fixed.onnx"))
    sessions = BoundSessions(ort, opening, "cpu", OUTPUTS, cuda_graph=True)
    inputs = image(SHAPES[0])
    sessions.infer_timed(inputs)
    sessions._sessions[0].run_with_iobinding = opening._capture
    works, opening.models = opening.models, (tmp_path / "the device is gone",)
    for _ in range(3):
        with pytest.raises(Exception, match="the device is gone"):
            sessions.infer_timed(inputs)
    opening.models = works
    assert equal(sessions.infer_timed(inputs)[0], run(model, inputs))


def test_a_version_that_cannot_copy_on_the_device_infers_with_a_graph_all_the_same(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ort_binding, "_copies_between_values", lambda _: False)
    path = fixed(model, tmp_path / "fixed.onnx")
    sessions = BoundSessions(ort, lambda graph: opened(path), "cpu", OUTPUTS, cuda_graph=True)
    inputs = image(SHAPES[0])
    assert equal(sessions.infer_timed(sessions.upload(inputs))[0], run(model, inputs))


def test_without_cuda_host_memory_is_plain() -> None:
    array = pinned_array(12)
    array[:] = 3
    assert array.dtype == np.float32 and array.shape == (12,) and array.sum() == 36
    assert pinned_array(0).size == 0


@pytest.mark.skipif(shutil.which("gcc") is None, reason="gcc is not installed")
def test_pinned_memory_is_freed_with_the_last_array_that_uses_it(tmp_path: Path) -> None:
    """By stubs of CUDA's library, in a process of its own."""
    code = """
import ctypes, gc, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from cuda_without_gpu import stub
from gfldeploy.engines.ort_binding import pinned_array
runtime = stub("libcudart.so.99", set(), Path(sys.argv[2]))
pinned = lambda: ctypes.c_long.in_dll(runtime, "stub_pinned").value
array = pinned_array(12)
array[:] = 3
view = array[:4].reshape(2, 2)
del array
gc.collect()
assert pinned() == 1 and view.sum() == 12
del view
gc.collect()
assert pinned() == 0
"""
    benchmarks = Path(__file__).parents[2] / "benchmarks"
    command = [sys.executable, "-c", code, str(benchmarks), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
