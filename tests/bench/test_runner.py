"""Children that work, crash, hang and lie: each becomes a result, and the rest goes on."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from sample_results import cell_of, plan_of

from gfldeploy.bench.journal import Journal
from gfldeploy.bench.matrix import Plan
from gfldeploy.bench.results import CellResult, DataDescription
from gfldeploy.bench.runner import Data, Runner
from gfldeploy.bench.timing import Settings
from gfldeploy.child_process import Limits

QUICK = Settings(min_seconds=0, min_count=2, max_seconds=0, warmup=1)
TIMED = {
    "run": {
        "started": "2026-01-01T00:00:00+00:00",
        "samples": {
            "latency_ms": [1.0], "warmup_ms": [], "batch_size": 1, "images": 1, "wall_s": 1.0, "stable": True,
        },
        "stages": {
            name: [1.0]
            for name in (
                "decode_ms", "preprocess_ms", "input_copy_ms", "inference_ms", "output_copy_ms", "postprocess_ms",
                "end_to_end_ms",
            )
        },
        "engine_version": "1", "load_s": 1.0, "build_s": None, "first_inference_ms": 1.0, "peak_rss_mb": 1.0,
        "inputs_mb": 1.0, "shapes": {"1x3x64x96": 1}, "padding_ratio": 1.0, "mixed_batches": 0, "convolutions": None,
        "not_low_precision": None, "delegated": None,
        "idle": {"cpu_percent": 1.0, "gpu_percent": None, "waited_s": 0.0}, "monitored": None,
        "serving": None,
    },
    "image_sizes": [[58, 96]],
}  # fmt: skip


@pytest.fixture(autouse=True)
def a_folder_for_the_journal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`measure` keeps its journal in ./journal."""
    (tmp_path / "here" / "journal").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "here")


class Steps:
    """The stages that were told."""

    def __init__(self) -> None:
        self.stages: list[str] = []

    def stage(self, text: str) -> None:
        self.stages.append(text)

    def step(self, label: str, done: int, total: int) -> None:
        pass

    def note(self, text: str) -> None:
        pass


def data(*images: Path, annotations: Path = Path("none.json"), **more: Any) -> Data:
    """These images, as if they had been read."""
    return Data(images or (Path("a.jpg"),), DataDescription("ab", "cd", 1, None), annotations, **more)


def measure(plan: Plan, *, settings: Settings = QUICK, **more: Any) -> tuple[CellResult, ...]:
    """What a runner with a journal in ./journal makes of the cells."""
    given: dict[str, Any] = {"data": data(), "journal": Journal(Path("journal")), "limits": Limits(60)}
    given |= {key: more.pop(key) for key in ("data", "limits", "about", "worker") if key in more}
    runner = Runner(plan.bundles, **given)
    return runner.measure(plan.cells, settings, **more)


def cells(bundle: Path, *batch_sizes: int) -> Plan:
    return plan_of(bundle, *(cell_of(bundle, batch_size=size) for size in batch_sizes))


def child(code: str) -> tuple[str, ...]:
    """A worker's command line: `request` and `answer(object)` are at hand."""
    prelude = (
        "import json, os, signal, sys, time\n"
        "folder = sys.argv[1]\n"
        "request = json.load(open(folder + '/request.json'))\n"
        "def answer(value):\n"
        "    open(folder + '/answer.json', 'w').write(value if type(value) is str else json.dumps(value))\n"
    )
    return sys.executable, "-c", prelude + code


def run_one(tiny_bundle: Path, code: str, timeout_s: float = 60) -> CellResult:
    (result,) = measure(cells(tiny_bundle, 1), limits=Limits(timeout_s), worker=child(code))
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
        ("answer({})", "answered nonsense: timing must be an object"),
        ("answer({'timing': {'run': 1}})", "answered nonsense: timing lacks"),
        ("answer({'reason': 'too big for ' + request['bundle'], 'remedy': 'x'})", "too big for tiny"),
    ],
)
def test_a_failing_child_is_a_result_with_its_reason(code: str, reason: str, tiny_bundle: Path) -> None:
    result = run_one(tiny_bundle, code)
    assert result.status == "failed" and result.reason is not None and reason in result.reason
    assert result.runs == ()


@pytest.mark.slow
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


