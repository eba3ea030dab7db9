"""A detector behind HTTP: `gfldeploy serve`."""

from __future__ import annotations

from gfldeploy.engines.base import is_installed
from gfldeploy.errors import MissingDependencyError

_PACKAGES = {"starlette": "starlette", "uvicorn": "uvicorn", "prometheus_client": "prometheus-client"}  # by module


def check_packages() -> None:
    """Raise `MissingDependencyError` unless all that the other modules here import is installed."""
    if missing := [name for module, name in _PACKAGES.items() if not is_installed(module)]:
        raise MissingDependencyError(
            f"gfldeploy serve needs {', '.join(missing)}, not installed here", f"Run: pip install {' '.join(missing)}"
        )
