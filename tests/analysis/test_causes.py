"""What the times of passes are put down to: planted causes, by arithmetic."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest

from gfldeploy.analysis.causes import BatchAnalysis, Change, analyze_passes, sentences
from gfldeploy.analysis.passes import Arrangement, Pass, arrangements

NOISE = (0.99, 1.0, 1.01)


def one_pass(
    batch_size: int,
    order: str,
    inference_ms: float,
    host_ms: float = 2.0,
    share: float | None = 0.8,
    taken: float = 0.0,
    padding: float = 1.0,
) -> Pass:
    return Pass(
        Arrangement(batch_size, order),  # type: ignore[arg-type]
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


def analyzed(single: Pass, listed: Pass, grouped: Pass, **known: float) -> BatchAnalysis:
    """Three rounds of these, a hundredth apart, whole rounds at a time."""
    (found,) = analyze_passes([[_slowed(one, by) for one in (single, listed, grouped)] for by in NOISE], **known)
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
    assert "Group images by size" in advice and "22.2 ms" in advice and "1.49x" in advice


def test_padding_that_a_gain_hides() -> None:
    found = analyzed(one_pass(1, "listed", 20), one_pass(8, "listed", 20), one_pass(8, "bucketed", 15))
    assert found.cause == "padding"
    assert "batches of one size each take 17.0 ms an image" in sentences(found)[1]


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
        peak_gmac_per_s=150.0,
    )
    assert found.cause == "saturated"
    assert found.percent_of_peak == pytest.approx(100 * 2e9 / 20.2e-3 / 150e9)
    # Convolutions take 80% of that time, and reach as much more while they run.
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


def test_a_change_that_rounds_disagree_on_is_none() -> None:
    rounds = [
        [one_pass(1, "listed", 20), one_pass(8, "listed", ms), one_pass(8, "bucketed", 20)] for ms in (18.0, 21.0, 35.0)
    ]
    (found,) = analyze_passes(rounds)
    assert found.ms / found.single_ms > 1.05 and not found.change.beyond_noise
    assert found.cause == "saturated"
    assert "the rounds do not agree on it" in sentences(found)[0]


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


def test_arrangements() -> None:
    found = [(one.batch_size, one.order) for one in arrangements([4, 1, 2, 4])]
    assert found == [(1, "listed"), (2, "listed"), (2, "bucketed"), (4, "listed"), (4, "bucketed")]


@pytest.mark.parametrize(("low", "high", "sure"), [(0.1, 2, True), (-2, -0.1, True), (-0.1, 2, False)])
def test_noise(low: float, high: float, sure: bool) -> None:
    assert Change(1.0, low, high).beyond_noise is sure


def _slowed(one: Pass, by: float) -> Pass:
    names: Sequence[str] = ("decode_ms", "inference_ms", "end_to_end_ms")
    return replace(one, **{name: getattr(one, name) * by for name in names})
