"""Preprocessing: PaddleDetection's arithmetic, and the reader configs that describe it."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from gfldeploy.errors import ConfigError, DataError
from gfldeploy.images.preprocess import Prepared, Preprocess
from gfldeploy.serialization import build, plain

MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]


def gfl_reader() -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The TestReader that PaddleDetection's GFL configs share."""
    sample: list[dict[str, Any]] = [
        {"Decode": {}},
        {"Resize": {"interp": 1, "target_size": [800, 1333], "keep_ratio": True}},
        {"NormalizeImage": {"is_scale": True, "mean": MEAN, "std": STD}},
        {"Permute": {}},
    ]
    return sample, [{"PadBatch": {"pad_to_stride": 32}}]


def image(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def blank(height: int, width: int, value: float = 1.0) -> Prepared:
    return Prepared(np.full((3, height, width), value, np.float32), (1.0, 1.0))


# (h, w) -> (h, w) and the scale, by hand: min(800 / short side, 1333 / long side).
@pytest.mark.parametrize(
    ("original", "resized", "scale"),
    [
        ((480, 640), (800, 1067), 800 / 480),  # the short side decides; 1066.67 rounds up
        ((640, 480), (1067, 800), 800 / 480),
        ((200, 1000), (267, 1333), 1.333),  # the long side decides; 266.6 rounds up
        ((800, 1333), (800, 1333), 1.0),
    ],
)
def test_keep_ratio_sizes(original: tuple[int, int], resized: tuple[int, int], scale: float) -> None:
    prepared = Preprocess(target_size=(800, 1333))(image(*original))
    assert prepared.tensor.shape == (3, *resized)
    assert prepared.tensor.dtype == np.float32
    assert prepared.tensor.flags.c_contiguous
    assert prepared.scale == pytest.approx((scale, scale))


def test_without_keep_ratio_both_sides_are_stretched() -> None:
    prepared = Preprocess(target_size=(64, 96), keep_ratio=False)(image(32, 24))
    assert prepared.tensor.shape == (3, 64, 96)
    assert prepared.scale == (2.0, 4.0)


def test_normalisation_by_hand() -> None:
    flat = np.full((8, 8, 3), (255, 0, 51), np.uint8)
    tensor = Preprocess(target_size=(8, 8))(flat).tensor
    expected = [(1 - 0.485) / 0.229, -0.456 / 0.224, (0.2 - 0.406) / 0.225]
    np.testing.assert_allclose(tensor[:, 3, 3], expected, rtol=1e-6)
    raw = Preprocess(target_size=(8, 8), is_scale=False, norm_type="none")(flat).tensor
    np.testing.assert_array_equal(raw[:, 3, 3], [255, 0, 51])
    scaled = Preprocess(target_size=(8, 8), norm_type="none")(flat).tensor
    np.testing.assert_allclose(scaled[:, 3, 3], [1, 0, 0.2], rtol=1e-6)


def test_the_input_image_is_left_alone() -> None:
    picture = image(16, 16)
    before = picture.copy()
    Preprocess(target_size=(16, 16))(picture)
    np.testing.assert_array_equal(picture, before)


def test_an_image_that_would_vanish_is_refused() -> None:
    with pytest.raises(DataError, match="3000 x 1 px is too elongated"):
        Preprocess(target_size=(32, 32))(image(1, 3000))


def test_a_batch_is_padded_right_and_bottom_to_the_stride() -> None:
    batch = Preprocess((64, 64), pad_stride=32).batch([blank(20, 33), blank(31, 10, 2.0)])
    assert batch.shape == (2, 3, 32, 64)
    assert batch.dtype == np.float32
    assert batch[0, :, :20, :33].min() == 1
    assert batch[1, :, :31, :10].min() == 2
    assert batch.sum() == 3 * (20 * 33 + 2 * 31 * 10)


def test_a_batch_without_stride_is_padded_to_the_largest_image_only() -> None:
    assert Preprocess((64, 64)).batch([blank(20, 33), blank(31, 10)]).shape == (2, 3, 31, 33)
    assert Preprocess((64, 64), pad_stride=32).batch([blank(64, 32)]).shape == (1, 3, 64, 32)
    assert Preprocess((64, 64), pad_stride=32).batch([blank(20, 33)], (65, 1)).shape == (1, 3, 96, 64)


def test_the_gfl_reader() -> None:
    assert Preprocess.from_reader(*gfl_reader()) == Preprocess(
        target_size=(800, 1333),
        keep_ratio=True,
        interp=1,
        mean=(0.485, 0.456, 0.406),
        std=(0.229, 0.224, 0.225),
        is_scale=True,
        norm_type="mean_std",
        pad_stride=32,
    )


def test_a_reader_with_the_least_it_may_have() -> None:
    operators: list[dict[str, Any]] = [
        {"Decode": None},
        {"Resize": {"target_size": 320, "keep_ratio": False}},
        {"Permute": None},
    ]
    preprocess = Preprocess.from_reader(operators)
    assert preprocess.target_size == (320, 320)
    assert preprocess.pad_stride == 0
    operators[1] = {"Resize": {"target_size": [320], "keep_ratio": True}}  # ppdet: the smallest and the largest of it
    assert Preprocess.from_reader(operators).target_size == (320, 320)
    picture = image(320, 320)
    np.testing.assert_array_equal(preprocess(picture).tensor, picture.transpose(2, 0, 1))


def test_padstride_is_padbatch() -> None:
    sample, _ = gfl_reader()
    assert Preprocess.from_reader(sample, [{"PadStride": {"stride": 32}}]) == Preprocess.from_reader(*gfl_reader())


def reader_with(change: str) -> tuple[list[Any], list[Any]]:
    sample, batch = gfl_reader()
    if change == "unknown operator":
        sample.insert(1, {"RandomFlip": {}})
    elif change == "order":
        sample[2], sample[3] = sample[3], sample[2]
    elif change == "twice":
        sample.insert(1, sample[1])
    elif change == "unknown argument":
        sample[1]["Resize"]["random_range"] = True
    elif change == "no resize":
        del sample[1]
    elif change == "no permute":
        del sample[3]
    elif change == "two operators in one entry":
        sample[0] = {"Decode": {}, "Permute": {}}
    elif change == "zero std":
        sample[2]["NormalizeImage"] = {"mean": MEAN, "std": [1, 0, 1]}
    elif change == "size of three":
        sample[1]["Resize"]["target_size"] = [3, 800, 1333]
    elif change == "no target size":
        del sample[1]["Resize"]["target_size"]
    elif change == "interp":
        sample[1]["Resize"]["interp"] = 9
    elif change == "arguments":
        sample[1]["Resize"] = 800
    elif change == "two pads":
        batch.append({"PadStride": {"stride": 32}})
    return sample, batch


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("unknown operator", "RandomFlip, which is not supported. Supported: Decode, Resize"),
        ("order", "NormalizeImage after Permute"),
        ("twice", "Resize twice"),
        ("unknown argument", "Resize has unknown arguments: random_range"),
        ("no resize", "no Resize"),
        ("no permute", "no Permute"),
        ("two operators in one entry", "one `- Operator"),
        ("zero std", "std is"),
        ("size of three", "target_size is"),
        ("no target size", "lacks target_size"),
        ("interp", "interp is 9"),
        ("arguments", "Resize has 800"),
        ("two pads", "both PadBatch and PadStride"),
    ],
)
def test_readers_that_cannot_be_reproduced(change: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as raised:
        Preprocess.from_reader(*reader_with(change))
    assert "\n" not in str(raised.value)


def test_json_round_trip() -> None:
    preprocess = Preprocess(target_size=(320, 416), keep_ratio=False, interp=2, pad_stride=64)
    assert build(Preprocess, json.loads(json.dumps(plain(preprocess)))) == preprocess
    with pytest.raises(DataError, match="unknown fields: colour"):
        build(Preprocess, plain(preprocess) | {"colour": "rgb"})
    with pytest.raises(DataError, match="lacks target_size"):
        build(Preprocess, {})


def test_infer_cfg_is_in_paddledetections_format() -> None:
    assert Preprocess.from_reader(*gfl_reader()).to_infer_cfg() == [
        {"type": "Resize", "target_size": [800, 1333], "keep_ratio": True, "interp": 1},
        {"type": "NormalizeImage", "mean": MEAN, "std": STD, "is_scale": True},
        {"type": "Permute"},
        {"type": "PadStride", "stride": 32},
    ]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.needs_ppdet
def test_infer_cfg_equals_paddledetections_export() -> None:
    export_utils = importlib.import_module("ppdet.engine.export_utils")

    class Dataset:
        def get_anno(self) -> None:
            return None

    ours = Preprocess.from_reader(*gfl_reader()).to_infer_cfg()
    sample, batch = gfl_reader()
    reader = {"sample_transforms": sample, "batch_transforms": batch}
    theirs, _ = export_utils._parse_reader(reader, Dataset(), "COCO", "GFL", [3, -1, -1])
    assert ours == theirs


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.needs_ppdet
def test_every_bit_equals_paddledetections_operators(tmp_path: Path) -> None:
    operators = importlib.import_module("ppdet.data.transform.operators")
    batch_operators = importlib.import_module("ppdet.data.transform.batch_operators")
    rng = np.random.default_rng(1)
    variants = [
        Preprocess(target_size=(800, 1333), pad_stride=32),
        Preprocess(target_size=(320, 320), keep_ratio=False, interp=2, pad_stride=32),
        Preprocess(target_size=(320, 416), interp=0, norm_type="none", pad_stride=64),
        Preprocess((256, 256), interp=4, mean=(123.675, 116.28, 103.53), std=(58.395, 57.12, 57.375), is_scale=False),
        Preprocess(target_size=(200, 300), interp=3, is_scale=False, norm_type="none", pad_stride=32),
    ]
    for preprocess in variants:
        samples, prepared = [], []
        for number in range(6):
            height, width = (int(side) for side in rng.integers(20, 700, 2))
            picture = image(height, width, seed=number)
            path = tmp_path / f"{number}.png"
            assert cv2.imwrite(str(path), picture[..., ::-1])
            sample: dict[str, Any] = {"im_file": str(path)}
            for operator in (
                operators.Decode(),
                operators.Resize(list(preprocess.target_size), preprocess.keep_ratio, preprocess.interp),
                operators.NormalizeImage(
                    list(preprocess.mean), list(preprocess.std), preprocess.is_scale, preprocess.norm_type
                ),
                operators.Permute(),
            ):
                sample = operator(sample)
            samples.append(sample)
            prepared.append(preprocess(picture))
            np.testing.assert_array_equal(prepared[-1].tensor, sample["image"])
            np.testing.assert_array_equal(np.array(prepared[-1].scale, np.float32), sample["scale_factor"])
        padded = batch_operators.PadBatch(preprocess.pad_stride)(samples)
        ours = preprocess.batch(prepared)
        np.testing.assert_array_equal(ours, np.stack([sample["image"] for sample in padded]))


# --- straight into a batch --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fixed", [False, True])
@pytest.mark.parametrize("size", [(48, 80), (80, 48), (37, 53), (64, 96), (200, 31), (640, 480)])
def test_into_a_batch_is_preparing_and_collating(size: tuple[int, int], fixed: bool) -> None:
    preprocess = Preprocess(target_size=(64, 96), pad_stride=32, fixed=fixed)
    picture = image(*size)
    prepared = preprocess(picture)
    batch = np.full((3, 3, *preprocess.input_size(*size)), np.nan, np.float32)
    assert preprocess.into(picture, batch[1]) == prepared.scale
    np.testing.assert_array_equal(batch[1], preprocess.batch([prepared])[0])
    assert np.isnan(batch[[0, 2]]).all(), "the other rows are left alone"


@pytest.mark.parametrize("fixed", [False, True])
def test_a_batch_of_images_is_preparing_and_collating(fixed: bool) -> None:
    preprocess = Preprocess(target_size=(64, 96), pad_stride=32, fixed=fixed)
    pictures = [image(*size) for size in ((48, 80), (80, 48), (37, 53))]
    prepared = [preprocess(picture) for picture in pictures]
    batch, scales = preprocess.batch_of(pictures)
    np.testing.assert_array_equal(batch, preprocess.batch(prepared))
    assert scales == [one.scale for one in prepared]


def test_into_refuses_what_does_not_hold_the_image() -> None:
    preprocess = Preprocess(target_size=(64, 96))
    with pytest.raises(ValueError, match="does not hold an image of 64 x 85"):
        preprocess.into(image(48, 64), np.zeros((3, 64, 84), np.float32))
    with pytest.raises(ValueError, match="out must be float32"):
        preprocess.into(image(48, 64), np.zeros((3, 64, 96), np.float64))
    with pytest.raises(DataError, match="too elongated"):
        preprocess.into(image(1, 3000), np.zeros((3, 64, 96), np.float32))


def test_a_reduced_image_has_the_geometry_of_the_whole() -> None:
    preprocess = Preprocess(target_size=(64, 96), pad_stride=32)
    whole = cv2.resize(image(6, 10), (515, 303), interpolation=cv2.INTER_CUBIC)
    prepared = preprocess(whole)
    out = np.zeros((3, *preprocess.input_size(303, 515)), np.float32)
    half = cv2.resize(whole, (258, 152), interpolation=cv2.INTER_AREA)
    assert preprocess.into(half, out, original=(303, 515)) == prepared.scale
    height, width = prepared.tensor.shape[1:]
    assert not out[:, height:].any() and not out[:, :, width:].any()
    # Close, not equal: other pixels.
    assert 0 < np.abs(out[:, :height, :width] - prepared.tensor).mean() < 0.1


@pytest.mark.parametrize(
    ("size", "factor"),
    [
        ((64, 96), 1),
        ((127, 190), 1),
        ((128, 192), 2),
        ((255, 300), 2),
        ((256, 384), 4),
        ((384, 256), 4),
        ((1e4, 1e4), 8),
    ],
)
def test_the_reduction_never_goes_below_the_target(size: tuple[int, int], factor: int) -> None:
    preprocess = Preprocess(target_size=(64, 96))
    height, width = map(int, size)
    assert preprocess.reduction(height, width) == factor
    resized = preprocess.resized_size(height, width)
    assert all(-(-side // factor) >= wanted for side, wanted in zip((height, width), resized, strict=True))
