"""The recipe that asks for wheels: what it makes of uv's answers, from a stand-in for uv."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from demo_bundles import ROOT

UV = """#!/bin/sh
[ "$1" = --version ] && echo "uv 1.2.3" && exit
case "$*" in *{refused}*) echo "error: no wheels of toy, see https://index.example/toy/" >&2; exit 1;; esac
while [ "$1" != --output-file ]; do shift; done
printf '[[packages]]\\nname = "toy"\\nwheels = [{{ url = "file:///a/toy-1-any.whl" }}]\\n' > "$2"
"""


@pytest.mark.parametrize(("refused", "code"), [("manylinux_2_28", 0), ("windows", 1)])
def test_wheels_are_named_and_what_lacks_one_is_told(refused: str, code: int, tmp_path: Path) -> None:
    (tmp_path / "benchmarks").mkdir()
    for name in ("pyproject.toml", "benchmarks/wheels.py"):
        shutil.copy(ROOT / name, tmp_path / name)
    uv = tmp_path / "uv"
    uv.write_text(UV.format(refused=refused))
    uv.chmod(0o755)
    command = [sys.executable, str(tmp_path / "benchmarks/wheels.py"), "--machine", "here", "--uv", str(uv)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == code, done.stderr
    result = json.loads((tmp_path / "benchmarks/results/here/checks/wheels.json").read_text())
    assert len(result["found"]) == 36 and result["uv"] == "1.2.3"
    for one in result["found"]:
        if refused == "windows" and one["system"].startswith("Windows"):
            assert one["lacks"] == "error: no wheels of toy, see"
        else:
            assert one["wheels"] == ["toy-1-any.whl"]
            assert one["platform"] != "aarch64-manylinux_2_28" or refused == "windows"
