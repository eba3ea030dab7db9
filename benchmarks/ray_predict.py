"""`gfldeploy predict --ray`: its bytes, what it survives, what it costs, and how much memory its driver takes.

    python benchmarks/ray_predict.py --source demo/int8 --images demo/data/val/images --machine epyc-2core

Four parts, all or those of `--parts`, on clusters of this machine:

deaths     `--count` images of a folder, in turn, on Ray's own test cluster: three nodes of one CPU. First undisturbed,
           compared with `predict` on this machine alone; then `--runs` times, each time with a worker, a node and the
           driver killed with SIGKILL at random moments. The same command is run again where the driver was killed.
           Every file must have the bytes of the undisturbed run.
overhead   Interleaved, `--rounds` times: `predict --ray local` with two workers of one thread, and two `predict` of one
           thread at once, each on half of the images: images a second from 20% to 90% of the images, and the CPU time
           that the commands, the workers and Ray's own processes take meanwhile.
memory     The driver's resident memory with 1,000 and with 100,000 small images, and a detector of one convolution.
killer     An engine that ends its process when it sees one of the images: "error" lines for that image alone.

Prints the figures, and writes them after every run to results/MACHINE/checks/NAME_ray_predict.json beside this script;
parts that are not run keep what is there.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import secrets
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import psutil

from gfldeploy.bundle import Bundle, Graph, Manifest, TensorSpec, write_bundle
from gfldeploy.files import write_json
from gfldeploy.images.coco import list_images
from gfldeploy.images.preprocess import Preprocess
from gfldeploy.machine import describe_machine
from gfldeploy.nms import NmsParams
from gfldeploy.serialization import plain

HERE = Path(__file__).resolve().parent
PARTS = ("deaths", "overhead", "memory", "killer")
POLL_S = 0.05
MOST_S = 600.0
STORE_BYTES = 100 * 10**6
ENGINE = """
import os

from gfldeploy.engines.ort_engine import OnnxRuntimeEngine


class FragileEngine(OnnxRuntimeEngine):
    name = "fragile"

    def infer_timed(self, inputs):
        if any(float(image.std()) < 1e-3 for image in inputs["image"][:, 0]):
            os._exit(139)
        return super().infer_timed(inputs)
"""
SPEC = """
from gfldeploy.engines.base import Build, EngineSpec, Library, Obstacle

SPEC = EngineSpec(
    name="fragile",
    title="ONNX Runtime that ends its process when it sees a picture of one colour",
    entry="fragile_engine:FragileEngine",
    library=Library("onnxruntime", {"cpu": Build("onnxruntime", "pip install onnxruntime")}),
    runs={"cpu": {"fp32": "onnx", "int8": "onnx"}, "gpu": Obstacle("it is an example", "use the engine onnxruntime")},
)
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", type=Path, required=True, help="a bundle")
    parser.add_argument("--images", type=Path, required=True, help="a folder of images")
    parser.add_argument("--name", default="demo", help="of the results file")
    parser.add_argument("--machine", required=True, help="folder of results/ for this machine, such as epyc-2core")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--count", type=int, default=2000, metavar="C", help="of images (default: 2000)")
    parser.add_argument("--runs", type=int, default=10, metavar="R", help="with deaths (default: 10)")
    parser.add_argument("--rounds", type=int, default=3, metavar="R", help="of overhead (default: 3)")
    parser.add_argument("--many", type=int, default=100_000, metavar="M", help="images of the part memory")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    output = HERE / "results" / args.machine / "checks" / f"{args.name}_ray_predict.json"
    record: dict[str, Any] = json.loads(output.read_text()) if output.exists() else {}
    record["machine"] = plain(describe_machine())
    wrong = False
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for part in args.parts:
            inside = folder / part
            inside.mkdir()
            right = False
            for so_far, right in globals()[part](args, inside):  # noqa: B007 - the last one counts
                record[part] = so_far
                output.parent.mkdir(parents=True, exist_ok=True)
                write_json(output, record)
            wrong |= not right
    raise SystemExit(wrong)


