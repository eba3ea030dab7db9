"""docs/guides/pull-requests.md, run as it is written."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from demo_bundles import ROOT

pytestmark = pytest.mark.slow
pytest.importorskip("openvino")
PAGE = (ROOT / "docs/guides/pull-requests.md").read_text(encoding="utf-8")
SHELL = re.findall(r"```sh\n(.*?)```", PAGE, re.DOTALL)
(PYTHON,) = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)

MEASURES_LITTLE = """
import sys
from functools import partial
from gfldeploy.bench import monitor, runner
from gfldeploy.cli import main
runner.wait_until_idle = partial(monitor.wait_until_idle, patience_s=0)
if sys.argv[1] == "bench":
    sys.argv += "--rounds 1 --min-seconds 0 --precisions fp32 --batch-sizes 1 --monitor-hz 0".split()
main()
"""


def slower(file: Path, factor: float) -> str:
    """The results with all latencies times `factor`."""
    data: dict[str, Any] = json.loads(file.read_text())
    for run in (run for cell in data["cells"] for run in cell["runs"]):
        for place, key in ((run["samples"], "latency_ms"), (run["stages"], "end_to_end_ms")):
            place[key] = [factor * value for value in place[key]]
    return json.dumps(data)


def gates_of(lines: str) -> list[str]:
    """What became of each."""
    return re.findall(r"^(Gate \w+): ", lines, re.MULTILINE)


def test_the_check(tiny_bundle: Path, tiny_coco: Path, tmp_path: Path) -> None:
    """What is not run here is the installation; `gfldeploy` is this checkout, and measures no longer than it must."""
    check, baseline = SHELL
    shutil.copytree(tiny_bundle, tmp_path / "detector")
    shutil.copytree(tiny_coco.parent, tmp_path / "val")
    tools = tmp_path / "tools"
    tools.mkdir()
    for name, text in (("gfldeploy", f"#!{sys.executable}\n{MEASURES_LITTLE}"), ("python", "#!/bin/sh\necho $*\n")):
        (tools / name).write_text(text)
        (tools / name).chmod(0o755)
    environment = {**os.environ, "PATH": f"{tools}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}

    def sh(script: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            ["sh", "-c", script], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300
        )

    done = sh(baseline)
    assert done.returncode == 0, done.stderr
    measured = tmp_path / "baseline.json"
    measured.write_text(slower(measured, 20))
    done = sh(check)
    assert (done.returncode, gates_of(done.stderr)) == (0, ["Gate passed"] * 3), done.stderr
    assert done.stdout.startswith("-m pip install . openvino\n")

    measured.write_text(slower(measured, 1 / 400))
    without = check.replace("gfldeploy bench", "true")  # change.json is there
    done = sh(without)
    assert (done.returncode, gates_of(done.stderr)) == (1, ["Gate passed", "Gate passed", "Gate failed"]), done.stderr

    python = subprocess.run(
        [sys.executable, "-c", PYTHON], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert python.returncode == 0, python.stderr
    assert [line.split()[0] for line in python.stdout.splitlines()[:2]] == ["passed", "passed"]
    assert len(python.stdout.splitlines()) == 3

    measured.unlink()
    assert sh(without).returncode == 2
