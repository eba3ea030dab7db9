"""What users turn behind the network, against NMS written out here over the raw scores and boxes of a real detector."""

from __future__ import annotations

import asyncio
import base64
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import cv2
import demo_bundles
import httpx
import numpy as np
import pytest
from demo_bundles import RunHere
from numpy.typing import NDArray
from sample_deploy import DEPLOY

from gfldeploy.accuracy import evaluate
from gfldeploy.bench.cell import BundleIdentity
from gfldeploy.bundle import Bundle, Graph, Manifest, TensorSpec, write_bundle
from gfldeploy.cluster.worker import Todo
from gfldeploy.detection_options import DetectionOptions
from gfldeploy.detector import Detector
from gfldeploy.engines.base import EngineOptions
from gfldeploy.engines.registry import open_engine
from gfldeploy.errors import DataError, OutputError, UsageError
from gfldeploy.export.golden import PICTURE
from gfldeploy.images.decode import read_image
from gfldeploy.images.preprocess import Preprocess
from gfldeploy.nms import NmsParams
from gfldeploy.predict.engine_selection import choose
from gfldeploy.predict.parts import merge_parts
from gfldeploy.predict.ray_shards import RayShards
from gfldeploy.predict.resume import batch_of
from gfldeploy.predict.session import predict_images
from gfldeploy.predict.shards import ShardJob
from gfldeploy.serialization import build, plain
from gfldeploy.tune.deploy_file import Deploy

CLASSES = ("person", "car", "traffic light")
CONFIG = {"score_threshold": 0.2, "nms_threshold": 0.5, "keep_top_k": 14}
TOP_K = 30
HERE: dict[str, Any] = {"engine": "onnxruntime", "threads": 1}
# What users turn, each by itself and together.
TURNED: list[dict[str, Any]] = [
    {},
    {"threshold": 0.62},
    {"class_thresholds": {"person": 0.62, "2": 0.3}},
    {"classes": ["car", "traffic light"]},
    {"classes": [2]},
    {"score_threshold": 0.05, "threshold": 0.06, "keep_top_k": 40},
    {"score_threshold": 0.7},
    {"nms_threshold": 0.2},
    {"keep_top_k": 3},
    {"keep_top_k": 200, "threshold": 0},
    {"class_agnostic": True},
    {
        "threshold": 0.55,
        "class_thresholds": {"traffic light": 0.25},
        "classes": ["person", "traffic light"],
        "nms_threshold": 0.7,
        "keep_top_k": 4,
        "class_agnostic": True,
    },
]


@dataclass(frozen=True)
class Raw:
    """What the network gives of an image: scores [A, 4], boxes [A, 4] in its pixels."""

    path: Path
    scores: NDArray[np.float32]
    boxes: NDArray[np.float32]


# A class, a score and a box of four corners.
Row = tuple[int, float, tuple[float, ...]]


def nms(raw: Raw, given: Mapping[str, Any]) -> list[Row]:
    """All that NMS leaves of the classes, best first: pair by pair, and box against box."""
    asked = {**CONFIG, **given}
    names = {name: number for number, name in enumerate(CLASSES)} | {str(number): number for number in range(3)}
    kept = [names[str(word)] for word in asked.get("classes", CLASSES)]
    # The fourth channel is no class. Where nothing is turned it takes room in keep_top_k, as in PaddleDetection.
    turned = set(given) - {"threshold"}
    pairs = []
    for category in sorted(kept) if turned else range(4):
        order = sorted(range(len(raw.scores)), key=lambda anchor: -raw.scores[anchor, category])
        enter = [anchor for anchor in order if raw.scores[anchor, category] > np.float32(asked["score_threshold"])]
        pairs += [(category, raw.scores[anchor, category], raw.boxes[anchor]) for anchor in enter[:TOP_K]]
    pairs.sort(key=lambda pair: -pair[1])
    survivors: list[tuple[int, np.float32, NDArray[np.float32]]] = []
    for category, score, box in pairs:
        rivals = [other for rival, _, other in survivors if asked.get("class_agnostic") or rival == category]
        if all(iou(box, other) <= asked["nms_threshold"] for other in rivals):
            survivors.append((category, score, box))
    rows = [(category, float(score), tuple(box.tolist())) for category, score, box in survivors]
    best = rows[: asked["keep_top_k"]]
    if asked.get("class_thresholds"):
        shown = [row for row in rows if row[1] >= lowest(row[0], given)][: asked["keep_top_k"]]
        best += [row for row in shown if row not in best]
    return [row for row in best if row[0] < 3]


