"""What is installed and what works here, answered without importing any engine."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from gfldeploy.engines.registry import Capability, capabilities
from gfldeploy.machine import Machine, describe_machine, installed_packages

__all__ = ["Report", "examine", "twin_warnings"]

# Two distributions of one module each: the one installed last overwrites the other's files.
_TWINS = (("paddlepaddle", "paddlepaddle-gpu", "paddle"), ("onnxruntime", "onnxruntime-gpu", "onnxruntime"))


@dataclass(frozen=True)
class Report:
    """`packages`: every package looked for, None where it is not installed; `warnings`: problem and remedy, one line
    each; `capabilities`: every engine x device x precision."""

    machine: Machine
    packages: Mapping[str, str | None]
    capabilities: tuple[Capability, ...]
    warnings: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Ready for JSON."""
        data = asdict(self)
        for entry, capability in zip(data["capabilities"], self.capabilities, strict=True):
            entry["works"] = capability.works
        return data


def examine() -> Report:
    """Look at this machine and environment."""
    packages = installed_packages()
    return Report(describe_machine(), packages, tuple(capabilities()), twin_warnings(packages))


def twin_warnings(packages: Mapping[str, str | None]) -> tuple[str, ...]:
    """One warning for each pair of distributions of the same module that are both installed."""
    return tuple(
        f"{cpu} and {gpu} are both installed and overwrite each other's {module} module. "
        f"Run `pip uninstall {cpu} {gpu}`, then install the one you need again."
        for cpu, gpu, module in _TWINS
        if packages.get(cpu) and packages.get(gpu)
    )
