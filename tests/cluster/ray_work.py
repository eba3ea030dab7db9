"""Work for the tests of workers, by its name: it doubles numbers, and does otherwise for some of them."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Generator, Iterable, Mapping
from pathlib import Path
from typing import Any

from gfldeploy.bundle import Bundle
from gfldeploy.cluster.worker import Todo
from gfldeploy.errors import DataError, UnsupportedError

EXITS, RAISES, BUG, SLOW = 1301, 1302, 1303, 1304


class Doubling:
    """A value for each of the `numbers` of a task: its double, where the bundle is, and the process."""

    def __init__(self, setting: Mapping[str, Any], bundle: Path) -> None:
        if setting.get("refuses"):
            raise UnsupportedError("it does not run here", "Run it elsewhere.")
        if setting.get("dies"):
            os.kill(os.getpid(), signal.SIGKILL)
        self._bundle = str(Bundle.open(bundle).directory)

    def run(self, tasks: Iterable[Todo]) -> Generator[tuple[int, list[Any]]]:
        for todo in tasks:
            for place, number in enumerate(todo.task["numbers"]):
                if place >= todo.skip:
                    yield todo.number, [todo.bad.get(place) or self._doubled(number)]
            yield todo.number, []

    def close(self) -> None:
        pass

    def _doubled(self, number: int) -> list[Any]:
        if number == EXITS:
            os._exit(3)
        if number == RAISES:
            raise DataError("1302 cannot be doubled", "Take another number.")
        if number == BUG:
            raise ZeroDivisionError("of a mistake of ours")
        if number == SLOW:
            time.sleep(0.05)
        return [2 * number, self._bundle, os.getpid()]
