"""Candidates chosen in the graph against all anchors: the recipe, and the graphs in both engines."""

from __future__ import annotations

import importlib.util
import json
import shutil
import subprocess
import sys
from pathlib import Path

import cv2
import demo_bundles
import numpy as np
import pytest

from gfldeploy.bundle import Bundle
from gfldeploy.candidates import DEFAULT_CANDIDATES
from gfldeploy.detections import postprocess
from gfldeploy.engines.base import EngineOptions
from gfldeploy.engines.registry import open_engine
from gfldeploy.images.coco import CocoDataset
from gfldeploy.images.decode import read_image

RECIPE = Path(__file__).parents[2] / "export" / "candidates.py"


@pytest.mark.slow
@demo_bundles.needs_export
def test_candidates_give_what_all_anchors_give(tmp_path_factory: pytest.TempPathFactory, tmp_path: Path) -> None:
    shutil.copytree(demo_bundles.trained(tmp_path_factory), tmp_path / f"fp32_{DEFAULT_CANDIDATES}")
    options = ["--images", "6", "--candidates", str(DEFAULT_CANDIDATES), "--precisions", "fp32"]
    command = [sys.executable, RECIPE, "--output", tmp_path, *options, "--results", tmp_path / "found.json"]
    subprocess.run(list(map(str, command)), check=True, capture_output=True)
    rows = json.loads((tmp_path / "found.json").read_text())["rows"]
    assert [(row["data"], row["candidates"]) for row in rows] == [("val", "all"), ("val", str(DEFAULT_CANDIDATES))]
    assert [(row["difference"], row["same"]) for row in rows] == [(0, 6), (0, 6)]

    every, chosen = Bundle.open(tmp_path / "fp32_all"), Bundle.open(tmp_path / f"fp32_{DEFAULT_CANDIDATES}")
    assert (every.manifest.candidates, chosen.manifest.candidates) == (None, DEFAULT_CANDIDATES)
    pictures = [read_image(path) for path in sorted((tmp_path / "data/val/images").iterdir())[:3]]
    preprocess, nms = every.manifest.preprocess, every.manifest.nms
    large = preprocess.batch([preprocess(picture) for picture in pictures])
    for name in ("onnxruntime", "paddle"):
        options_of = EngineOptions("fp32", "cpu", 1)
        with open_engine(name, every, options_of) as one, open_engine(name, chosen, options_of) as other:
            for batch in (large, np.ascontiguousarray(large[:, :, :64, :96])):  # the second has 129 anchors
                expected, actual = one.infer({"image": batch}), other.infer({"image": batch})
                there = min(expected["scores"].shape[1], DEFAULT_CANDIDATES)
                anchors = actual["anchors"]
                assert ((anchors >= 0).sum(axis=1) == there).all() and (anchors[:, there:] == -1).all()
                assert not actual["scores"][:, there:].any()
                scales = [(1.0, 1.0)] * len(batch)
                for theirs, ours in zip(
                    postprocess(expected["scores"], expected["boxes"], scales, nms),
                    postprocess(actual["scores"], actual["boxes"], scales, nms),
                    strict=True,
                ):
                    np.testing.assert_array_equal(ours.classes, theirs.classes)
                    np.testing.assert_allclose(ours.scores, theirs.scores, rtol=0, atol=1e-6)
                    np.testing.assert_allclose(ours.boxes, theirs.boxes, rtol=0, atol=1e-3)


def test_a_crowd_is_images_side_by_side(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = importlib.util.spec_from_file_location("recipe_candidates", RECIPE)
    assert spec and spec.loader
    recipe = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(recipe)
    monkeypatch.setattr(recipe, "SIDE", 2)
    images, annotations = [], []
    (tmp_path / "images").mkdir()
    for number in range(5):
        assert cv2.imwrite(str(tmp_path / f"images/{number}.png"), np.full((20, 30, 3), 50 * number, np.uint8))
        images.append({"id": number, "file_name": f"{number}.png", "height": 20, "width": 30})
        annotations.append({"id": number + 1, "image_id": number, "category_id": 1, "bbox": [1, 2, 3, 4], "iscrowd": 0})
    data = {"images": images, "annotations": annotations, "categories": [{"id": 1, "name": "disc"}]}
    (tmp_path / "annotations.json").write_text(json.dumps(data))
    crowds = CocoDataset.load(recipe.write_crowds(tmp_path / "annotations.json", tmp_path / "crowds"))
    (picture,) = crowds.images
    assert read_image(picture.path)[::20, ::30, 0].tolist() == [[0, 50], [100, 150]]
    assert [item.bbox for item in crowds.annotations] == [(1, 2, 3, 4), (31, 2, 3, 4), (1, 22, 3, 4), (31, 22, 3, 4)]
