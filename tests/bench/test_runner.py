"""Children that work, crash, hang and lie: each becomes a result, and the rest goes on."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from gfldeploy.bench.matrix import Cell, Plan, Skipped
from gfldeploy.bench.results import CellResult, Settings
from gfldeploy.bench.runner import AccuracyData, run_plan

QUICK = Settings(min_seconds=0, min_count=2, warmup=1)


def cells(bundle: Path, *batch_sizes: int) -> Plan:
    return Plan(tuple(Cell(bundle, "onnxruntime", "fp32", "cpu", size, 1) for size in batch_sizes), ())


def child(code: str) -> tuple[str, ...]:
    """A worker's command line: `request` and `answer(object)` are at hand."""
    prelude = (
        "import json, os, signal, sys, time\n"
        "request = json.load(sys.stdin)['request']\n"
        "def answer(value): open(request['result'], 'w').write(value if type(value) is str else json.dumps(value))\n"
    )
    return sys.executable, "-c", prelude + code


def run_one(tiny_bundle: Path, code: str, timeout_s: float = 60) -> CellResult:
    (result,) = run_plan(cells(tiny_bundle, 1), [Path("a.jpg")], QUICK, timeout_s=timeout_s, command=child(code))
    return result


def is_alive(pid: int) -> bool:
    """A process that was killed but not yet collected is not alive."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] not in "ZX"
    except FileNotFoundError:
        return False


def wait_until_dead(pid: int) -> bool:
    for _ in range(100):
        if not is_alive(pid):
            return True
        time.sleep(0.05)
    return False


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        ("os.kill(os.getpid(), signal.SIGSEGV)", "the process crashed with SIGSEGV"),
        ("print('oops', file=sys.stderr, flush=True); os.abort()", "the process crashed with SIGABRT: oops"),
        ("os.kill(os.getpid(), signal.SIGKILL)", "killed by SIGKILL, perhaps because memory ran out"),
        ("sys.exit(3)", "ended with exit code 3"),
        ("raise LookupError('where?')", "ended with exit code 1: LookupError: where?"),
        ("print('{}')", "ended without an answer"),
        ("answer('{')", "answered nonsense"),
        ("answer([])", "answered nonsense: not an object"),
        ("answer({})", "answered nonsense: run must be an object"),
        ("answer({'run': {'samples': 1}})", "answered nonsense: run lacks"),
        ("answer({'reason': 'too big for ' + request['cell']['bundle'], 'remedy': 'x'})", "too big for tiny"),
    ],
)
def test_a_failing_child_is_a_result_with_its_reason(code: str, reason: str, tiny_bundle: Path) -> None:
    result = run_one(tiny_bundle, code)
    assert result.status == "failed" and result.reason is not None and reason in result.reason
    assert result.runs == ()


def test_a_hanging_child_is_killed_with_all_it_started(tiny_bundle: Path, tmp_path: Path) -> None:
    note = tmp_path / "pid"
    code = (
        "import subprocess\n"
        f"open({str(note)!r}, 'w').write(str(subprocess.Popen(['sleep', '300']).pid))\n"
        "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        "time.sleep(300)\n"
    )
    result = run_one(tiny_bundle, code, timeout_s=2)
    assert (result.status, result.reason) == ("failed", "it took longer than 2 s")
    assert result.remedy is not None and "cell timeout" in result.remedy
    assert wait_until_dead(int(note.read_text()))


def test_a_child_that_does_not_read_is_still_killed(tiny_bundle: Path) -> None:
    # A request larger than a pipe holds.
    images = [Path("x" * 100 + f"{number}.jpg") for number in range(5000)]
    command = (sys.executable, "-c", "import time; time.sleep(300)")
    (result,) = run_plan(cells(tiny_bundle, 1), images, QUICK, timeout_s=1, command=command)
    assert result.reason == "it took longer than 1 s"


def test_ctrl_c_kills_the_child(tiny_bundle: Path, tmp_path: Path) -> None:
    note = tmp_path / "pid"
    hang = f"open({str(note)!r}, 'w').write(str(os.getpid())); time.sleep(300)"
    code = (
        "from pathlib import Path\n"
        "from gfldeploy.bench.matrix import Cell, Plan\n"
        "from gfldeploy.bench.results import Settings\n"
        "from gfldeploy.bench.runner import run_plan\n"
        f"plan = Plan((Cell(Path({str(tiny_bundle)!r}), 'onnxruntime', 'fp32', 'cpu', 1, 1),) , ())\n"
        f"run_plan(plan, [Path('a.jpg')], Settings(0, 1), command={child(hang)!r})\n"
    )
    with subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE, text=True) as process:
        for _ in range(600):
            if note.exists() and note.read_text():
                break
            time.sleep(0.05)
        pid = int(note.read_text())
        assert is_alive(pid)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
    assert process.returncode != 0 and "KeyboardInterrupt" in errors
    assert wait_until_dead(pid)


def test_the_rest_goes_on_and_a_failed_cell_is_not_tried_again(tiny_bundle: Path, tmp_path: Path) -> None:
    log = tmp_path / "log"
    run = {
        "samples": {"latency_ms": [1.0], "warmup_ms": [], "batch_size": 1, "wall_s": 1.0},
        "engine_version": "1",
        "load_s": 1.0,
        "first_inference_ms": 1.0,
        "peak_rss_mb": 1.0,
        "inputs_mb": 1.0,
        "decode_ms": [],
        "preprocess_ms": [],
        "postprocess_ms": [],
        "convolutions": None,
        "not_low_precision": None,
        "padding_ratio": 1.0,
    }
    code = (
        f"size = request['cell']['batch_size']; open({str(log)!r}, 'a').write(f'{{size}} ')\n"
        f"sys.exit('bad') if size == 2 else answer({{'run': {run!r}}})\n"
    )
    skipped = Skipped(None, "paddle", "fp16", "cpu", None, 1, "never", None)
    plan = Plan(cells(tiny_bundle, 1, 2, 4).cells, (skipped,))
    steps: list[tuple[int, int, str]] = []
    results = run_plan(
        plan,
        [Path("a.jpg")],
        Settings(0, 1, rounds=2),
        progress=lambda done, total, text: steps.append((done, total, text)),
        command=child(code),
    )
    assert [result.status for result in results] == ["ok", "failed", "ok", "skipped"]
    assert log.read_text().split() == ["1", "2", "4", "1", "4"]  # in rounds, the failed one once
    assert [len(result.runs) for result in results] == [2, 0, 2, 0]
    assert results[0].latency_ms == (1.0, 1.0)
    assert [(done, total) for done, total, _ in steps] == [(number, 6) for number in range(7)]
    assert steps[0][2] == "tiny: onnxruntime fp32 on cpu, batch 1" and steps[-1][2] == "done"


def test_real_worker(tiny_bundle: Path, tiny_coco: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("onnxruntime")
    # A bundle has folders of these names; in the current directory they must not hide the packages.
    monkeypatch.chdir(tmp_path)
    (tmp_path / "onnx.py").write_text("raise SystemExit('shadowed')")
    (tmp_path / "numpy.py").write_text("raise SystemExit('shadowed')")
    images = sorted((tiny_coco.parent / "images").iterdir())
    results = run_plan(cells(tiny_bundle, 1, 4), images, QUICK, AccuracyData(tiny_coco, limit=3), 120)
    assert [(result.status, result.reason) for result in results] == [("ok", None)] * 2
    for result in results:
        (run,) = result.runs
        assert result.bundle is not None and result.bundle.directory == "tiny"
        assert result.accuracy is not None and result.accuracy.images == 3
        assert run.samples.batch_size == result.batch_size
        assert run.peak_rss_mb > run.inputs_mb > 0
    # Six images in fours: the last batch is filled up from the beginning.
    assert len(results[1].runs[0].decode_ms) == 8


def test_a_deliberate_error_in_the_worker(tiny_bundle: Path, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    broken = tmp_path / "broken.jpg"
    broken.write_bytes(b"no image")
    (result,) = run_plan(cells(tiny_bundle, 1), [broken], QUICK)
    assert result.status == "failed" and result.reason is not None and "broken.jpg" in result.reason
    assert result.remedy and "Traceback" not in result.reason


def test_a_failing_accuracy_leaves_the_timing(tiny_bundle: Path, tiny_coco: Path, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    source = json.loads(tiny_coco.read_text())
    empty = tmp_path / "empty.json"
    empty.write_text(json.dumps({**source, "annotations": []}))
    images = tiny_coco.parent / "images"
    (result,) = run_plan(cells(tiny_bundle, 1), [images / "1.jpg"], QUICK, AccuracyData(empty, images))
    assert result.status == "ok" and result.accuracy is None
    assert result.accuracy_reason is not None and "no annotations" in result.accuracy_reason


def test_accuracy_may_take_long_as_long_as_it_gets_on(tiny_bundle: Path) -> None:
    accuracy = {
        "ap": 1.0, "ap50": 1.0, "ap75": 1.0, "ap_small": -1.0, "ap_medium": 1.0, "ap_large": -1.0,
        "images": 1, "detections": 1,
    }  # fmt: skip
    run = {
        "samples": {"latency_ms": [1.0], "warmup_ms": [], "batch_size": 1, "wall_s": 1.0}, "engine_version": "1",
        "load_s": 1.0, "first_inference_ms": 1.0, "peak_rss_mb": 1.0, "inputs_mb": 1.0, "decode_ms": [],
        "preprocess_ms": [], "postprocess_ms": [], "convolutions": None,
        "not_low_precision": None, "padding_ratio": 1.0,
    }  # fmt: skip
    code = (
        "if 'progress' in request:\n"
        "    for number in range(12):\n"
        "        open(request['progress'], 'w').write(f'{number} 12'); time.sleep(0.5)\n"
        f"    answer({{'accuracy': {accuracy!r}}})\n"
        f"else: answer({{'run': {run!r}}})\n"
    )
    (result,) = run_plan(
        cells(tiny_bundle, 1), [Path("a.jpg")], QUICK, AccuracyData(Path("a")), timeout_s=4, command=child(code)
    )
    assert result.accuracy is not None and result.accuracy.ap == 1.0


def test_the_worker_dies_with_its_parent(tmp_path: Path) -> None:
    code = (
        "import os, sys, time\n"
        "from gfldeploy.bench.worker import _die_with_parent\n"
        "if os.fork() == 0:\n"
        f"    _die_with_parent(); open({str(tmp_path / 'pid')!r}, 'w').write(str(os.getpid())); time.sleep(300)\n"
        f"while not os.path.exists({str(tmp_path / 'pid')!r}): time.sleep(0.05)\n"
        "time.sleep(0.2); os._exit(0)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60, env={**os.environ})
    assert wait_until_dead(int((tmp_path / "pid").read_text()))
