"""Which convolutions INT8 hurts most: how far the outputs move when one group alone is INT8 and the rest is FP32.

Needs no labels and works with any weights: it compares the candidates that FP32 scores highest.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gfldeploy.bundle import Bundle, Graph
from gfldeploy.candidates import anchors_of, matched
from gfldeploy.engines.base import EngineOptions
from gfldeploy.engines.registry import REFERENCE_ENGINE, open_engine
from gfldeploy.macs import convolution_macs
from gfldeploy.progress import SILENT, Progress
from gfldeploy.quant.agreement import Reference, check_finite
from gfldeploy.quant.calibration import Calibration, ConvUse
from gfldeploy.quant.groups import ConvGroup
from gfldeploy.quant.measurement import Fp32Reference
from gfldeploy.quant.qdq import write_qdq_onnx

# About as many as detectors keep of an image; background far below them enters no mAP.
CANDIDATES = 100


@dataclass(frozen=True)
class Sensitivity:
    """How far the outputs move when one group of convolutions alone runs in INT8.

    `uses`: the convolutions of the group; `macs_share`: theirs of the network's multiply-accumulates, 0 to 1.
    `score_difference` and `box_difference`: as `output_difference` gives them.
    """

    name: str
    uses: frozenset[ConvUse]
    macs_share: float
    score_difference: float
    box_difference: float

    @property
    def convolutions(self) -> int:
        """How many uses the group has."""
        return len(self.uses)

    @property
    def total(self) -> float:
        """The rank of the group. Both summands are from 0 to 1, and mAP falls with either."""
        return self.score_difference + self.box_difference

    def to_dict(self) -> dict[str, Any]:
        """As JSON-ready data; of the uses only how many."""
        return {
            "name": self.name,
            "convolutions": self.convolutions,
            "macs_share": self.macs_share,
            "score_difference": self.score_difference,
            "box_difference": self.box_difference,
            "total": self.total,
        }


def output_difference(reference: Reference, output: Mapping[str, NDArray[Any]]) -> tuple[float, float]:
    """Mean |score difference| and mean 1 - IoU over the candidates that FP32 scores highest, both from 0 to 1.

    A candidate is a cell with its best class; there are `CANDIDATES` of them, or all cells if there are fewer. One that
    the other graph did not choose has lost its score and its box. Raises `ParityError` for NaN.
    """
    check_finite(output)
    scores, boxes = reference.scores[0], reference.boxes[0]
    classes = scores.argmax(axis=1)
    best = scores[np.arange(len(scores)), classes]
    cells = np.argsort(-best, kind="stable")[:CANDIDATES]
    cells = cells[reference.anchors[cells] >= 0]
    here, there = matched(reference.anchors[cells], anchors_of(output, 0))
    kept = cells[here]
    moved, apart = best[cells], np.ones(len(cells))
    moved[here] = np.abs(best[kept] - output["scores"][0, there, classes[kept]])
    apart[here] = 1 - _pairwise_iou(boxes[kept], output["boxes"][0, there])
    return float(moved.mean()), float(apart.mean())


def _pairwise_iou(first: NDArray[np.float32], second: NDArray[np.float32]) -> NDArray[np.float64]:
    """IoU [K] of boxes [K, 4] with boxes [K, 4], one to one; 1 where both are empty."""
    a, b = first.astype(np.float64), second.astype(np.float64)
    size = np.clip(np.minimum(a[:, 2:], b[:, 2:]) - np.maximum(a[:, :2], b[:, :2]), 0, None)
    overlap = size[:, 0] * size[:, 1]
    union = sum(np.prod(np.clip(box[:, 2:] - box[:, :2], 0, None), axis=1) for box in (a, b)) - overlap
    result: NDArray[np.float64] = np.divide(overlap, union, out=np.ones_like(overlap), where=union > 0)
    return result


def macs_shares(source: Bundle) -> dict[ConvUse, float]:
    """Each convolution's share of the multiply-accumulates of all, at the largest picture that the bundle takes."""
    manifest = source.manifest
    _, _, height, width = manifest.inputs[0].shape
    if not (height and width):
        pad = max(manifest.preprocess.pad_stride, *manifest.strides)
        height, width = (-(-side // pad) * pad for side in manifest.preprocess.target_size)
    macs = convolution_macs(source.graph("onnx")[0], height, width, manifest.strides)
    total = sum(macs.values())
    return {ConvUse(*key): count / total for key, count in macs.items()}


def measure_sensitivity(
    source: Bundle,
    calibration: Calibration,
    groups: Iterable[ConvGroup],
    fp32_reference: Fp32Reference,
    scratch: Path,
    progress: Progress = SILENT,
) -> tuple[Sensitivity, ...]:
    """Rank the groups, the most sensitive first, in ONNX Runtime on the images that `fp32_reference` compares.

    What `calibration` keeps in float stays in float and counts in no group. `scratch`: a directory for one ONNX file at
    a time. Raises `EngineError`, `ParityError`.
    """
    shares = macs_shares(source)
    found = []
    wanted = [(group.name, frozenset(group.uses) - calibration.kept_float) for group in groups]
    wanted = [(name, uses) for name, uses in wanted if uses]
    for done, (name, uses) in enumerate(wanted, 1):
        with TemporaryDirectory(dir=scratch) as folder:
            alone = calibration.keeping(frozenset(calibration.uses) - uses)
            write_qdq_onnx(source.graph("onnx")[0], Path(folder) / "model.onnx", alone)
            manifest = replace(source.manifest, precision="int8", graphs={"onnx": Graph("model.onnx")})
            with open_engine(
                REFERENCE_ENGINE, Bundle(Path(folder), manifest), EngineOptions("int8", "cpu", fp32_reference.threads)
            ) as engine:
                moved = [
                    output_difference(reference, engine.infer({"image": batch}))
                    for reference, batch in zip(fp32_reference.references, fp32_reference.batches, strict=True)
                ]
        scores, boxes = np.mean(moved, axis=0).tolist()
        found.append(Sensitivity(name, uses, sum(shares[use] for use in uses), scores, boxes))
        progress.step("sensitivity", done, len(wanted))
    return tuple(sorted(found, key=lambda one: -one.total))


def to_record(ranked: Sequence[Sensitivity], images: Sequence[str]) -> dict[str, Any]:
    """`sensitivity.json`: the ranking, and the names of the images that it was measured on."""
    return {
        "measure": "one group in INT8, the rest in FP32, in ONNX Runtime: mean |score difference| plus mean 1 - IoU "
        f"over the {CANDIDATES} candidates of each image that FP32 scores highest",
        "images": list(images),
        "groups": [one.to_dict() for one in ranked],
    }


def rows(ranked: Sequence[Sensitivity], most: int | None = None) -> list[str]:
    """The ranking as lines of text, a header first; `most` groups of it, or all."""
    shown = ranked[:most]
    width = max((len(one.name) for one in shown), default=0)
    lines = [f"{'group':{width}}  convs  MACs   moves scores by  boxes by"]
    lines += [
        f"{one.name:{width}}  {one.convolutions:5}  {one.macs_share:5.1%}  {one.score_difference:14.5f}  "
        f"{one.box_difference:9.5f}"
        for one in shown
    ]
    if len(ranked) > len(shown):
        lines.append(f"and {len(ranked) - len(shown)} more groups")
    return lines
