"""Import a package that only some commands need, or say which command installs it."""

from __future__ import annotations

import importlib
import signal
import sys
from contextlib import suppress
from types import ModuleType

from gfldeploy._quiet import quiet
from gfldeploy.errors import MissingDependencyError

__all__ = ["INSTALL_ENGINE", "require"]

# How to get each engine, by module and device. The CPU and the GPU wheel of an engine are one module: the user chooses.
INSTALL_ENGINE: dict[tuple[str, str], str] = {
    ("paddle", "cpu"): "pip install paddlepaddle==3.2.2",
    ("paddle", "gpu"): "install the paddlepaddle-gpu 3.2.2 wheel for your CUDA from Paddle's own package index",
    ("onnxruntime", "cpu"): "pip install onnxruntime",
    ("onnxruntime", "gpu"): "pip uninstall onnxruntime, then pip install onnxruntime-gpu",
    ("openvino", "cpu"): "pip install openvino",
}


def require(module: str, extra: str, purpose: str) -> ModuleType:
    """Import `module` (a dotted name) and return it.

    `extra` is the extra of gfldeploy that brings the package, `purpose` what needs it ("export", "the engine 'ort'").
    What the package prints or warns about during the import is swallowed. Raises `MissingDependencyError` when the
    package is not installed, and, with another message, when it is installed but cannot be imported.
    """
    loaded = sys.modules.get(module)
    if loaded is not None:
        return loaded
    package = module.partition(".")[0]
    command = f"uv sync --no-dev --inexact --extra {extra} (in a checkout of gfldeploy)"
    if (package, "cpu") in INSTALL_ENGINE:
        command = INSTALL_ENGINE[package, "cpu"]
        if gpu := INSTALL_ENGINE.get((package, "gpu")):
            command = f"{command} (CPU), or {gpu} (GPU)"
    try:
        with quiet(), _KeepSigterm():
            return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name == package:
            raise MissingDependencyError(
                f"{package} is not installed, {purpose} needs it", f"Run: {command}"
            ) from error
        raise _broken(package, purpose, command, error) from error
    except (ImportError, OSError, AttributeError) as error:  # a shared library that is missing, or versions that clash
        raise _broken(package, purpose, command, error) from error


class _KeepSigterm:
    """Keeps the handler of SIGTERM while a package is imported, from one module to the next.

    Paddle installs its own in C, under which nothing is cleaned up, and its import goes on for seconds after that. A
    context manager, and a finder of modules that finds none.
    """

    def __init__(self) -> None:
        self._handler = signal.getsignal(signal.SIGTERM)

    def __enter__(self) -> None:
        sys.meta_path.insert(0, self)

    def __exit__(self, *_: object) -> None:
        sys.meta_path.remove(self)
        self._restore()

    def find_spec(self, name: str, path: object = None, target: object = None) -> None:
        self._restore()

    def _restore(self) -> None:
        with suppress(ValueError):  # not the main thread
            if callable(self._handler):
                signal.signal(signal.SIGTERM, self._handler)


def _broken(package: str, purpose: str, command: str, error: Exception) -> MissingDependencyError:
    return MissingDependencyError(
        f"{package} is installed but cannot be imported, {purpose} needs it: {error}", f"Repair it with: {command}"
    )
