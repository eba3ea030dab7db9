"""Whole batches from file to boxes, on a real engine: in whole passes, for as long as asked."""

from __future__ import annotations

from pathlib import Path

import pytest

from gfldeploy.batching.buckets import STREAM_ORDERS
from gfldeploy.bench.inputs import make_batches, prepare_images
from gfldeploy.bench.timing import Settings, time_stages
from gfldeploy.bundle import Bundle
from gfldeploy.engines import base
from gfldeploy.engines.base import EngineOptions
from gfldeploy.engines.registry import open_engine
from gfldeploy.images.coco import CocoDataset

pytest.importorskip("onnxruntime")


@pytest.mark.parametrize(("settings", "batches"), [((0, 1, 0), 3), ((0, 1, 60, 7), 9), ((0, 1, 0, 7), 3)])
def test_whole_passes_until_the_time_and_the_count_are_reached(
    settings: tuple[float, ...], batches: int, tiny_bundle: Path, tiny_coco: Path
) -> None:
    least, count, most, *tail = settings
    rule = Settings(least, int(count), most, tail_count=int(tail[0]) if tail else 0)
    bundle, paths = Bundle.open(tiny_bundle), [image.path for image in CocoDataset.load(tiny_coco).images]
    with open_engine("onnxruntime", bundle, EngineOptions("fp32", "cpu", 1)) as engine:
        found = time_stages(engine, [paths[:2], paths[2:4], paths[4:]], bundle, rule)
    assert len(found.end_to_end_ms) == len(found.decode_ms) == batches
    assert all(whole > decode > 0 for whole, decode in zip(found.end_to_end_ms, found.decode_ms, strict=True))


def test_streams_take_batches_by_turns(tiny_bundle: Path, tiny_coco: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(base, "usable_threads", lambda: 2)
    bundle, paths = Bundle.open(tiny_bundle), [image.path for image in CocoDataset.load(tiny_coco).images]
    with open_engine("onnxruntime", bundle, EngineOptions(streams=2)) as engine:
        found = time_stages(engine, [[path] for path in paths], bundle, Settings(0, 1, 60, tail_count=7))
    assert len(found.end_to_end_ms) >= 11  # a second pass; one batch may be under way
    assert min(found.decode_ms) > 0


def test_batches_know_their_images_and_whether_sizes_are_mixed(tiny_bundle: Path, tiny_coco: Path) -> None:
    preprocess = Bundle.open(tiny_bundle).manifest.preprocess
    images = prepare_images([image.path for image in CocoDataset.load(tiny_coco).images], preprocess)
    sizes = [preprocess.padded_size(*image.tensor.shape[1:]) for image in images]
    listed, bucketed = (make_batches(images, preprocess, 4, order) for order in STREAM_ORDERS)
    assert [batch.places for batch in listed] == [(0, 1, 2, 3), (4, 5, 0, 1)]
    assert [batch.formed.mixed for batch in listed] == [len({sizes[k] for k in batch.places}) > 1 for batch in listed]
    assert any(batch.formed.mixed for batch in listed) and not any(batch.formed.mixed for batch in bucketed)
    assert {place for batch in bucketed for place in batch.places} == set(range(6))
    for batch in bucketed:
        assert {sizes[place] for place in batch.places} == {batch.tensor.shape[2:]}
