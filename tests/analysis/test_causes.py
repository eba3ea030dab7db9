"""What the times of passes are put down to: planted causes, by arithmetic."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest

from gfldeploy.analysis.causes import BatchAnalysis, Change, analyze_passes, sentences
from gfldeploy.analysis.sweep import Pass, batch_orders
from gfldeploy.batching.buckets import Order

NOISE = (0.99, 1.0, 1.01)


def one_pass(
    batch_size: int,
    order: Order,
    inference_ms: float,
    host_ms: float = 2.0,
    share: float | None = 0.8,
    taken: float = 0.0,
    padding: float = 1.0,
) -> Pass:
    return Pass(
        batch_size,
        order,
        decode_ms=host_ms,
        preprocess_ms=0.0,
        copy_ms=0.0,
        inference_ms=inference_ms,
        postprocess_ms=0.0,
        end_to_end_ms=inference_ms + host_ms,
        taken=taken,
        padding=padding,
        convolution_share=share if order == "bucketed" or batch_size == 1 else None,
    )


def analyzed(
    single: Pass, listed: Pass, bucketed: Pass, macs: float | None = None, peak: float | None = None
) -> BatchAnalysis:
    """Three rounds of these, a hundredth apart, whole rounds at a time."""
    (found,) = analyze_passes([[_slowed(one, by) for one in (single, listed, bucketed)] for by in NOISE], macs, peak)
    return found


def test_padding() -> None:
    found = analyzed(
        one_pass(1, "listed", 20), one_pass(8, "listed", 31, padding=1.52), one_pass(8, "bucketed", 20.2), macs=2e9
    )
    assert found.cause == "padding" and found.padding == 1.52
    assert found.parts["padding"].ms == pytest.approx(10.8)
    assert found.gmac_per_s == pytest.approx(2e9 / 20.2e-3 / 1e9)
    what, advice = sentences(found)
    assert what.startswith("At batch 8 an image takes 33.0 ms, 22.0 ms at batch 1 (1.50x): padding +10.8 ms")
    assert "images of one input size into each batch" in advice and "22.2 ms" in advice and "1.49x" in advice


def test_padding_that_a_gain_hides() -> None:
    found = analyzed(one_pass(1, "listed", 20), one_pass(8, "listed", 20), one_pass(8, "bucketed", 15))
    assert found.cause == "padding"
    what, advice = sentences(found)
    assert what.endswith("no change to speak of (1.00x), though padding takes 5.0 ms of it.")
    assert "(bucketed): 17.0 ms an image" in advice


@pytest.mark.parametrize(("share", "cause"), [(0.9, "convolutions"), (0.4, "memory"), (None, "network")])
def test_a_network_that_slows_down_without_padding(share: float | None, cause: str) -> None:
    single = one_pass(1, "listed", 20, share=None if share is None else 0.7)
    found = analyzed(single, one_pass(4, "listed", 30), one_pass(4, "bucketed", 30, share=share))
    assert found.cause == cause
    assert found.parts["padding"].ms == 0


def test_host_work_that_no_batch_shortens() -> None:
    found = analyzed(
        one_pass(1, "listed", 5, host_ms=50), one_pass(8, "listed", 5, host_ms=50), one_pass(8, "bucketed", 5, 50)
    )
    assert found.cause == "host" and found.host_share == pytest.approx(50 / 55)
    assert sentences(found)[0].endswith("no change to speak of (1.00x).")
    assert "91% of the time" in sentences(found)[1]


def test_host_work_that_grows() -> None:
    found = analyzed(
        one_pass(1, "listed", 20, host_ms=5), one_pass(8, "listed", 20, host_ms=9), one_pass(8, "bucketed", 20, 9)
    )
    assert found.cause == "host" and found.parts["host"].ms == pytest.approx(4)


def test_a_saturated_processor() -> None:
    found = analyzed(
        one_pass(1, "listed", 20),
        one_pass(8, "listed", 20.3),
        one_pass(8, "bucketed", 20.2),
        macs=2e9,
        peak=150.0,
    )
    assert found.cause == "saturated"
    assert found.percent_of_peak == pytest.approx(100 * 2e9 / 20.2e-3 / 150e9)
    # Convolutions take 80% of that time, and reach as much more while they run.
    assert found.percent_of_peak is not None
    assert found.convolutions_percent_of_peak == pytest.approx(found.percent_of_peak / 0.8)
    assert "reach 83% of what" in sentences(found)[1]


def test_a_thread_without_a_cpu_goes_before_what_it_causes() -> None:
    found = analyzed(
        one_pass(1, "listed", 20), one_pass(8, "listed", 30, taken=0.25), one_pass(8, "bucketed", 29, taken=0.25)
    )
    assert found.cause == "starved" and "25% of its CPUs" in sentences(found)[1]


def test_a_batch_that_pays() -> None:
    found = analyzed(one_pass(1, "listed", 20), one_pass(8, "listed", 12), one_pass(8, "bucketed", 11.9))
    assert found.cause == "faster" and found.change.ms == pytest.approx(-8)


def rounds_of(listed_ms: Sequence[float], single_ms: float = 20.0) -> BatchAnalysis:
    """Batch 8 takes what its rounds say, all of it in the network without padding; batch 1 is always the same."""
    (found,) = analyze_passes(
        [[one_pass(1, "listed", single_ms), one_pass(8, "listed", ms), one_pass(8, "bucketed", ms)] for ms in listed_ms]
    )
    return found


@pytest.mark.parametrize(
    ("listed_ms", "told"),
    [
        ((18.0, 21.0, 35.0), "0.91x to 1.68x"),  # of different signs
        ((20.1, 21.5, 22.5, 22.9, 21.9), "1.00x to 1.13x"),  # all slower, but perhaps by nothing to speak of
        ((19.8, 18.2, 18.1, 18.3, 18.2), "0.91x to 0.99x"),  # and faster
    ],
)
def test_a_change_that_may_not_be_noticed_has_no_cause(listed_ms: Sequence[float], told: str) -> None:
    found = rounds_of(listed_ms)
    assert found.cause == "saturated"
    assert f"by the rounds {told}: no change that is sure to be noticed" in sentences(found)[0]


@pytest.mark.parametrize(
    ("listed_ms", "cause"),
    [((22.6, 22.4, 22.5, 22.7, 22.5), "convolutions"), ((17.0, 17.5, 17.3, 17.2, 17.1), "faster")],
)
def test_a_small_change_beyond_the_noise_has_one(listed_ms: Sequence[float], cause: str) -> None:
    assert rounds_of(listed_ms).cause == cause


def test_one_bad_round_changes_neither_the_times_nor_with_nine_rounds_the_cause() -> None:
    good = (25.0, 25.2, 24.9, 25.1, 25.0, 24.8, 25.3, 25.1)
    for bad in (5.0, 250.0):
        found = rounds_of((*good, bad))
        assert found.change.ms == pytest.approx(5.05, abs=0.2) and found.ms == pytest.approx(27.05, abs=0.2)
        assert found.cause == "convolutions"
        assert found.unexplained_ms == pytest.approx(0, abs=1e-9)


def test_the_largest_part_is_not_named_where_a_smaller_one_is_sure() -> None:
    rounds = [
        [one_pass(1, "listed", 20, 5), one_pass(8, "listed", listed, 9), one_pass(8, "bucketed", bucketed, 9)]
        for listed, bucketed in ((25.0, 12.0), (25.0, 12.0), (25.0, 26.0))
    ]
    (found,) = analyze_passes(rounds)
    assert found.parts["padding"].ms > found.parts["host"].ms and not found.parts["padding"].beyond_noise
    assert found.cause == "host"


def test_what_starved_engines_reach_is_not_told() -> None:
    single, listed = one_pass(1, "listed", 20), one_pass(8, "listed", 30, taken=0.25)
    found = analyzed(single, listed, one_pass(8, "bucketed", 30), macs=2e9, peak=50.0)
    assert found.gmac_per_s and found.percent_of_peak is None and found.convolutions_percent_of_peak is None


def test_the_parts_add_up_to_the_change() -> None:
    found = analyzed(
        one_pass(1, "listed", 20, host_ms=3), one_pass(8, "listed", 33, host_ms=5), one_pass(8, "bucketed", 24, 4)
    )
    assert sum(part.ms for part in found.parts.values()) == pytest.approx(found.change.ms)
    assert found.unexplained_ms == pytest.approx(0, abs=1e-9)


def test_what_no_timer_saw_is_told() -> None:
    listed = replace(one_pass(8, "listed", 25), end_to_end_ms=30.0)
    assert analyzed(one_pass(1, "listed", 20), listed, one_pass(8, "bucketed", 22)).unexplained_ms == pytest.approx(3)


def test_what_was_not_measured() -> None:
    with pytest.raises(ValueError, match="batch 1 was not measured"):
        analyze_passes([[one_pass(8, "listed", 25)]])
    with pytest.raises(ValueError, match="batch 8 was not measured in both orders"):
        analyze_passes([[one_pass(1, "listed", 20), one_pass(8, "listed", 25)]])


def test_batch_sizes_and_orders() -> None:
    assert batch_orders([4, 1, 2, 4]) == [(1, "listed"), (2, "listed"), (2, "bucketed"), (4, "listed"), (4, "bucketed")]


@pytest.mark.parametrize(("low", "high", "sure"), [(0.1, 2, True), (-2, -0.1, True), (-0.1, 2, False)])
def test_noise(low: float, high: float, sure: bool) -> None:
    assert Change(1.0, low, high).beyond_noise is sure


def _slowed(one: Pass, by: float) -> Pass:
    names: Sequence[str] = ("decode_ms", "inference_ms", "end_to_end_ms")
    return replace(one, **{name: getattr(one, name) * by for name in names})


def copied(one: Pass, ms: float) -> Pass:
    """With copies to and from a device on top."""
    return replace(one, copy_ms=ms, end_to_end_ms=one.end_to_end_ms + ms)


def on_gpu(single: Pass, listed: Pass, bucketed: Pass) -> BatchAnalysis:
    (found,) = analyze_passes([[_slowed(one, by) for one in (single, listed, bucketed)] for by in NOISE], device="gpu")
    return found


def test_copies_to_a_gpu_are_no_host_work() -> None:
    passes = one_pass(1, "listed", 5), one_pass(8, "listed", 5), one_pass(8, "bucketed", 5)
    found = on_gpu(*(copied(one, 20.0) for one in passes))
    assert found.cause == "transfers" and found.transfer_share == pytest.approx(20 / 27)
    assert found.host_share == pytest.approx(2 / 27)
    assert "Copies to and from the GPU take 74% of the time" in sentences(found)[1]
    grown = on_gpu(copied(passes[0], 1.0), copied(passes[1], 9.0), copied(passes[2], 9.0))
    assert grown.cause == "transfers" and grown.parts["transfers"].ms == pytest.approx(8.0)
    assert sum(one.ms for one in grown.parts.values()) == pytest.approx(grown.change.ms)
    # On a CPU they are.
    (same,) = analyze_passes([[_slowed(copied(one, 20.0), by) for one in passes] for by in NOISE])
    assert same.cause == "host" and same.transfer_share == 0 and "transfers" not in same.parts


def test_a_gpu_does_not_wait_for_cpus() -> None:
    passes = [one_pass(size, order, 20, taken=0.4) for size, order in batch_orders([8])]
    saturated = on_gpu(*passes)
    assert saturated.cause == "saturated" and "cores" not in sentences(saturated)[1]
    starved = on_gpu(*(replace(one, decode_ms=60.0, end_to_end_ms=80.0) for one in passes))
    assert starved.cause == "starved" and "75% of the time and lacked 40% of the CPUs" in sentences(starved)[1]
