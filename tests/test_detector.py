"""The three lines of the README."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image

import gfldeploy
from gfldeploy import Detector
from gfldeploy.errors import BundleError, DataError, UsageError
from gfldeploy.images.decode import read_image
from gfldeploy.predict.pipeline import Found

pytest.importorskip("onnxruntime")


@pytest.fixture(scope="module")
def detector(tiny_bundle: Path) -> Iterator[Detector]:
    with Detector(tiny_bundle, threads=1) as detector:
        yield detector


@pytest.fixture(scope="module")
def paths(tiny_coco: Path) -> list[Path]:
    return sorted((tiny_coco.parent / "images").iterdir())


def test_files_and_arrays_give_the_same(detector: Detector, paths: list[Path]) -> None:
    found = detector.detect(paths)
    assert len(found) == len(paths)
    assert all(detector.classes[one.classes[0]] == "box" and one.scores[0] > 0.8 for one in found)
    mixed = [str(path) if place % 2 else read_image(path) for place, path in enumerate(paths)]
    for one, other in zip(found, detector.detect(mixed), strict=True):
        np.testing.assert_array_equal(one.boxes, other.boxes)
        np.testing.assert_array_equal(one.scores, other.scores)


def test_one_image_makes_a_list_of_one(detector: Detector, paths: list[Path]) -> None:
    pixels = read_image(paths[0])
    (first,) = detector.detect(paths[0])
    for image in (str(paths[0]), paths[0].read_bytes(), pixels, pixels[np.newaxis], Image.fromarray(pixels)):
        (found,) = detector.detect(image)
        np.testing.assert_array_equal(found.scores, first.scores)
    bgr = cv2.imread(str(paths[0]))
    assert bgr is not None
    (found,) = detector.detect(bgr.astype(np.uint8), color="bgr")
    np.testing.assert_array_equal(found.scores, first.scores)
    assert detector.detect([]) == []
    with pytest.raises(ValueError, match="'rgb' or 'bgr'"):
        detector.detect(pixels, color="bgra")  # type: ignore[arg-type]


def test_another_input_size(tiny_bundle: Path, paths: list[Path], detector: Detector) -> None:
    with Detector(tiny_bundle, engine="onnxruntime", threads=1, input_size=(32, 48)) as half:
        assert half.choice.input_size == (32, 48) and detector.choice.input_size is None
        for one, other in zip(detector.detect(paths), half.detect(paths), strict=True):
            # The network finds a box of 48 px of its input: of an image at half the size, twice as many of its pixels.
            np.testing.assert_allclose(other.boxes[0, 2:], 2 * one.boxes[0, 2:], rtol=1e-5)
    with pytest.raises(BundleError, match="No side may be longer than 8192 px"):
        Detector(tiny_bundle, input_size=(9000, 32))


def test_a_batch_gives_what_single_images_give(tiny_bundle: Path, paths: list[Path], detector: Detector) -> None:
    with Detector(str(tiny_bundle), threads=1, batch_size=4) as batched:
        assert batched.choice.batch_size == 4
        for one, other in zip(detector.detect(paths), batched.detect(paths), strict=True):
            np.testing.assert_array_equal(one.scores, other.scores)


def test_a_bad_image_raises_or_is_kept_to_itself(detector: Detector, paths: list[Path], tmp_path: Path) -> None:
    bad = tmp_path / "bad.jpg"
    bad.write_bytes(paths[0].read_bytes()[:300])
    images = [paths[0], bad, tmp_path / "absent.jpg", paths[1]]
    with pytest.raises(DataError, match=r"bad\.jpg is truncated"):
        detector.detect(images)
    cv2.imwrite(str(tmp_path / "thin.png"), np.zeros((20_000, 1, 3), np.uint8))
    with pytest.raises(DataError, match=r"thin\.png: an image of 1 x 20000 px is too elongated"):
        detector.detect(tmp_path / "thin.png")
    found = list(detector.stream(images))
    assert [one.index for one in found] == [0, 1, 2, 3]
    assert [one.error is None for one in found] == [True, False, False, True]
    assert "absent.jpg" in str(found[2].error) and found[2].size is None
    for grey in (np.zeros((4, 4), np.uint8), [np.zeros((4, 4), np.uint8)]):
        with pytest.raises(ValueError, match=r"an image must be RGB, uint8 \[h, w, 3\], not uint8 \[4, 4\]"):
            detector.detect(grey)
    assert len(detector.detect(paths)) == len(paths), "it works on"


def test_a_stream_is_lazy_and_may_be_left(detector: Detector) -> None:
    taken = 0

    def endless() -> Iterator[np.ndarray]:
        nonlocal taken
        while True:
            taken += 1
            yield np.full((48, 80, 3), taken % 256, np.uint8)

    stream = detector.stream(endless())
    for found in stream:
        if found.index == 20:
            break
    assert taken < 40
    stream.close()
    assert [one.name for one in threading.enumerate() if one.name.startswith("gfldeploy")] == []


def test_what_goes_wrong_with_the_images_themselves_is_raised(detector: Detector, paths: list[Path]) -> None:
    def images() -> Iterator[Path]:
        yield from paths
        raise RuntimeError("the camera is gone")

    found: list[Found] = []
    with pytest.raises(RuntimeError, match="the camera is gone"):
        found += detector.stream(images(), look_ahead=0)
    assert [one.name for one in threading.enumerate() if one.name.startswith("gfldeploy")] == []


def test_streams_side_by_side_leave_opencv_its_threads(detector: Detector, paths: list[Path]) -> None:
    before = cv2.getNumThreads()
    cv2.setNumThreads(3)
    try:
        for one, other in zip(detector.stream(paths), detector.stream(paths), strict=True):
            assert one.detections is not None and other.detections is not None and cv2.getNumThreads() == 1
            np.testing.assert_array_equal(one.detections.scores, other.detections.scores)
        assert cv2.getNumThreads() == 3
    finally:
        cv2.setNumThreads(before)


def test_a_closed_detector_says_so(tiny_bundle: Path, paths: list[Path]) -> None:
    with Detector(tiny_bundle, threads=1) as closed:
        pass
    with pytest.raises(UsageError, match="the detector is closed"):
        closed.detect(paths[0])


def test_reduced_decoding_is_asked_for(detector: Detector, tmp_path: Path) -> None:
    picture = cv2.resize(np.random.default_rng(3).integers(0, 256, (6, 9, 3), np.uint8), (903, 601))
    cv2.imwrite(str(tmp_path / "large.jpg"), picture)
    (exact,), (fast,) = (detector.detect(tmp_path / "large.jpg", reduced=reduced) for reduced in (False, True))
    np.testing.assert_allclose(exact.boxes, fast.boxes, atol=1e-3)
    assert not np.array_equal(exact.scores, fast.scores)


def test_the_package_offers_it_and_nothing_more() -> None:
    assert gfldeploy.Detector is Detector
    with pytest.raises(AttributeError, match="no attribute 'Detectr'"):
        gfldeploy.Detectr  # noqa: B018
    with pytest.raises(BundleError, match="there is no nowhere"):
        Detector("nowhere")
