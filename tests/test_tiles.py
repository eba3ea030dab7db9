"""Tiles: where they are cut, and their merged detections against the rule written out pair by pair, in every use."""

from __future__ import annotations

import json
import weakref
from contextlib import closing
from pathlib import Path
from typing import Any

import cv2
import demo_bundles
import numpy as np
import pytest
import share_cpus
from numpy.typing import NDArray
from recorded_progress import RecordedProgress
from sample_results import OK, altered, sample_results

from gfldeploy import Detector, audit, benchmark, compare, evaluate, merge_parts, predict_images
from gfldeploy.accuracy import coco_accuracy, coco_results
from gfldeploy.batch_detection import DetectionJob, DetectionWork, detect_images, task_of
from gfldeploy.batching.tiles import InTiles, Tiling
from gfldeploy.bench.inputs import tile_batches
from gfldeploy.bench.results import BenchResults
from gfldeploy.bench.table import COLUMNS, rows
from gfldeploy.bench.timing import Settings, measure, time_stages
from gfldeploy.bundle import Bundle
from gfldeploy.cluster.worker import Todo
from gfldeploy.detections import Detections, to_text
from gfldeploy.engines.base import EngineOptions, Tensors
from gfldeploy.engines.detect import detect_batch
from gfldeploy.engines.registry import open_engine
from gfldeploy.errors import DataError, UsageError
from gfldeploy.images.coco import CocoDataset
from gfldeploy.images.decode import read_image
from gfldeploy.nms import NmsParams, UserNms, merge_tiles
from gfldeploy.predict import sources
from gfldeploy.predict.ray_shards import RayShards
from gfldeploy.predict.shards import ShardJob
from gfldeploy.serialization import plain

pytest.importorskip("onnxruntime")

# (height, width) of images; the fourth is no larger than a tile, the fifth in one direction alone.
SIZES = [(150, 260), (260, 150), (100, 100), (40, 60), (40, 300)]
TILE, OVERLAP = (64, 96), 0.25


def cut_by_hand(height: int, width: int) -> list[tuple[int, int, int, int]]:
    """(top, left, height, width) of the tiles of `TILE` and `OVERLAP`, then of the whole image if there are several."""

    def starts(side: int, tile: int) -> list[int]:
        found, step = [0], tile - tile // 4
        while found[-1] + tile < side:
            found.append(min(found[-1] + step, side - tile))
        return found

    tiles = [(top, left, min(64, height), min(96, width)) for top in starts(height, 64) for left in starts(width, 96)]
    return tiles if len(tiles) == 1 else [*tiles, (0, 0, height, width)]


def brute_force(parts: list[Detections], cut: list[NDArray[np.bool_]], params: NmsParams) -> list[tuple[float, ...]]:
    """Box by box and pair by pair: (class, score, x1, y1, x2, y2) of what is left, best first."""
    extra = np.float32(0 if params.normalized else 1)
    agnostic = isinstance(params, UserNms) and params.class_agnostic
    every = [
        (-float(score), int(category), part, place, *box, bool(is_cut))
        for part, (one, mask) in enumerate(zip(parts, cut, strict=True))
        for place, (box, score, category, is_cut) in enumerate(
            zip(one.boxes, one.scores, one.classes, mask, strict=True)
        )
    ]
    every.sort(key=lambda row: row[:4])
    kept: list[tuple[Any, ...]] = []
    limits: dict[int, np.float32] = {}
    for row in every:
        limit = limits.get(0 if agnostic else row[1], np.float32(params.nms_threshold))
        if all(not (agnostic or other[1] == row[1]) or iou(row, other, extra) <= limit for other in kept):
            kept.append(row)
            limits[0 if agnostic else row[1]] = limit * np.float32(params.nms_eta) if limit > np.float32(0.5) else limit
    left = [row for row in kept if not row[-1]]
    whole = list(left)
    for row in kept:
        by_whole = (
            common(row, other, extra) > area(row, extra) / 2
            and other[0] <= row[0] * (0.5 if agnostic or other[1] == row[1] else 1)
            for other in whole
        )
        by_part = (
            other[-1]
            and (agnostic or other[1] == row[1])
            and common(row, other, extra) > min(area(row, extra), area(other, extra)) / 2
            for other in left
        )
        if row[-1] and not any(by_whole) and not any(by_part):
            left.append(row)
    left.sort(key=lambda row: row[:4])
    most = params.most if isinstance(params, UserNms) and params.most != -1 else len(left)
    return [(row[1], -row[0], *map(float, row[4:8])) for row in left[:most]]


