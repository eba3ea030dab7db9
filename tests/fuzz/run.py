"""Feed a reader of files from elsewhere with damaged and hostile ones: only the project's own errors may come out.

    python tests/fuzz/run.py READER [READER ...] --minutes 5
    python tests/fuzz/run.py READER --input FINDING        # one input again, with its traceback

A target is `fuzz_READER.py` beside this file:

    def seeds() -> Iterable[bytes]: ...                       inputs to start from, good ones and bad ones
    def one(data: bytes, folder: Path) -> object: ...         reads the input, in `folder`, which is empty; raises only
                                                              `GfldeployError` (let it through: it tells the runner
                                                              which inputs are new)
    def mutate(data: bytes, rng: random.Random) -> bytes: ... optional: another input, for formats whose structure
                                                              `mutations.mutate` does not know (it knows JSON and bytes)

Inputs are read in a process of their own. A finding is whatever raises something else, kills the process, takes more
than 10 seconds, or 1 GB of memory; it is saved as a file with the reason beside it, and the run goes on. An input is
kept to be changed further when its error, apart from numbers and quoted text, is one not seen before. Where atheris is
installed (`--engine atheris`), inputs are chosen by the coverage of the package's code instead.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import importlib
import mmap
import os
import random
import re
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path
from types import ModuleType
from typing import Any

SECONDS = 10.0  # an input may take
BYTES = 10**9  # of memory, above what the process had before it
HERE = Path(__file__).resolve().parent
_STATE = struct.Struct("<dQQQ")  # when the input began (0: none), inputs so far, resident bytes before it, findings


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("readers", nargs="+", metavar="READER")
    parser.add_argument("--minutes", type=float, default=5.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--engine", choices=("own", "atheris"), default="own")
    parser.add_argument("--findings", type=Path, default=Path("fuzz-findings"))
    parser.add_argument("--input", type=Path, help="read this one input and show what happens")
    parser.add_argument("--state", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.state is not None:
        _child(arguments)
    elif arguments.input is not None:
        with tempfile.TemporaryDirectory() as folder:
            print(_outcome(_target(arguments.readers[0]), arguments.input.read_bytes(), Path(folder)))
    else:
        clean = [_run(reader, arguments) for reader in arguments.readers]
        sys.exit(0 if all(clean) else 1)


def _target(reader: str) -> ModuleType:
    sys.path[:0] = [str(HERE), str(HERE.parents[1])]
    return importlib.import_module(f"fuzz_{reader}")


# ------------------------------------------------------------------------------------------------ the watching process
def _run(reader: str, arguments: argparse.Namespace) -> bool:
    """Run one target for its time; whether nothing was found."""
    findings = arguments.findings / reader
    before = len(list(findings.glob("*.txt")))
    end = time.monotonic() + arguments.minutes * 60
    total, starts, startless = 0, 0, 0
    while time.monotonic() < end and startless < 3:
        with tempfile.TemporaryDirectory(prefix="fuzz-") as work:
            state = Path(work) / "state"
            state.write_bytes(bytes(_STATE.size))
            command = [sys.executable, __file__, reader, "--state", str(state), "--findings", str(arguments.findings)]
            command += ["--engine", arguments.engine, "--minutes", str((end - time.monotonic()) / 60)]
            command += ["--seed", str(arguments.seed + starts)]
            child = subprocess.Popen(command, start_new_session=True)
            starts += 1
            with state.open("r+b") as file, mmap.mmap(file.fileno(), _STATE.size) as view:
                why = _watch(child, view, end)
                done = _STATE.unpack(view[:])[1]
            total += done
            startless = 0 if done else startless + 1
            current = Path(work) / "current"
            if why is not None and current.exists():
                _save(findings, current.read_bytes(), why, why.split(":")[0])
            elif why is not None:
                print(f"{reader}: {why} before the first input", file=sys.stderr)
    found = len(list(findings.glob("*.txt"))) - before
    print(f"{reader}: {total} inputs in {arguments.minutes:g} minutes, {found} findings", flush=True)
    return found == 0 and startless == 0


def _watch(child: subprocess.Popen[bytes], view: mmap.mmap, end: float) -> str | None:
    """Wait for the child, and kill it when an input takes too much; what the input at work is to blame for, if any."""
    why = None
    while child.poll() is None:
        time.sleep(0.02)
        began, _, resident, _ = _STATE.unpack(view[:])
        now = time.monotonic()
        if began and now - began > SECONDS:
            why = f"slow: more than {SECONDS:g} s"
        elif began and _memory(child.pid, "VmRSS") - resident > BYTES:
            why = f"memory: more than {BYTES / 1e9:g} GB"
        elif now > end + SECONDS + 120:  # it neither ends nor works
            why = "stuck"
        if why is not None:
            break
    _kill(child)
    if why is None and child.returncode not in (0, None):
        why = f"died: exit status {child.returncode}"
    return why


def _kill(child: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGKILL)  # its own children too
    child.wait()


def _memory(process: int | str, key: str) -> int:
    try:
        text = Path(f"/proc/{process}/status").read_text()
    except OSError:
        return 0
    found = re.search(rf"{key}:\s+(\d+)", text)
    return int(found[1]) * 1024 if found else 0


def _save(findings: Path, data: bytes, why: str, kind: str) -> None:
    """One finding of a kind is enough to begin with: the others would mostly be the same."""
    findings.mkdir(parents=True, exist_ok=True)
    title = hashlib.sha256(kind.encode()).hexdigest()[:12]
    if kind in ("slow", "memory", "died", "stuck"):
        title = f"{kind}-{hashlib.sha256(data).hexdigest()[:12]}"
    if not (findings / f"{title}.txt").exists():
        (findings / f"{title}.bin").write_bytes(data)
        (findings / f"{title}.txt").write_text(why + "\n", errors="backslashreplace")
        print(f"finding: {findings / title}.bin: {why.splitlines()[-1][:200]!a}", file=sys.stderr, flush=True)


# -------------------------------------------------------------------------------------------------- the reading process
def _child(arguments: argparse.Namespace) -> None:
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # readers may show what they read
    if arguments.engine == "atheris":
        import atheris

        with atheris.instrument_imports(include=["gfldeploy"]):
            target = _target(arguments.readers[0])
            seeds = list(target.seeds())
    else:
        target = _target(arguments.readers[0])
        seeds = list(target.seeds())
    reader = _Reader(target, arguments.state, arguments.findings / arguments.readers[0])
    with tempfile.TemporaryDirectory() as folder:
        for data in seeds[:3]:  # imports happen now, and count for no input
            _outcome(target, data, _empty(Path(folder) / "input"))
    mutate = getattr(target, "mutate", None) or importlib.import_module("mutations").mutate
    end = time.monotonic() + arguments.minutes * 60
    if arguments.engine == "atheris":
        _atheris(reader, seeds, mutate, arguments)
    rng = random.Random(arguments.seed)
    corpus, seen = list(seeds), set()
    for data in seeds:
        seen.add(reader.read(data))
    while time.monotonic() < end:
        data = mutate(rng.choice(corpus), rng)
        outcome = reader.read(data)
        if outcome not in seen and len(data) < 10**7:
            seen.add(outcome)
            corpus.append(data)


def _atheris(reader: _Reader, seeds: list[bytes], mutate: Any, arguments: argparse.Namespace) -> None:
    """Have libFuzzer choose the inputs; it ends the process."""
    import atheris

    corpus = arguments.state.parent / "corpus"
    corpus.mkdir()
    for number, data in enumerate(seeds):
        (corpus / str(number)).write_bytes(data)

    def mutator(data: bytes, size: int, seed: int) -> bytes:
        rng = random.Random(seed)
        changed = mutate(data, rng) if rng.random() < 0.7 else atheris.Mutate(data, size)
        return bytes(changed[:size])

    options = [f"-max_total_time={int(arguments.minutes * 60)}", "-max_len=1000000", "-rss_limit_mb=0", "-timeout=3600"]
    options += [f"-seed={arguments.seed + 1}", "-verbosity=0", str(corpus)]
    atheris.Setup([sys.argv[0], *options], lambda data: reader.read(data), custom_mutator=mutator)
    atheris.Fuzz()


class _Reader:
    """Reads inputs, telling the watching process which one is at work, and saves what should not have come out."""

    def __init__(self, target: ModuleType, state: Path, findings: Path) -> None:
        self._target, self._findings = target, findings
        self._current, self._folder = state.parent / "current", state.parent / "input"
        with state.open("r+b") as file:
            self._view = mmap.mmap(file.fileno(), _STATE.size)
        self._count = 0

    def read(self, data: bytes) -> str:
        self._current.write_bytes(data)
        folder = _empty(self._folder)
        resident = _memory("self", "VmRSS")
        Path("/proc/self/clear_refs").write_text("5")  # forget the highest so far
        self._view[:] = _STATE.pack(time.monotonic(), self._count, resident, 0)
        began = time.monotonic()
        outcome = _outcome(self._target, data, folder)
        took, memory = time.monotonic() - began, _memory("self", "VmHWM") - resident
        self._count += 1
        self._view[:] = _STATE.pack(0.0, self._count, resident, 0)
        if outcome.startswith("!"):
            _save(self._findings, data, outcome[1:], _place(outcome))
        elif took > SECONDS:
            _save(self._findings, data, f"slow: {took:.1f} s", "slow")
        elif memory > BYTES:
            _save(self._findings, data, f"memory: {memory / 1e9:.1f} GB", "memory")
        return outcome


def _outcome(target: ModuleType, data: bytes, folder: Path) -> str:
    """What came out, without what differs from input to input; a finding begins with an exclamation mark."""
    from gfldeploy.errors import GfldeployError

    try:
        target.one(data, folder)
    except GfldeployError as error:
        if "\n" in str(error):
            return "!an error of several lines: " + repr(str(error))
        return re.sub(r"'.*?'|\".*?\"|[-+.\d]+|\S*/\S*|\W+", " ", f"{type(error).__name__} {error.problem}")[:120]
    except BaseException:  # noqa: BLE001, that is what is looked for
        return "!" + traceback.format_exc(limit=-12)
    return "read"


def _place(outcome: str) -> str:
    """The lines of the package that the traceback goes through last, and the kind of the exception."""
    frames = re.findall(r'File "[^"]*?((?:gfldeploy|tests)/[^"]+)", line (\d+)', outcome)
    return f"{frames[-1:]} {outcome.splitlines()[-1].partition(':')[0]}"


def _empty(folder: Path) -> Path:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder


if __name__ == "__main__":
    main()
