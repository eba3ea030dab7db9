"""How far one group in INT8 moves the outputs, on real tiny files."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from recorded_progress import RecordedProgress

from gfldeploy.bundle import Bundle
from gfldeploy.errors import ParityError
from gfldeploy.images.coco import CocoDataset
from gfldeploy.macs import convolution_macs, count_work
from gfldeploy.nms import NmsParams
from gfldeploy.quant import sensitivity
from gfldeploy.quant.agreement import Reference
from gfldeploy.quant.calibration import Calibration, ConvRanges, ConvUse, OutputRange
from gfldeploy.quant.groups import ConvGroup
from gfldeploy.quant.measurement import Fp32Reference
from gfldeploy.quant.sensitivity import (
    CANDIDATES,
    Sensitivity,
    macs_shares,
    measure_sensitivity,
    output_difference,
    rows,
    to_record,
)

NMS = NmsParams(score_threshold=0.05, nms_threshold=0.6, nms_top_k=100, keep_top_k=100)
CELLS = 3 * CANDIDATES


def outputs(seed: int = 0) -> dict[str, NDArray[np.float32]]:
    random = np.random.default_rng(seed)
    corners = random.uniform(0, 200, (1, CELLS, 2))
    return {
        "scores": random.uniform(0, 1, (1, CELLS, 4)).astype(np.float32),
        "boxes": np.concatenate([corners, corners + random.uniform(10, 50, (1, CELLS, 2))], axis=2, dtype=np.float32),
    }


def top(scores: NDArray[np.float32]) -> NDArray[np.int64]:
    return np.argsort(-scores[0].max(axis=1), kind="stable")[:CANDIDATES]


# --- the measure ------------------------------------------------------------------------------------------------------


def test_no_difference_is_zero() -> None:
    made = outputs()
    assert output_difference(Reference.of(made, NMS), made) == (0, 0)
    empty = {**made, "boxes": np.zeros_like(made["boxes"])}
    assert output_difference(Reference.of(empty, NMS), empty) == (0, 0), "an empty box is where it was"


def test_what_moves_is_measured_where_fp32_scores_highest() -> None:
    reference = outputs()
    cells = top(reference["scores"])
    others = np.setdiff1d(np.arange(CELLS), cells)
    moved = {name: array.copy() for name, array in reference.items()}
    moved["scores"][0, others] = 0
    moved["boxes"][0, others] += 500
    assert output_difference(Reference.of(reference, NMS), moved) == (0, 0), "background does not count"
    moved["scores"][0, cells] -= 0.25
    moved["boxes"][0, cells[: CANDIDATES // 2]] += 500
    scores, boxes = output_difference(Reference.of(reference, NMS), moved)
    assert scores == pytest.approx(0.25)
    assert boxes == pytest.approx(0.5)


def test_only_the_best_class_of_a_candidate_counts() -> None:
    reference = outputs()
    moved = {name: array.copy() for name, array in reference.items()}
    worst = reference["scores"][0].argmin(axis=1)
    moved["scores"][0, np.arange(CELLS), worst] += 0.5
    assert output_difference(Reference.of(reference, NMS), moved) == (0, 0)


def test_half_a_box_is_an_iou() -> None:
    reference = outputs()
    wide = reference["boxes"].copy()
    wide[..., 2] = wide[..., 0] + 2 * (wide[..., 2] - wide[..., 0])
    _, boxes = output_difference(Reference.of(reference, NMS), {**reference, "boxes": wide})
    assert boxes == pytest.approx(0.5, abs=1e-4)


def test_nan_is_no_measure() -> None:
    made = outputs()
    reference = Reference.of(made, NMS)
    made["scores"][0, 0, 0] = np.nan
    with pytest.raises(ParityError, match="NaN"):
        output_difference(reference, made)


# --- the ranking ------------------------------------------------------------------------------------------------------

TWICE = "weights"


@pytest.fixture
def tiny(tiny_bundle: Path) -> Bundle:
    pytest.importorskip("onnxruntime")
    return Bundle.open(tiny_bundle)


def calibration(clip: float = 3.0) -> Calibration:
    """Of the detector of `tiny_bundle`, whose input is within 3 and whose boxes end at 48."""
    return Calibration("hist", {}, {TWICE: ConvRanges((clip,), (OutputRange(-5, 49),), (0.005,) * 2 + (1e-9,) * 4)})


def test_macs_of_each_convolution(tiny: Bundle) -> None:
    file, _ = tiny.graph("onnx")
    found = convolution_macs(file, 64, 96, (8,))
    assert found == {(TWICE, 0): 8 * 12 * 6 * 3 * 3 * 3}
    assert sum(found.values()) == count_work(file, [(64, 96)], (8,))[64, 96].macs
    assert macs_shares(tiny) == {ConvUse(TWICE, 0): 1.0}


def test_groups_are_ranked(tiny: Bundle, tiny_coco: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images = [image.path for image in CocoDataset.load(tiny_coco).images[:2]]
    against = Fp32Reference.of(tiny, images, None, 1)
    alone = ConvGroup("all", (ConvUse(TWICE, 0),))
    progress = RecordedProgress()
    (fine,) = measure_sensitivity(tiny, calibration(), [alone], against, tmp_path, progress)
    assert progress.steps == [("sensitivity", 1, 1)]
    assert not list(tmp_path.iterdir()), "nothing is left"
    assert fine.name == "all"
    assert fine.macs_share == 1
    assert 0 < fine.total < 0.05, "eight bits for 54 pixels move a box by a fraction of one"
    coarse = replace(calibration(), convolutions={TWICE: ConvRanges((3.0,), (OutputRange(-50, 490),), (0.005,) * 6)})
    (worse,) = measure_sensitivity(tiny, coarse, [alone], against, tmp_path)
    assert worse.total > 2 * fine.total
    kept = calibration().keeping(calibration().uses)
    assert measure_sensitivity(tiny, kept, [alone], against, tmp_path) == (), "what is float has no sensitivity"

    moves = iter([(0.1, 0.1), (0.3, 0.2)])
    uses = [ConvUse("a", 0), ConvUse("b", 0), ConvUse("b", 1)]
    monkeypatch.setattr(sensitivity, "macs_shares", lambda source: dict.fromkeys(uses, 0.25))
    monkeypatch.setattr(
        sensitivity, "write_qdq_onnx", lambda source, target, cal: target.write_bytes(source.read_bytes())
    )
    found: dict[int, tuple[float, float]] = {}
    monkeypatch.setattr(
        sensitivity, "output_difference", lambda reference, output: found.setdefault(len(found), next(moves))
    )
    once = Fp32Reference.of(tiny, images[:1], None, 1)
    ranked = measure_sensitivity(
        tiny, calibration(), [ConvGroup("a", (uses[0],)), ConvGroup("b", tuple(uses[1:]))], once, tmp_path
    )
    assert [(one.name, one.convolutions, one.macs_share) for one in ranked] == [("b", 2, 0.5), ("a", 1, 0.25)]
    assert [one.total for one in ranked] == pytest.approx([0.5, 0.2])


def test_how_the_ranking_is_shown_and_saved() -> None:
    ranked = [
        Sensitivity(name, frozenset({ConvUse(name, use) for use in range(5)}), 0.076, 0.012, total)
        for name, total in (("head.gfl_cls", 0.5), ("backbone", 0.25), ("neck", 0.125))
    ]
    header, *lines = rows(ranked)
    assert header.split()[0] == "group"
    assert lines[0].split() == ["head.gfl_cls", "5", "7.6%", "0.01200", "0.50000"]
    assert len({len(line) for line in lines}) == 1, "columns are in line"
    assert rows(ranked, 2)[1:] == [*(line for line in rows(ranked, 2)[1:3]), "and 1 more groups"]
    record = json.loads(json.dumps(to_record(ranked, ["a.jpg"])))
    assert record["images"] == ["a.jpg"]
    assert record["groups"][0] == {
        "name": "head.gfl_cls",
        "convolutions": 5,
        "macs_share": 0.076,
        "score_difference": 0.012,
        "box_difference": 0.5,
        "total": 0.512,
    }