def lowest(category: int, given: Mapping[str, Any]) -> float:
    by_class = given.get("class_thresholds", {})
    own: float = by_class.get(CLASSES[category], by_class.get(str(category), given.get("threshold", 0.5)))
    return own


def shown(raw: Raw, given: Mapping[str, Any]) -> list[Row]:
    return [row for row in nms(raw, given) if row[1] >= lowest(row[0], given)]


def iou(one: NDArray[np.float32], other: NDArray[np.float32]) -> np.float32:
    width = min(one[2], other[2]) - max(one[0], other[0])
    height = min(one[3], other[3]) - max(one[1], other[1])
    if width < 0 or height < 0:
        return np.float32(0)
    areas = [(box[2] - box[0]) * (box[3] - box[1]) for box in (one, other)]
    result: np.float32 = width * height / (areas[0] + areas[1] - width * height)
    return result


def write_varied_bundle(target: Path) -> Path:
    """One convolution over noise: four scores of any size, and boxes that overlap more or less, at each of 24 places.

    Like GFLv2's, its head has a score channel more than there are classes.
    """
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    generator = np.random.default_rng(5)
    weights = generator.normal(0, 0.25, (8, 3, 3, 3)).astype(np.float32)
    weights[4:] *= 6
    constants = {
        "weights": weights,
        "bias": np.array([-1.2, -1, -2.4, -1.5, 8, 8, 52, 52], np.float32),
        "flat": np.array([0, 8, -1], np.int64),
        "split": np.array([4, 4], np.int64),
    }
    nodes = [
        helper.make_node("Conv", ["image", "weights", "bias"], ["map"], strides=[8, 8], pads=[1, 1, 1, 1]),
        helper.make_node("Reshape", ["map", "flat"], ["rows"]),
        helper.make_node("Transpose", ["rows"], ["anchors"], perm=[0, 2, 1]),
        helper.make_node("Split", ["anchors", "split"], ["logits", "boxes"], axis=2),
        helper.make_node("Sigmoid", ["logits"], ["scores"]),
    ]
    graph = helper.make_graph(
        nodes,
        "varied",
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, ["N", 3, "H", "W"])],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["N", "A", 4]) for name in ("scores", "boxes")],
        [numpy_helper.from_array(value, name) for name, value in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)
    with write_bundle(target) as (directory, manifests):
        (directory / "onnx").mkdir()
        onnx.save(model, str(directory / "onnx" / "model.onnx"))
        manifests.append(
            Manifest(
                name="varied",
                precision="fp32",
                graphs={"onnx": Graph("onnx/model.onnx")},
                inputs=(TensorSpec("image", "float32", (None, 3, None, None)),),
                outputs=tuple(TensorSpec(name, "float32", (None, None, 4)) for name in ("scores", "boxes")),
                preprocess=Preprocess(target_size=(64, 96), pad_stride=32),
                nms=NmsParams(**CONFIG, nms_top_k=TOP_K),  # type: ignore[arg-type]
                classes=CLASSES,
                score_channels=4,
                strides=(8,),
                reg_max=16,
                parameters=216,
                provenance={},
            )
        )
    return target


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("onnxruntime")
    return write_varied_bundle(tmp_path_factory.mktemp("varied") / "bundle")


@pytest.fixture(scope="module")
def raws(bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Raw]:
    """Images that are not resized, so that boxes are in their pixels, and what the network gives of each."""
    folder = tmp_path_factory.mktemp("images")
    opened, found = Bundle.open(bundle), []
    with open_engine("onnxruntime", opened, EngineOptions(threads=1)) as engine:
        for number in range(3):
            path = folder / f"{number}.png"
            picture = np.random.default_rng(number).integers(0, 256, (64, 96, 3), np.uint8)
            assert cv2.imwrite(str(path), picture)
            tensor, scales = opened.manifest.preprocess.batch_of([read_image(path)])
            assert scales == [(1.0, 1.0)]
            outputs = engine.infer({"image": tensor})
            found.append(Raw(path, outputs["scores"][0], outputs["boxes"][0]))
    return found