def deaths(args: argparse.Namespace, folder: Path) -> Iterator[tuple[dict[str, Any], bool]]:
    chooser = random.Random(args.seed)
    images = cycled(list_images(args.images), folder / "images", args.count)
    start = time.monotonic()
    finish(predict(args.source, images, folder / "alone", *SINGLE))
    alone_s = time.monotonic() - start
    expected = digests(folder / "alone")
    with cluster(3) as (address, nodes):
        start = time.monotonic()
        finish(predict(args.source, images, folder / "undisturbed", *SINGLE, "--ray", address))
        seconds = time.monotonic() - start
        same = digests(folder / "undisturbed") == expected
        print(f"{args.count} images on three nodes in {seconds:.0f} s, alone in {alone_s:.0f} s: same bytes {same}")
        runs: list[dict[str, Any]] = []
        record = {"images": args.count, "seconds": seconds, "alone_s": alone_s, "undisturbed_same": same, "runs": runs}
        right = same
        for number in range(args.runs):
            output = folder / f"run{number}"
            runs.append(disturbed(args, images, output, address, nodes, seconds, chooser))
            runs[-1]["same"] = digests(output) == expected
            right &= runs[-1]["same"] and runs[-1]["images"] == args.count
            print(number, runs[-1], flush=True)
            yield record, right
            shutil.rmtree(output)
    killed = Counter(one["what"] for run in runs for one in run["killed"])
    print(f"{len(runs)} runs, {dict(killed)} killed: {'the same bytes' if right else 'DIFFERENT BYTES'}")


def disturbed(
    args: argparse.Namespace,
    images: Path,
    output: Path,
    address: str,
    nodes: Nodes,
    seconds: float,
    chooser: random.Random,
) -> dict[str, Any]:
    """One run to its end, with a worker, a node and the driver killed at random moments of its work."""
    moments = sorted((chooser.uniform(0.05, 0.9) * seconds, what) for what in ("worker", "node", "driver"))
    killed, starts = [], 0
    work = output.with_name(f"{output.name}.unfinished") / "working.jsonl"
    worked = 0.0
    with (output.with_suffix(".log")).open("wb") as log:
        while not output.exists():
            starts += 1
            if starts > 5:
                raise SystemExit(output.with_suffix(".log").read_text())
            process = predict(args.source, images, output, *SINGLE, "--ray", address, stderr=log)
            before = work.stat().st_size if work.exists() else 0
            while process.poll() is None:
                time.sleep(POLL_S)
                if not work.exists() or work.stat().st_size == before:
                    continue  # it is starting
                worked += POLL_S
                if moments and worked > moments[0][0]:
                    _, what = moments.pop(0)
                    done = work.stat().st_size if work.exists() else -1
                    if what == "driver":
                        process.kill()
                    elif what == "node":
                        nodes.kill(chooser)
                    elif not kill_worker(chooser):
                        continue
                    killed.append({"what": what, "after_s": round(worked, 2), "working_bytes": done})
    note = json.loads((output / "predict.json").read_text())
    return {"starts": starts, "killed": killed, "images": note["images"], "failed": note["failed"]}


