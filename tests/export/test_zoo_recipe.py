"""The recipe that exports the model zoo, on the two configs whose heads differ most from the others."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from gfldeploy.inspection import inspect

RECIPE = Path(__file__).parents[2] / "export" / "export_zoo.py"
CONFIGS = ("gflv2_r50_fpn_1x_coco", "gfl_slim_ld_r18vd_1x_coco")


@pytest.mark.slow
@pytest.mark.needs_ppdet
def test_the_zoo_exports_within_the_promised_differences(tmp_path: Path) -> None:
    results = tmp_path / "zoo.json"
    command = [sys.executable, str(RECIPE), "--output", str(tmp_path), "--results", str(results), "--configs", *CONFIGS]
    subprocess.run(command, check=True, capture_output=True, timeout=540)
    rows = json.loads(results.read_text())
    assert [row["config"] for row in rows] == list(CONFIGS)
    for row in rows:
        compared = {(found["graph"], found["batch"], found["width"]) for found in row["comparisons"]}
        assert {
            (graph, batch, width) for graph in ("paddle", "onnx") for batch, width in ((1, 256), (3, 416), (1, 1344))
        } <= compared
        assert row["max_score_difference"] <= 1e-5
        assert row["max_box_difference_px"] <= 0.05
        assert inspect(tmp_path / row["config"])["macs"]["gmac"] > 50, "shapes can be inferred"
