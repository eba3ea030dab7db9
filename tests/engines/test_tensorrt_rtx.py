"""TensorRT-RTX: what is asked of the plug-in, on simulated machines, and with the real one where it is installed."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib import util
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from demo_bundles import ROOT

from gfldeploy.bundle import Bundle
from gfldeploy.engines import ort_engine, registry
from gfldeploy.engines.base import EngineOptions, Shape
from gfldeploy.engines.hardware import nvidia_driver
from gfldeploy.engines.ort_rtx import OnnxRuntimeRtxEngine, compile_model, compiled_parts, load_plugin, rtx_options
from gfldeploy.engines.registry import TENSORRT_ENGINES, TENSORRT_RTX, capability, graph_for
from gfldeploy.engines.tensorrt import Profile
from gfldeploy.errors import EngineError, OutputError

onnx = pytest.importorskip("onnx")

NAME = "onnxruntime-tensorrt-rtx"
PROVIDER = "NvTensorRTRTXExecutionProvider"
PROFILE = Profile((1, 800, 800), (4, 800, 1216), (8, 1216, 1344))
WHEEL = util.find_spec(TENSORRT_RTX.module)
needs_the_wheel = pytest.mark.skipif(
    WHEEL is None, reason=f"{TENSORRT_RTX.builds['gpu'].distribution} is not installed"
)


def test_options() -> None:
    assert rtx_options(PROFILE, Path("cache/kernels")) == {
        "nv_profile_min_shapes": "image:1x3x800x800",
        "nv_profile_opt_shapes": "image:4x3x800x1216",
        "nv_profile_max_shapes": "image:8x3x1216x1344",
        "nv_runtime_cache_path": "cache/kernels",
    }


@needs_the_wheel
def test_the_plug_in_knows_the_options() -> None:
    assert WHEEL is not None and WHEEL.origin is not None
    header = (Path(WHEEL.origin).parent / "tensorrt_rtx_provider_options.h").read_text(encoding="utf-8")
    known = set(re.findall(r'constexpr const char\* k\w+ = "(\w+)";', header))
    assert set(rtx_options(PROFILE, Path("k"))) <= known
    # Its list of architectures is the one in the table, which has "and newer" for the last.
    listed = re.search(r"kTargetSMValues\[\] = \{(.*?)\}", header)
    assert listed is not None
    named = {(int(digits[:-1]), int(digits[-1])) for digits in re.findall(r"sm(\d+)", listed[1])}
    spec = registry.ENGINES[NAME]
    assert set(spec.gpus) <= named and all(map(spec.runs_on_gpu, named))


def test_it_runs_the_files_that_say_each_precision() -> None:
    assert NAME in TENSORRT_ENGINES
    assert [graph_for(NAME, one, "gpu") for one in ("fp32", "fp16", "int8")] == ["onnx", "onnx_fp16", "onnx_tensorrt"]
    assert "GPUs alone" in (capability(NAME, "fp16", "cpu").reason or "")
    assert not capability(NAME, "bf16", "gpu").works


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A machine with an RTX card, its driver, ONNX Runtime's CPU build and the plug-in; tests take away from it.

    How the libraries of the plug-in are found is in test_nvidia_libraries.py.
    """
    here = SimpleNamespace(gpus=((8, 9),), modules={"onnxruntime", TENSORRT_RTX.module})
    here.versions = {"onnxruntime-ep-nv-tensorrt-rtx-cu13": "0.5.0", "onnxruntime": "1.27.0"}
    monkeypatch.setattr(registry, "nvidia_driver", lambda: "580.95.05")
    monkeypatch.setattr(registry, "compute_capabilities", lambda: here.gpus)
    monkeypatch.setattr(registry, "obstacle_to_loading", lambda spec: None)
    monkeypatch.setattr(registry, "is_installed", lambda module: module in here.modules)
    monkeypatch.setattr(registry, "installed_version", lambda name: here.versions.get(name))
    return here


def test_it_needs_no_gpu_build_of_onnx_runtime_and_no_other_tensorrt(machine: SimpleNamespace) -> None:
    assert capability(NAME, "fp16", "gpu").works
    assert not capability("onnxruntime-tensorrt", "fp16", "gpu").works


@pytest.mark.parametrize(
    ("lacking", "remedy"),
    [
        (TENSORRT_RTX.module, "pip install onnxruntime-ep-nv-tensorrt-rtx-cu13"),
        ("onnxruntime", "pip install onnxruntime"),
    ],
)
def test_what_is_not_installed(machine: SimpleNamespace, lacking: str, remedy: str) -> None:
    machine.modules.remove(lacking)
    found = capability(NAME, "int8", "gpu")
    assert (found.reason, found.remedy) == (f"{lacking} is not installed", remedy)


@pytest.mark.parametrize("distribution", ["onnxruntime", "onnxruntime-gpu"])
def test_an_onnx_runtime_that_is_too_old(machine: SimpleNamespace, distribution: str) -> None:
    del machine.versions["onnxruntime"]
    machine.versions[distribution] = "1.26.2"
    found = capability(NAME, "fp16", "gpu")
    assert found.reason == f"{distribution} 1.26.2 is installed, ONNX Runtime with TensorRT-RTX needs 1.27 or newer"
    assert found.remedy == f'pip install --upgrade "{distribution}>=1.27"'
    machine.versions[distribution] = "1.100.0"
    assert capability(NAME, "fp16", "gpu").works


