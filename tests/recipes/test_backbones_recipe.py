"""The recipe that tries backbones and necks: its configs, what it keeps, its table. What exports is in its results."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from demo_bundles import ROOT, imported

RECIPE = ROOT / "export" / "backbones.py"
EXPORTED: dict[str, Any] = {
    "equal": ["paddle in paddle", "onnx in onnxruntime", "onnx in openvino"],
    "left_out": {"paddle_program": "it cannot be traced"},
    "max_score_difference": 1e-6,
    "max_box_difference_px": 0.001,
    "end_to_end": [
        {"reference": "its network, NMS outside", "detections": 7, "missing": 0},
        {"reference": "its network, NMS outside", "detections": 5, "missing": 1},
        {"reference": "PaddleDetection, eager", "detections": 9, "missing": 3},
    ],
}


def test_every_pair_has_a_config() -> None:
    with imported(RECIPE) as recipe:
        for pair in recipe.PAIRS:
            assert recipe.unknown_names(pair) == [], pair
            settings = recipe.config(pair)
            names = settings["GFL"]
            assert names["backbone"] in settings and names["neck"] in settings, pair
            assert len(set(settings["GFLHead"]["fpn_stride"])) == len(settings["GFLHead"]["fpn_stride"]), pair
        assert len({pair.partition("+")[0] for pair in recipe.PAIRS}) >= 14
        assert len({pair.split("+")[1] for pair in recipe.PAIRS}) >= 8
        assert recipe.config("LCNet+LCPAN")["GFLHead"]["fpn_stride"] == [8, 16, 32, 64]
        assert recipe.config("ConvNeXt+CustomCSPPAN")["GFLHead"]["fpn_stride"] == [32, 16, 8]


def test_what_is_done_is_not_done_again_and_the_table_says_why(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = {
        "LCNet+LCPAN": {"fixed": EXPORTED, "any": {"failed": "it binds itself"}, "int8": "openvino 9 of 9"},
        "ResNet-C2+TTFFPN": {"fixed": {"failed": "one level as a tensor", "not in ppdet": "it is no list"}},
    }
    results = tmp_path / "results.json"
    results.write_text(json.dumps(rows))
    arguments = ("--output", tmp_path / "out", "--results", results, "--only", *rows, "--steps", "fixed")
    with imported(RECIPE, *arguments) as recipe:
        recipe.main()
    shown = capsys.readouterr().out
    assert json.loads(results.read_text()) == rows and list((tmp_path / "out").iterdir()) == []
    assert (
        "| LCNet, LCPAN | equal | left out | equal | equal | 11 of 12 | no | 1.0e-06 | 1.0e-03 | openvino 9 of 9 |"
        in shown
    )
    assert "- LCNet, LCPAN, any size: it binds itself" in shown
    assert "- LCNet, LCPAN, paddle_program left out: it cannot be traced" in shown
    assert "PaddleDetection itself says `it is no list`; export says: one level as a tensor" in shown


@pytest.mark.parametrize("pair", ["LCNet", "LCNet+Necklace"])
def test_an_unknown_pair_is_refused(pair: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with imported(RECIPE, "--output", tmp_path, "--only", pair) as recipe, pytest.raises(SystemExit) as stopped:
        recipe.main()
    assert stopped.value.code == 2 and "unknown: " in capsys.readouterr().err
