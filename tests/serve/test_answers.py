"""Every form of a request gets the detections that `Detector` finds, and PaddleX's clients get them too."""

from __future__ import annotations

import asyncio
import base64
import json
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cv2
import httpx
import numpy as np
import pytest
from served import contents, serving, talk
from starlette.applications import Starlette

from gfldeploy.detection_options import DetectionOptions
from gfldeploy.detections import Detections
from gfldeploy.detector import Detector
from gfldeploy.errors import EngineError
from gfldeploy.serve.answers import image_json
from gfldeploy.serve.app import create_app
from gfldeploy.serve.loaded import Answer, AnswerTimes
from gfldeploy.serve.problems import Problem
from gfldeploy.serve.requests import DetectRequest, RequestLimits

LIMITS = RequestLimits(body_bytes=200_000, timeout_ms=60_000)
FORM = "multipart/form-data; boundary=x-y"


@pytest.fixture(scope="module")
def files(tiny_coco: Path) -> list[bytes]:
    return contents(tiny_coco)


@pytest.fixture(scope="module")
def alone(tiny_bundle: Path, files: list[bytes]) -> list[Detections]:
    """What `Detector` finds, all that NMS leaves."""
    with Detector(tiny_bundle, engine="onnxruntime", threads=1) as detector:
        return detector.detect(files, threshold=0)


@pytest.fixture(scope="module")
def app(tiny_bundle: Path) -> Iterator[Starlette]:
    with serving(tiny_bundle) as service:
        yield create_app(service, LIMITS)


def post(app: Starlette, path: str, content: bytes, kind: str = "application/json") -> httpx.Response:
    async def ask(client: httpx.AsyncClient) -> httpx.Response:
        return await client.post(path, content=content, headers={"content-type": kind})

    return talk(app, ask)


def in_base64(image: bytes) -> str:
    return base64.b64encode(image).decode()


def check(image: dict[str, Any], expected: Detections) -> None:
    """Everything is there and nothing is rounded: floats of 32 bits survive JSON."""
    found = image["detections"]
    assert [one["class"] for one in found] == expected.names
    assert [one["class_id"] for one in found] == expected.classes.tolist()
    np.testing.assert_array_equal(np.array([one["score"] for one in found], np.float32), expected.scores)
    boxes = np.array([one["box"] for one in found], np.float32).reshape(-1, 4)
    np.testing.assert_array_equal(boxes, expected.boxes)


@pytest.mark.parametrize("form", ["raw", "multipart", "json"])
def test_every_form_has_the_detections_of_the_detector(
    app: Starlette, files: list[bytes], alone: list[Detections], form: str
) -> None:
    path = "/v1/detect?threshold=0"
    if form == "raw":
        answers = [post(app, path, one, "image/jpeg") for one in files]
    elif form == "multipart":
        parts = [b'--x-y\r\nContent-Disposition: form-data; name="a"; filename="b"\r\n\r\n' + one for one in files]
        answers = [post(app, path, b"\r\n".join([*parts, b"--x-y--"]), FORM)]
    else:
        answers = [post(app, path, json.dumps({"images": [in_base64(one) for one in files]}).encode())]
    assert {answer.status_code for answer in answers} == {200}
    found = [image for answer in answers for image in answer.json()["images"]]
    for image, expected, file in zip(found, alone, files, strict=True):
        assert len(expected)
        check(image, expected)
        pixels = cv2.imdecode(np.frombuffer(file, np.uint8), cv2.IMREAD_COLOR)
        assert pixels is not None
        assert (image["height"], image["width"]) == pixels.shape[:2]


def test_of_several_images_each_has_its_own_answer_or_error(
    app: Starlette, files: list[bytes], alone: list[Detections]
) -> None:
    body = json.dumps({"images": [in_base64(files[0]), in_base64(b"no image"), "", in_base64(files[1])]}).encode()
    answer = post(app, "/v1/detect?threshold=0", body)
    assert answer.status_code == 200
    first, second, third, fourth = answer.json()["images"]
    check(first, alone[0])
    check(fourth, alone[1])
    assert second["error"]["code"] == third["error"]["code"] == "image"


