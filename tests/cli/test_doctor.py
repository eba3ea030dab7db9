"""`gfldeploy doctor`: quick, honest, and without any engine."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from gfldeploy import machine
from gfldeploy.cli import main
from gfldeploy.doctor import examine, twin_warnings
from gfldeploy.engines.base import DEVICES, PRECISIONS
from gfldeploy.engines.registry import ENGINES


def run(*arguments: str) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["doctor", *arguments])
    assert stopped.value.code == 0


def test_table(capfd: pytest.CaptureFixture[str]) -> None:
    run()
    shown = capfd.readouterr().out
    for word in (*ENGINES, *PRECISIONS, *DEVICES, *machine.PACKAGES, machine.describe_machine().python):
        assert word in shown
    # The extras in brackets are not eaten as markup.
    missing = [item for item in examine().capabilities if not item.works]
    assert missing and all(item.reason and item.remedy for item in missing)


def test_extras_in_brackets_survive(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("gfldeploy.engines.registry.util.find_spec", lambda name: None)
    run()
    shown = " ".join(capfd.readouterr().out.split())  # which is broken into lines
    assert "onnxruntime is not installed; pip install onnxruntime" in shown


def test_json(capfd: pytest.CaptureFixture[str]) -> None:
    run("--json")
    data = json.loads(capfd.readouterr().out)
    assert set(data) == {"machine", "packages", "capabilities", "warnings"}
    assert len(data["capabilities"]) == len(ENGINES) * len(DEVICES) * len(PRECISIONS)
    assert all(entry["works"] == (entry["reason"] is None) for entry in data["capabilities"])


def test_twins(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    assert twin_warnings({"onnxruntime": "1.0", "onnxruntime-gpu": None}) == ()
    real = machine.metadata.version
    monkeypatch.setattr(
        machine.metadata, "version", lambda name: "1.0" if name.startswith("onnxruntime") else real(name)
    )
    run()
    (warning,) = (line for line in capfd.readouterr().out.splitlines() if line.startswith("Warning:"))
    assert "onnxruntime and onnxruntime-gpu are both installed" in warning
    assert "pip uninstall onnxruntime onnxruntime-gpu" in warning


def test_nothing_heavy_is_imported() -> None:
    code = (
        "import sys\n"
        "sys.modules.update(dict.fromkeys(['paddle', 'onnxruntime', 'ppdet', 'cv2', 'onnx', 'pycocotools']))\n"
        "from gfldeploy.cli import main\n"
        "main(['doctor', '--json'])\n"
    )
    # None in sys.modules makes an import of that name fail.
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL, timeout=60)
