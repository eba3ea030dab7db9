"""Folders on this machine in which engines keep what they compiled."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gfldeploy.errors import OutputError

__all__ = ["DEFAULT_ENGINE_CACHE", "digest_of", "engine_directory"]


def _home() -> Path:
    try:
        return Path.home()
    except RuntimeError:  # a user without one, as containers have: nothing can be kept
        return Path("/nonexistent")


DEFAULT_ENGINE_CACHE = _home() / ".cache" / "gfldeploy" / "engines"


def digest_of(depends_on: Mapping[str, Any]) -> str:
    """A digest of everything that a compiled model depends on, so that it is never used for another one."""
    return hashlib.sha256(json.dumps(depends_on, sort_keys=True).encode()).hexdigest()[:32]


def engine_directory(root: Path, digest: str) -> Path:
    """The folder for this digest under `root`, created if it is absent. Raises `OutputError`."""
    directory = root / digest
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(
            f"cannot write {directory}: {error.strerror or error}", "Choose another --engine-cache."
        ) from error
    return directory
