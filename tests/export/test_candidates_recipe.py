"""Candidates chosen in the graph against all anchors: the recipe, and the graphs in both engines."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import cv2
import demo_bundles
import numpy as np
import pytest
from demo_bundles import ROOT, RunHere, imported
from recorded_progress import RecordedProgress

from gfldeploy.bundle import Bundle
from gfldeploy.candidates import DEFAULT_CANDIDATES
from gfldeploy.engines.base import EngineOptions
from gfldeploy.engines.detect import detect_batch
from gfldeploy.engines.registry import open_engine
from gfldeploy.export.exporter import _candidates
from gfldeploy.images.coco import CocoDataset
from gfldeploy.images.decode import read_image
from gfldeploy.nms import NmsParams, postprocess

RECIPE = ROOT / "export" / "candidates.py"


@pytest.mark.slow
@demo_bundles.needs_export
def test_candidates_give_what_all_anchors_give(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(trained, tmp_path / f"fp32_{DEFAULT_CANDIDATES}")
    options = ("--images", 6, "--candidates", DEFAULT_CANDIDATES, "--precisions", "fp32", "--threads", 1)
    with imported(RECIPE, *options, "--output", tmp_path, "--results", tmp_path / "found.json") as recipe:
        monkeypatch.setattr(recipe, "gfldeploy", demo_bundles.make_here)
        recipe.main()
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


@pytest.mark.slow
@demo_bundles.needs_export
@pytest.mark.filterwarnings("ignore")
def test_a_config_that_keeps_500_has_ppdets_detections(tmp_path: Path, run_here: RunHere) -> None:
    import paddle

    from gfldeploy.export.config import load_detector_config
    from gfldeploy.export.model_builder import build_model
    from gfldeploy.export.parity import parity_images
    from gfldeploy.export.weights import set_random_weights

    nms = "{name: MultiClassNMS, nms_top_k: -1, keep_top_k: 500, score_threshold: -1, nms_threshold: 0.2}"
    config = demo_bundles.write_config(tmp_path, f"GFLHead: {{nms: {nms}}}")
    target = tmp_path / "fp32"
    done = run_here("export", "-c", config, "--random-weights", 0, "-o", target)
    assert done.returncode == 0, done.stderr
    assert "all anchors will be decoded: the config keeps 500 detections of an image" in done.stderr
    bundle = Bundle.open(target)
    assert (bundle.manifest.candidates, bundle.manifest.notes) == (None, ())

    model = build_model(load_detector_config(config))
    set_random_weights(model, 0)
    short = 0  # images of which 1000 candidates would give less
    sizes = ((320, 448), (448, 320), (640, 640))
    images = [parity_images((1, *size), bundle.manifest.preprocess, seed) for seed, size in enumerate(sizes)]
    expected = []
    for image, size in zip(images, sizes, strict=True):
        inputs = {"image": image, "im_shape": [size], "scale_factor": [(1, 1)], "im_id": [0]}
        with paddle.no_grad():
            rows = model({name: paddle.to_tensor(np.array(value, np.float32)) for name, value in inputs.items()})[
                "bbox"
            ].numpy()
        expected.append(rows[np.argsort(-rows[:, 1], kind="stable")])
    for name in ("paddle", "onnxruntime", "openvino"):
        with open_engine(name, bundle, EngineOptions("fp32", "cpu", 1)) as engine:
            for image, theirs in zip(images, expected, strict=True):
                [ours] = detect_batch(engine, image, [(1.0, 1.0)], bundle.manifest.nms)
                assert len(ours) == len(theirs)
                np.testing.assert_allclose(ours.scores, theirs[:, 1], rtol=0, atol=1e-4)
                assert alike(ours.boxes, ours.classes, theirs) == len(theirs)
                outputs = engine.infer({"image": image})
                best = np.sort(np.argsort(-outputs["scores"][0].max(axis=1))[:DEFAULT_CANDIDATES])
                chosen = (outputs["scores"][:, best], outputs["boxes"][:, best])
                [fewer] = postprocess(*chosen, [(1.0, 1.0)], bundle.manifest.nms)
                short += alike(fewer.boxes, fewer.classes, theirs) < len(theirs)
    assert short


def alike(boxes: np.ndarray, classes: np.ndarray, rows: np.ndarray) -> int:
    """How many boxes are among the rows: class, score, x1, y1, x2, y2. Nearly equal scores may have swapped."""
    near = np.abs(boxes[:, np.newaxis] - rows[np.newaxis, :, 2:]).max(axis=2) < 0.05
    return int((near & (classes[:, np.newaxis] == rows[np.newaxis, :, 0])).any(axis=1).sum())


@pytest.mark.parametrize(
    ("asked", "keep_top_k", "shape", "chosen", "said"),
    [
        ("auto", 5, (None, None, None), DEFAULT_CANDIDATES, ""),
        ("auto", 100, (None, None, None), None, "1000 do not suffice for test pictures"),
        ("auto", 101, (None, None, None), None, "the config keeps 101 detections"),
        ("auto", -1, (None, None, None), None, "the config keeps every detection"),
        ("all", -1, (None, None, None), None, ""),
        (1000, 5, (None, None, None), 1000, ""),
        (999, 5, (None, None, None), 999, "only the 999 anchors of an image that score highest"),
        (1000, 100, (None, None, None), 1000, "keeps 100 detections of an image"),
        (1500, 101, (None, None, None), 1500, "may be missing or differ"),
        (3000, -1, (None, None, None), 3000, "keeps every detection"),
        (3000, -1, (None, 256, 256), 3000, ""),  # there are no more
        (1999, -1, (None, 256, 256), 1999, "keeps every detection"),
    ],
)
def test_what_may_be_lost_is_noted(
    asked: int | str, keep_top_k: int, shape: tuple[int | None, ...], chosen: int | None, said: str
) -> None:
    # 2000 anchors at 20 places, all above the threshold: NMS leaves 20.
    corners = np.array([[100 * (number % 20), 0] for number in range(2000)], np.float32)
    boxes = np.concatenate([corners, corners + 50], 1)[np.newaxis]
    scores = np.linspace(0.5, 0.9, 2000, dtype=np.float32).reshape(1, 2000, 1).repeat(2, axis=2)
    nms = NmsParams(score_threshold=0.05, nms_threshold=0.6, nms_top_k=-1, keep_top_k=keep_top_k)
    progress = RecordedProgress()
    found, notes = _candidates(asked, shape, nms, [{"scores": scores, "boxes": boxes}], progress)  # type: ignore[arg-type]
    assert found == chosen
    lines = progress.stages + progress.notes
    assert said in "".join(lines) and bool(lines) == bool(said)
    assert list(notes) == progress.notes == (lines if chosen is not None else [])


def test_a_crowd_is_images_side_by_side(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with imported(RECIPE) as recipe:
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
