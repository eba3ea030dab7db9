"""Engines in packages of their own, for tests: installed into a folder, and commands run with that on the path."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import gfldeploy

_PACKAGE = Path(gfldeploy.__file__).parent
_SCRIPT = """
import functools, json, sys
from gfldeploy.bench import runner
from gfldeploy.cli import main
runner.wait_until_idle = functools.partial(runner.wait_until_idle, patience_s=0)
for command in json.loads(sys.argv[1]):
    try:
        main(command)
    except SystemExit as stopped:
        assert not stopped.code, command
"""


def install(folder: Path, module: str, source: str, group: str, entries: str) -> Path:
    """Write a module as a distribution that declares these entry points; returns the folder."""
    metadata = folder / f"{module}-1.0.dist-info"
    metadata.mkdir(parents=True)
    (folder / f"{module}.py").write_text(source)
    (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {module.replace('_', '-')}\nVersion: 1.0\n")
    (metadata / "entry_points.txt").write_text(f"[{group}]\n{entries}\n")
    return folder


def run(path: Path, folder: Path, *commands: list[str]) -> str:
    """What the commands print, one after the other in a process in `folder`; its packages come from `path` first."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(path), str(_PACKAGE.parent)])}
    done = subprocess.run(
        [sys.executable, "-P", "-c", _SCRIPT, json.dumps(commands)],
        cwd=folder, env=environment, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr
