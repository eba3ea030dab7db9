"""The demo detector as real bundles, made once for all tests, and the command line in processes of its own."""

from __future__ import annotations

import functools
import importlib.util
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from types import ModuleType

import cv2
import numpy as np
import pytest

from gfldeploy import demo
from gfldeploy.cli import main
from gfldeploy.demo.dataset import generate
from gfldeploy.system import DirectoryLock

needs_export = pytest.mark.needs_ppdet
needs_quant = pytest.mark.needs_paddleslim

RunHere = Callable[..., subprocess.CompletedProcess[str]]  # the fixture `run_here`

ROOT = Path(__file__).parents[1]  # of the checkout
SEED = 0
# A folder that `benchmarks/gpu.py --prepare` made, gpu-materials/demo: tests of engines take the trained detector from
# there, so that those marked gpu run where PaddleDetection is not installed.
MADE = os.environ.get("GFLDEPLOY_MADE")
EVALUATED = 10  # images of `labelled` to measure mAP on
STAGE = re.compile(r"\[ *\d+\.\d s\] .*")

# Fails at the first attempt to reach anything: what is downloaded would come from there.
NO_NETWORK = """
import sys
def no_network(event, arguments):
    if event in ("socket.connect", "socket.getaddrinfo", "urllib.Request"):
        sys.stderr.write(f"network: {event} {arguments}\\n")
        sys.stderr.flush()
        import os
        os._exit(99)
sys.addaudithook(no_network)
"""


@contextmanager
def imported(path: Path, *arguments: object) -> Iterator[ModuleType]:
    """The script as a module, in `sys.modules` meanwhile, where dataclasses look; its `main` gets the arguments."""
    spec = importlib.util.spec_from_file_location(f"recipe_{path.stem}", path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, spec.name, module)
        patch.setattr(sys, "argv", [path.name, *map(str, arguments)])
        patch.syspath_prepend(path.parent)
        spec.loader.exec_module(module)
        yield module


def command(arguments: Sequence[object], before: str, folder: Path) -> list[str]:
    """The command line that runs gfldeploy with `arguments`, after the Python code `before`."""
    # A file, since Paddle reads the source of what it traces. Ctrl-C works, though a shell may ignore it for us.
    heed = "import signal\nsignal.signal(signal.SIGINT, signal.default_int_handler)\n"
    script = folder / "gfldeploy"
    script.write_text(f"{heed}{before}\nfrom gfldeploy.__main__ import main\nmain()\n")
    return [sys.executable, str(script), *map(str, arguments)]