def area(one: tuple[Any, ...], extra: np.float32) -> np.float32:
    x1, y1, x2, y2 = one[4:8]
    return np.float32((x2 - x1 + extra) * (y2 - y1 + extra))


def common(one: tuple[Any, ...], other: tuple[Any, ...], extra: np.float32) -> np.float32:
    """The area that two boxes share."""
    (ax1, ay1, ax2, ay2), (bx1, by1, bx2, by2) = one[4:8], other[4:8]
    if ax1 > bx2 or bx1 > ax2 or ay1 > by2 or by1 > ay2:
        return np.float32(0)
    return np.float32((min(ax2, bx2) - max(ax1, bx1) + extra) * (min(ay2, by2) - max(ay1, by1) + extra))


def iou(one: tuple[Any, ...], other: tuple[Any, ...], extra: np.float32) -> np.float32:
    shared = common(one, other, extra)
    return shared / (area(one, extra) + area(other, extra) - shared)


def found_by_hand(bundle: Bundle, image: NDArray[np.uint8]) -> list[tuple[float, ...]]:
    """What is in an image, tile by tile, each by itself."""
    manifest = bundle.manifest
    height, width = image.shape[:2]
    parts, cut = [], []
    with open_engine("onnxruntime", bundle, EngineOptions()) as engine:
        for top, left, h, w in cut_by_hand(height, width):
            prepared = manifest.preprocess(np.ascontiguousarray(image[top : top + h, left : left + w]))
            tensor = manifest.preprocess.batch([prepared])
            (one,) = detect_batch(engine, tensor, [prepared.scale], manifest.nms)
            x1, y1, x2, y2 = one.boxes.T
            inner = (left > 0, top > 0, left + w < width, top + h < height)
            near = (x1 <= 0.01 * w, y1 <= 0.01 * h, x2 >= 0.99 * w, y2 >= 0.99 * h)
            cut.append(np.any([side & at for side, at in zip(inner, near, strict=True)], axis=0))
            shift = np.array([left, top, left, top], np.float32)
            parts.append(Detections(one.boxes + shift, one.scores, one.classes))
    return brute_force(parts, cut, manifest.nms)


def as_rows(found: Detections) -> list[tuple[float, ...]]:
    columns = zip(found.classes.tolist(), found.scores.tolist(), found.boxes.tolist(), strict=True)
    return [(category, score, *box) for category, score, box in columns]


@pytest.fixture(scope="module")
def pictures() -> list[NDArray[np.uint8]]:
    random = np.random.default_rng(5)
    return [random.integers(0, 256, (*size, 3), np.uint8) for size in SIZES]