def boxes_of(one: Mapping[str, Any]) -> Iterator[Row]:
    """Those of a line of detections.jsonl."""
    for row in one["detections"]:
        x, y, width, height = row["bbox"]
        yield row["class_id"], row["score"], (x, y, x + width, y + height)


def same(found: Sequence[Row], expected: Sequence[Row]) -> None:
    assert [row[:2] for row in found] == [row[:2] for row in expected]
    np.testing.assert_allclose([row[2] for row in found], [row[2] for row in expected], atol=1e-5)


def test_each_one_makes_a_difference(raws: list[Raw]) -> None:
    """Or the tests below would hold for something that does nothing."""
    results = [[shown(raw, given) for raw in raws] for given in TURNED]
    assert all(result != results[0] and any(map(len, result)) for result in results[1:])
    crowded = {"threshold": 0.62, "class_thresholds": {"traffic light": 0.25}}
    after = [[row for row in nms(raw, {"nms_threshold": 0.5}) if row[1] >= lowest(row[0], crowded)] for raw in raws]
    assert [shown(raw, crowded) for raw in raws] != after  # keep_top_k counts what is shown


@pytest.mark.parametrize("given", TURNED, ids=lambda given: "+".join(given) or "nothing")
def test_predict_and_the_detector(bundle: Path, raws: list[Raw], given: dict[str, Any], tmp_path: Path) -> None:
    predict_images(bundle, [raw.path for raw in raws], output=tmp_path / "found", **HERE, **given)
    lines = list(map(json.loads, (tmp_path / "found" / "detections.jsonl").read_text().splitlines()))
    results = json.loads((tmp_path / "found" / "coco.json").read_text())
    for number, (raw, line) in enumerate(zip(raws, lines, strict=True), start=1):
        same(list(boxes_of(line)), shown(raw, given))
        scores = [row["score"] for row in results if row["image_id"] == number]
        assert scores == [row[1] for row in nms(raw, given)]
    with Detector(bundle, **HERE, **given) as detector:
        for raw, found in zip(raws, detector.detect([raw.path for raw in raws]), strict=True):
            rows = zip(found.classes.tolist(), found.scores.tolist(), map(tuple, found.boxes.tolist()), strict=True)
            same(list(rows), shown(raw, given))
    note = json.loads((tmp_path / "found" / "predict.json").read_text())
    assert note["threshold"] == given.get("threshold", 0.5)
    recorded = {name: value for name, value in plain(given).items() if name != "threshold"}
    if "classes" in recorded:
        recorded["classes"] = list(map(str, recorded["classes"]))
    assert note.get("detection", {}) == recorded


def ask(service: Any, *requests: tuple[str, Raw]) -> list[httpx.Response]:
    from gfldeploy.serve.app import create_app
    from gfldeploy.serve.requests import RequestLimits

    async def answers() -> list[httpx.Response]:
        transport = httpx.ASGITransport(create_app(service, RequestLimits(timeout_ms=60_000)))
        async with httpx.AsyncClient(transport=transport, base_url="http://here", timeout=60) as client:
            return [await client.post(path, **body(path, raw)) for path, raw in requests]

    return asyncio.run(answers())


def body(path: str, raw: Raw) -> dict[str, Any]:
    content = raw.path.read_bytes()
    if path.startswith("/v1/"):
        return {"content": content, "headers": {"Content-Type": "image/png"}}
    asked = json.loads(path.partition("#")[2] or "{}")
    return {"json": {"image": base64.b64encode(content).decode(), "visualize": False, **asked}}


def answered(response: httpx.Response) -> list[Row]:
    answer = response.json()
    if "result" in answer:
        found = answer["result"]["detectedObjects"]
        return [(one["categoryId"], one["score"], tuple(one["bbox"])) for one in found]
    (image,) = answer["images"]
    return [(one["class_id"], one["score"], tuple(one["box"])) for one in image["detections"]]


