"""NVIDIA's libraries: which an installed package was built for, whether they are here, how they are loaded.

A wheel for GPUs (onnxruntime-gpu) does not say which TensorRT, CUDA and cuDNN it was built for, and its package index
offers others. Its native libraries do say: their ELF files name what must be loaded with them, with the major version
(`libnvinfer.so.10`). They are read here, without importing the package. What they need is then looked for in the
folders where pip puts it (`nvidia/*/lib`, `tensorrt_libs`), which the linker does not know, and where the linker looks.
What is in pip's folders works once it has been loaded by its path, which `load_libraries` does: seen with pip's CUDA
and cuDNN and ONNX Runtime's CUDA provider. It has not run on a GPU, nor with NVIDIA's own TensorRT libraries.
"""

from __future__ import annotations

import ctypes
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cache
from importlib import metadata, util
from pathlib import Path
from typing import Any, Literal

from gfldeploy._quiet import quiet
from gfldeploy.engines.base import EngineSpec, Obstacle, installed_version, is_installed, remedy_sentence
from gfldeploy.engines.elf import SharedLibrary, read_shared_library
from gfldeploy.engines.hardware import compute_capabilities, nvidia_driver
from gfldeploy.errors import EngineError

# weak: TensorRT chooses the precision of each layer among those that are allowed. strong: the network's types decide.
Typing = Literal["weak", "strong"]
_FIRST_STRONG = 11  # TensorRT 11 has neither the flags that allow precisions nor weakly typed networks

# The first driver for each CUDA, by NVIDIA's table "CUDA Toolkit Driver Version Ranges" (minor version compatibility).
_FIRST_DRIVER = {11: 450, 12: 525, 13: 580}
# The first GPUs for it, by compute capability: CUDA 13 has no kernels for Volta and older.
_FIRST_GPU = {13: (7, 5)}
# The last of a package's versions for an older CUDA, by their files (docs/installing.md).
_FOR_OLDER_CUDA = {"onnxruntime-gpu": (12, "onnxruntime-gpu<1.27")}
_NVIDIA = re.compile(r"lib(cuda|cu(?:dart|blas|dnn|fft|rand|solver|sparse|pti)|nv|nccl|tensorrt)\w*")
_DRIVERS = ("libcuda.so.1", "libnvidia-ml.so.1")  # which come with the driver
# What pip installs a library with, "-cuN" left out; the first that its name starts with.
_DISTRIBUTIONS = {
    "libnvinfer": "tensorrt",
    "libnvonnxparser": "tensorrt",
    "libcudnn": "nvidia-cudnn",
    "libcudart": "nvidia-cuda-runtime",
    "libcublas": "nvidia-cublas",
    "libcufft": "nvidia-cufft",
    "libcurand": "nvidia-curand",
    "libcusolver": "nvidia-cusolver",
    "libcusparse": "nvidia-cusparse",
    "libcupti": "nvidia-cuda-cupti",
    "libnvrtc": "nvidia-cuda-nvrtc",
    "libnvJitLink": "nvidia-nvjitlink",
    "libnccl": "nvidia-nccl",
}
_NUMBERED_BY_CUDA = (
    "nvidia-cuda-runtime",
    "nvidia-cublas",
    "nvidia-cuda-nvrtc",
    "nvidia-nvjitlink",
    "nvidia-cuda-cupti",
)
_ALWAYS_SUFFIXED = ("tensorrt", "nvidia-cudnn", "nvidia-nccl")  # the others have had no "-cuN" since CUDA 13
_TENSORRT = ("tensorrt-cu13-libs", "tensorrt-cu12-libs", "tensorrt-libs", "tensorrt-cu13", "tensorrt-cu12", "tensorrt")
_LINKER_FOLDERS = ("/lib/x86_64-linux-gnu", "/usr/lib/x86_64-linux-gnu", "/lib64", "/usr/lib64", "/lib", "/usr/lib")
_MOST_LIBRARIES = 200  # that one needs, with what these need
_time_left = [1.0]  # seconds that a process spends on trials, all together: large libraries take long from a slow disk
_LDCONFIG_S = 1.0
# Names each library before it is loaded, so that a crash can be told from what was printed.
_TRIAL = """
import ctypes, json, sys
for name in sys.argv[1:]:
    print(json.dumps([name]), flush=True)
    error = None
    try:
        ctypes.CDLL(name)
    except OSError as problem:
        error = str(problem)
    print(json.dumps([name, error]), flush=True)
"""
_TRY = (sys.executable, "-I", "-S", "-c", _TRIAL)