@pytest.fixture(scope="module")
def images(pictures: list[NDArray[np.uint8]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of them, and COCO annotations: an object where the detector finds one in each image, and one nowhere."""
    folder = tmp_path_factory.mktemp("tiles") / "images"
    folder.mkdir()
    listed: list[dict[str, Any]] = []
    boxes: list[dict[str, Any]] = []
    for number, picture in enumerate(pictures, start=1):
        assert cv2.imwrite(str(folder / f"{number}.png"), picture[..., ::-1])
        height, width = picture.shape[:2]
        listed.append({"id": number, "file_name": f"{number}.png", "height": height, "width": width})
        for side in (47, 20):
            box = {"id": 2 * number + (side == 20), "image_id": number, "category_id": 1, "iscrowd": 0}
            boxes.append({**box, "bbox": [0, 0, side, side]})
    categories = [{"id": number, "name": name} for number, name in enumerate(("box", "ball"), start=1)]
    content = {"images": listed, "annotations": boxes, "categories": categories}
    (folder.parent / "annotations.json").write_text(json.dumps(content))
    return folder


@pytest.mark.parametrize("size", SIZES)
def test_where_images_are_cut(size: tuple[int, int]) -> None:
    assert [tuple(one) for one in Tiling(TILE, OVERLAP).regions(*size)] == cut_by_hand(*size)


def test_tiles_that_cannot_be() -> None:
    assert Tiling.of(None, None) is None and Tiling.of((64, 96), None) == Tiling((64, 96), 0.2)
    assert str(Tiling((64, 96), 0.2)) == "tiles of 64x96"
    for tile, overlap in ((None, 0.2), ((0, 96), None), ((64, 96), 0.95), ((64, 96), float("nan"))):
        with pytest.raises(UsageError):
            Tiling.of(tile, overlap)
    wrong: tuple[Any, ...] = (640, (64,), (64.0, 96.0), "64x96")
    for tile in wrong:
        with pytest.raises(UsageError, match="whole numbers of pixels"):
            Tiling.of(tile, None)
    with pytest.raises(
        DataError, match=r"an image of 20000 x 20000 px makes 4,00\d,00\d tiles of 10x10 .*larger tiles"
    ):
        Tiling((10, 10), 0).regions(20_000, 20_000)


@pytest.mark.parametrize("eta", [1.0, 0.8])
@pytest.mark.parametrize("normalized", [True, False])
@pytest.mark.parametrize("pairs_at_once", [7, 1 << 20])
def test_what_is_left_is_what_the_rule_says(
    eta: float, normalized: bool, pairs_at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gfldeploy.nms._PAIRS", pairs_at_once)
    monkeypatch.setattr("gfldeploy.nms._BAND_BOXES", min(pairs_at_once, 1 << 11))
    random = np.random.default_rng(24)
    params = NmsParams(0.05, 0.6, 100, 5, normalized, eta)
    turned = UserNms(0.05, 0.6, 100, 30, normalized, eta, class_agnostic=True, most=30)
    for counts in ([0, 0], [1, 0], [40, 60, 20], [90, 1, 30]):
        parts, cut = [], []
        for count in counts:
            corner = random.uniform(0, 80, (count, 2))
            boxes = np.concatenate([corner, corner + random.choice([3, 10, 40], (count, 1))], 1).round(0)
            scores = random.uniform(0.05, 1, count).round(1)  # equal ones too
            order = np.argsort(-scores, kind="stable")
            classes = random.integers(0, 3, count)
            parts.append(Detections(boxes.astype(np.float32)[order], scores.astype(np.float32)[order], classes))
            cut.append(random.random(count) < 0.4)
        found = merge_tiles(parts, cut, params)
        assert as_rows(found) == brute_force(parts, cut, params)
        assert as_rows(merge_tiles(parts, cut, turned)) == brute_force(parts, cut, turned)
        assert sum(counts) < 10 or 10 < len(found) < sum(counts) - 10  # `keep_top_k` is no limit, and some go


@pytest.mark.parametrize("batch_size", [1, 4])
def test_a_detector_finds_what_its_tiles_hold(
    batch_size: int, tiny_bundle: Path, pictures: list[NDArray[np.uint8]], monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = Bundle.open(tiny_bundle)
    given = {"tile": TILE, "overlap": OVERLAP, "batch_size": batch_size, "engine": "onnxruntime"}
    with Detector(tiny_bundle, **given) as detector:  # type: ignore[arg-type]
        infer, sizes = detector._engine.infer, list[int]()

        def counted(inputs: Tensors) -> dict[str, NDArray[np.float32]]:
            sizes.append(len(inputs["image"]))
            return infer(inputs)

        monkeypatch.setattr(detector._engine, "infer", counted)
        found = detector.detect(pictures, threshold=0)
    for one, picture in zip(found, pictures, strict=True):
        expected = found_by_hand(bundle, picture)
        np.testing.assert_allclose(np.array(as_rows(one)), np.array(expected), rtol=1e-6, atol=1e-4)
    assert max(map(len, found)) > 3
    # Batches hold tiles of one image and of one input size, and the whole image, of another, is one by itself.
    counts = [len(cut_by_hand(*size)) - 1 for size in SIZES]
    assert sum(sizes) == sum(counts) + len(SIZES)
    if batch_size == 1:
        with Detector(tiny_bundle, engine="onnxruntime") as plain:
            (small,) = plain.detect([pictures[3]], threshold=0)
        assert as_rows(small) == as_rows(found[3]), "an image that is not cut is detected in as without tiles"


def test_an_image_is_decoded_once_and_let_go(tiny_bundle: Path, images: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read, alive = [], []

    def reading(path: Path, reduction: int = 1) -> NDArray[np.uint8]:
        image = read_image(path, reduction)
        read.append(path.name)
        alive.append(weakref.ref(image))
        return image

    monkeypatch.setattr(sources, "read_image", reading)
    paths = [images / f"{number}.png" for number in (1, 2, 5)] * 8
    most = 0
    with Detector(tiny_bundle, engine="onnxruntime", tile=TILE, overlap=OVERLAP) as detector:
        for _ in detector.stream(paths):
            most = max(most, sum(one() is not None for one in alive))
    assert read == [path.name for path in paths]
    assert most <= 4, "each has more tiles than there are threads: those of two images are under way"


def test_prediction_in_tiles_is_one_however_it_is_done(tiny_bundle: Path, images: Path, tmp_path: Path) -> None:
    video = tmp_path / "clip.avi"
    writer = cv2.VideoWriter(str(video), cv2.VideoWriter.fourcc(*"MJPG"), 10, (200, 120))
    for number in range(8):
        writer.write(np.full((120, 200, 3), 5 * number, np.uint8))
    writer.release()
    (tmp_path / "bad.jpg").write_bytes(b"no picture")
    files = sorted(images.iterdir())
    inputs = [*files, tmp_path / "bad.jpg", video]
    for copy in range(6):  # shards are of 32 inputs
        inputs += [tmp_path / f"{copy}{one.name}" for one in files]
        for file in files:
            (tmp_path / f"{copy}{file.name}").write_bytes(file.read_bytes())
    given: dict[str, Any] = {"inputs": inputs, "engine": "onnxruntime", "tile": TILE, "overlap": OVERLAP, "threads": 1}
    given["batch_size"] = 1
    found = predict_images(tiny_bundle, output=tmp_path / "one", **given)
    assert (found.images, found.failed) == (len(inputs) - 1 + 8, 1)
    note = json.loads((tmp_path / "one/predict.json").read_text())
    assert (note["tile"], note["overlap"]) == ([64, 96], 0.25)
    lines = [json.loads(line) for line in (tmp_path / "one/detections.jsonl").read_text().splitlines()]
    with Detector(tiny_bundle, engine="onnxruntime", tile=TILE, overlap=OVERLAP) as detector:
        for line, alone in zip(lines, detector.detect(files), strict=False):
            assert [item["score"] for item in line["detections"]] == alone.scores.tolist()
    with share_cpus.two_cpus():
        again = predict_images(tiny_bundle, output=tmp_path / "two", **{**given, "streams": 2, "batch_size": 4})
    assert again.detections == found.detections

    class Stops(RecordedProgress):
        def step(self, label: str, done: int, total: int) -> None:
            if done == 9:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        predict_images(tiny_bundle, output=tmp_path / "resumed", progress=Stops(), **given)
    assert predict_images(tiny_bundle, output=tmp_path / "resumed", **given).kept == 9
    assert demo_bundles.snapshot(tmp_path / "resumed") == demo_bundles.snapshot(tmp_path / "one")
    parts = [tmp_path / f"part{number}" for number in (1, 2)]
    for number, part in enumerate(parts, start=1):
        predict_images(tiny_bundle, output=part, shard=(number, 2), **given)
    merge_parts(parts, output=tmp_path / "merged")
    assert demo_bundles.snapshot(tmp_path / "merged") == demo_bundles.snapshot(tmp_path / "one")
    predict_images(tiny_bundle, output=tmp_path / "other", shard=(2, 2), **{**given, "overlap": 0.5})
    with pytest.raises(DataError, match=r"is not of the run of .*: other overlap"):
        merge_parts([parts[0], tmp_path / "other"], output=tmp_path / "mixed")
    with pytest.raises(UsageError, match="Leave --decode fast out"):
        predict_images(tiny_bundle, output=tmp_path / "fast", decode="fast", **given)


def test_eval_measures_what_a_detector_finds(tiny_bundle: Path, images: Path) -> None:
    data = images.parent / "annotations.json"
    dataset = CocoDataset.load(data, images)
    with Detector(tiny_bundle, engine="onnxruntime", tile=TILE, overlap=OVERLAP) as detector:
        found = detector.detect([image.path for image in dataset.images], threshold=0)
        categories = dataset.class_to_category(detector.classes)
    results = [
        row for image, one in zip(dataset.images, found, strict=True) for row in coco_results(image.id, one, categories)
    ]
    expected = coco_accuracy(dataset, results, categories)
    for batch_size, order in ((1, "listed"), (4, "sorted")):
        measured = evaluate(
            tiny_bundle, data=data, engine="onnxruntime", tile=TILE, overlap=OVERLAP, batch_size=batch_size,
            order=order,  # type: ignore[arg-type]
        )  # fmt: skip
        assert measured.accuracy == expected and measured.tiling == Tiling(TILE, OVERLAP)
    assert evaluate(tiny_bundle, data=data, engine="onnxruntime").accuracy.detections == len(SIZES) < len(results)


def test_channels_without_a_class_take_no_part_in_merging(tiny_bundle: Path, images: Path) -> None:
    """GFLv2 has one more channel than classes, and what is there is no object."""
    bundle = Bundle.open(tiny_bundle)
    manifest, nms = bundle.manifest, NmsParams(0.0, 0.6, 100, 100)
    with open_engine("onnxruntime", bundle, EngineOptions()) as engine:
        for classes, expected in ((("box", "ball"), {0, 1}), (("box",), {0})):
            ((_, found),) = detect_images(
                engine, [images / "1.png"], manifest.preprocess, nms, [[0]],
                cut=InTiles(Tiling(TILE, OVERLAP), 1), classes=classes,
            )  # fmt: skip
            assert set(found.classes.tolist()) == expected


def test_workers_elsewhere_find_the_same(tiny_bundle: Path, images: Path) -> None:
    """What a Ray worker runs, in this process: jobs, tasks and values went through JSON."""
    paths, cut = sorted(images.iterdir()), InTiles(Tiling(TILE, OVERLAP), 2)
    with Detector(tiny_bundle, engine="onnxruntime", tile=TILE, overlap=OVERLAP, batch_size=2) as detector:
        expected = [to_text(one) for one in detector.detect(paths, threshold=0)]
        job = ShardJob.of(detector.choice, EngineOptions(), reduced=False, cut=cut)
    bundle = Bundle.open(tiny_bundle)
    task = json.loads(json.dumps({"inputs": list(map(str, paths)), "bytes": None, "sizes": [None] * 5}))
    setting = {"job": json.loads(json.dumps(plain(job))), "own_cache": False, "folder": str(images)}
    work = RayShards(setting, tiny_bundle)
    with closing(work), closing(work.run([Todo(7, task, 1)])) as values:
        found = list(values)
    assert found.pop() == (7, []) and [value[0]["detections"] for _, value in found] == expected[1:]
    evaluated = DetectionJob("onnxruntime", EngineOptions().to_plain(), (64, 96), cut=cut)
    assert bundle.manifest.preprocess.target_size == evaluated.input_size
    units = task_of([[0], [1], [2], [3], [4]], paths)
    with DetectionWork(json.loads(json.dumps(plain(evaluated))), tiny_bundle) as unit_work:
        answers = [value for _, value in unit_work.run([Todo(0, units)])]
    assert [value[0][0] for value in answers[:-1]] == expected


def test_audit_counts_tiles_and_inferences(tiny_bundle: Path, images: Path) -> None:
    found = audit(data=images, config_or_bundle=tiny_bundle, batch_sizes=[1, 4], tile=TILE, overlap=OVERLAP)
    in_tiles = found.in_tiles
    assert in_tiles is not None and found.images == in_tiles.images == len(SIZES)
    preprocess = Bundle.open(tiny_bundle).manifest.preprocess
    cuts = [cut_by_hand(*size) for size in SIZES]
    sizes = [[preprocess.input_size(h, w) for _, _, h, w in cut] for cut in cuts]
    assert in_tiles.inputs == sum(map(len, cuts)) / 5 and in_tiles.most_inputs == max(map(len, cuts))
    assert in_tiles.pixels == sum(h * w for some in sizes for h, w in some) / 5
    resized = [preprocess.resized_size(h, w) for cut in cuts for _, _, h, w in cut]
    assert in_tiles.rounding == pytest.approx(5 * in_tiles.pixels / sum(h * w for h, w in resized))
    batches = [sum(-(-some.count(size) // 4) for some in sizes for size in set(some)), sum(map(len, sizes))]
    assert [row.inferences for row in in_tiles.rows] == [batches[1] / 5, batches[0] / 5]
    assert {row.padding for row in in_tiles.rows} == {1.0}
    assert in_tiles.answer[0].startswith(
        f"In tiles of 64x96 that overlap by 0.25 an image is {in_tiles.inputs:.3g} inputs"
    )
    small = audit(data=images, config_or_bundle=tiny_bundle, batch_sizes=(1,), tile=(4, 4)).in_tiles
    assert small and " inputs of the network, " in small.answer[0] and "e+" not in " ".join(small.answer)


def test_bench_times_images_with_all_their_tiles(tiny_bundle: Path, images: Path) -> None:
    bundle, paths = Bundle.open(tiny_bundle), sorted(images.iterdir())
    cut = InTiles(Tiling(TILE, OVERLAP), 4)
    of_images = tile_batches(paths, bundle.manifest.preprocess, cut)
    flat = [batch for some in of_images for batch in some]
    assert sum(len(batch.places) for batch in flat) == sum(len(cut_by_hand(*size)) for size in SIZES)
    places = iter(range(len(flat)))
    queries = [[next(places) for _ in some] for some in of_images]
    with open_engine("onnxruntime", bundle, EngineOptions()) as engine:
        samples = measure(engine, [one.inputs for one in flat], Settings(0, 5, 0), images=queries)
        stages = time_stages(engine, [[path] for path in paths], bundle, Settings(0, 1, 0), cut)
    assert (samples.images, samples.batch_size) == (len(samples.latency_ms), 1) and samples.images % 5 == 0
    assert len(stages.end_to_end_ms) == 5 and min(stages.inference_ms) > 0
    assert sum(stages.end_to_end_ms) >= sum(map(sum, (stages.decode_ms, stages.preprocess_ms, stages.inference_ms)))


def test_a_cell_of_tiles_is_another_cell() -> None:
    whole, in_tiles = OK, altered(OK, tiling=Tiling((320, 512)))
    assert in_tiles.cell.name() == whole.cell.name().replace(",", " in tiles of 320x512,", 1)
    results = sample_results()
    kept = BenchResults(results.created, results.machine, results.data, results.settings, (whole, in_tiles))
    assert BenchResults.from_dict(kept.to_dict()) == kept
    column = next(one for one in COLUMNS if one.key == "tiles")
    shown = rows(kept)
    assert [column.value(row) for row in shown] == [None, "320x512, overlap 0.2"]
    speeds = [row.file_images_per_s or 0 for row in shown]
    assert speeds[0] == pytest.approx(speeds[1] * whole.cell.batch_size)  # the same times, of one image each
    alone = BenchResults(results.created, results.machine, results.data, results.settings, (in_tiles,))
    assert [pair.cell.tiling for pair in compare(kept, alone).pairs] == [Tiling((320, 512))]
    for wrong in ({"end_to_end": True}, {"scenario": "server", "rate": 1.0, "policy": "adaptive"}):
        with pytest.raises(ValueError, match="tiles are measured in networks"):
            altered(in_tiles, **wrong)


@pytest.mark.slow
def test_bench_measures_whole_images_and_tiles(tiny_bundle: Path, images: Path, tmp_path: Path) -> None:
    found = benchmark(
        tiny_bundle, data=images.parent / "annotations.json", engines=["onnxruntime"], precisions=["fp32"],
        batch_sizes=[4], scenarios=["multi-stream"], rounds=1, min_seconds=0.1, peak=False, tile=TILE,
        overlap=OVERLAP, output=tmp_path / "results.json",
    )  # fmt: skip
    whole, in_tiles = found.cells
    assert (whole.cell.tiling, in_tiles.cell.tiling) == (None, Tiling(TILE, OVERLAP))
    run = in_tiles.runs[0]
    preprocess = Bundle.open(tiny_bundle).manifest.preprocess
    inputs = [preprocess.input_size(h, w) for size in SIZES for _, _, h, w in cut_by_hand(*size)]
    counted = [tuple(map(int, shape.split("x"))) for shape in run.shapes for _ in range(run.shapes[shape])]
    assert sum(count * h * w for count, _, h, w in counted) == sum(h * w for h, w in inputs)
    assert run.padding_ratio and run.padding_ratio < 1.5 and run.mixed_batches == 0
    assert whole.accuracy and in_tiles.accuracy and in_tiles.accuracy.detections > whole.accuracy.detections
    measured = evaluate(
        tiny_bundle, data=images.parent / "annotations.json", engine="onnxruntime", tile=TILE, overlap=OVERLAP
    )
    assert in_tiles.accuracy == measured.accuracy
    assert whole.cost and in_tiles.cost
    assert in_tiles.cost.macs == in_tiles.cost.padded_macs > whole.cost.macs
    assert "tiles of 64x96" in (tmp_path / "results.html").read_text()
