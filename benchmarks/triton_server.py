"""Ask a real Triton Inference Server for the detections that `gfldeploy predict` finds, over HTTP and gRPC.

    python benchmarks/triton_server.py --bundle demo/int8 --bundle demo/fp32 --images demo/data/val/images \
        --machine epyc-2core --name demo

Installs `tritonserver` out of the wheel nvidia-pytriton, its clients and gfldeploy into a temporary environment of its
own, with uv. Writes a model repository with `gfldeploy triton` for each bundle and engine, serves it, sends the images
eight at a time, and compares what comes back with `predict`, bit for bit, and within rounding. What was found goes to
results/MACHINE/checks/NAME_triton.json beside this script. Exits with 1 where FP32, or INT8 in ONNX Runtime, is not the
same in all bits, and where more than 5% of the detections of `predict` are missing anywhere else.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import socket
import subprocess
import sys
import sysconfig
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np

HERE = Path(__file__).resolve().parent
SERVER = "nvidia-pytriton==0.7.0"
PACKAGES = (f"{HERE.parent}[onnxruntime,openvino]", "tritonclient[http,grpc]==2.73.0")
# Triton 2.51, which that is, dies of BYTES with NumPy 2. OpenCV's wheel asks for NumPy 2, and runs without.
OVERRIDES = "numpy>=1.26,<2\n"
VERSION = f"{sys.version_info.major}.{sys.version_info.minor}"
START_S, CLIENT_S = 180.0, 600.0
AT_ONCE = 8
BATCH, INSTANCES = 4, 2
SCORE, NEAR_SCORE, NEAR_PX = 0.5, 0.1, 8.0  # of the detections that count, and what INT8 may round them by
MOST_MISSING = 0.05


class CannotInstallError(Exception):
    """Why there is no environment."""


def install(folder: Path) -> Path:
    """Make the environment in the folder, and return it. Raises `CannotInstallError`."""
    uv = os.environ.get("UV") or shutil.which("uv")
    if uv is None:
        raise CannotInstallError("uv is not there")
    place = folder / "environment"
    (folder / "overrides.txt").write_text(OVERRIDES)
    into = [uv, "pip", "install", "--quiet", "--python", str(place / "bin" / "python")]
    for command in (
        [uv, "venv", "--quiet", "--python", sys.executable, str(place)],
        [*into, "--overrides", str(folder / "overrides.txt"), *PACKAGES],
        [*into, "--no-deps", SERVER],
    ):
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise CannotInstallError(f"uv {command[1]} failed: {done.stderr.strip()[-300:]}")
    # The wheel keeps the process that Python models run in apart, one for each version of Python.
    stub = server_in(place) / "python_backend_stubs" / VERSION / "triton_python_backend_stub"
    if not stub.exists():
        raise CannotInstallError(f"{SERVER} has nothing for Python {VERSION}")
    shutil.copy(stub, server_in(place) / "backends" / "python")
    return place


def server_in(environment: Path) -> Path:
    return environment / f"lib/python{VERSION}/site-packages/pytriton/tritonserver"


@dataclass(frozen=True)
class Server:
    """A running server: its environment, where it answers, and what it logs to."""

    environment: Path
    http: str
    grpc: str
    log: Path

    def ask(self, protocol: str, model: str, images: Sequence[Path], threshold: float | None = None) -> Any:
        """What tritonclient gets for each image by the names of the outputs, or its error and status."""
        address = self.http if protocol == "http" else self.grpc
        words = [protocol, address, model, "none" if threshold is None else str(threshold), *map(str, images)]
        done = subprocess.run(
            [self.environment / "bin" / "python", HERE / "triton_server.py", "client", *words],
            capture_output=True,
            text=True,
            timeout=CLIENT_S,
        )
        if done.returncode:
            raise RuntimeError(done.stderr)
        return json.loads(done.stdout)

    def is_ready(self) -> bool:
        try:
            with urllib.request.urlopen(f"http://{self.http}/v2/health/ready", timeout=5) as answer:
                return bool(answer.status == 200)
        except (urllib.error.URLError, ConnectionError, TimeoutError):
            return False


@contextmanager
def serving(environment: Path, repository: Path, folder: Path) -> Iterator[Server]:
    """A server with this repository, once it is ready; it ends with the block."""
    triton = server_in(environment)
    ports = free_ports(2)
    server = Server(environment, *(f"127.0.0.1:{port}" for port in ports), folder / "tritonserver.log")
    command = [
        str(triton / "bin" / "tritonserver"),
        f"--model-repository={repository}",
        f"--backend-directory={triton / 'backends'}",
        *(f"--{name}-port={port}" for name, port in zip(("http", "grpc"), ports, strict=True)),
        *("--http-address=127.0.0.1", "--grpc-address=127.0.0.1", "--allow-metrics=false"),
        f"--backend-config=python,shm-region-prefix-name=gfldeploy{os.getpid()}_",
    ]
    # The libraries of the wheel, and the interpreter's own, which the stub is linked to.
    libraries = f"{triton.parents[1] / 'nvidia_pytriton.libs'}:{sysconfig.get_config_var('LIBDIR')}"
    environ = {**os.environ, "LD_LIBRARY_PATH": libraries}
    with server.log.open("wb") as file:
        process = subprocess.Popen(command, stdout=file, stderr=file, env=environ)
    try:
        limit = time.monotonic() + START_S
        while not server.is_ready():
            if process.poll() is not None or time.monotonic() > limit:
                raise RuntimeError(server.log.read_text())
            time.sleep(0.1)
        yield server
    finally:
        process.terminate()
        try:
            process.wait(60)
        finally:
            process.kill()


def free_ports(count: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports


def client(protocol: str, address: str, model: str, threshold: str, *images: str) -> None:
    """Runs in the server's environment: send the images, several at once so that Triton batches; print the answers."""
    triton: Any = import_module(f"tritonclient.{protocol}")
    failure: Any = import_module("tritonclient.utils").InferenceServerException
    # Its default of 60 s is short where the machine is busy.
    more = {"network_timeout": CLIENT_S, "connection_timeout": CLIENT_S} if protocol == "http" else {}

    def ask(server: Any, path: str) -> dict[str, Any]:
        image = triton.InferInput("image", [1, 1], "BYTES")
        image.set_data_from_numpy(np.array([[Path(path).read_bytes()]], np.object_))
        inputs = [image]
        if threshold != "none":
            inputs.append(triton.InferInput("threshold", [1, 1], "FP32"))
            inputs[-1].set_data_from_numpy(np.array([[threshold]], np.float32))
        try:
            answer = server.infer(model, inputs)
        except failure as error:
            return {"error": error.message(), "status": str(error.status())}
        whole = answer.get_response()
        names = [one["name"] for one in whole["outputs"]] if protocol == "http" else [one.name for one in whole.outputs]
        values = {name: answer.as_numpy(name)[0].tolist() for name in names}
        return {**values, "names": [name.decode() for name in values.get("names", ())]}

    def ask_all(paths: Sequence[str]) -> list[dict[str, Any]]:
        # A client of its own for each thread: that for HTTP must stay in the thread that made it.
        with triton.InferenceServerClient(address, **more) as server:
            return [ask(server, path) for path in paths]

    with ThreadPoolExecutor(AT_ONCE) as pool:
        parts = list(pool.map(ask_all, [images[place::AT_ONCE] for place in range(AT_ONCE)]))
    answers: list[Any] = [None] * len(images)
    for place, part in enumerate(parts):
        answers[place::AT_ONCE] = part
    print(json.dumps(answers))