@dataclass(frozen=True)
class _Need:
    """A library that must be loaded: its name, who asks for it, the file where it was found, why it does not load."""

    soname: str
    asked_by: str
    path: Path | None
    error: str | None = None

    @property
    def what(self) -> str:
        """What the linker is given."""
        return str(self.path or self.soname)


@dataclass(frozen=True)
class BuiltFor:
    """The major versions that a package for GPUs was built for; None for what it does not need."""

    cuda: int | None
    cudnn: int | None
    tensorrt: int | None

    def __str__(self) -> str:
        named = (("CUDA", self.cuda), ("cuDNN", self.cudnn), ("TensorRT", self.tensorrt))
        return ", ".join(f"{name} {version}" for name, version in named if version)


def typing_of(tensorrt: str | None) -> Typing:
    """How networks of this version of TensorRT are typed; of an unknown version, as of 10."""
    major = _major(tensorrt)
    return "strong" if major is not None and major >= _FIRST_STRONG else "weak"


def tensorrt_library(spec: EngineSpec | None = None) -> str | None:
    """The version of TensorRT that an engine loads, or of any that is installed; None without one.

    Found without loading it: from the file that the engine would load, its name or its package. "unknown version" of a
    bare library.
    """
    if spec is not None:
        path = next((one.path for one in _needs(spec) if one.soname.startswith("libnvinfer.so.") and one.path), None)
        return None if path is None else _version_of(path)
    if version := next(filter(None, map(installed_version, _TENSORRT)), None):
        return version
    folders = (*_pip_folders(), *_linker_folders())
    files = [
        folder / name
        for folder in folders
        for name in sorted(_listed(folder), reverse=True)
        if name.startswith("libnvinfer.so.")
    ]
    files += [path for name, path in _cached().items() if name.startswith("libnvinfer.so")]
    return _version_of(files[0]) if files else None


def nvidia_packages() -> dict[str, str]:
    """The installed distributions of NVIDIA's libraries that inference uses, with their versions."""
    names = {f"{name}{suffix}" for name in _DISTRIBUTIONS.values() for suffix in ("", "-cu11", "-cu12", "-cu13")}
    return {name: version for name in (*_TENSORRT, *sorted(names)) if (version := installed_version(name))}


def built_for(spec: EngineSpec) -> BuiltFor | None:
    """What the installed GPU package of an engine was built for; None where it is not installed or cannot tell."""
    sonames = [soname for _, library in _own_libraries(spec) for soname in library.needed]
    if not any(map(_NVIDIA.match, sonames)):
        return None
    cuda = next(filter(None, (_numbered(sonames, name) for name in ("libcudart", "libcublas", "libnvrtc"))), None)
    return BuiltFor(cuda, _numbered(sonames, "libcudnn"), _numbered(sonames, "libnvinfer"))


def doubt(spec: EngineSpec) -> Obstacle | None:
    """What may keep the engine from running though everything loads: a driver or GPU that is too old for its CUDA, or
    a TensorRT or cuDNN for another CUDA.

    An older driver works with NVIDIA's compatibility packages for data centre GPUs; the others nobody promises.
    """
    built = built_for(spec)
    if built is None or built.cuda is None:
        return None
    driver, first = nvidia_driver(), _FIRST_DRIVER.get(built.cuda)
    major = _major(driver)
    if first and major and major < first:
        needs = f"{_package(spec)} was built for CUDA {built.cuda}, which needs {first}"
        cuda, older = _FOR_OLDER_CUDA.get(spec.library.builds["gpu"].distribution, (0, ""))
        instead = f', or for CUDA {cuda}: pip install "{older}"' if _FIRST_DRIVER.get(cuda, major + 1) <= major else ""
        return Obstacle(f"the NVIDIA driver is {driver}, {needs}", f"update the driver{instead}")
    newest, needed = max(compute_capabilities(), default=None), _FIRST_GPU.get(built.cuda)
    if newest and needed and newest < needed:
        have, need = (".".join(map(str, one)) for one in (newest, needed))
        reason = f"the GPU has compute capability {have}, {_package(spec)} was built for CUDA {built.cuda}, which needs"
        _, older = _FOR_OLDER_CUDA.get(spec.library.builds["gpu"].distribution, (0, ""))
        return Obstacle(f"{reason} {need}", f'pip install "{older}"' if older else "use another GPU")
    if built.tensorrt and (other := _of_another_cuda("tensorrt-cu{}-libs", built.cuda)):
        other = other.removesuffix("-libs")
        reason = f"{other} is installed, {_package(spec)} was built for CUDA {built.cuda}"
        wanted = f'pip install --force-reinstall "tensorrt-cu{built.cuda}<{built.tensorrt + 1}"'
        return Obstacle(reason, f"pip uninstall -y {other} {other}-libs {other}-bindings && {wanted}")
    if built.cudnn and (other := _of_another_cuda("nvidia-cudnn-cu{}", built.cuda)):  # which may be that of PyTorch
        reason = f"the cuDNN here is that of {other}, {_package(spec)} was built for CUDA {built.cuda}"
        package = spec.library.builds["gpu"].distribution
        return Obstacle(reason, f"install {package} in an environment of its own, without {other}")
    return None