@pytest.mark.parametrize("given", TURNED, ids=lambda given: "+".join(given) or "nothing")
@pytest.mark.posix
def test_the_server_and_what_its_clients_ask_for(bundle: Path, raws: list[Raw], given: dict[str, Any]) -> None:
    from gfldeploy.serve.service import DetectionService, ServiceSettings

    raw, keep = raws[0], {**CONFIG, **given}["keep_top_k"]
    service = DetectionService(choose(bundle, **HERE, detection=DetectionOptions.of(**given)), ServiceSettings())
    paths = [
        "/v1/detect",
        "/object-detection",
        "/v1/detect?threshold=0.3",
        '/object-detection#{"threshold": 0.3}',
        "/v1/detect?classes=traffic+light&threshold=0",
        '/object-detection#{"threshold": {"2": 0.45}}',
    ]
    try:
        found = list(map(answered, ask(service, *((path, raw) for path in paths))))
    finally:
        service.close(drain=False)
    own = given.get("class_thresholds", {})
    floors = [own.get(CLASSES[number], own.get(str(number), 0)) for number in range(3)]

    def asked(threshold: float) -> dict[str, Any]:
        """A request is the last word, but not below what the server has for single classes."""
        raised = {"class_thresholds": {name: max(value, threshold) for name, value in own.items()}} if own else {}
        return {**given, "threshold": threshold, **raised}

    left = nms(raw, given)
    same(found[0], shown(raw, given))
    same(found[1], shown(raw, given))
    for one in found[2:4]:
        same(one, shown(raw, asked(0.3))[:keep])
    same(found[4], [row for row in shown(raw, asked(0)) if row[0] == 2][:keep])
    lights = [max(0.45, floors[2]) if row[0] == 2 else lowest(row[0], given) for row in left]
    same(found[5], [row for row, least in zip(left, lights, strict=True) if row[1] >= least][:keep])


@pytest.mark.posix
def test_a_class_that_the_server_does_not_keep_is_refused(bundle: Path, raws: list[Raw]) -> None:
    from gfldeploy.serve.service import DetectionService, ServiceSettings

    service = DetectionService(choose(bundle, **HERE, detection=DetectionOptions(classes=("car",))), ServiceSettings())
    try:
        (refused,) = ask(service, ("/v1/detect?classes=person", raws[0]))
        assert service.description.detection.classes == ("car",)
    finally:
        service.close(drain=False)
    assert (refused.status_code, refused.json()["error"]["code"]) == (400, "unknown_class")
    assert "without the class person" in refused.json()["error"]["message"]


@pytest.mark.posix
def test_the_golden_picture_has_the_nms_that_it_was_made_with(tiny_whole: Path) -> None:
    """A server that keeps none of what it expects is compared all the same."""
    from gfldeploy.serve.reload import check_golden
    from gfldeploy.serve.service import DetectionService, ServiceSettings

    detection = DetectionOptions(classes=("ball",), score_threshold=0.9)
    service = DetectionService(choose(tiny_whole, **HERE, detection=detection), ServiceSettings())
    try:
        assert re.search(r"finds ([1-9]\d*) of \1 expected detections", asyncio.run(check_golden(service)))
        answer = asyncio.run(service.detect((tiny_whole / PICTURE).read_bytes(), 60_000))
        assert len(answer.detections) == 0
    finally:
        service.close(drain=False)


