"""Another bundle without a pause: loaded beside the old one, compared, and put in its place between two requests."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Awaitable, Callable, Coroutine, Iterator
from concurrent.futures import Future, InvalidStateError
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import TypeVar

from starlette.requests import Request
from starlette.responses import Response

from gfldeploy.bundle import GOLDEN
from gfldeploy.engines.heap import give_memory_back
from gfldeploy.errors import GfldeployError, RejectedError, ServerError
from gfldeploy.export.golden import PICTURE, agreement, is_expected
from gfldeploy.progress import SILENT, Progress
from gfldeploy.serialization import plain
from gfldeploy.serve.keys import Keys
from gfldeploy.serve.metrics import Metrics
from gfldeploy.serve.problems import Problem, json_response
from gfldeploy.serve.service import DetectionService

_log = logging.getLogger(__name__)
_GOLDEN_TIMEOUT_MS = 60_000.0  # on a busy machine, beside the service that still answers

T = TypeVar("T")


class _Held:
    """A service, and how many requests use it."""

    def __init__(self, service: DetectionService) -> None:
        self.service = service
        self.users = 0
        self.unused = asyncio.Event()
        self.unused.set()


class Current:
    """The service that answers. Of the event loop's thread alone."""

    def __init__(self, service: DetectionService) -> None:
        self._held = _Held(service)
        self._replaced: set[_Held] = set()

    @property
    def in_use(self) -> tuple[DetectionService, ...]:
        """The service, and those that were replaced and have requests to answer."""
        return (self.service, *(held.service for held in self._replaced))

    @property
    def service(self) -> DetectionService:
        """To ask it something at once; a request that waits for its answer has it by `use`."""
        return self._held.service

    @contextmanager
    def use(self) -> Iterator[DetectionService]:
        """The service, for one request: the same one to the end, and not closed before."""
        held = self._held
        held.users += 1
        held.unused.clear()
        try:
            yield held.service
        finally:
            held.users -= 1
            if not held.users:
                held.unused.set()

    def replace(self, service: DetectionService) -> Awaitable[DetectionService]:
        """Let `service` answer what comes from now on; returns the old one when no request uses it any more."""
        replaced, self._held = self._held, _Held(service)
        return self._left(replaced)

    async def _left(self, held: _Held) -> DetectionService:
        self._replaced.add(held)
        await held.unused.wait()
        self._replaced.discard(held)
        return held.service


@dataclass(frozen=True)
class Reloaded:
    """What answers since a reload. `golden`: how the golden picture came out, in words."""

    bundle: str
    digest: str
    golden: str
    seconds: float


class Reloader:
    """Replaces the service of an application, one at a time, by another that the same `load` makes.

    Both are loaded at once for a while, which takes the memory of both. Whatever goes wrong, the old one answers on.
    The keys are read again too.
    """

    def __init__(
        self,
        current: Current,
        load: Callable[[], DetectionService],
        metrics: Metrics,
        keys: Keys | None = None,
        progress: Progress = SILENT,
    ) -> None:
        """`load` makes a service that is ready, in whatever thread. `keys`: those that are valid."""
        self._current, self._load, self._metrics, self._keys = current, load, metrics, keys
        self._progress, self._stopped = progress, False
        self._task: asyncio.Task[Reloaded] | None = None
        self._retired: set[asyncio.Task[None]] = set()

    @property
    def has_keys(self) -> bool:
        """Whether the application asks for keys."""
        return self._keys is not None

    @property
    def busy(self) -> bool:
        """Whether a reload is under way, or the service that the last one replaced is still in use."""
        return bool(self._retired) or (self._task is not None and not self._task.done())

    def hung_up(self) -> None:
        """Begin a reload, if none is under way: for SIGHUP, in the event loop."""
        try:
            self.start()
        except GfldeployError as problem:
            self._progress.note(f"SIGHUP: {problem}")

    def start(self) -> asyncio.Task[Reloaded]:
        """Begin a reload. Cancelling whoever waits for it should not cancel the task: `asyncio.shield` it.

        Raises `Problem` (409) if another is under way, and `RejectedError` after a stop. The task raises what `load`
        raises, and `ParityError` where the golden picture comes out otherwise than expected.
        """
        if self._stopped:
            raise _stopping()
        if self.busy:
            raise under_way()
        self._task = asyncio.create_task(self._reload())
        self._task.add_done_callback(_retrieve)
        return self._task

    def stop(self) -> None:
        """Give up a reload that is under way, and begin no other."""
        self._stopped = True
        if self._task is not None:
            self._task.cancel()

    async def close(self) -> None:
        """Stop, and wait until a service that was replaced is closed."""
        self.stop()
        await asyncio.gather(*self._retired)

    async def _reload(self) -> Reloaded:
        began = time.monotonic()
        self._progress.stage("reload: loading beside what answers")
        try:
            keys = self._keys.read_again() if self._keys is not None else None
            service = await _in_thread(self._loaded, lambda late: late.close(drain=False))
            try:
                golden = await check_golden(service)
            except BaseException:
                await _in_thread(lambda: service.close(drain=False))
                raise
        except Exception as error:
            self._metrics.reloaded("failed")
            self._progress.note(f"reload failed, the old service answers on: {error}")
            if not isinstance(error, GfldeployError):
                _log.exception("an error that nobody foresaw")
            raise
        if self._keys is not None and keys is not None:
            self._keys.replace(keys)
        old = self._current.replace(service)
        retired = asyncio.create_task(_retire(old))
        self._retired.add(retired)
        retired.add_done_callback(self._retired.discard)
        self._metrics.reloaded("switched")
        identity = service.description.bundle
        done = Reloaded(identity.name, identity.digest, golden, time.monotonic() - began)
        self._progress.stage(f"reload: {done.bundle} ({done.digest[:12]}) answers; {golden}")
        return done

    def _loaded(self) -> DetectionService:
        service = self._load()
        try:
            service.choice.bundle.verify_files()  # a copy that was under way may have the right lengths already
        except BaseException:
            service.close(drain=False)
            raise
        return service


