"""The fuzz targets work: a few hundred inputs of each, in this process."""

from __future__ import annotations

import importlib
import importlib.util
import random
import shutil
import sys
from pathlib import Path

import pytest

from gfldeploy.errors import GfldeployError

FUZZ = Path(__file__).parent / "fuzz"
INPUTS = 30  # of each target, besides its seeds


@pytest.mark.parametrize(
    "reader", ["bundle", "graph_onnx", "graph_pdmodel", "graph_pir", "results", "deploy", "journal", "resume", "part"]
)
def test_target(
    reader: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    if reader == "graph_pdmodel" and importlib.util.find_spec("paddle") is None:
        pytest.skip("its messages are Paddle's")
    monkeypatch.setattr(sys, "path", [str(FUZZ), *sys.path])
    target = importlib.import_module(f"fuzz_{reader}")
    mutate = getattr(target, "mutate", importlib.import_module("mutations").mutate)
    rng = random.Random(0)
    seeds = list(target.seeds())
    refused = 0
    for data in [*seeds, *(mutate(rng.choice(seeds), rng) for _ in range(INPUTS))]:
        folder = tmp_path / "input"
        folder.mkdir()
        try:
            target.one(data, folder)
        except GfldeployError as error:
            refused += 1
            assert "\n" not in str(error)
        shutil.rmtree(folder)
    assert refused > INPUTS / 4 or reader == "resume", "a batch that is damaged is made again"
