"""A bundle's manifest, and the records beside it."""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1]))

from conftest import write_tiny_bundle

from gfldeploy.bundle import MANIFEST, Bundle
from gfldeploy.inspection import describe

_HOME = tempfile.TemporaryDirectory()
_BUNDLE = write_tiny_bundle(Path(_HOME.name) / "tiny")


def seeds() -> Iterable[bytes]:
    """JSON objects: the content of the bundle's JSON files by name."""
    manifest = json.loads((_BUNDLE / MANIFEST).read_text())
    yield json.dumps({MANIFEST: manifest}).encode()


def one(data: bytes, folder: Path) -> None:
    """Everything is sealed with the right digests, unless `data` is no such object: then it is the manifest."""
    directory = folder / "bundle"
    shutil.copytree(_BUNDLE, directory)
    try:
        files = json.loads(data)
        manifest = files.pop(MANIFEST)
        for name, content in files.items():
            (directory / name).write_text(json.dumps(content))
        record = {
            path.relative_to(directory).as_posix(): {
                "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
                "bytes": path.stat().st_size,
            }
            for path in directory.rglob("*")
            if path.is_file() and path.name != MANIFEST
        }
        if isinstance(manifest, dict) and "files" in manifest:
            manifest["files"] = record
        (directory / MANIFEST).write_text(json.dumps(manifest))
    except (ValueError, AttributeError, KeyError, TypeError, OSError, RecursionError):
        (directory / MANIFEST).write_bytes(data)
    describe(Bundle.open(directory))