@pytest.mark.slow
def test_a_child_that_does_not_read_is_still_killed(tiny_bundle: Path) -> None:
    # A request larger than a pipe holds.
    images = [Path("x" * 100 + f"{number}.jpg") for number in range(5000)]
    command = (sys.executable, "-c", "import time; time.sleep(300)")
    (result,) = measure(cells(tiny_bundle, 1), data=data(*images), limits=Limits(1), worker=command)
    assert result.reason == "it took longer than 1 s"


def test_ctrl_c_kills_the_child(tiny_bundle: Path, tmp_path: Path) -> None:
    note = tmp_path / "pid"
    hang = f"open({str(note)!r}, 'w').write(str(os.getpid())); time.sleep(300)"
    code = (
        "import signal, sys\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # a shell's background jobs ignore it
        "from pathlib import Path\n"
        f"sys.path.append({str(Path(__file__).parents[1])!r})\n"
        "from sample_results import cell_of, plan_of\n"
        "from gfldeploy.bench.journal import Journal\n"
        "from gfldeploy.bench.results import DataDescription, Settings\n"
        "from gfldeploy.bench.runner import Data, Runner\n"
        f"plan = plan_of(Path({str(tiny_bundle)!r}), cell_of(Path({str(tiny_bundle)!r})))\n"
        "data = Data((Path('a.jpg'),), DataDescription('', '', 1, None), Path('none.json'))\n"
        f"runner = Runner(plan.bundles, data, Journal(Path('journal')), worker={child(hang)!r})\n"
        "runner.measure(plan.cells, Settings(0, 1, 0))\n"
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
    code = (
        f"size = request['cell']['batch_size']; open({str(log)!r}, 'a').write(f'{{size}} ')\n"
        f"sys.exit('bad') if size == 2 else answer({{'timing': {TIMED!r}}})\n"
    )
    steps = Steps()
    results = measure(
        cells(tiny_bundle, 1, 2, 4), settings=Settings(0, 1, 0, rounds=2), progress=steps, worker=child(code)
    )
    assert [result.status for result in results] == ["ok", "failed", "ok"]
    assert log.read_text().split() == ["1", "2", "4", "1", "4"]  # in rounds, the failed one once
    assert [len(result.runs) for result in results] == [2, 0, 2]
    assert results[0].latency_ms == (1.0, 1.0)
    assert [text.split()[0] for text in steps.stages] == ["1/6", "2/6", "3/6", "4/6", "6/6"]
    assert steps.stages[0] == "1/6 tiny: onnxruntime fp32, batch 1" and steps.stages[1].endswith(" left)")


def test_what_is_in_the_journal_is_not_measured_again(tiny_bundle: Path, tmp_path: Path) -> None:
    log = tmp_path / "log"
    code = (
        f"size = request['cell']['batch_size']; open({str(log)!r}, 'a').write(f'{{size}} ')\n"
        f"sys.exit('bad') if size == 2 else answer({{'timing': {TIMED!r}}})\n"
    )
    settings = Settings(0, 1, 0, rounds=2)
    first = measure(cells(tiny_bundle, 1, 2), settings=settings, worker=child(code))
    assert log.read_text().split() == ["1", "2", "1"]
    steps = Steps()
    again = measure(cells(tiny_bundle, 1, 2, 4), settings=settings, worker=child(code), progress=steps)
    assert log.read_text().split() == ["1", "2", "1", "2", "4", "4"], "what made a cell fail may be gone"
    assert again[:2] == first and len(again[2].runs) == 2
    assert [text.split()[0] for text in steps.stages] == ["1/4", "2/4", "4/4"]


@pytest.mark.parametrize("change", ["settings", "data", "about"])
def test_answers_are_not_used_for_another_question(change: str, tiny_bundle: Path, tmp_path: Path) -> None:
    log = tmp_path / "log"
    code = f"open({str(log)!r}, 'a').write('x'); answer({{'timing': {TIMED!r}}})"
    plan = cells(tiny_bundle, 1)
    measure(plan, worker=child(code), about={"machine": "one"})
    measure(
        plan,
        data=replace(data(), accuracy_limit=5) if change == "data" else data(),
        settings=replace(QUICK, seed=5) if change == "settings" else QUICK,
        worker=child(code),
        about={"machine": "other" if change == "about" else "one"},
    )
    assert log.read_text() == "xx"


def test_a_damaged_journal_is_measured_again(tiny_bundle: Path) -> None:
    code = f"answer({{'timing': {TIMED!r}}})"
    first = measure(cells(tiny_bundle, 1), worker=child(code))
    (entry,) = Path("journal").iterdir()
    entry.write_text(entry.read_text()[:-20])
    assert measure(cells(tiny_bundle, 1), worker=child(code)) == first


def test_a_child_that_takes_too_much_memory(tiny_bundle: Path) -> None:
    code = "hoard = bytearray(os.urandom(1) * 400_000_000); time.sleep(300)"
    (result,) = measure(cells(tiny_bundle, 1), limits=Limits(60, memory_mb=200), worker=child(code))
    assert result.status == "failed"
    assert result.reason == "out of memory: it took more than 200 MB"
    assert result.remedy is not None and "memory limit" in result.remedy


@pytest.mark.slow
def test_real_worker(tiny_bundle: Path, tiny_coco: Path, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    # A bundle has folders of these names; in the current directory they must not hide the packages.
    Path("onnx.py").write_text("raise SystemExit('shadowed')")
    Path("numpy.py").write_text("raise SystemExit('shadowed')")
    images = tuple(sorted((tiny_coco.parent / "images").iterdir()))
    used = data(*images, annotations=tiny_coco, accuracy_limit=3)
    results = measure(cells(tiny_bundle, 1, 4), data=used, accuracy=True, limits=Limits(120))
    assert [(result.status, result.reason) for result in results] == [("ok", None)] * 2
    for result in results:
        (run,) = result.runs
        assert result.cell.bundle.directory == "tiny"
        assert result.accuracy is not None and result.accuracy.images == 3
        assert run.samples.batch_size == result.cell.batch_size
        assert run.samples.images == len(run.samples.latency_ms) * run.samples.batch_size
        assert run.peak_rss_mb is not None and run.peak_rss_mb > run.inputs_mb > 0
        stages = run.stages
        assert stages is not None
        for total, *parts in zip(
            stages.end_to_end_ms,
            stages.decode_ms,
            stages.preprocess_ms,
            stages.input_copy_ms,
            stages.inference_ms,
            stages.output_copy_ms,
            stages.postprocess_ms,
            strict=True,
        ):
            assert 0 < sum(parts) <= total
        assert run.monitored is not None and run.monitored.gpu_percent == ()
        # One convolution of 3x3 over 3 channels to 6, at stride 8: of the six images as they are, then as padded.
        assert result.cost is not None
        sizes = [preprocess_size(path) for path in images]
        macs = [-(-height // 8) * -(-width // 8) * 6 * 27 for height, width in sizes]
        assert result.cost.macs == sum(macs) / 6
    one, four = (result.runs[0] for result in results)
    assert one.shapes == {"1x3x64x96": 3, "1x3x96x64": 2, "1x3x64x64": 1}
    assert four.shapes == {"4x3x96x96": 2}  # the last batch is filled up from the beginning
    assert results[1].cost is not None and results[1].cost.padded_macs == 12 * 12 * 6 * 27


@pytest.mark.slow
def test_the_file_that_deploys_by_itself_is_measured_on_the_same_batches(tiny_whole: Path, tiny_coco: Path) -> None:
    images = tuple(sorted((tiny_coco.parent / "images").iterdir()))
    for engine in ("onnxruntime", "openvino"):
        pytest.importorskip(engine)
        alone = cell_of(tiny_whole, engine=engine, batch_size=4)
        plan = plan_of(tiny_whole, alone, replace(alone, end_to_end=True))
        results = measure(plan, data=data(*images, annotations=tiny_coco), accuracy=True)
        assert [(one.status, one.reason, one.accuracy_reason) for one in results] == [("ok", None, None)] * 2
        network, file = results
        assert network.accuracy == file.accuracy and file.accuracy is not None and file.accuracy.ap == 1
        assert network.runs[0].shapes == file.runs[0].shapes and network.cost == file.cost
        assert file.runs[0].stages is not None and file.runs[0].samples.batch_size == 4


def preprocess_size(path: Path) -> tuple[int, int]:
    """Height and width as the tiny detector resizes it: the short side to 64, the long one to 96 at most."""
    from gfldeploy.images.decode import read_image
    from gfldeploy.images.preprocess import Preprocess

    return Preprocess(target_size=(64, 96), pad_stride=32)(read_image(path)).tensor.shape[1:]


def test_the_offline_scenario(tiny_bundle: Path, tiny_coco: Path) -> None:
    pytest.importorskip("onnxruntime")
    images = tuple(sorted((tiny_coco.parent / "images").iterdir()))
    plan = plan_of(tiny_bundle, cell_of(tiny_bundle, batch_size=2, scenario="offline", order="bucketed"))
    (result,) = measure(plan, data=data(*images), settings=Settings(0, 20, 0))
    assert result.status == "ok", result.reason
    (run,) = result.runs
    assert run.serving is None
    assert run.padding_ratio == pytest.approx(padding_of_single_images(images))
    assert run.shapes == {"2x3x64x96": 2, "2x3x96x64": 1, "2x3x64x64": 1}


def test_the_server_scenario(tiny_bundle: Path, tiny_coco: Path) -> None:
    pytest.importorskip("onnxruntime")
    images = tuple(sorted((tiny_coco.parent / "images").iterdir()))
    cell = cell_of(tiny_bundle, batch_size=2, scenario="server", rate=200.0, policy="adaptive")
    (result,) = measure(
        plan_of(tiny_bundle, cell), data=data(*images), settings=Settings(0, 20, 0, latency_bound_ms=500)
    )
    assert result.status == "ok", result.reason
    (run,) = result.runs
    assert (result.cell.rate, result.cell.policy) == (200.0, "adaptive") and result.cost is not None
    assert run.serving is not None and run.serving.requests == 20 == run.samples.images + run.serving.rejected
    assert sum(int(shape[0]) * count for shape, count in run.shapes.items()) == run.samples.images


def padding_of_single_images(images: Sequence[Path]) -> float:
    """Of batches of two: three landscapes with the first once more, two portraits, a square twice."""
    landscapes: list[int] = []
    portraits: list[int] = []
    squares: list[int] = []
    for path in images:
        height, width = preprocess_size(path)
        (landscapes if width > height else portraits if height > width else squares).append(height * width)
    real = sum(landscapes) + landscapes[0] + sum(portraits) + 2 * sum(squares)
    return (4 * 64 * 96 + 2 * 96 * 64 + 2 * 64 * 64) / real


def test_a_deliberate_error_in_the_worker(tiny_bundle: Path, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    broken = tmp_path / "broken.jpg"
    broken.write_bytes(b"no image")
    (result,) = measure(cells(tiny_bundle, 1), data=data(broken))
    assert result.status == "failed" and result.reason is not None and "broken.jpg" in result.reason
    assert result.remedy and "Traceback" not in result.reason


@pytest.mark.slow
def test_a_failing_accuracy_leaves_the_timing(tiny_bundle: Path, tiny_coco: Path, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    source = json.loads(tiny_coco.read_text())
    empty = tmp_path / "empty.json"
    empty.write_text(json.dumps({**source, "annotations": []}))
    images = tiny_coco.parent / "images"
    (result,) = measure(
        cells(tiny_bundle, 1), data=data(images / "1.jpg", annotations=empty, image_dir=images), accuracy=True
    )
    assert result.status == "ok" and result.accuracy is None
    assert result.accuracy_reason is not None and "no annotations" in result.accuracy_reason


@pytest.mark.slow
def test_accuracy_may_take_long_as_long_as_it_gets_on(tiny_bundle: Path) -> None:
    accuracy = {
        "ap": 1.0, "ap50": 1.0, "ap75": 1.0, "ap_small": -1.0, "ap_medium": 1.0, "ap_large": -1.0,
        "images": 1, "detections": 1,
    }  # fmt: skip
    code = (
        "if request['kind'] == 'accuracy':\n"
        "    for number in range(12):\n"
        "        open(folder + '/progress', 'a').write(json.dumps(['images', number, 12]) + '\\n'); time.sleep(0.5)\n"
        f"    answer({{'accuracy': {accuracy!r}}})\n"
        f"else: answer({{'timing': {TIMED!r}}})\n"
    )
    (result,) = measure(cells(tiny_bundle, 1), accuracy=True, limits=Limits(4), worker=child(code))
    assert result.accuracy is not None and result.accuracy.ap == 1.0


def test_the_worker_dies_with_its_parent(tmp_path: Path) -> None:
    code = (
        "import os, sys, time\n"
        "from gfldeploy.signals import die_with_parent\n"
        "if os.fork() == 0:\n"
        f"    die_with_parent(); open({str(tmp_path / 'pid')!r}, 'w').write(str(os.getpid())); time.sleep(300)\n"
        f"while not os.path.exists({str(tmp_path / 'pid')!r}): time.sleep(0.05)\n"
        "time.sleep(0.2); os._exit(0)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60, env={**os.environ})
    assert wait_until_dead(int((tmp_path / "pid").read_text()))
