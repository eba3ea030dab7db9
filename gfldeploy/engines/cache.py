"""Folders on this machine in which engines keep what they compiled."""

from __future__ import annotations

import hashlib
import json
import tempfile
from pathlib import Path

from gfldeploy.bundle import Bundle
from gfldeploy.engines.base import Engine
from gfldeploy.errors import OutputError
from gfldeploy.system import rename


def _home() -> Path:
    try:
        return Path.home()
    except RuntimeError:  # a user without one, as containers have: nothing can be kept
        return Path("/nonexistent")


_DIGEST = hashlib.sha256().digest_size
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


def keep(path: Path, content: bytes) -> None:
    """Write what was compiled, with its digest, in one step. Raises `OutputError`."""
    part = None
    try:
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}.", delete=False) as file:
            part = Path(file.name)
            file.write(hashlib.sha256(content).digest() + content)
        rename(part, path)
    except OSError as error:
        if part is not None:
            part.unlink(missing_ok=True)
        raise OutputError(
            f"cannot write {path}: {error.strerror or error}", "Choose another --engine-cache."
        ) from error


def kept(path: Path) -> bytes | None:
    """What `keep` wrote; None if it is not there or damaged: a damaged model may run, and compute anything."""
    try:
        data = path.read_bytes()
    except OSError:
        return None
    digest, content = data[:_DIGEST], data[_DIGEST:]
    return content if hashlib.sha256(content).digest() == digest else None
