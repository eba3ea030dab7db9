"""What limits a cell, and where its curve ends, of results whose limit is known because they are made up."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from sample_results import OK, RUN, altered, sample_results

from gfldeploy.bench.limits import explain, knee, network_limits, stage_times
from gfldeploy.bench.report.page import short_answer
from gfldeploy.bench.results import CellResult, Cost, Monitored, Peak, Run
from gfldeploy.bench.table import Row
from gfldeploy.bench.timing import Samples, Stages

# Of batches of 4 images of 800x1344, 10 ms each.
SHAPE = "4x3x800x1344"
STAGES = {"decode_ms": 4.0, "preprocess_ms": 4.0, "input_copy_ms": 1.0, "inference_ms": 39.0, "output_copy_ms": 0.5}


def run(images_per_s: float = 100.0, size: int = 4, padding: float = 1.0, **watched: Any) -> Run:
    """Five seconds of the network, at so many images a second."""
    stages = STAGES | {"postprocess_ms": 1.5} | watched.pop("stages", {})
    stages["end_to_end_ms"] = sum(stages.values())
    t_s = tuple(float(second) for second in range(1, 6))
    given = {"gpu_percent": 99.0, "gpu_clock_mhz": 1980.0, "gpu_power_w": 600.0} | watched
    throttled = given.pop("throttled", ())
    samples: dict[str, Any] = {name: (value,) * 5 for name, value in given.items()}
    monitored = Monitored(
        t_s=t_s,
        **samples,
        gpu_most_clock_mhz=1980.0,
        gpu_most_power_w=700.0,
        throttled=throttled,
    )
    return replace(
        RUN,
        samples=Samples((1e3 * size / images_per_s,) * 40, (), size, int(5 * images_per_s), 5.0, True),
        stages=Stages(**{name: (value * size / 4,) * 3 for name, value in stages.items()}),
        shapes={SHAPE.replace("4x3", f"{size}x3"): 3},
        padding_ratio=padding,
        mixed_batches=3 * (padding > 1),
        monitored=monitored,
    )


def cell(images_per_s: float = 100.0, size: int = 4, padding: float = 1.0, **more: Any) -> CellResult:
    """At 100 images/s it reaches a quarter of the peak of 400 GMAC/s and a tenth of the 100 GB/s of the memory."""
    peak = more.pop("peak", Peak(400.0, 100.0, None))
    order = {"order": "listed"} if size == 1 or padding > 1 else {"order": "bucketed", "scenario": "offline"}
    one = altered(OK, device="gpu", precision="fp16", batch_size=size, **order)
    cost = Cost(macs=1e9, padded_macs=1e9, traffic_mb=100.0)
    return replace(one, runs=(run(images_per_s, size, padding, **more),), cost=cost, peak=peak)


def row(one: CellResult) -> Row:
    return Row(one, sample_results())


@pytest.mark.parametrize(
    ("more", "limits"),
    [
        ({}, ["it reaches 25% of what the engine does on convolutions alone and 10% of the memory's bandwidth"]),
        ({"peak": Peak(110.0, None, None)}, ["the arithmetic is saturated: 91% of what"]),
        ({"peak": Peak(400.0, 12.5, None)}, ["the memory is saturated: 80% of its bandwidth"]),
        ({"stages": {"input_copy_ms": 12.0}}, ["transfers take 24% of its time, 4.3 GB/s to the device"]),
        ({"gpu_percent": 60.0}, ["no kernel runs for 36% of the time"]),
        (
            {"gpu_clock_mhz": 1400.0, "gpu_power_w": 695.0, "throttled": ("GPU: power cap in 4 of 5 samples",)},
            ["the clock is lowered to 1400 of 1980 MHz (power cap in 4 of 5 samples, 695 of 700 W)"],
        ),
        # A cap that was met for a moment, and a clock that somebody else set.
        ({"throttled": ("GPU: power cap in 1 of 5 samples",)}, ["it reaches 25%"]),
        ({"gpu_clock_mhz": 1400.0}, ["it reaches 25%"]),
        ({"peak": None}, []),
        ({"stages": dict.fromkeys(("input_copy_ms", "inference_ms", "output_copy_ms"), 0.0)}, ["it reaches 25%"]),
    ],
)
def test_the_limit_is_the_one_that_is_there(more: dict[str, Any], limits: list[str]) -> None:
    found = network_limits(row(cell(**more)))
    assert [text[: len(limit)] for text, limit in zip(found, limits, strict=True)] == limits


def test_stages_are_of_one_image_and_copies_have_a_speed() -> None:
    times = stage_times(row(cell()))
    assert times is not None
    assert (times.decode_ms, times.inference_ms, times.end_to_end_ms) == (1.0, 9.75, 12.5)
    # 800 x 1344 x 3 floats in a quarter of a millisecond.
    assert times.input_gb_per_s == pytest.approx(51.6, abs=0.05)
    assert times.host_share == pytest.approx(9.5 / 50)
    no_copy = stage_times(row(cell(stages={"input_copy_ms": 0.0})))
    assert no_copy is not None and no_copy.input_gb_per_s is None
    assert stage_times(row(replace(cell(), runs=(replace(run(), stages=None),)))) is None


def test_where_a_curve_ends_and_why() -> None:
    speeds = {1: 50.0, 8: 100.0, 32: 102.0}
    some = [row(cell(speed, size, peak=Peak(110.0, None, None))) for size, speed in speeds.items()]
    some.append(row(cell(64.0, 32, padding=1.68)))
    assert knee(some[:3]).cell.batch_size == 8
    (told,) = explain(some)
    assert told.startswith(
        "onnxruntime fp16: 50 images/s at batch 1, 100 images/s at batch 8, 102 images/s at batch 32: "
    )
    assert "no larger batch is faster than batch 8. At batch 32 the arithmetic is saturated: 93%" in told
    assert "1.68 times the pixels; those of one size are 1.59 times as fast at batch 32" in told
    assert "with 19% of the time in decoding, preprocessing and NMS." in told


def test_a_curve_that_still_rises_says_so() -> None:
    (told,) = explain([row(cell(50.0, 1)), row(cell(90.0, 4))])
    assert "throughput still rises there" in told
    (host,) = explain([row(cell(50.0, 1, stages={"decode_ms": 60.0}))])
    assert "the one batch size measured" in host and "no larger batch shortens" in host
    assert explain([row(replace(OK, status="failed", reason="x"))]) == []


def test_the_report_says_what_limits_the_fastest_on_a_gpu() -> None:
    fast = cell(peak=Peak(110.0, None, None))
    found = short_answer(replace(sample_results(), cells=(fast, cell(50.0, 1))))
    (told,) = [line for line in found if line.startswith("What limits")]
    assert told.startswith("What limits its network: the arithmetic is saturated: 91% of what the engine reaches")
    assert not any("limits" in line for line in short_answer(sample_results()))
