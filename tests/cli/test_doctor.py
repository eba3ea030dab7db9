"""`gfldeploy doctor`: quick, honest, and without any engine."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from importlib import metadata

import pytest

from gfldeploy import machine
from gfldeploy.cli import main
from gfldeploy.doctor import Diagnosis, diagnose, summarize_report, twin_warnings
from gfldeploy.engines.base import DEVICES, PRECISIONS, Obstacle
from gfldeploy.engines.registry import ENGINES, Capability


def run(*arguments: str) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["doctor", *arguments])
    assert stopped.value.code == 0


def report(driver: str | None = None, installed: bool = True, lacking: tuple[str, ...] = ()) -> Diagnosis:
    """What another machine would report."""
    cpu = replace(diagnose().machine, cpu="Some Processor " * 9, driver=driver, gpus=("NVIDIA H100",) * bool(driver))
    found = []
    for name, spec in ENGINES.items():
        for device in DEVICES:
            for precision in PRECISIONS:
                graph = spec.graph(precision, device)
                why = graph if isinstance(graph, Obstacle) else None
                if why is None and device == "gpu" and not driver:
                    why = Obstacle("no driver", "a GPU")
                if why is None and not installed:
                    why = Obstacle(f"{name} is not installed", spec.library.builds[device].install)
                found.append(Capability(name, precision, device, *(why or ())))
    return Diagnosis(cpu, {}, tuple(found), {"export": lacking, "quantize": lacking}, ())


def test_the_summary_of_this_machine(capfd: pytest.CaptureFixture[str]) -> None:
    run()
    lines = capfd.readouterr().out.splitlines()
    assert lines == summarize_report(diagnose())
    works = {one.engine for one in diagnose().capabilities if one.works}
    text = "\n".join(lines)
    assert all(name in text for name in ENGINES) and lines[-1].split() == ["Details", "gfldeploy", "doctor", "--all"]
    assert all(f"{name}: " in text for name in works)


@pytest.mark.parametrize("driver", [None, "580.95.05"])
@pytest.mark.parametrize("installed", [True, False])
@pytest.mark.parametrize("lacking", [(), ("paddleslim",), ("paddle", "ppdet", "paddle2onnx")])
@pytest.mark.parametrize("warning", ["", "both are installed and overwrite each other. " * 9])
def test_every_summary_fits(driver: str | None, installed: bool, lacking: tuple[str, ...], warning: str) -> None:
    lines = summarize_report(replace(report(driver, installed, lacking), warnings=(warning,) if warning else ()))
    assert len(lines) <= 15 and all(len(line) <= 80 for line in lines)
    assert lines[0].startswith("Machine   Some Processor") and lines[-1].startswith("Details")
    assert any(line.startswith("Warning") for line in lines) == bool(warning)


def test_what_would_help_most() -> None:
    assert not any(line.startswith("Install") for line in summarize_report(report()))
    lines = [line[10:] for line in summarize_report(report(installed=False, lacking=("paddleslim",)))]
    assert "pip install openvino  # OpenVINO, the first choice on cpu" in lines
    place = lines.index("# export; quantize:")
    assert lines[place + 1].startswith("uv sync --no-dev --inexact ")
    on_gpu = [line[10:] for line in summarize_report(report("580.95.05", installed=False))]
    assert any(line.startswith("# ONNX Runtime, the first choice on gpu") for line in on_gpu)
    assert "pip uninstall -y onnxruntime && pip install" in on_gpu


def test_table(capfd: pytest.CaptureFixture[str]) -> None:
    run("--all")
    shown = capfd.readouterr().out
    for word in (*ENGINES, *PRECISIONS, *DEVICES, *machine.PACKAGES, machine.describe_machine().python):
        assert word in shown
    # The extras in brackets are not eaten as markup.
    missing = [item for item in diagnose().capabilities if not item.works]
    assert missing and all(item.reason and item.remedy for item in missing)


def test_extras_in_brackets_survive(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("gfldeploy.engines.base.util.find_spec", lambda name: None)
    run("--all")
    shown = " ".join(capfd.readouterr().out.split())  # which is broken into lines
    assert "onnxruntime is not installed; pip install onnxruntime" in shown


def test_json(capfd: pytest.CaptureFixture[str]) -> None:
    run("--json")
    data = json.loads(capfd.readouterr().out)
    assert set(data) == {"machine", "packages", "capabilities", "lacking", "warnings"}
    assert len(data["capabilities"]) == len(ENGINES) * len(DEVICES) * len(PRECISIONS)
    assert all(entry["works"] == (entry["reason"] is None) for entry in data["capabilities"])


def test_twins(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    assert twin_warnings({"onnxruntime": "1.0", "onnxruntime-gpu": None}) == ()
    real = metadata.version
    monkeypatch.setattr(metadata, "version", lambda name: "1.0" if name.startswith("onnxruntime") else real(name))
    run("--all")
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
