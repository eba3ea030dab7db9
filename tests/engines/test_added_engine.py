"""docs/extending/engine.md, followed word by word: a module and an entry make an engine that every command has."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
from plug_in import install, run

import gfldeploy

PACKAGE = Path(gfldeploy.__file__).parent
PAGE = (PACKAGE.parent / "docs/extending/engine.md").read_text(encoding="utf-8")
MODULE, ENTRY = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
ENTRY_POINT = re.findall(r'```toml\n\[project.entry-points."(.*)"\]\n(.*)\n```', PAGE)
NAME = "onnx-reference"
BRIEF = ("--batch-sizes", "1", "--rounds", "1", "--min-seconds", "0.1", "--limit", "2", "--no-peak")


@pytest.mark.slow
def test_in_a_package_of_its_own(tiny_bundle: Path, tiny_coco: Path, tmp_path: Path) -> None:
    ((group, value),) = ENTRY_POINT
    broken = 'none = "no_such_module:SPEC"\ntaken = "gfldeploy.engines.registry:ENGINES"'
    lines = f"{value}\n{broken}".replace('"', "")
    installed = install(tmp_path / "site-packages", "reference_engine", f"{MODULE}\n\n{ENTRY}", group, lines)
    bundle, data = str(tiny_bundle), str(tiny_coco)
    shown = run(
        installed,
        tmp_path,
        ["doctor"],
        ["predict", bundle, str(tiny_coco.parent / "images"), "--engine", NAME, "--output", "found"],
        ["eval", bundle, "--data", data, "--engine", NAME],
        ["bench", bundle, "--data", data, "--engines", NAME, "--precisions", "fp32,int8", *BRIEF, "-o", "results.json"],
    )
    assert f"{NAME}: fp32 on cpu" in shown
    assert "plug-in none is left out" in shown and "plug-in taken is left out" in shown
    assert len((tmp_path / "found/detections.jsonl").read_text().splitlines()) == 6
    assert "1.0000" in shown, "mAP of a detector that finds every object"
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["machine"]["packages"]["onnx"]
    (measured,) = (cell for cell in results["cells"] if cell["runs"])
    assert measured["accuracy"]["ap"] == pytest.approx(1)
    assert "choose another engine or precision" in json.dumps(results), "why it has no INT8"


@pytest.mark.slow
def test_in_gfldeploy_itself(tiny_bundle: Path, tiny_coco: Path, tmp_path: Path) -> None:
    shutil.copytree(PACKAGE, tmp_path / "gfldeploy", ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "gfldeploy/engines/reference_engine.py").write_text(MODULE)
    registry = tmp_path / "gfldeploy/engines/registry.py"
    entry = ENTRY.partition("SPEC = ")[2].replace("reference_engine:", "gfldeploy.engines.reference_engine:")
    table = registry.read_text()
    assert table.count("_BUILT_IN = (\n") == 1
    registry.write_text(table.replace("_BUILT_IN = (\n", f"_BUILT_IN = (\n{entry.rstrip()},\n"))
    shown = run(tmp_path, tmp_path, ["doctor"], ["eval", str(tiny_bundle), "--data", str(tiny_coco), "--engine", NAME])
    assert f"{NAME}: fp32 on cpu" in shown and "1.0000" in shown
