"""Whether commands that are killed at random moments leave the target old or whole, the next run right, and nothing
that grows.

    python benchmarks/kill.py --demo gfldeploy-demo --machine epyc-2core

Kills `predict`, `bench`, `export` and `quantize` with SIGKILL, each `--kills` times, on the detector of
`gfldeploy demo`: half of them a random while after the start, half a random while after something was written. Before
every second run to its end there is an old result, which `--force` replaces. After each kill the target must be the old
one or the new one, whole, and all processes must end; one to four kills later a run is let end, which must make what
an undisturbed one made, and leave nothing else beside the target or among temporary files (but for `.ses`, which ONNX
Runtime leaves there). Prints a line for each kill, and writes results/MACHINE/checks/NAME_kill.json beside this script.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from gfldeploy import demo
from gfldeploy.bench.results import BenchResults
from gfldeploy.files import write_json
from gfldeploy.images.coco import list_images
from gfldeploy.machine import describe_machine
from gfldeploy.serialization import plain

HERE = Path(__file__).resolve().parent
MARK = ".made-by-gfldeploy"
KILLS = ("predict=32", "bench=8", "export=5", "quantize=5")
TOKEN = "GFLDEPLOY_KILL_RECIPE"
THEIRS = {".ses"}
ENDS_S = 30.0  # processes have so long to end after their parent
POLL_S = 0.005


@dataclass
class Command:
    """One that is killed: its `arguments` before --output, the name of the `target`, and what tells results apart."""

    name: str
    arguments: list[str]
    target: str
    identity: Callable[[Path], Any]
    beside: tuple[str, ...] = ()
    seconds: float = 0.0
    undisturbed: Any = None


@dataclass
class Place:
    """Where the killed commands work: the folder of the target, temporary files, and a home, each of its own."""

    root: Path
    token: str = field(default_factory=lambda: uuid.uuid4().hex)

    def __post_init__(self) -> None:
        for folder in (self.work, self.temporary, self.home):
            folder.mkdir(parents=True)

    @property
    def extra(self) -> list[str]:
        """What is among temporary files."""
        return [name for name in names(self.temporary) if name not in THEIRS]

    @property
    def work(self) -> Path:
        return self.root / "work"

    @property
    def temporary(self) -> Path:
        return self.root / "tmp"

    @property
    def home(self) -> Path:
        return self.root / "home"

    def start(self, command: Command) -> subprocess.Popen[bytes]:
        environment = {**os.environ, "TMPDIR": str(self.temporary), "HOME": str(self.home), TOKEN: self.token}
        line = [sys.executable, "-m", "gfldeploy", *command.arguments, "-o", str(self.work / command.target), "--force"]
        return subprocess.Popen(line, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env=environment, cwd=self.root)

    def written(self, command: Command) -> bool:
        """Whether anything but marks is beside the target or among temporary files."""
        names = {command.target, *command.beside}
        return any(
            path.name not in {MARK, *THEIRS} and path.is_file()
            for path in (*below(self.work), *below(self.temporary))
            if path.relative_to(self.root).parts[1] not in names
        )

    def processes(self) -> list[psutil.Process]:
        found = []
        for process in psutil.process_iter():
            try:
                if process.environ().get(TOKEN) == self.token and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
            except psutil.Error:
                continue
        return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--demo", type=Path, required=True, help="the folder that `gfldeploy demo` wrote")
    parser.add_argument("--name", default="demo", help="of the results file")
    parser.add_argument("--machine", required=True, help="folder of results/ for this machine, such as epyc-2core")
    parser.add_argument("--kills", nargs="+", default=KILLS, metavar="COMMAND=K", help=f"(default: {' '.join(KILLS)})")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    chooser = random.Random(args.seed)
    kills = {name: int(count) for name, _, count in (one.partition("=") for one in args.kills)}
    shared = set(names(Path("/dev/shm")))
    output = HERE / "results" / args.machine / "checks" / f"{args.name}_kill.json"
    output.parent.mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as name:
        place = Place(Path(name))
        commands = [one for one in make_commands(args.demo.resolve(), place.root) if one.name in kills]
        for number, command in enumerate(commands, start=1):
            rows += kill(command, place, kills[command.name], chooser)
            killed = [row for row in rows if not row["ended_before"]]
            failures = [row for row in rows if row["problem"]]
            left = sorted(set(names(Path("/dev/shm"))) - shared)
            record = {
                "machine": plain(describe_machine()), "kills": len(killed),
                "after_something_was_written": sum(row["written"] for row in killed), "failures": len(failures),
                "left_in_shared_memory": left,
                "seconds_undisturbed": {one.name: round(one.seconds, 1) for one in commands[:number]}, "rows": rows,
            }  # fmt: skip
            write_json(output, record)
    print(f"{len(killed)} kills, {record['after_something_was_written']} after something was written")
    print(f"{len(failures)} failures; left in shared memory: {', '.join(left) or 'nothing'}")
    if failures:
        raise SystemExit(1)


def make_commands(made: Path, root: Path) -> list[Command]:
    val, calib = made / "data" / "val", made / "data" / "calib" / "images"
    images = root / "images"
    images.mkdir()
    for path in list_images(val / "images")[:40]:
        shutil.copy(path, images)
    weights = ["-w", str(demo.weights_path())]
    bench = ["--engines", "onnxruntime,openvino", "--batch-sizes", "1", "--rounds", "1", "--min-seconds", "0.2"]
    predict = ["predict", str(made / "int8"), str(images), "--engine", "onnxruntime", "--batch-size", "2"]
    return [
        Command("predict", [*predict, "--draw"], "out", folder_identity),
        Command(
            "bench",
            ["bench", str(made / "int8"), "--data", str(val / "annotations.json"), *bench, "--accuracy-limit", "4",
             "--no-peak", "--limit", "4"],
            "results.json", bench_identity, ("results.csv", "results.html"),
        ),
        Command("export", ["export", "-c", str(demo.config_path()), *weights], "out", bundle_identity),
        Command(
            "quantize",
            ["quantize", str(made / "fp32"), "--data", str(calib), "--samples", "2", "--algo", "abs_max",
             "--min-agreement", "0"],
            "out", bundle_identity,
        ),
    ]  # fmt: skip


def kill(command: Command, place: Place, kills: int, chooser: random.Random) -> Iterator[dict[str, Any]]:
    """Kill it so many times; what was found after each."""
    clear(place.work)
    target = place.work / command.target
    finish(command, place)
    command.undisturbed = command.identity(target)
    old_results = place.root / f"{command.name}-old"
    shutil.copytree(place.work, old_results)
    spoil(old_results / command.target)
    done = 0
    while done < kills:  # of those that had not ended before
        clear(place.work)
        replaces = chooser.random() < 0.5
        if replaces:
            shutil.copytree(old_results, place.work, dirs_exist_ok=True)
        old = command.identity(target) if replaces else None
        rows = []
        for _ in range(min(chooser.randint(1, 4), kills - done)):
            rows.append(kill_once(command, place, old, chooser, wait=(done + len(rows)) % 2 == 0))
        done += sum(not row["ended_before"] for row in rows)
        problem = finish(command, place)
        if not problem and command.identity(target) != command.undisturbed:
            problem = "the run that was let end made something else"
        left = {*names(place.work), *place.extra} - {command.target, *command.beside}
        if left:
            problem = problem or f"left behind: {', '.join(sorted(left))}"
        rows[-1]["problem"] = rows[-1]["problem"] or problem
        for row in rows:
            print(json.dumps(row), flush=True)
            yield row


def kill_once(command: Command, place: Place, old: Any, chooser: random.Random, wait: bool) -> dict[str, Any]:
    """`wait`: until something is written, so that the moment is between that and the end."""
    start = time.monotonic()
    with place.start(command) as process:
        if wait:
            while process.poll() is None and not place.written(command):
                time.sleep(POLL_S)
        least = time.monotonic() - start
        delay = chooser.uniform(0, 0.8 * max(command.seconds - least, 0.5))
        ended = True
        try:
            process.communicate(timeout=delay)
        except subprocess.TimeoutExpired:
            ended = False
            process.kill()
    moment = time.monotonic() - start
    written = place.written(command)
    problem = wait_for_end(place)
    target = place.work / command.target
    if target.exists() and (identity := command.identity(target)) not in (old, command.undisturbed):
        problem = problem or f"the target is neither old nor new: {identity}"
    elif not target.exists() and old is not None:
        problem = problem or "the old target is gone"
    return {
        "command": command.name, "replaces": old is not None, "seconds": round(moment, 2), "written": written,
        "ended_before": ended, "beside": names(place.work), "temporary": place.extra,
        "problem": problem,
    }  # fmt: skip


def wait_for_end(place: Place) -> str | None:
    deadline = time.monotonic() + ENDS_S
    while running := place.processes():
        if time.monotonic() > deadline:
            return f"still running: {', '.join(str(one.pid) for one in running)}"
        time.sleep(0.1)
    return None


def finish(command: Command, place: Place) -> str | None:
    start = time.monotonic()
    with place.start(command) as process:
        _, said = process.communicate()
    seconds = time.monotonic() - start
    command.seconds = min(command.seconds or seconds, seconds)
    if process.returncode:
        return f"exit code {process.returncode}: {said.decode(errors='replace').strip().splitlines()[-1]}"
    return None


def bundle_identity(bundle: Path) -> Any:
    """All of its files but the measurements, of which nothing is missing."""
    listed = json.loads((bundle / "manifest.json").read_text())["files"]
    found = folder_identity(bundle)
    assert set(found) == {*listed, "manifest.json"}, "files are missing, or there are more"
    return {name: digest for name, digest in found.items() if name not in ("manifest.json", "parity.json")}


def bench_identity(results: Path) -> Any:
    """What was measured: figures differ from run to run. An old one has another date."""
    read = BenchResults.read(results)
    cells = [(one.cell.name(), one.status, len(one.runs)) for one in read.cells]
    return {"old": read.created.startswith("2000"), "cells": cells}


def folder_identity(folder: Path) -> Any:
    return {path.relative_to(folder).as_posix(): digest(path) for path in sorted(below(folder)) if path.is_file()}


def digest(path: Path) -> str:
    """Of a file's content; of a Paddle program without the order of its operators, in which PaddleSlim varies."""
    content = path.read_bytes()
    if path.suffix == ".pdmodel":
        from paddle.base.proto import framework_pb2

        blocks = framework_pb2.ProgramDesc.FromString(content).blocks
        content = b"".join(sorted(one.SerializeToString(deterministic=True) for block in blocks for one in block.ops))
    return hashlib.sha256(content).hexdigest()


def spoil(result: Path) -> None:
    """Make a result that can be told from a new one."""
    if result.is_file():
        content = json.loads(result.read_text())
        write_json(result, {**content, "created": "2000-01-01T00:00:00+00:00"})
        return
    name = "layers.json" if (result / "layers.json").exists() else "detections.jsonl"
    (result / name).write_text("old")


def clear(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.mkdir()


def below(folder: Path) -> Iterator[Path]:
    """What is there now: others may be removing it."""
    for name, folders, files in os.walk(folder):
        yield from (Path(name) / one for one in (*folders, *files))


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


if __name__ == "__main__":
    main()