def overhead(args: argparse.Namespace, folder: Path) -> Iterator[tuple[dict[str, Any], bool]]:
    images = cycled(list_images(args.images), folder / "images", args.count)
    halves = [cycled(list_images(args.images), folder / f"half{number}", args.count // 2) for number in (0, 1)]
    rounds: list[dict[str, Any]] = []
    for number in range(args.rounds):
        ways = {}
        for way in ("ray", "two")[:: 1 if number % 2 else -1]:
            place = folder / f"{way}{number}"
            place.mkdir()
            if way == "ray":
                options = (*SINGLE, "--ray", "local", "--workers", "2")
                running = [(predict(args.source, images, place / "0", *options), place / "0", args.count)]
            else:
                running = [
                    (predict(args.source, half, place / str(one), *SINGLE), place / str(one), args.count // 2)
                    for one, half in enumerate(halves)
                ]
            ways[way] = steady(running)
        rounds.append(ways)
        print(json.dumps(ways), flush=True)
        ratios = [one["ray"]["images_per_s"] / one["two"]["images_per_s"] for one in rounds]
        yield {"images": args.count, "rounds": rounds, "ratios": ratios}, statistics.median(ratios) >= 0.95
    print(f"two workers: {statistics.median(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f}) times two processes")


def steady(running: Sequence[tuple[subprocess.Popen[bytes], Path, int]]) -> dict[str, Any]:
    """From when 20% of the images of all of these together are done to 90%, by their working files.

    Images a second, and milliseconds of CPU for an image: of the commands, of workers, and of Ray's own processes.
    """
    total = sum(count for *_, count in running)
    commands = [psutil.Process(process.pid) for process, *_ in running]
    readers = [counted(output.with_name(f"{output.name}.unfinished") / "working.jsonl") for _, output, _ in running]
    seen = 0
    marks: list[tuple[float, int, Counter[str]]] = []
    while any(process.poll() is None for process, *_ in running):
        count = sum(next(reader) for reader in readers)
        # From one arrival to another: they come in chunks.
        if count > seen and len(marks) < 2 and count >= (0.2, 0.9)[len(marks)] * total:
            marks.append((time.monotonic(), count, cpu_seconds(commands)))
        seen = count
        time.sleep(POLL_S)
    if any(process.returncode for process, *_ in running):
        raise SystemExit("predict failed")
    (start, first, used_before), (end, last, used) = marks
    images = last - first
    used.subtract(used_before)
    cpu_ms = {kind: 1000 * seconds / images for kind, seconds in used.items()}
    return {"images_per_s": images / (end - start), "cpu_ms_per_image": cpu_ms}


def cpu_seconds(commands: Sequence[psutil.Process]) -> Counter[str]:
    """What these and their children have used so far, by kind."""
    used: Counter[str] = Counter()
    for command in commands:
        for process in (command, *command.children(recursive=True)):
            with suppress(psutil.Error):
                line = " ".join(process.cmdline())
                kind = "command" if process == command else "workers" if "RemoteWorker" in line else "ray"
                times = process.cpu_times()
                used[kind] += times.user + times.system
    return used


def counted(path: Path) -> Iterator[int]:
    """How many images are in a working file, each time it is asked."""
    count = 0
    while not path.exists():
        yield 0
    with path.open("rb") as file:
        while True:
            count += file.read().count(b'"file"')
            yield count


def memory(args: argparse.Namespace, folder: Path) -> Iterator[tuple[dict[str, Any], bool]]:
    bundle = folder / "bundle"
    write_small_bundle(bundle)
    record = {}
    for count in (1000, args.many):
        place = folder / str(count)
        place.mkdir()
        images = small_images(place / "images", count)
        options = (*SINGLE, "--engine", "onnxruntime", "--ray", "local", "--workers", "2", "--batch-size", "8")
        process = predict(bundle, images, place / "out", *options)
        watched, samples = psutil.Process(process.pid), []
        start = time.monotonic()
        reader = counted(place / "out.unfinished" / "working.jsonl")
        while process.poll() is None:
            with suppress(psutil.Error):
                samples.append((next(reader), watched.memory_info().rss / 1e6))
            time.sleep(POLL_S)
        working = [one for one in samples if one[0] >= min(500, count // 2)]
        record[str(count)] = {
            "seconds": time.monotonic() - start,
            "returncode": process.returncode,
            "at_first_mb": working[0][1],
            "most_mb": max(one[1] for one in working),
            "samples": working[:: max(len(working) // 20, 1)],
        }
        print(count, {key: value for key, value in record[str(count)].items() if key != "samples"})
    few, many = (record[str(count)]["most_mb"] for count in (1000, args.many))
    print(f"the driver's memory at most: {few:.0f} MB with 1,000 images, {many:.0f} MB with {args.many:,}")
    yield record, not any(one["returncode"] for one in record.values())


def killer(args: argparse.Namespace, folder: Path) -> Iterator[tuple[dict[str, Any], bool]]:
    images = cycled(list_images(args.images), folder / "images", 400)
    bad = images / "000123.png"
    (images / "000123.jpg").unlink()
    cv2.imwrite(str(bad), np.full((320, 448, 3), 127, np.uint8))
    package = folder / "package"
    metadata = package / "fragile_engine-1.0.dist-info"
    metadata.mkdir(parents=True)
    (package / "fragile_engine.py").write_text(ENGINE)
    (package / "fragile_spec.py").write_text(SPEC)
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: fragile-engine\nVersion: 1.0\n")
    (metadata / "entry_points.txt").write_text("[gfldeploy.engines]\nfragile = fragile_spec:SPEC\n")
    environment = {"PYTHONPATH": os.pathsep.join([str(package), os.environ.get("PYTHONPATH", "")])}
    options = (*SINGLE, "--engine", "fragile", "--ray", "local", "--workers", "2")
    start = time.monotonic()
    process = predict(args.source, images, folder / "out", *options, environment=environment)
    process.wait(MOST_S)
    seconds = time.monotonic() - start
    finish(predict(args.source, images, folder / "alone", *SINGLE, "--engine", "onnxruntime"))
    lines = [json.loads(line) for line in (folder / "out" / "detections.jsonl").read_text().splitlines()]
    alone = [json.loads(line) for line in (folder / "alone" / "detections.jsonl").read_text().splitlines()]
    errors = [line for line in lines if "error" in line]
    rest = [one == other for one, other in zip(lines, alone, strict=True) if "error" not in one]
    right = [Path(line["file"]).name for line in errors] == [bad.name] and all(rest) and process.returncode == 1
    print(f"{len(lines)} images in {seconds:.0f} s, {len(errors)} with an error ({errors[0]['error']}), rest the same")
    yield {"images": len(lines), "seconds": seconds, "errors": errors, "rest_same": all(rest)}, right


SINGLE = ("--threads", "1", "--streams", "1")


def predict(
    source: Path,
    images: Path,
    output: Path,
    *options: str,
    environment: Mapping[str, str] | None = None,
    stderr: Any = None,
) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "gfldeploy", "predict", str(source), str(images), *options, "-o", str(output)]
    return subprocess.Popen(
        command, env={**os.environ, **(environment or {})}, stdout=subprocess.DEVNULL, stderr=stderr
    )


def finish(process: subprocess.Popen[bytes]) -> None:
    if process.wait(MOST_S):
        raise SystemExit(f"{process.args} failed")


class Nodes:
    """The nodes of a cluster beside its head, which can be killed, and are replaced."""

    def __init__(self, running: Any, count: int) -> None:
        self._cluster = running
        self._nodes = [self._add() for _ in range(count)]

    def kill(self, chooser: random.Random) -> None:
        node = self._nodes.pop(chooser.randrange(len(self._nodes)))
        self._cluster.remove_node(node, allow_graceful=False)
        self._nodes.append(self._add())

    def _add(self) -> Any:
        return self._cluster.add_node(num_cpus=1, **node_settings())


@contextmanager
def cluster(nodes: int) -> Iterator[tuple[str, Nodes]]:
    """Ray's test cluster of so many nodes of one CPU, the head among them: its address, and the others."""
    os.environ.update(RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=secrets.token_hex(16))
    from ray.cluster_utils import Cluster

    running = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, **node_settings()})
    try:
        yield running.address, Nodes(running, nodes - 1)
    finally:
        running.shutdown()


def node_settings() -> dict[str, Any]:
    """Little memory, and ports that are known: on a busy machine Ray does not wait long enough for its agents'."""
    names = ("metrics_agent_port", "runtime_env_agent_port", "dashboard_agent_listen_port")
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in names]
        for one in sockets:
            one.bind(("", 0))
        ports = {name: one.getsockname()[1] for name, one in zip(names, sockets, strict=True)}
    return {"object_store_memory": STORE_BYTES, "include_dashboard": False, **ports}


def kill_worker(chooser: random.Random) -> bool:
    """Kill the process of a worker; False if there is none now."""
    workers = []
    for process in psutil.Process().children(recursive=True):  # the nodes are among them
        with suppress(psutil.Error):
            if "RemoteWorker" in " ".join(process.cmdline()):
                workers.append(process)
    if not workers:
        return False
    chooser.choice(workers).send_signal(signal.SIGKILL)
    return True


def cycled(sources: Sequence[Path], folder: Path, count: int) -> Path:
    """A folder with so many names for these files, in turn."""
    folder.mkdir()
    for number in range(count):
        source = sources[number % len(sources)]
        (folder / f"{number:06d}{source.suffix}").symlink_to(source.resolve())
    return folder


def small_images(folder: Path, count: int) -> Path:
    """A folder with so many names for a small image in two orientations."""
    folder.mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (48, 80, 3), np.uint8)
    originals = (folder / "0000000.jpg", folder / "0000001.jpg")
    for path, image in zip(originals, (pixels, pixels.transpose(1, 0, 2)), strict=True):
        assert cv2.imwrite(str(path), image)
    for number in range(2, count):
        os.link(originals[number % 2], folder / f"{number:07d}.jpg")
    return folder


def write_small_bundle(target: Path) -> Bundle:
    """A detector of one convolution of stride 8, which finds one box everywhere."""
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    weights = np.zeros((6, 3, 3, 3), np.float32)
    weights[:2] = np.random.default_rng(0).normal(0, 0.001, (2, 3, 3, 3))
    constants = {
        "weights": weights,
        "bias": np.array([2, -4, 0, 0, 48, 48], np.float32),
        "flat": np.array([0, 6, -1], np.int64),
        "split": np.array([2, 4], np.int64),
    }
    nodes = [
        helper.make_node("Conv", ["image", "weights", "bias"], ["map"], strides=[8, 8], pads=[1, 1, 1, 1]),
        helper.make_node("Reshape", ["map", "flat"], ["rows"]),
        helper.make_node("Transpose", ["rows"], ["anchors"], perm=[0, 2, 1]),
        helper.make_node("Split", ["anchors", "split"], ["logits", "boxes"], axis=2),
        helper.make_node("Sigmoid", ["logits"], ["scores"]),
    ]
    graph = helper.make_graph(
        nodes,
        "small",
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, ["N", 3, "H", "W"])],
        [
            helper.make_tensor_value_info("scores", TensorProto.FLOAT, ["N", "A", 2]),
            helper.make_tensor_value_info("boxes", TensorProto.FLOAT, ["N", "A", 4]),
        ],
        [numpy_helper.from_array(value, name) for name, value in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)
    with write_bundle(target) as (directory, manifests):
        (directory / "onnx").mkdir()
        onnx.save(model, str(directory / "onnx" / "model.onnx"))
        manifests.append(
            Manifest(
                name="small",
                precision="fp32",
                graphs={"onnx": Graph("onnx/model.onnx")},
                inputs=(TensorSpec("image", "float32", (None, 3, None, None)),),
                outputs=(
                    TensorSpec("scores", "float32", (None, None, 2)),
                    TensorSpec("boxes", "float32", (None, None, 4)),
                ),
                preprocess=Preprocess(target_size=(64, 96), pad_stride=32),
                nms=NmsParams(score_threshold=0.05, nms_threshold=0.6, nms_top_k=100, keep_top_k=100),
                classes=("box", "ball"),
                score_channels=2,
                strides=(8,),
                reg_max=16,
                parameters=168,
                provenance={},
            )
        )
    return Bundle.open(target)


def digests(folder: Path) -> dict[str, str]:
    """Of every file."""
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


if __name__ == "__main__":
    main()