def test_workers_of_a_cluster_and_parts_have_what_was_turned(bundle: Path, raws: list[Raw], tmp_path: Path) -> None:
    given = TURNED[-1]
    choice = choose(bundle, **HERE, detection=DetectionOptions.of(**given))
    job = json.loads(json.dumps(plain(ShardJob.of(choice, EngineOptions(threads=1), reduced=False))))
    assert build(ShardJob, job).detection == choice.detection
    work = RayShards({"job": job, "own_cache": False, "folder": str(tmp_path)}, bundle)
    try:
        inputs = [str(raw.path) for raw in raws]
        values = list(work.run([Todo(0, {"inputs": inputs, "bytes": None, "sizes": [None] * 3})]))
    finally:
        work.close()
    found = [one for _, batch in values for one in batch_of(batch) or ()]
    for raw, one in zip(raws, found, strict=True):
        assert one.detections is not None
        assert one.detections.scores.tolist() == [row[1] for row in nms(raw, given)]

    inputs = [str(raw.path) for raw in raws] * 14  # more than one shard
    settings: dict[str, Any] = {"inputs": inputs, **HERE, **given}
    predict_images(bundle, output=tmp_path / "one", **settings)
    parts = [tmp_path / name for name in ("first", "second", "other")]
    for number, part in enumerate(parts[:2], start=1):
        predict_images(bundle, output=part, shard=(number, 2), **settings)
    merge_parts(parts[:2], output=tmp_path / "merged")
    assert demo_bundles.snapshot(tmp_path / "merged") == demo_bundles.snapshot(tmp_path / "one")
    with pytest.raises(OutputError, match="exists"):  # it is not this part that is there
        predict_images(bundle, inputs, output=parts[0], shard=(1, 2), **HERE)
    predict_images(bundle, output=parts[2], shard=(2, 2), **{**settings, "nms_threshold": 0.6})
    with pytest.raises(DataError, match=r"not of the run of .*: other nms threshold\."):
        merge_parts([parts[0], parts[2]], output=tmp_path / "wrong")


def test_deploy_yml_turns_what_arguments_do_not(bundle: Path, raws: list[Raw], tmp_path: Path) -> None:
    opened = Bundle.open(bundle)
    identity = BundleIdentity(opened.name, str(bundle), opened.digest)
    cell = replace(DEPLOY.choice.cell, bundle=identity, precision="fp32", threads=1, batch_size=1)
    path = os.path.relpath(bundle, tmp_path)
    asked = DetectionOptions(threshold=0.6, classes=("car", "person"), keep_top_k=5)
    deploy = replace(DEPLOY, choice=replace(DEPLOY.choice, cell=cell, path=path), shapes=(), detection=asked)
    deploy.write(tmp_path / "deploy.yml")
    with Detector(tmp_path / "deploy.yml", keep_top_k=2) as detector:
        assert detector.choice.detection == replace(asked, keep_top_k=2)
        (found,) = detector.detect(raws[0].path)
    expected = shown(raws[0], {"threshold": 0.6, "classes": ["car", "person"], "keep_top_k": 2})
    assert found.scores.tolist() == [row[1] for row in expected]
    with pytest.raises(DataError, match=r"detection: threshold is 2.* Give a number from 0 to 1"):
        Deploy.from_dict({**deploy.to_dict(), "detection": {"threshold": 2.0}})


def test_a_call_has_a_threshold_of_its_own(bundle: Path, raws: list[Raw]) -> None:
    with Detector(bundle, **HERE, class_thresholds={"traffic light": 0.3}) as detector:
        (found,) = detector.detect(raws[0].path, threshold=0.25)
    rows = nms(raws[0], {"threshold": 0.25, "class_thresholds": {"traffic light": 0.3}})
    expected = [row[1] for row in rows if row[1] >= (0.3 if row[0] == 2 else 0.25)]
    assert found.scores.tolist() == expected


def test_map_is_that_of_the_nms_that_was_turned(bundle: Path, raws: list[Raw], tmp_path: Path) -> None:
    """Annotations are what NMS leaves of two classes when it is turned so: then mAP is 1, and otherwise less."""
    given: dict[str, Any] = {"classes": ["car", "traffic light"], "nms_threshold": 0.2, "score_threshold": 0.3}
    rows = [(number, row) for number, raw in enumerate(raws) for row in nms(raw, given)]
    boxes = [
        {"id": place, "image_id": number, "category_id": row[0], "iscrowd": 0, "bbox": box_of(row[2])}
        for place, (number, row) in enumerate(rows, start=1)
    ]
    boxes += [{"id": 999, "image_id": 0, "category_id": 0, "iscrowd": 0, "bbox": [0, 0, 5, 5]}]  # a person
    images = [{"id": number, "file_name": raw.path.name, "height": 64, "width": 96} for number, raw in enumerate(raws)]
    categories = [{"id": number, "name": name} for number, name in enumerate(CLASSES)]
    data = tmp_path / "data.json"
    data.write_text(json.dumps({"images": images, "annotations": boxes, "categories": categories}))
    settings: dict[str, Any] = {"data": data, "images": raws[0].path.parent, **HERE}
    found = evaluate(bundle, **settings, **given)
    assert found.accuracy.ap == 1 and (found.matched, found.detection) == (2, DetectionOptions.of(**given))
    assert evaluate(bundle, **settings).accuracy.ap < 0.9
    with pytest.raises(UsageError, match="has its own NMS, so nms_threshold cannot be turned"):
        evaluate(bundle, **settings, nms_threshold=0.2, end_to_end=True)