def records_of(answer: dict[str, Any]) -> list[dict[str, Any]]:
    """An answer as `predict` writes it."""
    rows = zip(answer["names"], answer["classes"], answer["scores"], answer["boxes"], strict=True)
    return [
        {"class": name, "class_id": category, "score": score, "bbox": [x1, y1, x2 - x1, y2 - y1]}
        for name, category, score, (x1, y1, x2, y2) in rows
    ]


def compare(expected: Sequence[list[dict[str, Any]]], answers: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """How many images are the same in all bits, and how many detections that score `SCORE` are missing beyond rounding.

    Raises `RuntimeError` for an answer that is an error.
    """
    same = counted = missing = 0
    for wanted, answer in zip(expected, answers, strict=True):
        if "error" in answer:
            raise RuntimeError(answer["error"])
        found = records_of(answer)
        same += found == wanted
        for one in wanted:
            if one["score"] >= SCORE:
                counted += 1
                missing += not any(map(one_near(one), found))
    detections = sum(map(len, expected))
    return {"images": len(expected), "same": same, "detections": detections, "counted": counted, "missing": missing}


def one_near(one: dict[str, Any]) -> Any:
    def near(other: dict[str, Any]) -> bool:
        moved = max(abs(a - b) for a, b in zip(one["bbox"], other["bbox"], strict=True))
        within = abs(one["score"] - other["score"]) <= NEAR_SCORE and moved <= NEAR_PX
        return bool(one["class_id"] == other["class_id"] and within)

    return near


def measure(
    bundle: Path, engine: str, images: Sequence[Path], environment: Path, folder: Path
) -> Iterator[dict[str, Any]]:
    """A row for each protocol."""
    from gfldeploy import Bundle, predict_images, triton_repository

    opened = Bundle.open(bundle)
    settings: dict[str, Any] = {"engine": engine, "batch_size": BATCH}
    predict_images(bundle, images, output=folder / "found", threshold=0, **settings)
    lines = (folder / "found" / "detections.jsonl").read_text().splitlines()
    expected = [json.loads(line)["detections"] for line in lines]
    repository = triton_repository(
        bundle, output=folder / "models", name="model", instances=INSTANCES, python_env=str(environment), **settings
    )
    with serving(environment, repository, folder) as server:
        for protocol in ("http", "grpc"):
            found = compare(expected, server.ask(protocol, "model", images, 0.0))
            about = {"bundle": opened.name, "precision": opened.manifest.precision, "engine": engine}
            yield {**about, "batch": BATCH, "instances": INSTANCES, "protocol": protocol, **found}


def main() -> None:
    from gfldeploy.files import write_json
    from gfldeploy.machine import describe_machine
    from gfldeploy.serialization import plain

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bundle", type=Path, action="append", required=True)
    parser.add_argument("--images", type=Path, required=True, help="folder of image files")
    parser.add_argument("--count", type=int, default=200, help="of images")
    parser.add_argument("--engine", action="append", help="default: onnxruntime and openvino")
    parser.add_argument("--machine", required=True, help="folder of results/ for this machine, such as epyc-2core")
    parser.add_argument("--name", required=True, help="of the results file")
    args = parser.parse_args()
    images = sorted(path for path in args.images.iterdir() if path.is_file())[: args.count]
    rows = []
    with tempfile.TemporaryDirectory() as temporary:
        environment = install(Path(temporary))
        for bundle in args.bundle:
            for engine in args.engine or ("onnxruntime", "openvino"):
                with tempfile.TemporaryDirectory() as folder:
                    for row in measure(bundle, engine, images, environment, Path(folder)):
                        print(*(f"{key} {value}" for key, value in row.items()), sep=", ", flush=True)
                        rows.append(row)
    output = HERE / "results" / args.machine / "checks" / f"{args.name}_triton.json"
    output.parent.mkdir(parents=True, exist_ok=True)
    write_json(output, {"machine": plain(describe_machine()), "server": SERVER, "rows": rows})
    exact = [row for row in rows if (row["precision"], row["engine"]) != ("int8", "openvino")]
    if any(row["same"] < row["images"] for row in exact):
        sys.exit("detections differ from those of predict")
    if any(row["missing"] > MOST_MISSING * row["counted"] for row in rows):
        sys.exit("detections of predict are missing")


if __name__ == "__main__":
    if sys.argv[1:2] == ["client"]:
        client(*sys.argv[2:])
    else:
        main()
