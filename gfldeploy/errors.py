"""Everything gfldeploy raises on purpose: `GfldeployError` and the classes below it.

Every message says what is wrong and what to do about it. Anything else that escapes is a bug and keeps its traceback.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal


class GfldeployError(Exception):
    """Base of every deliberate error: exit code 2 on the command line.

    Attributes:
        problem: What is wrong, in one line.
        remedy: What the user can do about it. `str(error)` is the problem, then the remedy.
    """

    def __init__(self, problem: str, remedy: str | None = None) -> None:
        problem = " ".join(problem.split()).rstrip(".")
        super().__init__(f"{problem}. {remedy}" if remedy else problem)
        self.problem = problem
        self.remedy = remedy


class UsageError(GfldeployError):
    """Options or arguments do not go together."""


class ConfigError(GfldeployError):
    """The PaddleDetection config cannot be used."""


class CheckpointError(GfldeployError):
    """The checkpoint is missing, damaged, unsafe, or does not fit the config."""


class BundleError(GfldeployError):
    """A bundle directory is damaged, changed, too new or not a bundle."""


class DataError(GfldeployError):
    """Images or annotations cannot be used."""


class OutputError(GfldeployError):
    """The output cannot be written, or something is in the way."""


class ParityError(GfldeployError):
    """An exported graph does not compute what the eager model computes."""


class BoundsError(GfldeployError):
    """No configuration keeps the bounds that were set."""


class EngineError(GfldeployError):
    """An engine failed to load or run a model."""


class ServerError(GfldeployError):
    """A server cannot be reached, or does not answer as `gfldeploy serve` does."""


class UnsupportedError(EngineError):
    """This engine x precision x device combination does not work here."""


# deadline: the answer would come too late; queue full: too many requests wait; closed: nothing is answered any more.
Rejection = Literal["deadline", "queue full", "closed"]


class RejectedError(GfldeployError):
    """A busy server rejected a request rather than serve it late.

    Attributes:
        reason: Why, for programs.
    """

    def __init__(self, problem: str, remedy: str | None = None, reason: Rejection = "closed") -> None:
        super().__init__(problem, remedy)
        self.reason: Rejection = reason


class MissingDependencyError(GfldeployError):
    """A package is not installed; the remedy is the exact install command."""


@contextmanager
def reading(what: object, error: type[GfldeployError], remedy: str) -> Iterator[None]:
    """Read a file that came from elsewhere: whatever goes wrong in the block becomes an `error` about `what`.

    The block should hold the parsing and checking of the file alone, since a bug in it reads like a damaged file, too.
    """
    try:
        yield
    except GfldeployError:
        raise
    except Exception as problem:  # a file from elsewhere can make a parser raise anything
        reasons = {RecursionError: "it is nested too deeply", MemoryError: "it takes too much memory"}
        reason = getattr(problem, "strerror", None) or str(problem)[:200] or type(problem).__name__
        raise error(f"{what} cannot be read: {reasons.get(type(problem), reason)}", remedy) from problem


def summary(error: Exception, length: int = 200) -> str:
    """The line of another package's error that says what is wrong, without the source and call stack that follow."""
    lines = [" ".join(line.split()) for line in str(error).splitlines() if line.strip()]
    told = [line for line in lines if re.search(r"Error|error|Cannot|cannot|not ", line)]
    line = (told or lines or [type(error).__name__])[0].rstrip(".")
    return line if len(line) <= length else f"{line[: length - 3]}..."
