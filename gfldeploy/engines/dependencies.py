"""Packages that only some engines and commands need: how they are imported, and what installs them."""

from __future__ import annotations

import importlib
import signal
import sys
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from types import ModuleType

from gfldeploy._quiet import quiet
from gfldeploy.engines.base import Device, Library, is_installed
from gfldeploy.engines.registry import ENGINES, ONNXRUNTIME, PADDLE
from gfldeploy.errors import MissingDependencyError


@dataclass(frozen=True)
class ToolChain:
    """What a command, or an option of several, needs besides the packages that gfldeploy always has.

    `libraries`: of engines that it runs. `distributions`: of the other packages, by module, which `extra` of gfldeploy
    brings.
    """

    extra: str
    libraries: tuple[Library, ...]
    distributions: Mapping[str, str]

    @property
    def modules(self) -> tuple[str, ...]:
        return (*(library.module for library in self.libraries), *self.distributions)


TOOL_CHAINS: Mapping[str, ToolChain] = {
    "export": ToolChain("export", (PADDLE, ONNXRUNTIME), {"ppdet": "paddledet", "paddle2onnx": "paddle2onnx"}),
    "quantize": ToolChain("quant", (PADDLE, ONNXRUNTIME), {"paddleslim": "paddleslim"}),
    "serve": ToolChain(
        "serve", (), {"starlette": "starlette", "uvicorn": "uvicorn", "prometheus_client": "prometheus-client"}
    ),
    "ray": ToolChain("ray", (), {"ray": "ray"}),
}


def require(module: str, purpose: str) -> ModuleType:
    """Import `module` (a dotted name) and return it; `purpose`: what needs it ("export", "the ONNX Runtime engine").

    What the package prints or warns about during the import is swallowed. Raises `MissingDependencyError` when the
    package is not installed, and, with another message, when it is installed but cannot be imported.
    """
    if loaded := sys.modules.get(module):
        return loaded
    package = module.partition(".")[0]
    command = install_command(package)
    missing = MissingDependencyError(f"{package} is not installed, {purpose} needs it", f"Run: {command}")
    if not is_installed(package):
        raise missing
    try:
        with quiet(), _KeepSigterm():
            return importlib.import_module(module)
    except (ImportError, OSError, AttributeError) as error:  # missing shared libraries, versions that clash
        if isinstance(error, ModuleNotFoundError) and error.name == package:
            raise missing from error
        problem = f"{package} is installed but cannot be imported, {purpose} needs it: {error}"
        raise MissingDependencyError(problem, f"Repair it with: {command}") from error


def install_command(package: str, device: Device | None = None) -> str:
    """How to get the package with this module; of an engine's, the build for `device`, or for each."""
    builds = next((spec.library.builds for spec in ENGINES.values() if spec.library.module == package), {})
    if device and device in builds:
        return builds[device].install
    if builds:
        several = len(builds) > 1
        return ", or ".join(f"{one.install} ({on.upper()})" if several else one.install for on, one in builds.items())
    for tools in TOOL_CHAINS.values():
        if package in tools.distributions:
            old = PADDLE in tools.libraries and sys.version_info >= (3, 13)  # paddle2onnx has no wheel for 3.13
            python = "--python 3.12 " if old else ""
            return f"uv sync --no-dev --inexact {python}--extra {tools.extra} (in a checkout of gfldeploy)"
    return f"pip install {package}"


class _KeepSigterm:
    """Keeps the handler of SIGTERM while a package is imported, from one module to the next.

    Paddle installs its own in C, under which nothing is cleaned up, and its import takes seconds more after that. A
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