def _of_another_cuda(name: str, cuda: int) -> str | None:
    """The package whose files lie where those of package `name` for this CUDA would: they go to the same folder."""
    ours = _recorded(name.format(cuda)).values()
    if any(path.name.startswith("lib") for path, _ in ours) and all(_size(path) == size for path, size in ours if size):
        return None
    others = (name.format(other) for other in _FIRST_DRIVER if other != cuda)
    return next((other for other in others if installed_version(other)), None)


def obstacle_to_loading(spec: EngineSpec) -> Obstacle | None:
    """What keeps the engine's GPU package from loading NVIDIA's libraries, with the exact remedy; None if nothing does.

    The libraries are loaded in a process of its own, once, and for at most a second for all engines.
    """
    return _overwritten(spec) or _unfit_tensorrt(spec) or _explain(spec, _tried(spec))


def why_not_loaded(spec: EngineSpec) -> Obstacle:
    """Why an engine did not get its GPU provider, as far as it can be told afterwards."""
    build = spec.library.builds["gpu"]
    if installed_version(build.distribution) is None:
        return Obstacle(f"{build.distribution} is not installed", build.install)
    if known := obstacle_to_loading(spec) or doubt(spec):
        return known
    return Obstacle("its libraries are all there", f"check the GPU, and the driver for {built_for(spec) or 'CUDA'}")


def load_libraries(spec: EngineSpec) -> None:
    """Load what the engine's GPU package needs of NVIDIA's, before its session is opened; what is loaded stays.

    Those in pip's folders are not found otherwise. Their symbols are not made global: another library of the process,
    as PyTorch, may have been built for other versions. Raises `EngineError` with the exact remedy if one does not load.
    """
    if obstacle := _overwritten(spec) or _unfit_tensorrt(spec):
        raise _cannot_load(spec, obstacle)
    loaded = []
    for need in _needs(spec):
        try:
            ctypes.CDLL(need.what)
            loaded.append(need)
        except OSError as error:
            loaded.append(replace(need, error=str(error)))
    if obstacle := _explain(spec, tuple(loaded)):
        raise _cannot_load(spec, obstacle)
    for library in _opened_while_building(loaded):
        with suppress(OSError):
            ctypes.CDLL(str(library))
    preload = getattr(sys.modules.get("onnxruntime"), "preload_dlls", None)
    if callable(preload):  # those that others open only when they use them; it prints what it does not find
        with quiet(), suppress(Exception):
            preload()


def _opened_while_building(needs: Iterable[_Need]) -> list[Path]:
    """What TensorRT opens by name when it builds an engine (libnvinfer_builder_resource), where pip has put it."""
    path = next((need.path for need in needs if need.path and need.soname.startswith("libnvinfer.so.")), None)
    if path is None or path.parent not in _pip_folders():
        return []
    major = path.name.removeprefix("libnvinfer.so.").partition(".")[0]
    return sorted(path.parent.glob(f"libnvinfer_*.so.{major}*"))


def _cannot_load(spec: EngineSpec, obstacle: Obstacle) -> EngineError:
    return EngineError(f"{spec.title} cannot be loaded: {obstacle.reason}", remedy_sentence(obstacle.remedy))