@pytest.mark.parametrize(
    ("threshold", "classes", "places"),
    [
        (0.0, None, [0, 1, 2, 3]),
        (0.5, None, [0, 1, 2]),
        (0.0, ("box",), [0, 2]),
        (0.3, ("1", "7"), [1]),
        (1.0, None, []),
    ],
)
def test_threshold_and_classes_filter(threshold: float, classes: tuple[str, ...] | None, places: list[int]) -> None:
    found = Detections(
        np.linspace(0, 9, 16, dtype=np.float32).reshape(4, 4),
        np.array([0.9, 0.7, 0.5, 0.2], np.float32),
        np.array([0, 1, 0, 2]),
        may_lack_below=0.25,
        class_names=("box", "ball", "7"),
    )
    answer = Answer(found, (30, 40), AnswerTimes(1, 2, 3.00049, 4))
    record = json.loads(image_json(answer, DetectRequest((b"",), threshold, 100, classes)))
    check(record, found.select(np.array(places, np.intp)))
    assert (record["height"], record["width"]) == (30, 40)
    assert record["times_ms"] == {"decode": 1, "preprocess": 2, "queue": 3, "infer": 4}
    assert record.get("may_lack_below") == (0.25 if threshold == 0 else None)


def test_thresholds_of_classes_go_with_that_of_a_request(tiny_bundle: Path, files: list[bytes]) -> None:
    """The two that leave NMS are the best of those that the request asks for, as for `Detector`."""
    turned = DetectionOptions(class_thresholds={"box": 0.97}, score_threshold=0.001, nms_threshold=1.0, keep_top_k=2)
    alone = Detector(tiny_bundle, engine="onnxruntime", threads=1, **turned.given)
    with serving(tiny_bundle, detection=turned) as service, alone as detector:
        app = create_app(service, LIMITS)
        for threshold in (0.0, 0.01, 0.6):
            (expected,) = detector.detect(files[0], threshold=threshold)
            assert len(expected) == (2 if threshold < 0.1 else 0)
            answer = post(app, f"/v1/detect?threshold={threshold}", files[0], "image/jpeg")
            check(answer.json()["images"][0], expected)
            _, content = paddlex(app, image=in_base64(files[0]), threshold=threshold, visualize=False)
            assert [one["score"] for one in content["result"]["detectedObjects"]] == expected.scores.tolist()


def test_a_class_that_the_detector_no_longer_has(files: list[bytes], alone: list[Detections]) -> None:
    """Another bundle may have been loaded since the request was read."""
    answer = Answer(alone[0], (30, 40), AnswerTimes(1, 2, 3, 4))
    with pytest.raises(Problem, match="no class 'bicycle'"):
        image_json(answer, DetectRequest((files[0],), 0, 100, ("bicycle",)))


def test_a_malformed_request_touches_no_other(app: Starlette, files: list[bytes], alone: list[Detections]) -> None:
    async def ask(client: httpx.AsyncClient) -> list[httpx.Response]:
        kinds = ["image/png", "application/json", FORM, "text/plain"]
        bad = [client.post("/v1/detect", content=b"x" * 999, headers={"content-type": kind}) for kind in kinds]
        large = client.post("/v1/detect", content=b"x" * 999_999)
        good = [client.post("/v1/detect?threshold=0", content=one) for one in files]
        return await asyncio.gather(*bad, large, *good)

    *bad, large = (answers := talk(app, ask))[:5]
    assert [answer.status_code for answer in (*bad, large)] == [422, 400, 400, 415, 413]
    for answer, expected in zip(answers[5:], alone, strict=True):
        check(answer.json()["images"][0], expected)


# --- PaddleX ----------------------------------------------------------------------------------------------------------


def paddlex(app: Starlette, **fields: Any) -> tuple[int, dict[str, Any]]:
    answer = post(app, "/object-detection", json.dumps(fields).encode())
    content: dict[str, Any] = answer.json()
    assert uuid.UUID(content["logId"])
    return answer.status_code, content


def test_clients_of_paddlex_get_the_same_detections(
    app: Starlette, files: list[bytes], alone: list[Detections]
) -> None:
    for file, all_found in zip(files, alone, strict=True):
        for threshold, lowest in [(0, 0.0), (0.9, 0.9), (None, 0.5)]:
            status, content = paddlex(app, image=in_base64(file), threshold=threshold, visualize=False)
            assert (status, content["errorCode"], content["errorMsg"]) == (200, 0, "Success")
            assert set(content["result"]) == {"detectedObjects"}
            found = content["result"]["detectedObjects"]
            expected = all_found.at_least(lowest)
            assert [one["categoryName"] for one in found] == expected.names
            assert [one["categoryId"] for one in found] == expected.classes.tolist()
            assert [one["score"] for one in found] == expected.scores.tolist()
            assert [one["bbox"] for one in found] == expected.boxes.tolist()