def test_numbers_of_numpy_are_numbers() -> None:
    numbers: dict[str, Any] = {"threshold": np.float32(0.5), "keep_top_k": np.int64(2)}
    assert DetectionOptions.of(**numbers) == DetectionOptions(0.5, keep_top_k=2)


def box_of(corners: tuple[float, ...]) -> list[float]:
    x1, y1, x2, y2 = corners
    return [x1, y1, x2 - x1, y2 - y1]


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"classes": ["persn"]}, "no class 'persn'. Did you mean 'person'?"),
        ({"class_thresholds": {"Trafic Light": 0.5}}, "no class 'Trafic Light'. Did you mean 'traffic light'?"),
        ({"classes": [3]}, "there is no class '3'"),
        ({"classes": []}, "no class is kept. Name one, or leave classes out"),
        ({"threshold": 1.5}, "threshold is 1.5. Give a number from 0 to 1"),
        ({"class_thresholds": {"car": -1}}, "class_thresholds of 'car' is -1. Give a number"),
        ({"class_thresholds": {"car": 0.5, 1: 0.6}}, "class_thresholds name 'car' twice"),
        ({"class_thresholds": {"car": 0.5}, "classes": ["person"]}, "name 'car', which is not among the classes"),
        ({"threshold": 0.1, "score_threshold": 0.3}, "threshold is 0.1, and score_threshold 0.3: nothing between"),
        ({"nms_threshold": 2}, "the NMS's nms_threshold is 2. Give a number"),
        ({"keep_top_k": 0}, "the NMS's keep_top_k is 0. Give a whole number"),
    ],
)
def test_what_cannot_be_turned_is_one_line(bundle: Path, raws: list[Raw], given: dict[str, Any], told: str) -> None:
    with pytest.raises(UsageError) as refused:
        Detector(bundle, **HERE, **given)
    assert told in str(refused.value) and "\n" not in str(refused.value)


def test_a_threshold_of_one_call_is_checked_too(bundle: Path, raws: list[Raw]) -> None:
    with Detector(bundle, **HERE) as detector, pytest.raises(UsageError, match=r"threshold is nan. Give a number"):
        detector.detect(raws[0].path, threshold=float("nan"))


def test_a_threshold_below_what_leaves_nms_is_noted(bundle: Path) -> None:
    with pytest.warns(UserWarning, match=r"scores 0.2 or less leaves the detector's NMS.*score_threshold below 0.1"):
        Detector(bundle, **HERE, threshold=0.1).close()


def test_the_command_line_takes_lists(bundle: Path, raws: list[Raw], run_here: RunHere, tmp_path: Path) -> None:
    command = ("predict", bundle, raws[0].path, "--engine", "onnxruntime", "--threads", 1, "--output", tmp_path / "cli")
    words = ("--classes", "car, 2", "--class-thresholds", "traffic light=0.3,car=0.7", "--class-agnostic")
    assert run_here(*command, *words).returncode == 0
    (line,) = map(json.loads, (tmp_path / "cli" / "detections.jsonl").read_text().splitlines())
    given = {"classes": ["car", 2], "class_thresholds": {"traffic light": 0.3, "car": 0.7}, "class_agnostic": True}
    same(list(boxes_of(line)), shown(raws[0], given))
    for wrong, told in [
        (("--class-thresholds", "car"), "'car' is not a class and a score from 0 to 1 such as person=0.3"),
        (("--class-thresholds", "car=0.1,car=0.2"), "a class has two scores; give one"),
        (("--classes", "cat"), "there is no class 'cat'. Did you mean 'car'?"),
    ]:
        refused = run_here(*command, "--force", *wrong)
        assert refused.returncode == 2 and told in refused.stderr and "Traceback" not in refused.stderr