def _overwritten(spec: EngineSpec) -> Obstacle | None:
    """Whether the CPU build of the engine's module, or another copy of it, took the place of the GPU build."""
    build, module = spec.library.builds["gpu"], spec.library.module
    ours = _recorded(build.distribution)
    version = installed_version(build.distribution)
    again = f"pip install {build.distribution}=={version}"
    for twin in spec.library.distributions if ours else ():
        if twin == build.distribution or installed_version(twin) is None:
            continue
        theirs = _recorded(twin)
        differing = (name for name in theirs if name in ours and theirs[name][1] != ours[name][1])
        elsewhere = {path.parent for path, _ in theirs.values()} - {path.parent for path, _ in ours.values()}
        if any(_size(ours[name][0]) == theirs[name][1] for name in differing) or _origin(module) in elsewhere:
            reason = f"the CPU package {twin} overwrites the {module} module of {build.distribution}"
            return Obstacle(reason, f"pip uninstall -y {twin} {build.distribution} && {again}")
    for name, (path, _) in ours.items():
        if Path(name).name in spec.gpu_files and _read(path) is None:
            what = "missing" if _size(path) is None else "damaged"
            return Obstacle(f"{Path(name).name} of {_package(spec)} is {what}", f"{again} --force-reinstall")
    return None


def _unfit_tensorrt(spec: EngineSpec) -> Obstacle | None:
    """Whether the engine opens a TensorRT by its bare name, and finds none, or one that it cannot use."""
    if not spec.gpu_opens:
        return None
    found = {name: _find_by_linker(name) for name in spec.gpu_opens}
    installed = next((_version_of(path) for path in found.values() if path), None) or tensorrt_library()
    needs = f"{spec.title} needs TensorRT {_FIRST_STRONG - 1}"
    remedy = f"install TensorRT {_FIRST_STRONG - 1} with NVIDIA's packages for your system"
    if installed is None:
        return Obstacle(f"TensorRT is not installed, {needs}", remedy)
    if typing_of(installed) == "strong":
        reason = f"TensorRT {installed} is installed, {needs}: {_FIRST_STRONG} is strongly typed only"
        return Obstacle(reason, remedy)
    if missing := [name for name, path in found.items() if path is None]:
        where = f"or link {' and '.join(missing)} in a folder of LD_LIBRARY_PATH"
        reason = f"{spec.title} opens {' and '.join(missing)}, which the tensorrt packages of pip do not hold"
        return Obstacle(reason, f"{remedy}, {where}")
    return None


def _explain(spec: EngineSpec, needs: Iterable[_Need]) -> Obstacle | None:
    """One problem and one remedy for all libraries that do not load."""
    failed = [need for need in needs if need.error is not None]
    if not failed:
        return None
    built, package = built_for(spec), _package(spec)
    first = failed[0]  # the others may fail because it does
    cuda = built.cuda if built else None
    absent = [need for need in failed if need.path is None]
    if driver := next((need for need in absent if need.soname in _DRIVERS), None):
        reason = f"{driver.asked_by} needs {driver.soname} of the NVIDIA driver, which is not found"
        return Obstacle(reason, "install the driver's libraries; in a container, start it with access to the GPUs")
    wanted = dict.fromkeys(_requirement(need.soname, cuda) for need in absent or failed)
    install = " ".join(f'"{one}"' for one in wanted if one)
    again = "" if absent else " --force-reinstall"
    remedy = f"pip install {install}{again}" if install else f"install {first.soname}, or repair its package"
    if built and any(need.soname.startswith(("libnvinfer", "libnvonnxparser")) for need in absent):
        installed = tensorrt_library()
        if installed is None:
            return Obstacle(f"TensorRT {built.tensorrt} is not installed, {package} needs it", remedy)
        if _major(installed) != built.tensorrt:
            reason = f"TensorRT {installed} is installed, {package} needs TensorRT {built.tensorrt}"
            return Obstacle(reason, remedy)
    if not absent:
        return Obstacle(f"{first.soname} is installed but cannot be loaded: {_line(first.error)}", remedy)
    others = [need.soname for need in absent[1:]]
    more = f", nor {', '.join(others[:3])}{f' and {len(others) - 3} more' * (len(others) > 3)}" if others else ""
    return Obstacle(f"{absent[0].asked_by} needs {absent[0].soname}, which is not found{more}", remedy)


