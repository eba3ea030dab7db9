"""docs/guides/pull-requests.md, run as it is written."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from demo_bundles import ROOT

pytestmark = pytest.mark.slow
pytest.importorskip("openvino")
PAGE = (ROOT / "docs/guides/pull-requests.md").read_text(encoding="utf-8")
SHELL = re.findall(r"```sh\n(.*?)```", PAGE, re.DOTALL)
(PYTHON,) = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)

# For `bench`: the latencies of the bundle SLOWED are multiplied by 100, more than any noise.
MEASURES_LITTLE = """
import json, os, sys
from functools import partial
from gfldeploy.bench import monitor, runner
from gfldeploy.cli import main
runner.wait_until_idle = partial(monitor.wait_until_idle, patience_s=0)
file = sys.argv[-1]
if sys.argv[1] == "bench":
    sys.argv += "--rounds 1 --min-seconds 0 --precisions fp32 --batch-sizes 1 --monitor-hz 0 --force".split()
try:
    main()
finally:
    if sys.argv[1] == "bench":
        with open(file) as opened:
            data = json.load(opened)
        for cell in data["cells"]:
            if cell["cell"]["bundle"]["directory"] == os.environ["SLOWED"]:
                for run in cell["runs"]:
                    for place, key in ((run["samples"], "latency_ms"), (run["stages"], "end_to_end_ms")):
                        place[key] = [100 * value for value in place[key]]
        with open(file, "w") as opened:
            json.dump(data, opened)
"""


def gates_of(lines: str) -> list[str]:
    """What became of each."""
    return re.findall(r"^(Gate \w+): ", lines, re.MULTILINE)


def test_the_check(tiny_bundle: Path, tiny_coco: Path, tmp_path: Path) -> None:
    """What is not run here is the installation; `gfldeploy` is this checkout, and measures no longer than it must."""
    check, baseline, against_it = SHELL
    for name in ("old", "new"):
        shutil.copytree(tiny_bundle, tmp_path / name)
    shutil.copytree(tiny_coco.parent, tmp_path / "val")
    tools = tmp_path / "tools"
    tools.mkdir()
    for name, text in (("gfldeploy", f"#!{sys.executable}\n{MEASURES_LITTLE}"), ("python", "#!/bin/sh\necho $*\n")):
        (tools / name).write_text(text)
        (tools / name).chmod(0o755)
    environment = {**os.environ, "PATH": f"{tools}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}

    def sh(script: str, slowed: str = "") -> subprocess.CompletedProcess[str]:
        env = environment | {"SLOWED": slowed}
        return subprocess.run(["sh", "-c", script], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=300)

    done = sh(check, "old")
    assert (done.returncode, gates_of(done.stderr)) == (0, ["Gate passed"] * 3), done.stderr
    assert done.stdout.startswith("-m pip install . openvino\n")
    swapped = check.replace("gfldeploy bench", "true").replace("old,new", "new,old")  # change.json is there
    done = sh(swapped)
    assert (done.returncode, gates_of(done.stderr)) == (1, ["Gate passed", "Gate passed", "Gate failed"]), done.stderr

    python = subprocess.run(
        [sys.executable, "-c", PYTHON], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert python.returncode == 0, python.stderr
    assert [line.split()[0] for line in python.stdout.splitlines()[:2]] == ["passed", "passed"]
    assert len(python.stdout.splitlines()) == 3

    done = sh(f"set -e\n{baseline}\n{against_it}")
    assert done.returncode in (0, 1) and len(gates_of(done.stderr)) == 1, "whatever the noise was"
    (tmp_path / "change.json").unlink()
    assert sh(swapped).returncode == 2
