"""The choice in plain words: what the figures are of, and what they are not good for."""

from __future__ import annotations

from dataclasses import replace

import pytest
from sample_deploy import CHOICE, DEPLOY, EVIDENCE

from gfldeploy.bench.estimates import Estimate
from gfldeploy.tune.deploy_file import Evidence
from gfldeploy.tune.measured import Measured, Tail
from gfldeploy.tune.summary import summarize

FOUND = Measured(((80.0,) * 6,), 25.0, Tail(31.0, 30.0, 400, True), 310.5)


def summary(evidence: Evidence) -> str:
    return summarize(replace(DEPLOY, choice=replace(CHOICE, evidence=evidence), runner_up=None), FOUND, None)


def test_a_known_percentile_is_held_against_the_bound() -> None:
    text = summary(EVIDENCE)
    assert (
        "From file to boxes it handles 80.0 images a second (95% interval 79.0 to 81.5), one batch after the " in text
    )
    assert "the network alone does 95.0." in text
    assert (
        "25.0 ms or less half of the time, and 31.0 ms or less 99 times in 100 (95% interval 30.0 to 33.0), where 50 "
        in text
    )
    assert "first look" not in text and "padded" not in text


def test_an_unknown_percentile_is_said_to_be_unknown() -> None:
    text = summary(replace(EVIDENCE, latency_p50_ms=Estimate(25.0, 24.0, 26.0, 40), latency_p99_ms=None))
    assert (
        "the longest of 40 took 40.5 ms, where 50 ms were allowed. These are too few to know the 99th percentile, "
        in text
    )
    assert "which takes 368." in text and "99 times in 100" not in text


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"quick": True}, "this is a first look."),
        ({"padded": True}, "padded to the largest, which changes boxes and scores; mAP is of one image at a time."),
        (
            {"images_per_s": None},
            "From file to boxes it was not measured; the network alone does 95.0 images a second.",
        ),
    ],
)
def test_what_to_be_careful_of(change: dict[str, object], sentence: str) -> None:
    assert sentence in summary(replace(EVIDENCE, **change))  # type: ignore[arg-type]