async def check_golden(service: DetectionService) -> str:
    """Let a service detect in its bundle's golden picture, and say how far that is from what was expected.

    Or why it was not compared. Raises `ParityError` where too many of the detections are missing, and as
    `DetectionService.detect`.
    """
    choice = service.choice
    bundle, options = choice.bundle, choice.options
    own = bundle.manifest.precision
    if bundle.record(GOLDEN) is None:
        return "not compared: the bundle has no golden picture"
    if not is_expected(bundle, options.precision, choice.input_size, options.tf32):
        expected = f"{own} at the bundle's own input size"
        return f"not compared: the detections expected in the golden picture are those of {expected}"
    picture = await asyncio.to_thread((bundle.directory / PICTURE).read_bytes)
    # Its detections are those of the config's own NMS, whatever was turned.
    answer = await service.detect(picture, _GOLDEN_TIMEOUT_MS, bundle.manifest.nms)
    return agreement(bundle, answer.detections, choice.engine)


async def _retire(old: Awaitable[DetectionService]) -> None:
    service = await old

    def free() -> None:
        service.close()
        give_memory_back()

    try:
        await _in_thread(free)
    except Exception:  # noqa: BLE001 - of one that nobody uses any more
        _log.exception("the service that was replaced could not be closed")


def under_way() -> Problem:
    """What whoever asks for another reload meanwhile is told."""
    return Problem(409, "reload_in_progress", "a reload is under way already", "Wait for its end.")


def _stopping() -> RejectedError:
    return RejectedError("the server is stopping", "Start another one.", "closed")


def _retrieve(task: asyncio.Task[Reloaded]) -> None:
    """Its error was logged: whoever started it need not wait for it."""
    if not task.cancelled():
        task.exception()


async def _in_thread(work: Callable[[], T], late: Callable[[T], object] | None = None) -> T:
    """What `work` returns, from a thread of its own, which does not hold up the end of the process.

    If nobody waits for the result any more, `late` gets it.
    """
    outcome: Future[T] = Future()

    def run() -> None:
        try:
            result = work()
        except BaseException as error:  # noqa: BLE001 - raised where it is waited for
            with suppress(InvalidStateError):
                outcome.set_exception(error)
            return
        try:
            outcome.set_result(result)
        except InvalidStateError:  # cancelled
            if late is not None:
                late(result)

    threading.Thread(target=run, name="gfldeploy-reload", daemon=True).start()
    return await asyncio.wrap_future(outcome)


async def reload_route(request: Request) -> Response:
    """`POST /v1/reload`: answers when the new service does, or the old one goes on. Raises `Problem`."""
    reloader: Reloader = request.app.state.reloader
    if not reloader.has_keys:
        raise Problem(
            403,
            "reload_needs_keys",
            "whoever asks for a reload must show a key, and this server has none",
            "Start it with --api-key-file, or send SIGHUP to its process.",
        )
    reload_all: Callable[[], Coroutine[None, None, Reloaded]] | None = request.app.state.reload_all
    task = reloader.start() if reload_all is None else asyncio.create_task(reload_all())
    task.add_done_callback(_retrieve)
    try:
        done = await asyncio.shield(task)  # which goes on if the client leaves
    except asyncio.CancelledError:
        if task.cancelled():
            raise _stopping() from None
        raise
    except Problem:
        raise
    except ServerError as error:  # of several processes, which says what they serve now
        raise Problem(500, "reload_failed", error.problem, error.remedy) from error
    except GfldeployError as error:
        raise Problem(500, "reload_failed", f"the old service answers on: {error.problem}", error.remedy) from error
    return json_response(plain(done))
