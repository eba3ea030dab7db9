"""What NMS takes of one image: `gfldeploy.nms.postprocess` beside the compiled ones of Paddle and OpenCV.

    python benchmarks/postprocess.py --machine xeon-2core [--rounds N] [--cases NAME ...]

The same generated candidates of 80 classes go through all three interleaved, N times, once where that takes seconds:
`detections` (1000 candidates of 40 objects and their surroundings, 100 detections), `every class` (1000 candidates,
each above the threshold in nearly all classes, as random weights give) and `all anchors` (22,400 instead of 1000, as
`export --candidates all` gives). Prints the median and the least time, and whether the detections are those of
gfldeploy; writes all times to
results/MACHINE/checks/postprocess.json beside this script.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from gfldeploy.detections import Detections
from gfldeploy.files import write_json
from gfldeploy.machine import describe_machine
from gfldeploy.nms import NmsParams, postprocess
from gfldeploy.serialization import plain

HERE = Path(__file__).resolve().parent
# Those of the model zoo's GFLs.
NMS = NmsParams(score_threshold=0.025, nms_threshold=0.6, nms_top_k=1000, keep_top_k=100)
CLASSES = 80
TOO_LONG_MS = 5000.0  # is not measured again
CASES = ("detections", "every class", "all anchors")
Candidates = tuple[NDArray[np.float32], NDArray[np.float32]]
Method = Callable[[NDArray[np.float32], NDArray[np.float32]], Detections]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--machine", required=True, help="folder of results/ for this machine, such as epyc-2core")
    parser.add_argument("--rounds", type=int, default=9, metavar="N")
    parser.add_argument("--cases", nargs="+", choices=CASES, default=CASES, metavar="NAME")
    args = parser.parse_args()
    methods: dict[str, Method] = {"gfldeploy": ours, "paddle": paddles, "opencv": opencvs}
    records = []
    for case in args.cases:
        scores, boxes = candidates(case)
        times: dict[str, list[float]] = {name: [] for name in methods}
        found: dict[str, Detections] = {}
        for _ in range(args.rounds):
            for name, method in methods.items():
                if max(times[name], default=0) > TOO_LONG_MS:
                    continue
                start = time.perf_counter()
                found[name] = method(scores, boxes)
                times[name].append((time.perf_counter() - start) * 1e3)
        same = {name: equal(one, found["gfldeploy"]) for name, one in found.items()}
        print(f"{case}: {int((scores > NMS.score_threshold).sum())} scores above the threshold")
        for name, each in times.items():
            print(
                f"  {name:10} {statistics.median(each):9.2f} ms (least {min(each):.2f})  {len(found[name])} detections"
                f"{'' if same[name] else ', NOT those of gfldeploy'}"
            )
        records.append({"case": case, "detections": len(found["gfldeploy"]), "same": same, "times_ms": times})
    output = HERE / "results" / args.machine / "checks" / "postprocess.json"
    output.parent.mkdir(parents=True, exist_ok=True)
    write_json(output, {"machine": plain(describe_machine()), "nms": plain(NMS), "cases": records})


def candidates(case: str) -> Candidates:
    """Scores [1, A, 80] and boxes [1, A, 4] of a case."""
    random = np.random.default_rng(0)
    count = 22_400 if case == "all anchors" else 1000
    corners = random.uniform(0, 800, (count, 2))
    boxes = np.concatenate([corners, corners + random.uniform(10, 300, corners.shape)], axis=1)
    if case == "every class":
        scores = random.uniform(0, 1, (count, CLASSES)) ** 3
    else:
        scores = random.uniform(0, 0.02, (count, CLASSES))
        rows = random.permutation(count)
        for number in range(40):
            around, rows = rows[:12], rows[12:]
            corner, size = random.uniform(0, 1000, 2), random.uniform(20, 200, 2)
            boxes[around] = np.concatenate([corner, corner + size]) + random.normal(0, 0.05 * size.min(), (12, 4))
            # Half of the objects are of one class, as people are of many pictures.
            scores[around, random.integers(20) if number % 2 else 0] = random.uniform(0.03, 0.9, 12)
        stray = rows[:300]
        scores[stray, random.integers(0, CLASSES, 300)] = random.uniform(0.025, 0.15, 300)
    return scores[np.newaxis].astype(np.float32), boxes[np.newaxis].astype(np.float32)


def ours(scores: NDArray[np.float32], boxes: NDArray[np.float32]) -> Detections:
    return postprocess(scores, boxes, [(1.0, 1.0)], NMS)[0]


def paddles(scores: NDArray[np.float32], boxes: NDArray[np.float32]) -> Detections:
    import paddle

    found, _, _ = paddle._C_ops.multiclass_nms3(
        paddle.to_tensor(boxes),
        paddle.to_tensor(np.ascontiguousarray(scores.transpose(0, 2, 1))),
        None,
        *(NMS.score_threshold, NMS.nms_top_k, NMS.keep_top_k, NMS.nms_threshold, NMS.normalized, NMS.nms_eta, -1),
    )
    rows = found.numpy()
    rows = rows[np.argsort(-rows[:, 1], kind="stable")]
    return Detections(rows[:, 2:], rows[:, 1], rows[:, 0].astype(np.int64))


def opencvs(scores: NDArray[np.float32], boxes: NDArray[np.float32]) -> Detections:
    import cv2

    flat = np.flatnonzero(scores[0] > np.float32(NMS.score_threshold))
    anchors, classes = np.divmod(flat, CLASSES)
    values, corners = scores[0].reshape(-1)[flat], boxes[0, anchors]
    sizes = np.concatenate([corners[:, :2], corners[:, 2:] - corners[:, :2]], axis=1).astype(np.float64)
    kept = cv2.dnn.NMSBoxesBatched(sizes, values, classes.astype(np.int32), NMS.score_threshold, NMS.nms_threshold)  # type: ignore[call-overload]
    best = np.asarray(kept, dtype=np.int64).reshape(-1)
    best = best[np.lexsort((classes[best], -values[best]))][: NMS.keep_top_k]
    return Detections(corners[best], values[best], classes[best].astype(np.int64))


def equal(one: Detections, other: Detections) -> bool:
    return all(np.array_equal(getattr(one, name), getattr(other, name)) for name in ("boxes", "scores", "classes"))


if __name__ == "__main__":
    main()