@pytest.mark.parametrize("gpu", [(7, 5), (8, 0), (8, 7), (9, 0), (10, 0)])
def test_cards_that_the_plug_in_refuses(machine: SimpleNamespace, gpu: tuple[int, int]) -> None:
    machine.gpus = (gpu,)
    machine.modules.clear()  # nothing to be installed in vain
    found = capability(NAME, "fp32", "gpu")
    assert found.reason == (
        "ONNX Runtime with TensorRT-RTX needs a GPU of compute capability 8.6, 8.9, or 12.0 and newer, "
        f"not {gpu[0]}.{gpu[1]}"
    )
    assert found.remedy == "use the engine onnxruntime-tensorrt"


@pytest.mark.parametrize("gpus", [((8, 6),), ((8, 9),), ((12, 0),), ((12, 1),), ((13, 0),), ((8, 0), (8, 6)), ()])
def test_cards_that_it_takes_or_that_nobody_knows(machine: SimpleNamespace, gpus: tuple[tuple[int, int], ...]) -> None:
    machine.gpus = gpus
    assert capability(NAME, "fp32", "gpu").works


def card(number: int) -> Any:
    """An `OrtEpDevice` of the plug-in."""
    memory = SimpleNamespace(device_id=number)
    return SimpleNamespace(ep_name=PROVIDER, ep_metadata={"version": "0.5.0"}, memory_info=lambda kind: memory)


@dataclass
class Toy:
    """`onnxruntime` with one plug-in, as far as the engine uses it; `compiled` counts, and the file has `operators`."""

    __version__ = "1.32.0"
    error: str | None = None
    devices: list[Any] = field(default_factory=lambda: [card(0)])
    operators: tuple[str, ...] = ("EPContext",)
    compiled: int = 0
    asked: list[Any] = field(default_factory=list)
    OrtDeviceMemoryType = SimpleNamespace(DEFAULT=0)
    __hash__ = object.__hash__
    OrtValue = SimpleNamespace(
        ortvalue_from_shape_and_type=lambda *_: SimpleNamespace(update_inplace=lambda _: None)  # memory of the card
    )

    def register_execution_provider_library(self, name: str, library: str) -> None:
        if self.error:
            raise RuntimeError(self.error)

    def get_ep_devices(self) -> list[Any]:
        return [SimpleNamespace(ep_name="CPUExecutionProvider"), *self.devices]

    def SessionOptions(self) -> Any:
        def add(devices: list[Any], options: dict[str, str]) -> None:
            self.asked.append(options)

        return SimpleNamespace(add_provider_for_devices=add, add_session_config_entry=lambda *_: None)

    def ModelCompiler(self, options: Any, model: str, **_: Any) -> Any:
        def compile_to_file(path: str) -> None:
            self.compiled += 1
            nodes = [onnx.helper.make_node(one, ["image"], [f"{number}"]) for number, one in enumerate(self.operators)]
            onnx.save(onnx.helper.make_model(onnx.helper.make_graph(nodes, "toy", [], [])), path)
            if self.error:
                raise RuntimeError(self.error)

        return SimpleNamespace(compile_to_file=compile_to_file)

    def InferenceSession(self, path: str, options: Any, **_: Any) -> Any:
        assert Path(path).is_file()
        return SimpleNamespace(get_providers=lambda: [PROVIDER])


@pytest.fixture
def plugin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A package of the plug-in's name, without its libraries."""
    package = tmp_path / "site" / TENSORRT_RTX.module
    package.mkdir(parents=True)
    (package / "libtensorrt_rtx.so.1.7.1").touch()
    (package / "__init__.py").write_text(
        f"def get_ep_name(): return {PROVIDER!r}\ndef get_library_path(): return {str(package / 'plugin.so')!r}\n"
    )
    monkeypatch.syspath_prepend(str(package.parent))
    monkeypatch.delitem(sys.modules, TENSORRT_RTX.module, raising=False)
    monkeypatch.setattr(ort_engine, "load_libraries", lambda spec: None)  # a real plug-in, where one is installed
    monkeypatch.setenv("NVIDIA_TF32_OVERRIDE", "1")  # which the engine changes
    yield package
    sys.modules.pop(TENSORRT_RTX.module, None)


@pytest.mark.parametrize(
    ("toy", "said"),
    [
        (
            Toy(error="/src/ep.cc:393 Create() [ONNXRuntimeError] : 1 : FAIL : CUDA failure 100: no device"),
            "cannot be loaded: CUDA failure 100: no device",
        ),
        (Toy(devices=[]), "finds no GPU that it runs on"),
        (Toy(devices=[card(1)]), "not run on the first GPU, but on number 1"),
    ],
)
def test_a_plug_in_that_does_not_load(plugin: Path, toy: Toy, said: str) -> None:
    with pytest.raises(EngineError) as caught:
        load_plugin(toy)
    assert said in caught.value.problem and "\n" not in str(caught.value) and caught.value.remedy


