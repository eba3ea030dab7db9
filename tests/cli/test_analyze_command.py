"""`gfldeploy analyze` on a real, tiny bundle."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from schema_checks import check_schema

from gfldeploy.cli import main

QUICK = ("--rounds", "2", "--batch-sizes", "2,4", "--no-peak", "--threads", "1")


def run(*arguments: object) -> int | str | None:
    with pytest.raises(SystemExit) as stopped:
        main(["analyze", *map(str, arguments)])
    return stopped.value.code


@pytest.fixture(scope="module")
def found(
    tiny_bundle: Path, tiny_coco: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[dict[str, object], str]:
    output = tmp_path_factory.mktemp("analysis") / "analysis.json"
    assert run(tiny_bundle, "--data", tiny_coco, "-o", output, *QUICK) == 0
    check_schema("analysis", output)
    return json.loads(output.read_text()), output.with_suffix(".html").read_text()


def test_every_batch_size_is_explained(found: tuple[dict, str]) -> None:  # type: ignore[type-arg]
    analysis, page = found
    assert analysis["schema"] == 1 and analysis["images"] == 6 and analysis["peak"] is None
    assert [one["batch_size"] for one in analysis["batches"]] == [2, 4]
    for one in analysis["batches"]:
        parts = {name: part["ms"] for name, part in one["parts"].items()}
        assert set(parts) == {"padding", "convolutions", "memory", "host"}
        assert sum(parts.values()) + one["unexplained_ms"] == pytest.approx(one["change"]["ms"])
        assert one["padding"] > 1 and one["gmac_per_s"] > 0
    assert len(analysis["answer"]) == 4
    assert all(sentence.replace("'", "&#x27;") in page for sentence in analysis["answer"])


def test_every_batch_size_and_order_is_run_in_every_round(found: tuple[dict, str]) -> None:  # type: ignore[type-arg]
    analysis, _ = found
    wanted = [(1, "listed"), (2, "listed"), (2, "bucketed"), (4, "listed"), (4, "bucketed")]
    for passes in analysis["rounds"]:
        assert [(one["batch_size"], one["order"]) for one in passes] == wanted
        for one in passes:
            of_one_size = one["batch_size"] == 1 or one["order"] == "bucketed"
            assert (one["padding"] == 1.0) == of_one_size
            assert (one["convolution_share"] is not None) == of_one_size
            assert one["convolution_share"] is None or 0 < one["convolution_share"] < 1


def test_batches_of_one_size_change_no_detection(found: tuple[dict, str]) -> None:  # type: ignore[type-arg]
    analysis, page = found
    assert page.count(">listed</td>") == 3 and page.count(">bucketed</td>") == 2
    single, *batched = analysis["invariance"]
    assert single["detections"] == 6 and single["accuracy"]["ap"] == pytest.approx(1)
    for one in batched:
        if one["order"] == "bucketed":
            assert (one["lost"], one["accuracy"]["ap"]) == (0, single["accuracy"]["ap"])
            assert one["score_change"] < 1e-5 and one["box_change_px"] < 1e-3


def test_nothing_is_replaced_unasked(
    tiny_bundle: Path, tiny_coco: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    page = tmp_path / "analysis.html"
    page.write_text("mine")
    assert run(tiny_bundle, "--data", tiny_coco, "-o", tmp_path / "analysis.json", *QUICK) == 2
    assert "analysis.html exists already. Choose another" in capfd.readouterr().err
    assert run(tiny_bundle, "--data", tiny_coco, "-o", tmp_path / "a.json", "--batch-sizes", "1") == 2
    assert "no batch size to compare with batch 1. Give larger ones" in capfd.readouterr().err
    assert page.read_text() == "mine"
