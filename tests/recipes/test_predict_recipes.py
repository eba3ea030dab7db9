"""The recipes of `gfldeploy predict`, on the tiny detector."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("onnxruntime")
pytestmark = pytest.mark.slow

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


def run(name: str, folder: Path, *arguments: object) -> tuple[str, dict[str, Any]]:
    """What it prints, and what it writes."""
    script = folder / name
    script.write_text((BENCHMARKS / name).read_text())  # it writes beside itself
    command = [sys.executable, str(script), "--name", "tiny", "--machine", "here", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    record: dict[str, Any] = json.loads((folder / f"results/here/checks/tiny_{script.stem}.json").read_text())
    assert str(folder) not in json.dumps(record)
    return done.stdout, record


def test_killed_and_watched(tiny_bundle: Path, tiny_coco: Path, tmp_path: Path) -> None:
    images = ("--images", tiny_coco.parent / "images")
    options = ("--count", 40, "--kills", 2, "--", "--batch-size", 2)
    shown, record = run("predict_robust.py", tmp_path, "--source", tiny_bundle, *images, *options)
    assert "killed after" in shown and "the same bytes" in shown
    assert record["same"] and record["images"] == 40 and set(record["files"]) >= {"detections.jsonl", "coco.json"}


def test_parts_merge_and_memory_does_not_grow(tiny_bundle: Path, tiny_coco: Path, tmp_path: Path) -> None:
    images = ("--images", tiny_coco.parent / "images")
    options = ("--count", 70, "--parts", 3, "--orders", 2, "--memory", 40, 80)
    shown, record = run("shards.py", tmp_path, "--bundle", tiny_bundle, *images, *options)
    parts, memory = record["parts"], record["memory"]
    assert parts["same"] and parts["missing_named"] == 3 and parts["images"] == 70
    assert [one["images"] for one in memory] == [40, 80] and all(one["same"] for one in memory)
    assert "'predict_mb': " in shown


def test_what_the_pipeline_costs(tiny_bundle: Path, tiny_coco: Path, tmp_path: Path) -> None:
    options = ("--data", tiny_coco, "--images", 4, "--rounds", 2, "--batch-size", 2)
    shown, record = run("predict_overhead.py", tmp_path, "--source", tiny_bundle, *options)
    assert "| network | " in shown and "| in turn | " in shown
    assert {name: len(times) for name, times in record["seconds"].items()} == dict.fromkeys(
        ("network", "pipeline", "in_turn"), 2
    )


def test_the_time_of_tiles(tiny_bundle: Path, tmp_path: Path) -> None:
    options = ("--engine", "onnxruntime", "--data", tmp_path / "data", "--scenes", 1, "--timed", 1, "--rounds", 1)
    tiles = ("--tiles", "800x800", "1200x1600", "--parts", "time")
    _, record = run("tiles.py", tmp_path, "--bundle", tiny_bundle, *options, *tiles)
    assert record["time"]["scenes"] == 1 and record["overlap"] == 0.2
    inputs = {name: record["time"][name]["inputs"] for name in ("whole", "800x800", "1200x1600")}
    assert inputs["whole"] == 1 < inputs["1200x1600"] < inputs["800x800"]


def test_predict_beside_a_plain_script(tiny_bundle: Path, tmp_path: Path) -> None:
    pytest.importorskip("openvino")
    (tmp_path / "rivals.py").write_text((BENCHMARKS / "rivals.py").read_text())
    options = ("--images", 4, "--rounds", 1, "--size", 64, 96, "--before", BENCHMARKS.parent, "--no-network")
    for more in (), ("--append",):
        shown, record = run(
            "files_to_boxes.py", tmp_path, "--bundle", tiny_bundle, *options, *more, "--", "--batch-size", 2
        )
    assert "| plain script | " in shown and "| network alone | " in shown
    assert {name: len(rounds) for name, rounds in record["rounds"].items()} == dict.fromkeys(
        ("plain script", "predict", "predict before", "network alone"), 2
    )


def test_the_network_beside_benchmark_app(tiny_bundle: Path, tmp_path: Path) -> None:
    pytest.importorskip("openvino")
    (tmp_path / "rivals.py").write_text((BENCHMARKS / "rivals.py").read_text())
    options = ("--no-files", "--rounds", 1, "--size", 64, 96, "--seconds", 0.2, "--batch-sizes", 2)
    shown, record = run("files_to_boxes.py", tmp_path, "--bundle", tiny_bundle, *options)
    rates = record["network_images_per_s"]
    assert next(iter(rates)) == "benchmark_app, throughput hint" and "onnxruntime, one session" in rates
    assert {"gfldeploy, openvino fp32, 1 stream, batch 2", "gfldeploy, onnxruntime fp32, 1 stream, batch 2"} <= set(
        rates
    )
    assert all(len(each) == 1 and each[0] > 0 for each in rates.values())
    assert all(f"| {name} | " in shown for name in rates)


def test_what_fast_decoding_changes(tiny_bundle: Path, tiny_coco: Path, tmp_path: Path) -> None:
    options = ("--data", tiny_coco, "--factors", 1, 4, "--timed", 2, "--rounds", 2)
    shown, record = run("fast_decode.py", tmp_path, "--source", tiny_bundle, *options)
    assert "| 4x | 1/2, 1/4 | 1.0000 | 1.0000 | " in shown
    assert [row["reductions"] for row in record["rows"]] == [[1], [2, 4]]
    assert [row["ap"] for row in record["rows"]] == [[pytest.approx(1)] * 2] * 2