def run(
    *arguments: object, folder: Path, before: str = "", cwd: Path | None = None, env: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Run `gfldeploy` in a process of its own; `folder` is for its script."""
    return subprocess.run(
        command(arguments, before, folder), capture_output=True, text=True, cwd=cwd, env={**os.environ, **(env or {})}
    )


def make_here(*arguments: object) -> None:
    """Run `gfldeploy` in this process, which must succeed: loading Paddle takes half of the time."""
    with pytest.raises(SystemExit) as stopped:
        main(list(map(str, arguments)))
    assert stopped.value.code == 0


def export_here(weights: Path, output: Path) -> None:
    """Export the demo's config with `weights`."""
    make_here("export", "-c", demo.config_path(), "-w", weights, "-o", output)


def refusal(done: subprocess.CompletedProcess[str]) -> str:
    """The one line that a refused command ends with, after its progress."""
    return refusal_in(done.returncode, done.stdout, done.stderr)


def refusal_in(code: int | str | None, out: str, err: str) -> str:
    *stages, message = err.splitlines()
    assert [line for line in stages if not (STAGE.fullmatch(line) or line.startswith("Note: "))] == [], err
    assert message.startswith("Error: "), err
    assert code == 2, err
    assert out == ""
    # What is wrong, a full stop, and what to do about it.
    assert re.search(r"[^.]\. \S.{5}", message), message
    return message


def snapshot(directory: Path) -> dict[str, bytes | None]:
    """Everything below a directory, with its content."""
    return {
        path.relative_to(directory).as_posix(): path.read_bytes() if path.is_file() else None
        for path in directory.rglob("*")
    }


def export_arguments(config: Path) -> tuple[object, ...]:
    return ("export", "-c", config, "--random-weights", SEED, "--with-nms")


def write_config(folder: Path, text: str = "", name: str = "gfl_demo.yml") -> Path:
    """The demo's config with `text` on top."""
    path = folder / name
    path.write_text(f"_BASE_: ['{demo.config_path()}']\n{text}\n")
    return path


def once(make: Callable[[pytest.TempPathFactory], Path]) -> Callable[[pytest.TempPathFactory], Path]:
    """Call `make` once in a session, whichever tests ask for what it returns, in whichever of its processes."""

    @functools.wraps(make)
    def shared(factory: pytest.TempPathFactory) -> Path:
        # pytest-xdist gives each of its workers a folder in that of the session.
        base = factory.getbasetemp()
        session = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
        folder = session / f"{make.__name__}.once"
        folder.mkdir(exist_ok=True)
        with closing(DirectoryLock(folder)) as lock:
            lock.acquire(wait=True)
            if not (made := folder / "path").exists():
                made.write_text(str(make(factory)))
            return Path(made.read_text())

    return shared


@once
def exported(factory: pytest.TempPathFactory) -> Path:
    """An FP32 bundle with random weights and PaddleDetection's graph. Read it, do not change it.

    Its config asks for pretrained weights from the network, and the process that makes it has none.
    """
    folder = factory.mktemp("exported")
    config = write_config(folder, "pretrain_weights: https://example.invalid/weights.pdparams")
    done = run(*export_arguments(config), "-o", folder / "fp32", folder=folder, before=NO_NETWORK, cwd=folder)
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{folder / 'fp32'}\n"
    return folder / "fp32"


@once
def trained(factory: pytest.TempPathFactory) -> Path:
    """The FP32 bundle of the trained demo detector. Read it, do not change it."""
    if MADE:
        return Path(MADE) / "fp32"
    folder = factory.mktemp("trained")
    export_here(demo.weights_path(), folder / "fp32")
    return folder / "fp32"


@once
def pictures(factory: pytest.TempPathFactory) -> Path:
    """A folder of images of every kind that is read: see `write_pictures`."""
    folder = factory.mktemp("pictures")
    write_pictures(folder)
    return folder


def write_pictures(folder: Path) -> list[str]:
    """Write one picture, 120x200, as colour, grey, RGBA, 16-bit, CMYK and EXIF-rotated files; returns their names."""
    picture = np.full((120, 200, 3), 60, np.uint8)
    for index in range(8):
        corner = (20 * index, 10 * index)
        cv2.rectangle(picture, corner, (corner[0] + 40, corner[1] + 30), (30 * index, 255 - 20 * index, 90), -1)
    grey = cv2.cvtColor(picture, cv2.COLOR_BGR2GRAY)
    files = {
        "colour.jpg": picture,
        "grey.jpg": grey,
        "grey.png": grey,
        "rgba.png": cv2.cvtColor(picture, cv2.COLOR_BGR2BGRA),
        "sixteen.png": picture.astype(np.uint16) * 257,
    }
    for name, content in files.items():
        assert cv2.imwrite(str(folder / name), content)
    jpeg = (folder / "colour.jpg").read_bytes()
    # An APP1 segment with one Exif tag: orientation 6, to be turned by 90 degrees.
    exif = b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x06\0\0\0\0\0\0"
    (folder / "turned.jpg").write_bytes(jpeg[:2] + b"\xff\xe1" + (len(exif) + 2).to_bytes(2, "big") + exif + jpeg[2:])
    names = [*files, "turned.jpg"]
    image_module = pytest.importorskip("PIL.Image", reason="Pillow writes the CMYK file")
    image_module.fromarray(picture[..., ::-1].copy()).convert("CMYK").save(folder / "cmyk.jpg")
    return [*names, "cmyk.jpg"]


@once
def quantized(factory: pytest.TempPathFactory) -> Path:
    """The INT8 bundle of `exported`, calibrated on `pictures`. Read it, do not change it.

    What random weights detect, if anything, is nothing to judge INT8 by.
    """
    folder = factory.mktemp("quantized")
    data = pictures(factory)
    samples = len(list(data.iterdir()))
    arguments = ("quantize", exported(factory), "--data", data, "--samples", samples, "--algo", "abs_max")
    make_here(*arguments, "--min-agreement", 0, "-o", folder / "int8")
    return folder / "int8"


@once
def labelled(factory: pytest.TempPathFactory) -> Path:
    """A folder with generated images and labels: calib/annotations.json of 4, val/annotations.json of `EVALUATED`."""
    folder = factory.mktemp("labelled")
    generate(folder, "calib", 4)
    generate(folder, "val", EVALUATED)
    return folder


@once
def calibrated(factory: pytest.TempPathFactory) -> Path:
    """The INT8 bundle of `trained`, calibrated on `labelled` and measured, also at 256x384. Do not change it."""
    if MADE:
        return Path(MADE) / "int8"
    data, folder = labelled(factory), factory.mktemp("calibrated")
    arguments = ("quantize", trained(factory), "--data", data / "calib/annotations.json", "--samples", 4)
    # Few images make a coarse measure: what is wanted here is that a sound calibration passes.
    measured = ("--eval-data", data / "val/annotations.json", "--max-drop", 0.03, "--input-sizes", "256x384")
    make_here(*arguments, *measured, "-o", folder / "int8")
    return folder / "int8"