@pytest.fixture
def opened(plugin: Path, tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Opens the engine on a toy."""
    monkeypatch.setattr(OnnxRuntimeRtxEngine, "infer", lambda self, inputs: {})

    def open_on(toy: Toy, *shapes: Shape, **options: Any) -> OnnxRuntimeRtxEngine:
        monkeypatch.setitem(sys.modules, "onnxruntime", toy)
        shapes = shapes or ((2, 320, 448), (1, 320, 320))
        chosen = EngineOptions("fp32", "gpu", shapes=shapes, cache_dir=tmp_path / "engines", **options)
        return OnnxRuntimeRtxEngine(Bundle.open(tiny_bundle), chosen, "onnx")

    return open_on


def test_the_second_start_compiles_nothing(opened: Any) -> None:
    first = opened(Toy())
    assert first.version == "1.32.0, TensorRT-RTX 1.7.1 (plug-in 0.5.0)" and first.build_s is not None
    assert first.delegated == "1 part in TensorRT-RTX, 0 nodes outside"
    assert os.environ["NVIDIA_TF32_OVERRIDE"] == "0"
    second = Toy()
    assert opened(second).directory == first.directory
    assert second.compiled == 0 and second.asked[0]["nv_profile_opt_shapes"] == "image:2x3x320x448"
    # With TF32 it is another engine.
    with_tf32 = Toy()
    assert opened(with_tf32, tf32=True).directory != first.directory and with_tf32.compiled == 1
    assert "NVIDIA_TF32_OVERRIDE" not in os.environ


def test_one_shape_is_replayed_as_a_cuda_graph(opened: Any) -> None:
    several, one = Toy(), Toy()
    opened(several)
    assert not any("enable_cuda_graph" in options for options in several.asked)
    assert opened(one, (2, 320, 448)).cuda_graph == "a CUDA graph"
    assert one.asked[-1]["enable_cuda_graph"] == "1"


def test_a_graph_of_which_tensorrt_takes_nothing_is_not_timed_on_the_cpu(opened: Any) -> None:
    for _ in range(2):  # nor is it found compiled the next time
        with pytest.raises(EngineError, match="takes no part of"):
            opened(Toy(operators=("Conv", "Relu")))


def test_a_compiled_graph_that_is_damaged(opened: Any) -> None:
    directory = opened(Toy()).directory
    (directory / "compiled.onnx").write_bytes(b"\x08")
    with pytest.raises(EngineError, match=r"cannot load .*compiled\.onnx") as caught:
        opened(Toy())
    assert "Delete that file" in (caught.value.remedy or "")


def test_what_runs_where(tmp_path: Path) -> None:
    toy = Toy(operators=("EPContext", "Cast", "Cast"))
    compile_model(toy, toy.SessionOptions(), Path("model.onnx"), tmp_path / "compiled.onnx", None, {})
    assert compiled_parts(tmp_path / "compiled.onnx") == (1, {"Cast": 2})


def test_a_failed_compilation_leaves_nothing(tmp_path: Path) -> None:
    toy = Toy(error="no memory")
    with pytest.raises(RuntimeError, match="no memory"):
        compile_model(toy, toy.SessionOptions(), Path("model.onnx"), tmp_path / "compiled.onnx", None, {})
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(OutputError):
        compile_model(Toy(), toy.SessionOptions(), Path("m"), Path("/proc/1/compiled.onnx"), None, {})


@needs_the_wheel
@pytest.mark.skipif(nvidia_driver() is not None, reason="there is a driver")
def test_the_real_plug_in_without_a_driver_is_one_line(tiny_bundle: Path) -> None:
    code = (
        "import sys; from gfldeploy.bundle import Bundle; from gfldeploy.engines.base import EngineOptions\n"
        "from gfldeploy.engines.registry import load_graph\n"
        f"load_graph({NAME!r}, Bundle.open(sys.argv[1]), EngineOptions('fp32', 'gpu'), 'onnx')\n"
    )
    command = [sys.executable, "-c", code, str(tiny_bundle)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    *_, last = done.stderr.splitlines()
    assert done.returncode == 1, done.stderr
    assert last.startswith("gfldeploy.errors.EngineError: ONNX Runtime with TensorRT-RTX cannot be loaded: ")
    assert "libcuda.so.1 of the NVIDIA driver" in last


@pytest.mark.slow
@needs_the_wheel
@pytest.mark.skipif(not (shutil.which("gcc") and shutil.which("nm")), reason="gcc and nm make the stubs of a driver")
def test_the_real_plug_in_compiles_without_a_gpu(tiny_bundle: Path) -> None:
    script = str(ROOT / "benchmarks" / "tensorrt_rtx.py")
    command = [sys.executable, script, "--bundles", str(tiny_bundle), "--targets", "sm89"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    rows = [row.split(" | ") for row in done.stdout.splitlines()[2:]]
    assert rows and all(row[1:5] == ["sm89", "1", "0", "0"] for row in rows), done.stdout
