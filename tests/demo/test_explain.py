"""What the demo says of its results."""

from __future__ import annotations

from dataclasses import replace

from sample_results import OK, RUN, altered, sample_results

from gfldeploy.demo.pipeline import explain


def test_low_precision_and_larger_batches_are_compared_in_sentences() -> None:
    one = replace(RUN, samples=replace(RUN.samples, batch_size=1, images=3), padding_ratio=1.0)
    single = altered(OK, batch_size=1, runs=(one,))
    cells = (altered(single, precision="fp32"), single, OK)
    lines = explain(replace(sample_results(), cells=cells))
    # Batches from file to boxes take 12 and 24 ms: 2 in 36 ms, of 1 and of 2 images.
    assert any(
        line.startswith("onnxruntime int8 at batch 1 against its fp32: 1.00 times the images/s from file to boxes")
        for line in lines
    )
    assert [line for line in lines if "from batch 1 to 2" in line] == [
        "onnxruntime int8 from batch 1 to 2: 55.56 to 111.1 images/s. The images are of mixed orientation, so a batch "
        "of 2 is padded to 1.25 times its real pixels (batch 1: 1.00)."
    ]


def test_nothing_measured_is_no_sentence_about_speed() -> None:
    failed = replace(sample_results(), cells=sample_results().cells[1:])
    assert not any("images/s" in line for line in explain(failed))
