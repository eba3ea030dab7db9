"""Work on many jobs in several threads at once, results in order."""

from __future__ import annotations

import threading
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future
from queue import SimpleQueue
from typing import TypeVar

T = TypeVar("T")
R = TypeVar("R")
_LONGEST_WAIT_S = 2.0  # for a job that is on its way when no more are wanted


def at_once(work: Callable[[T], R], jobs: Iterable[T], threads: int) -> Generator[R]:
    """`work(job)` of every job, in order, in so many threads at once.

    The jobs are taken by one more thread, the same all the time: what they come from need not be made for several. At
    most `threads` + 1 jobs have been taken whose results were not. Errors of a job, and of taking it, are raised in its
    place. Closing the iterator ends the threads after their current job. Who is waiting for the next job then, as of a
    queue, is waited for a moment and no longer: that thread ends when the job comes.
    """
    room = threading.Semaphore(threads + 1)
    todo: SimpleQueue[tuple[T, Future[R]] | None] = SimpleQueue()
    results: SimpleQueue[Future[R] | None] = SimpleQueue()
    stopped = False

    def take() -> None:
        source: Iterator[T] | None = None
        try:
            source = iter(jobs)
            while room.acquire() and not stopped:
                job = next(source)
                result: Future[R] = Future()
                results.put(result)
                todo.put((job, result))
        except StopIteration:
            pass
        except BaseException as error:  # noqa: BLE001 - raised in the other thread
            failed: Future[R] = Future()
            failed.set_exception(error)
            results.put(failed)
        finally:
            results.put(None)
            for _ in range(threads):
                todo.put(None)
            if isinstance(source, Generator):
                source.close()

    def run() -> None:
        while (taken := todo.get()) is not None and not stopped:
            job, result = taken
            try:
                result.set_result(work(job))
            except BaseException as error:  # noqa: BLE001 - raised in the other thread
                result.set_exception(error)
            del taken, job, result  # or memory holds them until the next job comes

    named = [("gfldeploy-take", take), *[("gfldeploy-batch", run)] * threads]
    taker, *_ = workers = [threading.Thread(target=target, name=name, daemon=True) for name, target in named]
    for worker in workers:
        worker.start()
    try:
        while (following := results.get()) is not None:
            found = following.result()
            room.release()
            yield found
    finally:
        stopped = True
        room.release()
        for _ in range(threads):
            todo.put(None)
        for worker in workers:
            if worker is not threading.current_thread():  # which it is if the garbage collector closes this
                worker.join(_LONGEST_WAIT_S if worker is taker else None)