def _requirement(soname: str, cuda: int | None) -> str | None:
    """What pip installs a library with, in its major version and for this CUDA."""
    name = next((package for start, package in _DISTRIBUTIONS.items() if soname.startswith(start)), None)
    major = _numbered([soname], soname.partition(".so")[0])
    if name is None or major is None:
        return None
    cuda = major if name in _NUMBERED_BY_CUDA else cuda
    suffix = f"-cu{cuda}" if cuda and (cuda <= 12 or name in _ALWAYS_SUFFIXED) else ""
    return f"{name}{suffix}<{major + 1}" if name == "tensorrt" else f"{name}{suffix}=={major}.*"


def _tried(spec: EngineSpec) -> tuple[_Need, ...]:
    """What the engine's package needs, each with why it does not load, tried in a process of its own.

    What there was no time to try counts as loaded where it was found.
    """
    needs = _needs(spec)
    errors = _trial(tuple(need.what for need in needs))
    return tuple(replace(need, error=errors.get(need.what, None if need.path else "not found")) for need in needs)


@cache
def _trial(names: tuple[str, ...]) -> dict[str, str | None]:
    """Load libraries one after the other, and say why those that do not load do not; those it had time for."""
    start = time.monotonic()
    crashed = False
    try:
        done = subprocess.run([*_TRY, *names], stdin=subprocess.DEVNULL, capture_output=True, timeout=_time_left[0])
        printed, crashed = done.stdout, done.returncode < 0
    except subprocess.TimeoutExpired as late:
        printed = late.stdout or b""
    except OSError:  # Python is inside of another program, which cannot be run so
        printed = b""
    _time_left[0] = max(_time_left[0] - (time.monotonic() - start), 0)
    lines: list[list[Any]] = []
    for line in printed.decode(errors="replace").splitlines():
        with suppress(ValueError):  # cut off by the timeout, or what a library prints
            if isinstance(told := json.loads(line), list) and told and told[0] in names:
                lines.append(told)
    errors: dict[str, str | None] = {line[0]: line[1] for line in lines if len(line) == 2}
    if crashed and lines and len(lines[-1]) == 1:
        errors[lines[-1][0]] = "it crashes the process that loads it"
    return errors


def _needs(spec: EngineSpec) -> tuple[_Need, ...]:
    """NVIDIA's libraries that the engine's GPU package needs, and those that these need, each after its own needs."""
    found: dict[str, _Need] = {}
    entered: set[str] = set()

    def visit(library: SharedLibrary, path: Path, name: str) -> None:
        for soname in library.needed:
            if soname in entered or len(entered) >= _MOST_LIBRARIES:
                continue
            beside = _find_beside(soname, library, path)
            if not (_NVIDIA.match(soname) or beside):
                continue  # the system's, which are there, or not ours to judge
            entered.add(soname)
            where = beside or _find_by_linker(soname)
            inner = _read(where) if where else None
            if where and inner:
                visit(inner, where, soname)
            if _NVIDIA.match(soname):
                found[soname] = _Need(soname, name, where)

    for path, library in _own_libraries(spec):
        visit(library, path, path.name)
    return tuple(found.values())


def _own_libraries(spec: EngineSpec) -> Iterator[tuple[Path, SharedLibrary]]:
    """The native libraries that an engine loads from its GPU package.

    ONNX Runtime's CUDA provider opens cuDNN when it first needs it, and since 1.28 its file does not say so: that of
    the TensorRT provider, in the same wheel, does.
    """
    build = spec.library.builds.get("gpu")
    if build is None or not spec.gpu_files:
        return
    recorded = _recorded(build.distribution).values()
    libraries = {path.name: (path, one) for path, _ in recorded if path.suffix == ".so" and (one := _read(path))}
    cudnn = {soname for _, one in libraries.values() for soname in one.needed if soname.startswith("libcudnn.")}
    for name in spec.gpu_files:
        if name in libraries:
            path, one = libraries[name]
            yield path, replace(one, needed=tuple(dict.fromkeys((*one.needed, *sorted(cudnn)))))


@cache
def _recorded(distribution: str) -> dict[str, tuple[Path, int | None]]:
    """The files of an installed distribution, by their names in its record: where they are, and their recorded size."""
    try:
        files = metadata.distribution(distribution).files or ()
    except metadata.PackageNotFoundError:
        return {}
    return {str(file): (Path(str(file.locate())), file.size) for file in files}


