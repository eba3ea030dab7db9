"""What runs in a worker elsewhere: the bundle by its digest, a function by its name, tasks and values as JSON."""

from __future__ import annotations

import importlib
import json
import platform
import queue
import threading
import time
from collections.abc import Generator, Iterable, Iterator, Mapping
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any, Protocol

from gfldeploy import errors
from gfldeploy.bundle import MANIFEST, Bundle
from gfldeploy.engines.hardware import processor
from gfldeploy.engines.registry import ENGINES
from gfldeploy.errors import BundleError, GfldeployError, UnsupportedError
from gfldeploy.files import scratch_directory, writing
from gfldeploy.machine import installed_packages
from gfldeploy.serialization import build

_QUEUED_VALUES = 64  # batches that are done and not yet asked for


@dataclass(frozen=True)
class Todo:
    """A task as a worker gets it: the caller's own `task`, of which `skip` values are left out, and inputs `bad`.

    `bad`: by place in the task, why they are errors without being opened.
    """

    number: int
    task: Mapping[str, Any]
    skip: int = 0
    bad: Mapping[int, str] = field(default_factory=dict)

    def as_list(self) -> list[Any]:
        """JSON-ready."""
        return [self.number, self.task, self.skip, [[place, why] for place, why in self.bad.items()]]

    @classmethod
    def of_list(cls, data: list[Any]) -> Todo:
        number, task, skip, bad = data
        return cls(number, task, skip, dict(bad))


class Work(Protocol):
    """What the function that a worker is told makes, once: it keeps the engine open."""

    def run(self, tasks: Iterable[Todo]) -> Generator[tuple[int, list[Any]]]:
        """The values of the tasks, each with the number of its task, JSON-ready; an empty one after the last of a task.

        One thread takes the tasks, and may have to wait for the next one.
        """

    def close(self) -> None:
        """Free what it holds."""


@dataclass(frozen=True)
class Opening:
    """What a worker is asked to open.

    `work`: "module:function", called with the `setting` and the directory of the bundle. `bundle`: where the driver has
    it; `digest`: what it has to be. `versions`: of Python and packages, which have to be the same. `chunk_s`: how long
    it collects what it has done before it answers. `on_gpu`: whether the engine runs there.
    """

    work: str
    setting: Mapping[str, Any]
    bundle: str
    digest: str
    versions: Mapping[str, str]
    chunk_s: float
    on_gpu: bool = False


class RemoteWorker:
    """A worker as the driver calls it, one call at a time; text and bytes are JSON."""

    def __init__(self) -> None:
        self._stack = ExitStack()
        self._todo: queue.SimpleQueue[Todo] = queue.SimpleQueue()
        self._values: queue.Queue[tuple[int, list[Any]] | BaseException] = queue.Queue(_QUEUED_VALUES)
        self._chunk_s = 0.0

    def open(self, request: str, files: Mapping[str, bytes] | None = None) -> str:
        """Open what is asked for. Answers what it runs on, or that it needs the `files` of the bundle, or an error."""
        opening = build(Opening, json.loads(request))
        self._chunk_s = opening.chunk_s
        try:
            check_versions(opening.versions)
            bundle = self._stack.enter_context(local_bundle(opening.bundle, opening.digest, files))
            if bundle is None:
                return json.dumps({"needs": "bundle"})
            module, _, name = opening.work.partition(":")
            work = getattr(importlib.import_module(module), name)(opening.setting, bundle.directory)
        except GfldeployError as error:
            return json.dumps({"error": as_plain(error)})
        self._stack.callback(work.close)
        threading.Thread(target=self._run, args=(work,), name="gfldeploy-work", daemon=True).start()
        import ray

        node = ray.get_runtime_context().get_node_id()
        place = f"{platform.node()} (node {node[:8]})"  # there may be several on a machine
        return json.dumps({"processor": processor(opening.on_gpu), "node": node, "place": place})

    def collect(self, tasks: str) -> bytes:
        """Take more tasks, and answer with what has been done since, once that is worth an answer."""
        for one in json.loads(tasks):
            self._todo.put(Todo.of_list(one))
        deadline = time.monotonic() + self._chunk_s
        chunk: list[tuple[int, list[Any]]] = []
        with suppress(queue.Empty):
            while len(chunk) < _QUEUED_VALUES:
                # Whoever asks has tasks here: at least the end of one comes.
                value = self._values.get(timeout=max(deadline - time.monotonic(), 0) if chunk else None)
                if isinstance(value, GfldeployError):
                    return json.dumps({"error": as_plain(value), "values": chunk}).encode()
                if isinstance(value, BaseException):
                    raise value
                chunk.append(value)
                if not value[1]:
                    break  # the driver may have another task
        return json.dumps({"values": chunk}).encode()

    def _run(self, work: Work) -> None:
        try:
            with closing(work.run(self._tasks())) as values:
                for value in values:
                    self._values.put(value)
        except BaseException as error:  # noqa: BLE001 - raised where the driver asks
            self._values.put(error)

    def _tasks(self) -> Iterator[Todo]:
        while True:
            yield self._todo.get()


