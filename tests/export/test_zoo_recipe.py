"""The recipe that exports the model zoo, on the two configs whose heads differ most from the others.

Narrow ones, compared on smaller pictures than a user's: what the zoo itself comes to is in export/results/zoo.json.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import demo_bundles
import pytest
from demo_bundles import ROOT, RunHere, imported

from gfldeploy.export import parity
from gfldeploy.inspection import inspect

RECIPE = ROOT / "export" / "export_zoo.py"
CONFIGS = ("gflv2_r50_fpn_1x_coco", "gfl_slim_ld_r18vd_1x_coco")


NARROW = """
ResNet: {depth: 18, variant: d}
FPN: {out_channel: 64}
GFLHead: {conv_feat: {feat_in: 64, feat_out: 64}, feat_in_chan: 64}
LDGFLHead: {conv_feat: {feat_in: 64, feat_out: 64}, feat_in_chan: 64}
"""


@pytest.mark.slow
@demo_bundles.needs_export
def test_the_zoo_exports_within_the_promised_differences(
    tmp_path: Path, run_here: RunHere, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in CONFIGS:
        base = ROOT / "configs" / "gfl" / f"{name}.yml"
        (tmp_path / base.name).write_text(f"_BASE_: ['{base}']\n{NARROW}")

    def run(command: list[str], check: bool) -> None:
        assert command[:3] == [sys.executable, "-m", "gfldeploy"] and check
        assert run_here(*command[3:]).returncode == 0

    monkeypatch.setattr(parity, "_MOST_PIXELS", 512 * 512)
    results = tmp_path / "zoo.json"
    with imported(RECIPE, "--output", tmp_path, "--results", results, "--configs", *CONFIGS) as recipe:
        monkeypatch.setattr(recipe, "CONFIGS", tmp_path)
        monkeypatch.setattr(recipe, "subprocess", SimpleNamespace(run=run))
        recipe.main()
    rows = json.loads(results.read_text())
    assert [row["config"] for row in rows] == list(CONFIGS)
    for row in rows:
        compared = {(found["graph"], found["batch"], found["width"]) for found in row["comparisons"]}
        graphs = ("paddle", "paddle_program", "onnx")
        assert compared == {(graph, *one) for graph in graphs for one in ((1, 256), (3, 416), (1, 672))}
        files = {(one["graph"], one["engine"]) for one in row["end_to_end"]}
        assert files >= {("end_to_end", "onnxruntime"), ("end_to_end", "openvino"), ("end_to_end_fp16", "onnxruntime")}
        assert row["left_out"] == {}
        assert row["max_score_difference"] <= 1e-5
        assert row["max_box_difference_px"] <= 0.05
        assert inspect(tmp_path / row["config"])["macs"]["gmac"] > 10, "shapes can be inferred"
