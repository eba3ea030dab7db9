"""What batches would cost, from the heads of real files and from sizes alone."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pytest
from recorded_progress import RecordedProgress

from gfldeploy.batching.audit import Audit, AuditRow, Survey, audit_sizes, survey
from gfldeploy.batching.buckets import ORDERS, Order, Size, area
from gfldeploy.errors import DataError
from gfldeploy.images.preprocess import Preprocess

LANDSCAPE, PORTRAIT = (800, 1216), (1216, 800)
AS_IS = Preprocess(target_size=LANDSCAPE, pad_stride=32)


def of(*sizes: Size) -> Survey:
    """Images that are resized to these sizes, all of them multiples of the stride."""
    return Survey((Path(),) * len(sizes), sizes, sizes, sizes, ())


def row(found: Audit, batch_size: int, order: Order) -> AuditRow:
    (one,) = (one for one in found.rows if (one.batch_size, one.order) == (batch_size, order))
    return one


def write(folder: Path, name: str, height: int, width: int) -> Path:
    path = folder / name
    assert cv2.imwrite(str(path), np.zeros((height, width, 3), np.uint8))
    return path


def test_both_orientations_cost_half_as_much_again() -> None:
    found = audit_sizes(
        of(LANDSCAPE, PORTRAIT),
        [1, 2],
        macs=lambda sizes: {size: 10 * area(size) for size in sizes},
        activations=lambda sizes: {size: 39 * area(size) for size in sizes},
    )
    listed = row(found, 2, "listed")
    assert listed == AuditRow(
        batch_size=2,
        order="listed",
        batches=1,
        mixed=1,
        padding=1.52,
        macs=10 * 1216 * 1216,
        largest=(2, 1216, 1216),
        input_bytes=2 * 3 * 1216 * 1216 * 4,
        mean_input_bytes=2 * 3 * 1216 * 1216 * 4,
        activation_bytes=2 * 39 * 1216 * 1216 * 4,
    )
    bucketed = row(found, 2, "bucketed")
    assert (bucketed.padding, bucketed.mixed, bucketed.batches, bucketed.largest) == (1.0, 0, 2, (1, *LANDSCAPE))
    assert found.macs == 10 * 800 * 1216 == bucketed.macs == row(found, 1, "listed").macs
    assert (found.images, found.sizes, found.rounding, found.limited) == (2, 2, 1.0, {1: 1.52, 2: 1.0})


def test_every_row_is_there_and_batch_1_pads_nothing() -> None:
    found = audit_sizes(of(LANDSCAPE, PORTRAIT, LANDSCAPE, (800, 1088)), [1, 2, 16])
    assert [(one.batch_size, one.order) for one in found.rows] == [(n, order) for n in (1, 2, 16) for order in ORDERS]
    assert all(one.padding == 1.0 and one.batches == 4 for one in found.rows if one.batch_size == 1)
    assert all(one.macs is None and one.activation_bytes is None for one in found.rows)
    assert row(found, 16, "bucketed").batches == 3


def test_memory_is_that_of_the_batch_with_the_most_pixels() -> None:
    found = row(audit_sizes(of((32, 64), (32, 64), (64, 64)), [2]), 2, "listed")
    assert found.largest == (2, 32, 64), "two of 32x64 are as many pixels as one of 64x64, and come first"
    assert (found.input_bytes, found.mean_input_bytes) == (2 * 32 * 64 * 12, 2 * 32 * 64 * 12)


def test_few_buckets_limit_the_bucketed_order_alone() -> None:
    sizes = of(LANDSCAPE, PORTRAIT, (800, 1088))
    assert row(audit_sizes(sizes, [2], most_buckets=1), 2, "bucketed").largest[1:] == (1216, 1216)
    assert row(audit_sizes(sizes, [2], most_buckets=2), 2, "bucketed").largest == (2, 800, 1216)
    assert row(audit_sizes(sizes, [2], most_buckets=1), 2, "sorted") == row(audit_sizes(sizes, [2]), 2, "sorted")


def test_the_seed_is_of_the_shuffled_order_alone() -> None:
    sizes = of(*([LANDSCAPE, PORTRAIT, (800, 1088)] * 20))
    first, second = (audit_sizes(sizes, [4], seed=seed) for seed in (0, 1))
    assert first == audit_sizes(sizes, [4], seed=0)
    assert row(first, 4, "shuffled") != row(second, 4, "shuffled")
    assert row(first, 4, "listed") == row(second, 4, "listed")


def test_no_images() -> None:
    with pytest.raises(ValueError, match="at least one size"):
        audit_sizes(of(), [1])


def test_sizes_of_files(tmp_path: Path) -> None:
    paths = [write(tmp_path, "a.jpg", 600, 900), write(tmp_path, "b.png", 900, 600), write(tmp_path, "c.bmp", 5, 5)]
    progress = RecordedProgress()
    found = survey(paths, AS_IS, progress)
    assert found.original == ((600, 900), (900, 600), (5, 5))
    assert found.resized == ((800, 1200), (1200, 800), (800, 800)), "smaller than the stride, and enlarged"
    assert found.inputs == ((800, 1216), (1216, 800), (800, 800))
    assert found.left_out == () and found.paths == tuple(paths)
    assert progress.steps == [("reading sizes", done, 3) for done in (1, 2, 3)]
    assert audit_sizes(found, [1]).rounding == (2 * 800 * 1216 + 800 * 800) / (2 * 800 * 1200 + 800 * 800)


def test_what_cannot_be_used_is_left_out(tmp_path: Path) -> None:
    good = write(tmp_path, "good.jpg", 32, 48)
    narrow = write(tmp_path, "narrow.png", 1, 10_000)
    bad = tmp_path / "bad.jpg"
    bad.write_bytes(b"no picture")
    found = survey([bad, good, narrow, tmp_path / "absent.jpg"], AS_IS)
    assert found.paths == (good,)
    assert [one.path.name for one in found.left_out] == ["bad.jpg", "narrow.png", "absent.jpg"]
    assert all(one.path.name in one.reason for one in found.left_out)
    assert "too elongated" in found.left_out[1].reason
    with pytest.raises(DataError, match=r"none of 2 images can be used: .*bad\.jpg"):
        survey([bad, narrow], AS_IS)


def test_a_fixed_input_size_costs_bars_and_no_padding(tmp_path: Path) -> None:
    paths = [write(tmp_path, "a.jpg", 48, 96), write(tmp_path, "b.jpg", 96, 48)]
    found = audit_sizes(survey(paths, Preprocess(target_size=(64, 96), fixed=True)), [1, 2])
    assert {one.padding for one in found.rows} == {1.0}
    assert (found.sizes, found.rounding) == (1, 2 * 64 * 96 / (48 * 96 + 64 * 32))
    assert row(found, 2, "listed").mixed == 0, "the inputs are all of one size"