def versions(engine: str) -> dict[str, str]:
    """What has to be the same on every machine for the same results, with its version: of Python and packages."""
    names = {"gfldeploy", "numpy", "onnx", "opencv-python-headless", "opencv-python"}
    names |= set(ENGINES[engine].library.distributions)
    found = {name: version for name, version in installed_packages().items() if version and name in names}
    return {"Python": platform.python_version(), **found}


def check_versions(expected: Mapping[str, str]) -> None:
    """Raise `UnsupportedError` unless this machine has these versions."""
    installed = {"Python": platform.python_version(), **installed_packages()}
    others = [
        f"{name} {installed.get(name) or 'not installed'}, not {version}"
        for name, version in expected.items()
        if installed.get(name) != version
    ]
    if others:
        raise UnsupportedError(
            f"{platform.node()} has other versions than the machine of the command: {'; '.join(others)}",
            "Install the same packages on every machine, or start the workers' machines from one image.",
        )


def bundle_files(bundle: Bundle) -> dict[str, bytes]:
    """The content of every file of a bundle, by name, for `local_bundle`."""
    return {name: (bundle.directory / name).read_bytes() for name in (*bundle.manifest.files, MANIFEST)}


@contextmanager
def local_bundle(directory: str, digest: str, files: Mapping[str, bytes] | None) -> Iterator[Bundle | None]:
    """The bundle of this digest: that in the directory if it is there, else from `files`, unpacked and verified.

    None if it is in neither. Raises `BundleError` for files that are not those of this digest.
    """
    there: Bundle | None = None
    with suppress(GfldeployError):  # not around the block that uses it
        there = Bundle.open(directory)
    if there is not None and there.digest == digest:
        yield there
        return
    if files is None:
        yield None
        return
    with scratch_directory() as folder:
        target = folder / "bundle"
        with writing(target):
            for name, content in files.items():
                path = (target / name).resolve()
                if not path.is_relative_to(target.resolve()):
                    raise BundleError(f"a bundle has a file outside it: {name!r:.60}", "Do not use it.")
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(content)
        bundle = Bundle.open(target)
        bundle.verify_files()
        if bundle.digest != digest:
            raise BundleError("the bundle changed while it was sent to a worker", "Run the command again.")
        yield bundle


def as_plain(error: GfldeployError) -> dict[str, Any]:
    """An error as JSON-ready data; `raised` is the inverse."""
    return {"kind": type(error).__name__, "problem": error.problem, "remedy": error.remedy}


def raised(data: Mapping[str, Any]) -> GfldeployError:
    """The error that a worker answered."""
    kind = getattr(errors, str(data["kind"]), GfldeployError)
    return kind(data["problem"], data["remedy"]) if issubclass(kind, GfldeployError) else GfldeployError(str(data))
