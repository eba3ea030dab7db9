"""The mean work of the images of a benchmark, by hand on the tiny detector: one convolution, of stride 8."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from gfldeploy.bench.cost import count_cost
from gfldeploy.bundle import Bundle
from gfldeploy.errors import BundleError

pytest.importorskip("onnx")

WEIGHTS = 6 * 3 * 3 * 3


def macs(height: int, width: int) -> float:
    return height // 8 * (width // 8) * WEIGHTS


def activations(height: int, width: int) -> float:
    return 3 * height * width + 6 * (height // 8) * (width // 8)


@pytest.fixture
def bundle(tiny_bundle: Path) -> Bundle:
    return Bundle.open(tiny_bundle)


def test_one_image_alone(bundle: Bundle) -> None:
    found = count_cost(bundle, "fp32", [(64, 96)], {(1, 64, 96): 1})
    assert found.macs == found.padded_macs == macs(64, 96)
    assert found.traffic_mb == pytest.approx((activations(64, 96) + WEIGHTS) * 4 / 1e6)


def test_an_image_is_padded_to_what_the_network_needs_and_a_batch_to_its_largest(bundle: Bundle) -> None:
    found = count_cost(bundle, "fp32", [(64, 96), (90, 60)], {(2, 96, 96): 1})
    assert found.macs == (macs(64, 96) + macs(96, 64)) / 2
    assert found.padded_macs == macs(96, 96)


def test_batches_count_by_their_images(bundle: Bundle) -> None:
    found = count_cost(bundle, "int8", [(64, 96)], {(1, 64, 96): 2, (4, 96, 96): 3})
    assert found.padded_macs == pytest.approx((2 * macs(64, 96) + 12 * macs(96, 96)) / 14)
    traffic = 2 * (activations(64, 96) + WEIGHTS) + 12 * (activations(96, 96) + WEIGHTS / 4)
    assert found.traffic_mb == pytest.approx(traffic / 14 / 1e6)


def test_a_network_of_one_size_runs_at_that(tiny_bundle: Path, bundle: Bundle) -> None:
    fixed = Bundle(tiny_bundle, replace(bundle.manifest, preprocess=replace(bundle.manifest.preprocess, fixed=True)))
    assert count_cost(fixed, "fp32", [(40, 40)], {(1, 64, 96): 1}).macs == macs(64, 96)


def test_nothing_to_count(bundle: Bundle) -> None:
    with pytest.raises(ValueError, match="at least one"):
        count_cost(bundle, "fp32", [], {(1, 64, 96): 1})
    with pytest.raises(ValueError, match="at least one"):
        count_cost(bundle, "fp32", [(64, 96)], {})


def test_a_graph_that_cannot_be_read(tiny_bundle: Path, tmp_path: Path) -> None:
    damaged = Bundle.open(Path(shutil.copytree(tiny_bundle, tmp_path / "damaged")))
    (damaged.directory / "onnx/model.onnx").write_bytes(b"\xff" * 99)
    with pytest.raises(BundleError, match=r"model\.onnx"):
        count_cost(damaged, "fp32", [(32, 224)], {(1, 32, 224): 1})  # a size that no other test has counted
