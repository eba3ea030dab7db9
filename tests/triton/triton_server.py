"""A real `tritonserver`, out of the wheel nvidia-pytriton, in an environment of its own."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import sysconfig
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from demo_bundles import ROOT

SERVER = "nvidia-pytriton==0.7.0"
PACKAGES = (f"{ROOT}[onnxruntime]", "tritonclient[http,grpc]==2.73.0")
# Triton 2.51, which that is, dies of BYTES with NumPy 2; OpenCV says that it needs it, and does not.
OVERRIDES = "numpy>=1.26,<2\n"
START_S = 120.0
VERSION = f"{sys.version_info.major}.{sys.version_info.minor}"


class CannotInstallError(Exception):
    """Why there is no environment here."""


def install(folder: Path) -> Path:
    """Make the environment; its folder. Raises `CannotInstallError`."""
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
    # The wheel keeps the process that Python models run in apart, for each version of Python.
    server = server_in(place)
    stub = server / "python_backend_stubs" / VERSION / "triton_python_backend_stub"
    if not stub.exists():
        raise CannotInstallError(f"{SERVER} has nothing for Python {VERSION}")
    shutil.copy(stub, server / "backends" / "python")
    return place


def server_in(environment: Path) -> Path:
    return environment / f"lib/python{VERSION}/site-packages/pytriton/tritonserver"


@dataclass(frozen=True)
class Server:
    """A running server: where it answers, what it has logged so far, and its process."""

    environment: Path
    http: str
    grpc: str
    log: Path
    process: subprocess.Popen[bytes]

    def ask(self, protocol: str, model: str, images: Sequence[Path], threshold: float | None = None) -> Any:
        """What tritonclient gets for each image, or its error."""
        client = Path(__file__).with_name("triton_client.py")
        address = self.http if protocol == "http" else self.grpc
        words = (protocol, address, model, "none" if threshold is None else threshold, *images)
        done = subprocess.run(
            [self.environment / "bin" / "python", client, *map(str, words)], capture_output=True, text=True, timeout=300
        )
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    def is_ready(self) -> bool:
        try:
            with urllib.request.urlopen(f"http://{self.http}/v2/health/ready", timeout=5) as answer:
                return bool(answer.status == 200)
        except (urllib.error.URLError, ConnectionError, TimeoutError):
            return False


@contextmanager
def serving(environment: Path, repository: Path, folder: Path) -> Iterator[Server]:
    """The server with this repository, once it is ready; ended with the block."""
    triton = server_in(environment)
    ports = free_ports(2)
    log = folder / "tritonserver.log"
    command = [
        str(triton / "bin" / "tritonserver"),
        f"--model-repository={repository}",
        f"--backend-directory={triton / 'backends'}",
        *(f"--{name}-port={port}" for name, port in zip(("http", "grpc"), ports, strict=True)),
        *("--http-address=127.0.0.1", "--grpc-address=127.0.0.1", "--allow-metrics=false"),
        f"--backend-config=python,shm-region-prefix-name=gfldeploy{os.getpid()}_",
    ]
    libraries = f"{triton.parents[1] / 'nvidia_pytriton.libs'}:{sysconfig.get_config_var('LIBDIR')}"
    with log.open("wb") as file:
        process = subprocess.Popen(command, stdout=file, stderr=file, env={**os.environ, "LD_LIBRARY_PATH": libraries})
    server = Server(environment, f"127.0.0.1:{ports[0]}", f"127.0.0.1:{ports[1]}", log, process)
    try:
        limit = time.monotonic() + START_S
        while not server.is_ready():
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < limit, log.read_text()
            time.sleep(0.1)
        yield server
    finally:
        process.terminate()
        try:
            process.wait(30)
        finally:
            process.kill()


def free_ports(count: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports
