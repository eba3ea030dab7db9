"""The recipe of `gfldeploy serve`, on the tiny detector, without its rivals."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("onnxruntime")
pytest.importorskip("uvicorn")
pytestmark = pytest.mark.slow

RECIPE = Path(__file__).parents[2] / "benchmarks" / "serving.py"


@pytest.fixture
def run(tiny_bundle: Path, tiny_coco: Path, tmp_path: Path) -> Any:
    """Runs one of its commands: what it prints, and what it writes."""

    def recipe(command: str, *arguments: object) -> tuple[str, dict[str, Any]]:
        script = tmp_path / RECIPE.name
        script.write_text(RECIPE.read_text())  # it writes beside itself
        shared = ["--images", tiny_coco.parent / "images", "--machine", "here", "--clients", 3]
        shared += ["--bundle", tiny_bundle, "--engine", "onnxruntime"] if command != "generator" else []
        words = [sys.executable, script, command, *shared, *arguments]
        done = subprocess.run(list(map(str, words)), capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        record = json.loads((tmp_path / f"results/here/checks/demo_serving_{command}.json").read_text())
        assert str(tmp_path) not in json.dumps(record)
        return done.stdout, record

    return recipe


def test_clients_beside_the_detector(run: Any) -> None:
    shown, record = run("clients", "--rivals", "--rounds", 1, "--seconds", 0.4)
    assert all(one["images"] == 6 and not one["wrong"] for one in record["by_predict"].values())
    assert set(record["orientations"]) == {"landscape", "portrait"}
    assert all(one["per_s"][0] > 0 and one["failed"] == 0 for one in record["legs"].values())
    assert set(record["ratios"]) == {"one client's time by Detector's", "goodput by Detector.stream"}
    assert "| serve, 3 clients | " in shown


def test_what_the_generator_takes(run: Any) -> None:
    shown, record = run("generator", "--rounds", 1, "--seconds", 0.2)
    assert "gfldeploy load: " in shown and record["cpu_ms_per_request"]["gfldeploy load"][0] > 0


def test_more_than_the_server_can(run: Any) -> None:
    shown, record = run("overload", "--factors", 0.3, 2, "--seconds", 0.6)
    assert [one["factor"] for one in record["loads"]] == [0.3, 2.0] and "| 0.3 | " in shown
    assert all(sum(one["endings"].values()) == one["requests"] for one in record["loads"])


def test_clients_of_every_kind_and_sigterm(run: Any) -> None:
    _, record = run("soak", "--minutes", 0.05, "--most-growth", 9)
    assert record["wrong"] == 0 and record["exit_code"] == 0
    assert any(name.startswith("good: 200") for name in record["endings"])
    assert sum(record["at_sigterm"].values()) == 32 and set(record["at_sigterm"]) <= {"200", "429", "503"}
