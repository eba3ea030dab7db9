"""Commands that are stopped half-way leave what was there, and no process."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import demo_bundles
import psutil
import pytest

from gfldeploy import demo
from gfldeploy.bundle import Bundle

pytestmark = [pytest.mark.slow, demo_bundles.needs_export, demo_bundles.needs_quant]


@pytest.fixture
def target(tiny_bundle: Path, tmp_path: Path) -> Path:
    """An older bundle, where the new one is to go."""
    return Path(shutil.copytree(tiny_bundle, tmp_path / "work" / "out"))


def start(folder: Path, *arguments: object) -> subprocess.Popen[str]:
    """gfldeploy in a session of its own."""
    script = demo_bundles.command(arguments, "", folder)
    return subprocess.Popen(script, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True)


def wait_for_stage(process: subprocess.Popen[str], stage: str) -> None:
    assert process.stderr is not None
    for line in process.stderr:
        if stage in line:
            return
    pytest.fail(f"{stage!r} was never reached")


def wait_for_child(process: subprocess.Popen[str]) -> psutil.Process:
    while process.poll() is None:
        if children := psutil.Process(process.pid).children():
            return children[0]
        time.sleep(0.02)
    pytest.fail("it ended without a child process")


def session_of(process: subprocess.Popen[str]) -> list[psutil.Process]:
    """What still runs of its session, zombies left out."""
    found = []
    for other in psutil.process_iter():
        try:
            if os.getsid(other.pid) == process.pid and other.status() != psutil.STATUS_ZOMBIE:
                found.append(other)
        except (ProcessLookupError, psutil.NoSuchProcess):
            continue
    return found


def check_unwound(process: subprocess.Popen[str], target: Path, before: dict[str, bytes | None]) -> None:
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert [line for line in err.splitlines() if line.startswith("Error: ")] == [
        "Error: interrupted; nothing half-written was left behind"
    ]
    assert "Traceback" not in err
    assert out == ""
    assert session_of(process) == []
    assert demo_bundles.snapshot(target.parent) == before


@pytest.mark.parametrize(
    ("stage", "number"),
    [
        ("loading Paddle", signal.SIGTERM),  # before and after Paddle has put a handler of its own in place
        ("folding BatchNorm", signal.SIGINT),
        ("comparing the paddle_program graph", signal.SIGTERM),
    ],
)
def test_export(stage: str, number: signal.Signals, target: Path, tmp_path: Path) -> None:
    before = demo_bundles.snapshot(target.parent)
    arguments = ("export", "-c", demo.config_path(), "--random-weights", 0, "--input-shape", "64x64")
    with start(tmp_path, *arguments, "-o", target, "--force") as process:
        wait_for_stage(process, stage)
        process.send_signal(number)
        check_unwound(process, target, before)


def test_a_killed_export_is_cleaned_up_by_the_next(target: Path, exported: Path, tmp_path: Path) -> None:
    before = demo_bundles.snapshot(target)
    config = exported.parent / "gfl_demo.yml"
    arguments = (*demo_bundles.export_arguments(config), "-o", target, "--force")
    with start(tmp_path, *arguments) as process:
        wait_for_stage(process, "writing the ONNX graph")
        process.kill()
    assert demo_bundles.snapshot(target) == before
    assert len(list(target.parent.iterdir())) == 2, "the old bundle, and what the killed run left"
    # In a process of its own: tracing numbers what it makes on from what the process has traced before.
    done = demo_bundles.run(*arguments, folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert [path.name for path in target.parent.iterdir()] == ["out"]
    # And it is what another run, in another place, made of the same: only the command differs.
    made, other = (Bundle.open(bundle).manifest for bundle in (target, exported))
    assert {name: r.sha256 for name, r in made.files.items()} == {name: r.sha256 for name, r in other.files.items()}
    commands = [dict(manifest.provenance).pop("command") for manifest in (made, other)]
    assert {**made.provenance, "command": ""} == {**other.provenance, "command": ""}, commands


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_quantize(
    number: signal.Signals, target: Path, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    before = demo_bundles.snapshot(target.parent)
    source, data = demo_bundles.exported(tmp_path_factory), demo_bundles.pictures(tmp_path_factory)
    arguments = ("quantize", source, "--data", data, "--samples", 3, "--min-agreement", 0, "-o", target, "--force")
    with start(tmp_path, *arguments) as process:
        wait_for_stage(process, "calibrating (hist)")
        child = wait_for_child(process)
        while "gfldeploy.quant.ptq" not in child.cmdline() or not child.num_threads() > 1:
            time.sleep(0.02)  # until it has loaded Paddle
        if number == signal.SIGINT:
            os.killpg(process.pid, number)  # as a terminal does on Ctrl-C
        else:
            process.send_signal(number)
        if number != signal.SIGKILL:
            check_unwound(process, target, before)
            return
        assert process.wait(60) == -signal.SIGKILL
        psutil.wait_procs([child], timeout=60)
        assert session_of(process) == []
        assert demo_bundles.snapshot(target) == {
            name.removeprefix("out/"): content for name, content in before.items() if name != "out"
        }