@cache
def _read(path: Path) -> SharedLibrary | None:
    try:
        return read_shared_library(path) if path.is_file() else None
    except (OSError, ValueError):
        return None


def _find_beside(soname: str, library: SharedLibrary, path: Path) -> Path | None:
    """The file of a library in pip's folders, beside the one that needs it, or where that has it looked for."""
    own = [Path(one.replace("${ORIGIN}", "$ORIGIN").replace("$ORIGIN", str(path.parent))) for one in library.paths]
    return _find(soname, (path.parent, *_pip_folders(), *own))


def _find_by_linker(soname: str) -> Path | None:
    return _find(soname, _linker_folders()) or _cached().get(soname)


def _find(soname: str, folders: Iterable[Path]) -> Path | None:
    """The first file of this name, or of a longer version (libcudart.so.13.4.36) of a name that has one."""
    for folder in folders:
        names = _listed(folder)
        longer = () if soname.endswith(".so") else sorted(name for name in names if name.startswith(f"{soname}."))
        for name in (soname, *reversed(longer)):
            if name in names and _size(folder / name) is not None:
                return folder / name
    return None


@cache
def _listed(folder: Path) -> frozenset[str]:
    """The names of the libraries in a folder."""
    try:
        return frozenset(path.name for path in folder.iterdir() if path.name.startswith("lib"))
    except OSError:
        return frozenset()


@cache
def _pip_folders() -> tuple[Path, ...]:
    """Where pip puts NVIDIA's libraries; not in the current folder, which may be anybody's."""
    found: list[Path] = []
    here: Path | None = None
    with suppress(FileNotFoundError):  # it was deleted
        here = Path.cwd()
    for entry in map(Path, sys.path):
        if entry.is_absolute() and entry != here:
            with suppress(OSError):  # a folder that this user may not read
                found += sorted(entry.glob("nvidia/*/lib"))
            found.append(entry / "tensorrt_libs")
    return tuple(dict.fromkeys(found))


def _linker_folders() -> tuple[Path, ...]:
    given = os.environ.get("LD_LIBRARY_PATH", "").split(os.pathsep)
    return tuple(Path(one) for one in (*given, *_LINKER_FOLDERS) if one)


@cache
def _cached() -> dict[str, Path]:
    """The linker's cache of NVIDIA's libraries, by their names."""
    tool = shutil.which("ldconfig", path=os.pathsep.join((os.environ.get("PATH", ""), "/sbin", "/usr/sbin")))
    if tool is None:
        return {}
    try:
        listed = subprocess.run([tool, "-p"], capture_output=True, text=True, timeout=_LDCONFIG_S, check=False).stdout
    except (OSError, subprocess.TimeoutExpired):
        return {}
    found = re.findall(r"^\s*(\S+) \(.*x86-64.*\) => (.+)$", listed, re.MULTILINE)
    return {name: Path(path) for name, path in reversed(found) if _NVIDIA.match(name)}


def _version_of(library: Path) -> str:
    """From the file's full name (libnvinfer.so.10.13.3), or the package of its folder."""
    if found := re.fullmatch(r".*\.so\.(\d+\.\d[\d.]*)", library.resolve().name):
        return found[1]
    if library.parent.name == "tensorrt_libs":
        return next(filter(None, map(installed_version, _TENSORRT)), "unknown version")
    return "unknown version"


def _package(spec: EngineSpec) -> str:
    distribution = spec.library.builds["gpu"].distribution
    return f"{distribution} {installed_version(distribution)}"


def _numbered(sonames: Iterable[str], name: str) -> int | None:
    """The number of the first `NAME.so.NUMBER`."""
    return next((int(found[1]) for one in sonames if (found := re.match(rf"{re.escape(name)}\.so\.(\d+)", one))), None)


def _major(version: str | None) -> int | None:
    found = re.match(r"\d+", version or "")
    return int(found[0]) if found else None


def _origin(module: str) -> Path | None:
    """The folder of a module that would be imported."""
    if not is_installed(module):
        return None
    spec = util.find_spec(module)
    return Path(spec.origin).parent if spec and spec.origin else None


def _size(path: Path) -> int | None:
    try:
        return path.stat().st_size
    except OSError:
        return None


def _line(text: str | None) -> str:
    return " ".join((text or "").split())
