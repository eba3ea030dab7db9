"""What differs by operating system: locks, ends of processes, and prediction without what Windows lacks."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import pytest

from gfldeploy.system import DirectoryLock, end_of, exchange, named_path, usable_cpus

PORTABLE = Path(__file__).parent / "portable"
LOCKS = """
import os, sys
from pathlib import Path
from gfldeploy.system import DirectoryLock
lock = DirectoryLock(Path(sys.argv[1]))
print(lock.acquire(), flush=True)
sys.stdin.readline()
os._exit(0)  # as if it were killed
"""


@pytest.fixture(params=[False, pytest.param(True, marks=pytest.mark.posix)], ids=["here", "without what Windows lacks"])
def environment(request: pytest.FixtureRequest) -> dict[str, str]:
    """Of a process, as ours and without what Windows lacks: the parameter."""
    path = os.pathsep.join(filter(None, ([str(PORTABLE)] if request.param else []) + [os.environ.get("PYTHONPATH")]))
    return {**os.environ, "PYTHONPATH": path}


def test_a_lock_is_of_one_process_and_ends_with_it(environment: dict[str, str], tmp_path: Path) -> None:
    command = [sys.executable, "-c", LOCKS, str(tmp_path)]
    with subprocess.Popen(command, env=environment, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as one:
        assert one.stdout is not None and one.stdout.readline() == "True\n"
        two = subprocess.run(command, env=environment, text=True, input="\n", capture_output=True, check=True)
        assert two.stdout == "False\n"
        one.communicate("\n")
    for _ in range(2):
        after = subprocess.run(command, env=environment, text=True, input="\n", capture_output=True, check=True)
        assert after.stdout == "True\n", "one that has ended locks nothing"


def test_a_lock_of_a_link_or_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to(tmp_path)
    for name in ("file", "link", "nothing"):
        with pytest.raises(OSError, match=r".*"):
            DirectoryLock(tmp_path / name)
    (tmp_path / "folder").mkdir()
    with closing(DirectoryLock(tmp_path / "folder")) as lock:
        assert lock.acquire() and lock.is_of_path()
        (tmp_path / "folder").rename(tmp_path / "moved")
        assert not lock.is_of_path()


def test_two_directories_are_exchanged_or_nothing_is(tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / name).touch()
    done = exchange(tmp_path / "one", tmp_path / "two")
    assert [path.name for path in (tmp_path / "one").iterdir()] == ["two" if done else "one"]


def test_how_a_process_ended() -> None:
    assert end_of(1) is None
    assert end_of(-signal.Signals["SIGSEGV"].value) == "crashed with SIGSEGV"
    assert end_of(-9) == "was killed by SIGKILL, perhaps because memory ran out"
    assert end_of(0xC0000005) == "crashed with an access violation"
    assert end_of(0xC0000420) == "crashed with status 0xc0000420"


def test_names_for_c_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert named_path("café") == str(tmp_path / "café")
    assert named_path("caf\udce9") is None
    assert len(usable_cpus()) >= 1


@pytest.mark.posix
def test_prediction_without_what_windows_lacks_has_the_same_bytes(
    tiny_bundle: Path, tiny_coco: Path, tmp_path: Path
) -> None:
    pytest.importorskip("onnxruntime")
    pytest.importorskip("simplejpeg")
    found = []
    for name, more in (("as usual", []), ("as there", [str(PORTABLE)])):
        path = os.pathsep.join(filter(None, [*more, os.environ.get("PYTHONPATH")]))
        arguments = ["predict", str(tiny_bundle), str(tiny_coco.parent / "images"), "--output", str(tmp_path / name)]
        # With a console that knows no Unicode, as those of Windows are.
        environment = {**os.environ, "PYTHONPATH": path, "PYTHONIOENCODING": "cp1252"}
        command = [sys.executable, "-m", "gfldeploy", *arguments, "--draw"]
        subprocess.run(command, env=environment, check=True, capture_output=True)
        folder = tmp_path / name
        notes = json.loads((folder / "predict.json").read_text())
        found.append(
            {one.relative_to(folder).as_posix(): one.read_bytes() for one in folder.rglob("*") if one.is_file()}
        )
        found[-1].pop("predict.json")
    assert found[0] == found[1] and len(found[0]) == 3 + notes["images"]
    assert sorted(one.name for one in tmp_path.iterdir()) == ["as there", "as usual"]
