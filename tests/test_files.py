"""An interrupted or refused write leaves what was there, and nothing else."""

from __future__ import annotations

import ctypes
import errno
import json
import os
import signal
import subprocess
import sys
import textwrap
import threading
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from sample_results import sample_results

from gfldeploy.bench.report.page import write_report
from gfldeploy.bench.table import write_csv
from gfldeploy.errors import OutputError
from gfldeploy.files import (
    FileKind,
    atomic_directory,
    check_apart,
    check_file,
    check_target,
    native_writes,
    open_own,
    read_json,
    scratch_directory,
    unfinished_beside,
    write_json,
    write_text,
)
from gfldeploy.system import DirectoryLock


def ours(directory: Path, **content: str) -> Path:
    """A directory that gfldeploy could have written: a manifest, and the files that it lists."""
    directory.mkdir()
    for name, text in content.items():
        (directory / name).write_text(text)
    (directory / "manifest.json").write_text(json.dumps({"schema": 1, "files": {name: {} for name in content}}))
    return directory


def tree(directory: Path) -> dict[str, str | None]:
    """What is there but the locks that a killed process leaves where directories cannot be locked."""
    return {
        path.relative_to(directory).as_posix(): path.read_text() if path.is_file() else None
        for path in directory.rglob("*")
        if path.suffix != ".lock"
    }


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MiB."""
    directory = tmp_path / "small"
    directory.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", directory], capture_output=True)
    if mounted.returncode:
        pytest.skip(f"mounting a tmpfs is not allowed here: {mounted.stderr.decode().strip()}")
    yield directory
    subprocess.run(["umount", directory], check=True)


# --- publishing -------------------------------------------------------------------------------------------------------


def test_the_directory_appears_whole(tmp_path: Path) -> None:
    target = tmp_path / "new" / "deep" / "out"
    with atomic_directory(target) as directory:
        (directory / "a").write_text("1")
        assert not target.exists()
    assert tree(tmp_path) == {"new": None, "new/deep": None, "new/deep/out": None, "new/deep/out/a": "1"}
    umask = os.umask(0)
    os.umask(umask)
    assert target.stat().st_mode & 0o777 == 0o777 & ~umask  # not the private mode of a temporary directory


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, SystemExit])
def test_a_failed_block_leaves_nothing(tmp_path: Path, error: type[BaseException]) -> None:
    with pytest.raises(error), atomic_directory(tmp_path / "new" / "deep" / "out") as directory:
        (directory / "a").write_text("1")
        raise error
    assert list(tmp_path.iterdir()) == []


def test_force_exchanges_ours(tmp_path: Path) -> None:
    target = ours(tmp_path / "out", old="1")
    before = tree(tmp_path)
    with pytest.raises(RuntimeError), atomic_directory(target, force=True) as directory:
        (directory / "new").write_text("2")
        raise RuntimeError
    assert tree(tmp_path) == before
    with atomic_directory(target, force=True) as directory:
        (directory / "new").write_text("2")
        assert (target / "old").read_text() == "1"
    assert tree(tmp_path) == {"out": None, "out/new": "2"}


def test_force_without_an_exchange_in_the_file_system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Libc:
        def renameat2(self, *arguments: object) -> int:
            ctypes.set_errno(errno.EINVAL)
            return -1

    monkeypatch.setattr(ctypes, "CDLL", lambda *arguments, **options: Libc())
    target = ours(tmp_path / "out", old="1")
    with atomic_directory(target, force=True) as directory:
        (directory / "new").write_text("2")
    assert tree(tmp_path) == {"out": None, "out/new": "2"}


@pytest.mark.parametrize("force", [False, True])
def test_what_is_in_the_way_is_refused(tmp_path: Path, force: bool) -> None:
    elsewhere = ours(tmp_path / "elsewhere", a="1")
    (tmp_path / "file").write_text("mine")
    (tmp_path / "link").symlink_to(elsewhere)
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "thesis.tex").write_text("mine")
    # Manifests of this name are common: web applications, container images, browser extensions.
    (tmp_path / "webapp").mkdir()
    (tmp_path / "webapp" / "manifest.json").write_text('{"name": "app", "schema": 1}')
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "manifest.json").write_text("{")
    (ours(tmp_path / "extended", a="1") / "notes.txt").write_text("mine")
    (ours(tmp_path / "begun", a="1") / "my folder").mkdir()
    before = tree(tmp_path)
    for name, reason in {
        "file": "is a file",
        "link": "is a symbolic link",
        "dangling": "is a symbolic link",
        "folder": "did not write",
        "webapp": "did not write",
        "broken": "did not write",
        "extended": "did not write",
        "begun": "holds my folder, which gfldeploy did not write",
        "file/below": "cannot write",
        "x" * 300: "File name too long",
    }.items():
        with pytest.raises(OutputError) as caught, atomic_directory(tmp_path / name, force=force):
            pytest.fail("the block must not run")
        assert caught.value.remedy
        assert (reason if force or "did not" not in reason else "add --force") in str(caught.value)
    assert tree(tmp_path) == before
    assert (tmp_path / "begun" / "my folder").is_dir()


def test_an_empty_directory_is_replaced_with_force_only(tmp_path: Path) -> None:
    target = tmp_path / "out"
    target.mkdir()
    with pytest.raises(OutputError, match="exists already"):
        check_target(target)
    with atomic_directory(target, force=True) as directory:
        (directory / "a").write_text("1")
    assert tree(target) == {"a": "1"}


def test_somebody_else_is_faster(tmp_path: Path) -> None:
    target = tmp_path / "out"
    with pytest.raises(OutputError, match="exists already"), atomic_directory(target) as directory:
        (directory / "a").write_text("1")
        ours(target, theirs="2")
    assert tree(target)["theirs"] == "2"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


# --- killed runs ------------------------------------------------------------------------------------------------------


def run_writer(target: Path, body: str) -> subprocess.Popen[str]:
    """A process that opens `target` for writing and then runs `body`, which may use `directory`."""
    code = "import os, signal, sys, time\nfrom pathlib import Path\nfrom gfldeploy.files import atomic_directory\n"
    code += "with atomic_directory(Path(sys.argv[1]), force=True) as directory:\n"
    code += "    (directory / 'half').write_text('1')\n    print(directory.relative_to(sys.argv[2]), flush=True)\n"
    code += textwrap.indent(body, "    ")
    return subprocess.Popen([sys.executable, "-c", code, target, target.parent], stdout=subprocess.PIPE, text=True)


def test_a_killed_run_is_cleaned_up_by_the_next_and_a_running_one_is_not(tmp_path: Path) -> None:
    target = ours(tmp_path / "out", old="1")
    before = tree(target)
    with run_writer(target, "os.kill(os.getpid(), signal.SIGKILL)") as killed:
        assert killed.wait(60) == -signal.SIGKILL
        assert killed.stdout is not None
        stale = killed.stdout.readline().strip()
    assert (tmp_path / stale / "half").exists()
    assert tree(target) == before
    with run_writer(target, "time.sleep(60)") as running:
        assert running.stdout is not None
        alive = running.stdout.readline().strip()
        # The stale one is gone already.
        assert {path for path in tree(tmp_path) if "/" not in path} == {Path(alive).parts[0], "out"}
        with atomic_directory(target, force=True) as directory:
            (directory / "new").write_text("2")
        assert (tmp_path / alive / "half").exists()
        running.terminate()
        assert running.wait(60) == -signal.SIGINT  # as Python ends when nobody catches KeyboardInterrupt
    assert tree(tmp_path) == {"out": None, "out/new": "2"}


def test_names_with_wildcards_clean_up_after_themselves_only(tmp_path: Path) -> None:
    other = tmp_path / ".ab.partial-1"
    other.mkdir()
    stale = tmp_path / ".a[b]*.partial-1"
    stale.mkdir()
    with atomic_directory(tmp_path / "a[b]*"):
        pass
    assert other.exists()
    assert not stale.exists()


def partial(directory: Path, mark: str, **content: str) -> Path:
    """What a killed run could have left, or something of the same name."""
    (directory / "new").mkdir(parents=True)
    (directory / ".made-by-gfldeploy").write_text(mark)
    for name, text in content.items():
        (directory / name).write_text(text)
    return directory


def test_only_what_has_our_mark_is_cleaned_up(tmp_path: Path) -> None:
    stale = partial(tmp_path / ".out.partial-1", "gfldeploy , on its way to out\n")
    (stale / "new" / "half").write_text("1")
    partial(tmp_path / ".out.partial-2", "mine")
    partial(tmp_path / ".out.partial-3", "gfldeploy , on its way to out\n", notes="mine")
    (tmp_path / ".out.partial-4").mkdir()
    (tmp_path / ".out.partial-4" / "thesis.tex").write_text("mine")
    with atomic_directory(tmp_path / "out"):
        pass
    assert sorted(path.name for path in tmp_path.iterdir()) == [*(f".out.partial-{n}" for n in (2, 3, 4)), "out"]
    assert tree(tmp_path / ".out.partial-3")["notes"] == "mine"


def test_killed_between_two_renames_the_old_one_comes_back(tmp_path: Path) -> None:
    stale = partial(tmp_path / ".out.partial-1", "gfldeploy , on its way to out\n")
    ours(stale / "old", a="1")
    with pytest.raises(RuntimeError), atomic_directory(tmp_path / "out", force=True):
        raise RuntimeError
    assert sorted(tree(tmp_path)) == ["out", "out/a", "out/manifest.json"]


@pytest.mark.parametrize("replaced", [False, True])
def test_killed_while_unfinished_work_replaces_another(replaced: bool, tmp_path: Path) -> None:
    place, out = tmp_path / "out.unfinished", tmp_path / "out"
    place.mkdir()
    (place / ".made-by-gfldeploy").write_text("gfldeploy predict, on its way to out\n")
    note = json.dumps({"what": "results of gfldeploy predict", "files": ["a.json"]})
    for folder, text in ((place / "old", "1"), *([(out, "2")] if replaced else [])):
        folder.mkdir()
        (folder / "predict.json").write_text(note)
        (folder / "a.json").write_text(text)
    work(out)
    assert tree(tmp_path) == {"out": None, "out/predict.json": note, "out/a.json": "2" if replaced else "1"}


def test_scratch_of_a_killed_run_goes_with_the_next(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    code = (
        "import os, signal\nfrom gfldeploy.files import scratch_directory\n"
        "with scratch_directory() as folder:\n    (folder / 'big').touch()\n    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    subprocess.run([sys.executable, "-c", code], env={**os.environ, "TMPDIR": str(tmp_path)})
    assert len(list(tmp_path.rglob("big"))) == 1
    with scratch_directory() as folder:
        assert list(tmp_path.rglob("big")) == []
        (folder / "small").touch()
    assert list(tmp_path.iterdir()) == []


# --- unfinished work --------------------------------------------------------------------------------------------------


MADE = r"done\.txt|results/([a-z]+\.json)?"


def work(output: Path, command: str = "predict", fail: type[BaseException] | None = None) -> None:
    with unfinished_beside(output, command, MADE) as unfinished:
        (unfinished.directory / "results").mkdir(exist_ok=True)
        (unfinished.directory / "results" / "a.json").write_text("1")
        with open_own(unfinished.directory / "done.txt") as file:
            unfinished.worth_keeping |= bool(file.read())
            file.write(b"1")
        if fail:
            raise fail


def test_unfinished_work_is_kept_if_there_is_any(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError):
        work(tmp_path / "new" / "out", fail=RuntimeError)
    assert list(tmp_path.iterdir()) == [], "nothing was done before the error"
    with run_python("with unfinished_beside(Path('out'), 'predict', '') as one: os.kill(os.getpid(), 9)", tmp_path):
        pass
    assert list(tree(tmp_path)) == ["out.unfinished", "out.unfinished/.made-by-gfldeploy"]
    with (
        pytest.raises(KeyboardInterrupt) as caught,
        unfinished_beside(tmp_path / "out", "predict", MADE) as unfinished,
    ):
        (unfinished.directory / "done.txt").write_text("1")
        unfinished.worth_keeping = True
        raise KeyboardInterrupt
    assert caught.value.__notes__ == [
        "what was done so far is kept in out.unfinished, the same command resumes from there"
    ]
    with pytest.raises(OutputError, match=r"out\.unfinished is needed .* did not make it"):
        work(tmp_path / "out", "bench")
    work(tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def run_python(code: str, folder: Path) -> subprocess.Popen[str]:
    """A process in `folder`, ended already."""
    imports = "import os\nfrom pathlib import Path\nfrom gfldeploy.files import *\n"
    process = subprocess.Popen([sys.executable, "-c", imports + code], cwd=folder, text=True)
    process.wait(60)
    return process


@pytest.mark.parametrize("kind", ["theirs", "stranger", "folder", "link", "link below", "hard link", "file", "fifo"])
def test_what_is_not_ours_is_never_touched(kind: str, tmp_path: Path) -> None:
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "done.txt").write_text("mine")
    place = tmp_path / "out.unfinished"
    match kind:
        case "file":
            place.write_text("mine")
        case "link":
            place.symlink_to(tmp_path / "theirs")
        case _:
            place.mkdir()
            if kind != "theirs":
                (place / ".made-by-gfldeploy").write_text("gfldeploy predict, on its way to out\n")
    match kind:
        case "theirs" | "stranger":
            (place / "notes.txt").write_text("mine")
        case "folder":
            (place / "thesis").mkdir()
        case "link below":
            (place / "results").symlink_to(tmp_path / "theirs")
        case "hard link":
            (place / "done.txt").hardlink_to(tmp_path / "theirs" / "done.txt")
        case "fifo":
            os.mkfifo(place / "done.txt")
    before = {path: path.lstat().st_mtime_ns for path in tmp_path.rglob("*")}
    with pytest.raises(OutputError, match="gfldeploy did not make"):
        work(tmp_path / "out")
    assert {path: path.lstat().st_mtime_ns for path in tmp_path.rglob("*")} == before


def test_what_others_put_there_meanwhile_is_left(tmp_path: Path) -> None:
    with unfinished_beside(tmp_path / "out", "predict", MADE) as unfinished:
        (unfinished.directory / "done.txt").write_text("1")
        (unfinished.directory / "notes.txt").write_text("mine")
    assert tree(tmp_path)["out.unfinished/notes.txt"] == "mine"
    assert not (tmp_path / "out.unfinished" / "done.txt").exists()


def test_a_partial_directory_of_another_is_never_followed(tmp_path: Path) -> None:
    elsewhere = ours(tmp_path / "elsewhere", a="1")
    (tmp_path / ".out.partial-1").symlink_to(elsewhere)
    with atomic_directory(tmp_path / "out"):
        pass
    assert (elsewhere / "a").read_text() == "1"


def test_the_partial_directory_is_locked(tmp_path: Path) -> None:
    with atomic_directory(tmp_path / "out") as directory:
        with closing(DirectoryLock(directory.parent)) as other:
            assert not other.acquire()
        with closing(DirectoryLock(directory.parent)) as other:  # which took nothing away
            assert not other.acquire()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_sigterm_unwinds_and_is_given_back(tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt), atomic_directory(tmp_path / "out") as directory:
        (directory / "a").write_text("1")
        signal.raise_signal(signal.SIGTERM)
    assert list(tmp_path.iterdir()) == []
    assert signal.getsignal(signal.SIGTERM) == before


def test_a_programs_own_sigterm_is_left_to_it(tmp_path: Path) -> None:
    received = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: received.append(number))
    try:
        with atomic_directory(tmp_path / "out"):
            signal.raise_signal(signal.SIGTERM)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert received == [signal.SIGTERM]
    assert (tmp_path / "out").is_dir()


def test_another_thread_may_write(tmp_path: Path) -> None:
    failures: list[BaseException] = []

    def write() -> None:
        try:
            with atomic_directory(tmp_path / "out") as directory:
                (directory / "a").write_text("1")
        except BaseException as error:  # noqa: BLE001 - the test fails on it
            failures.append(error)

    thread = threading.Thread(target=write)
    thread.start()
    thread.join()
    assert failures == []
    assert tree(tmp_path / "out") == {"a": "1"}


# --- disks ------------------------------------------------------------------------------------------------------------


def test_too_little_space_is_said_before_the_work(tmp_path: Path) -> None:
    with (
        pytest.raises(OutputError, match=r"MB free, 1000000000000 MB are needed"),
        atomic_directory(tmp_path / "new" / "out", need_bytes=10**18),
    ):
        pytest.fail("the block must not run")
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk(small_disk: Path) -> None:
    target = ours(small_disk / "out", old="1")
    with (
        pytest.raises(OutputError, match=r"cannot write .*/out: No space left on device\. Free some space"),
        atomic_directory(target, force=True) as directory,
    ):
        (directory / "big").write_bytes(bytes(2 << 20))
    assert [path.name for path in small_disk.iterdir()] == ["out"]
    assert (target / "old").read_text() == "1"


def test_native_code_that_keeps_a_full_disk_to_itself(small_disk: Path) -> None:
    with (
        pytest.raises(OutputError, match="No space left on device"),
        native_writes(small_disk),
        (small_disk / "big").open("wb", buffering=0) as file,
    ):
        file.write(bytes(2 << 20))  # writes what fits, and says so in a return value that nobody reads
    (small_disk / "big").unlink()
    with pytest.raises(OutputError, match="No space left on device"), native_writes(small_disk):
        (small_disk / "big").write_bytes(bytes(1 << 20))
        raise RuntimeError("Unknown exception")
    (small_disk / "big").unlink()
    with pytest.raises(RuntimeError, match="a real one"), native_writes(small_disk):
        raise RuntimeError("a real one")
    assert list(small_disk.iterdir()) == []


@pytest.mark.posix
def test_a_limit_on_file_sizes(tmp_path: Path) -> None:
    import resource

    code = (
        "import resource, sys\nfrom pathlib import Path\nfrom gfldeploy.files import *\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))\n"
        "try:\n    with atomic_directory(Path(sys.argv[1])) as directory:\n"
        "        if sys.argv[2] == 'told':\n            (directory / 'big').write_bytes(bytes(200_000))\n"
        "        with native_writes(directory), open(directory / 'big', 'wb', buffering=0) as file:\n"
        "            file.write(bytes(200_000))\n"
        "except Exception as error:\n    print(type(error).__name__, error)\n"
    )
    for how in ("told", "untold"):
        arguments = [sys.executable, "-c", code, str(tmp_path / "out"), how]
        said = subprocess.run(arguments, capture_output=True, text=True, check=True).stdout
        assert said == (
            f"OutputError cannot write {tmp_path / 'out'}: File too large. "
            "Raise the limit on file sizes (`ulimit -f`), or choose another --output.\n"
        )
    assert list(tmp_path.iterdir()) == []
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] != 100_000


def test_a_read_only_file_system(tmp_path: Path) -> None:
    for target in (Path("/proc/out"), Path("/proc/new/out")):
        with pytest.raises(OutputError, match=f"cannot write {target}: ") as caught, atomic_directory(target):
            pytest.fail("the block must not run")
        assert caught.value.remedy == "Choose an --output that you may write to."
    (tmp_path / "data").mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "ro", "tmpfs", str(tmp_path / "data")]
    mounted = subprocess.run(mount, capture_output=True)
    if mounted.returncode:
        pytest.skip(f"mounting a tmpfs is not allowed here: {mounted.stderr.decode().strip()}")
    try:
        with pytest.raises(OutputError, match="Read-only file system"), atomic_directory(tmp_path / "data" / "out"):
            pytest.fail("the block must not run")
    finally:
        subprocess.run(["umount", tmp_path / "data"], check=True)


def test_mistakes_of_ours_keep_their_type(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), atomic_directory(tmp_path / "out"):
        (tmp_path / "nowhere").read_text()


# --- single files -----------------------------------------------------------------------------------------------------


def test_files_of_others_are_not_replaced(tmp_path: Path) -> None:
    beginnings: dict[FileKind, str] = {
        "json": '{\n  "schema": 3,\n  "created": "2026',
        "csv": "bundle,engine,precision,device\n",
        "html": '<!doctype html>\n<html lang="en">\n<head>\n<meta name="generator" content="gfldeploy">',
        "yml": "schema: 1\ncreated: '2026",
    }
    for kind, text in beginnings.items():
        path = tmp_path / f"a.{kind}"
        check_file(path, kind)
        for content, ours in ((text, True), ("", True), ('{"name": "app"}', False), ("\0\xff", False)):
            path.write_text(content)
            with pytest.raises(OutputError, match="exists already"):
                check_file(path, kind)
            if ours:
                check_file(path, kind, force=True)
                continue
            with pytest.raises(OutputError, match="is not a file that gfldeploy wrote"):
                check_file(path, kind, force=True)
    (tmp_path / "link.json").symlink_to(path)
    for name, what in (("link.json", "a symbolic link"), (".", "a directory"), ("/dev/null", "no regular file")):
        with pytest.raises(OutputError, match=f"is {what}, which is never replaced"):
            check_file(tmp_path / name, "json", force=True)


def test_files_of_ours_are_known_by_how_they_begin(tmp_path: Path) -> None:
    found = sample_results()
    found.write(tmp_path / "a.json")
    write_csv(found, tmp_path / "a.csv")
    write_report(found, tmp_path / "a.html")
    kinds: tuple[FileKind, ...] = ("json", "csv", "html")
    for kind in kinds:
        check_file(tmp_path / f"a.{kind}", kind, force=True)


def test_what_is_read_is_not_replaced(tmp_path: Path) -> None:
    images = tmp_path / "out" / "images"
    images.mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "out")
    for output in (tmp_path / "out", images, tmp_path / "link", tmp_path / "bundle" / "new", tmp_path / "bundle"):
        with pytest.raises(OutputError, match="the --output"):
            check_apart(output, [images], tmp_path / "bundle")
    check_apart(images / "found", [images], tmp_path / "bundle")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), object()])
def test_what_is_no_json_leaves_the_old_file(tmp_path: Path, value: Any) -> None:
    path = tmp_path / "a.json"
    write_json(path, {"a": 1})
    with pytest.raises((TypeError, ValueError)):
        write_json(path, {"a": value})
    assert read_json(path) == {"a": 1}
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.json"]


def test_a_file_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    for path in (tmp_path / "folder", Path("/proc/a")):
        with pytest.raises(OutputError, match=f"cannot write {path}: "):
            write_text(path, "text")
    assert [entry.name for entry in tmp_path.iterdir()] == ["folder"]


@pytest.mark.parametrize("content", [b"{", b"\xff\xfe", b"[" * 100_000, b""])
def test_what_is_no_json_is_a_value_error(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(ValueError):
        read_json(tmp_path / "a.json")
