"""Folders on this machine in which engines keep what they compiled."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from gfldeploy.bundle import Bundle
from gfldeploy.engines.base import Engine
from gfldeploy.errors import OutputError


def _home() -> Path:
    try:
        return Path.home()
    except RuntimeError:  # a user without one, as containers have: nothing can be kept
        return Path("/nonexistent")


DEFAULT_ENGINE_CACHE = _home() / ".cache" / "gfldeploy" / "engines"


def engine_directory(root: Path, engine: Engine, bundle: Bundle, **depends_on: object) -> Path:
    """The folder under `root` of what `engine` compiled of `bundle`, created if it is absent. Raises `OutputError`.

    `depends_on`: what else the compiled model depends on. The folder is named after a digest of everything, so that a
    compiled model is never used for another one.
    """
    options = engine.options
    tf32 = {"tf32": options.tf32} if options.device == "gpu" else {}  # CPUs have none, and keep what they compiled
    parts = {"engine": engine.name, "version": engine.version, "precision": options.precision, **tf32}
    key = json.dumps({**parts, "bundle": bundle.digest, **depends_on}, sort_keys=True)
    directory = root / hashlib.sha256(key.encode()).hexdigest()[:32]
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        problem = f"cannot write {directory}: {error.strerror or error}"
        raise OutputError(problem, "Choose another --engine-cache.") from error
    return directory
