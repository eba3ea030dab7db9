"""The choice in plain words: what the figures are of, and what they are not good for."""

from __future__ import annotations

from dataclasses import replace

import pytest
from sample_deploy import CHOICE, DEPLOY, EVIDENCE
from sample_results import FAILED, altered

from gfldeploy.bench.estimates import Estimate
from gfldeploy.tune.deploy_file import Evidence, SizeChoice
from gfldeploy.tune.measured import Measured, Tail
from gfldeploy.tune.search import model_of
from gfldeploy.tune.summary import summarize

FOUND = Measured(((80.0,) * 6,), 25.0, Tail(31.0, 30.0, 400, True), 310.5)


def summary(evidence: Evidence) -> str:
    return summarize(replace(DEPLOY, choice=replace(CHOICE, evidence=evidence), runner_up=None), FOUND, None)


def test_a_known_percentile_is_held_against_the_bound() -> None:
    text = summary(EVIDENCE)
    assert "Throughput from file to boxes is 80.0 images/s (95% interval 79.0 to 81.5), one batch after the " in text
    assert "that of the network alone is 95.0 images/s." in text
    assert (
        "Latency of a batch has a median of 25.0 ms and a 99th percentile of 31.0 ms (95% interval 30.0 to 33.0); the "
        "bound is 50 ms." in text
    )
    assert "first look" not in text and "padded" not in text


def test_an_unknown_percentile_is_said_to_be_unknown() -> None:
    text = summary(replace(EVIDENCE, latency_p50_ms=Estimate(25.0, 24.0, 26.0, 40), latency_p99_ms=None))
    assert (
        "a median of 25.0 ms and is 40.5 ms at most; the bound is 50 ms. 40 samples are too few to know the 99th "
        "percentile, which takes 368." in text
    )
    assert "99th percentile of" not in text


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"quick": True}, "this is a first look."),
        ({"padded": True}, "padded to the largest, which changes boxes and scores; mAP is of one image at a time."),
        (
            {"images_per_s": None},
            "Throughput from file to boxes was not measured; that of the network alone is 95.0 images/s.",
        ),
        ({"ap_drop": 0.0}, "mAP is 0.701 on 200 images, not below FP32 (bound: 0.01)."),
        ({"ap": None}, "It takes 310 MB of memory; mAP was not measured."),
    ],
)
def test_what_to_be_careful_of(change: dict[str, object], sentence: str) -> None:
    assert sentence in summary(replace(EVIDENCE, **change))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("passes", "median_ms", "sentence"),
    [
        (
            (40.0,) * 6,
            30.0,
            "fp32 in ONNX Runtime (FP32), one image at a time with 2 threads: 40.0 images/s from file to",
        ),
        ((40.0,) * 6, 30.0, "boxes, 50% less."),
        ((79.5,) * 6, 30.0, "as fast within the noise but with a higher latency."),
        ((79.5,) * 6, 20.0, "as fast within the noise but with less throughput."),
    ],
)
def test_why_the_second_is_second(passes: tuple[float, ...], median_ms: float, sentence: str) -> None:
    second = replace(FOUND, passes=(passes,), median_ms=median_ms)
    text = summarize(DEPLOY, FOUND, second)
    assert sentence in text
    assert "Batches of more than 2 images are no faster (measured up to 4)." in text
    assert text.endswith(
        "12 of 55 configurations were measured on 2026-01-01; the figures hold for this machine and bundle only."
    )


def test_what_the_input_size_costs_and_gains() -> None:
    drops = (((320, 512), 0.001), ((256, 384), 0.008), ((192, 320), 0.0512))
    sizes = SizeChoice((320, 512), Estimate(1.523, 1.49, 1.56, 12), 0.0071, drops)
    at = replace(CHOICE, cell=replace(CHOICE.cell, input_size=(256, 384)))
    text = summarize(replace(DEPLOY, choice=at, sizes=sizes), FOUND)
    assert text.startswith("Deploy int8 in ONNX Runtime (INT8) at 256x384, batches of 2 images")
    cost = "At 256x384 in place of 320x512: 0.0071 mAP less, 1.52 times the images/s (95% interval 1.49 to 1.56)."
    assert f"{cost} 192x320 would lose 0.0512 mAP against FP32." in text
    unknown = replace(sizes, speed=None, ap_less=None)
    assert "in place of 320x512: neither mAP nor throughput could be measured there." in summarize(
        replace(DEPLOY, choice=at, sizes=unknown), FOUND
    )
    own = replace(unknown, drops=(drops[0], drops[2]))
    assert " 192x320 would lose 0.0512 mAP" in summarize(replace(DEPLOY, sizes=own), FOUND)
    assert "in place of" not in summarize(replace(DEPLOY, sizes=own), FOUND)
    smaller = model_of(replace(CHOICE.cell, input_size=(192, 320))), "is no faster"
    told = summarize(replace(DEPLOY, sizes=replace(own, drops=())), FOUND, no_smaller=smaller)
    assert " The next smaller size, 192x320, is no faster. " in told


def test_what_failed_is_named_with_the_reason() -> None:
    reason = "differs from the CPU: boxes by up to 3 px (allowed 0.1)"
    failed = [altered(FAILED, batch_size=size, runs=(), reason=reason) for size in (1, 2)]
    assert "Left out" not in summarize(DEPLOY, FOUND, FOUND)
    text = summarize(DEPLOY, FOUND, FOUND, [*failed, altered(FAILED, engine="paddle", runs=())])
    assert f"Left out: onnxruntime int8, batch 1, 2: {reason}. Left out: paddle int8, batch 2: it crashed." in text