def test_a_threshold_for_each_class(app: Starlette, files: list[bytes], alone: list[Detections]) -> None:
    _, content = paddlex(app, image=in_base64(files[0]), threshold={"0": 1.0, "1": 0.0}, visualize=False)
    assert {one["categoryName"] for one in content["result"]["detectedObjects"]} <= {"ball"}
    _, content = paddlex(app, image=in_base64(files[0]), threshold={"1": 0.0}, visualize=False)
    scores = [one["score"] for one in content["result"]["detectedObjects"] if one["categoryId"] == 0]
    assert scores == alone[0].of_classes(0).at_least(0.5).scores.tolist()


def test_a_picture_comes_along_unless_it_is_not_wanted(app: Starlette, files: list[bytes]) -> None:
    """Which PaddleX's published clients write to a file."""
    _, content = paddlex(app, image=in_base64(files[0]), threshold=0.5)
    picture = cv2.imdecode(np.frombuffer(base64.b64decode(content["result"]["image"]), np.uint8), cv2.IMREAD_COLOR)
    plain = cv2.imdecode(np.frombuffer(files[0], np.uint8), cv2.IMREAD_COLOR)
    assert picture is not None and plain is not None
    assert picture.shape == plain.shape
    assert np.abs(picture.astype(int) - plain).max() > 100  # there are boxes on it


@pytest.mark.parametrize(
    ("fields", "status"),
    [
        ({}, 422),
        ({"image": 5}, 422),
        ({"image": ""}, 422),
        ({"image": "http://example.org/a.jpg"}, 400),
        ({"image": "!"}, 400),
        ({"image": "bm8gaW1hZ2U="}, 422),
        ({"image": "AA==", "threshold": "0.5"}, 422),
        ({"image": "AA==", "threshold": True}, 422),
        ({"image": "AA==", "threshold": 1.5}, 422),
        ({"image": "AA==", "threshold": {"box": 0.5}}, 422),
        ({"image": "AA==", "threshold": {"0": "x"}}, 422),
        ({"image": "AA==", "visualize": "yes"}, 422),
        ({"image": "AA==", "layoutNms": True}, 422),
    ],
)
def test_what_paddlex_clients_ask_wrongly(app: Starlette, fields: dict[str, Any], status: int) -> None:
    answered, content = paddlex(app, **fields)
    assert answered == content["errorCode"] == status
    assert content["errorMsg"]


def test_a_threshold_for_a_class_that_is_not_there(app: Starlette, files: list[bytes]) -> None:
    status, content = paddlex(app, image=in_base64(files[0]), threshold={"2": 0.5})
    assert status == 422
    assert "0 to 1" in content["errorMsg"]


def test_paddlex_clients_send_json_within_limits(app: Starlette) -> None:
    for content, kind, status in [(b"x", "image/png", 415), (b"x", "application/json", 400), (b"x" * 999_999, "", 413)]:
        answer = post(app, "/object-detection", content, kind)
        assert answer.status_code == answer.json()["errorCode"] == status


def test_names_that_json_escapes() -> None:
    names = ('a "b"', "\\", "\u4e2d", "\ud800\n")
    found = Detections(np.ones((4, 4), np.float32), np.ones(4, np.float32), np.arange(4), class_names=names)
    text = image_json(Answer(found, (3, 4), AnswerTimes(1e-9, 2, 3, 1e9)), DetectRequest((b"",), 0, 100))
    assert text.isascii() and [one["class"] for one in json.loads(text)["detections"]] == list(names)


def test_what_json_has_no_number_for() -> None:
    found = Detections(np.full((1, 4), np.inf, np.float32), np.ones(1, np.float32), np.arange(1), class_names=("box",))
    with pytest.raises(EngineError, match="infinite"):
        image_json(Answer(found, (3, 4), AnswerTimes(1, 2, 3, 4)), DetectRequest((b"",), 0, 100))
