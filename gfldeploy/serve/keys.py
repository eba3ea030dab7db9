"""API keys: who may use the server, from a file of `--api-key-file`."""

from __future__ import annotations

import hashlib
import hmac
import os
import re
import stat
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from gfldeploy.errors import DataError
from gfldeploy.serve.problems import Problem, answer_to
from gfldeploy.system import without_waiting

_MOST_BYTES = 1 << 20
# Letters and digits give 6 bits each: 16 of them cannot be guessed, however fast the server answers.
_LEAST_CHARACTERS = 16
# What may stand behind "Bearer" in a header (RFC 6750, b64token).
_KEY = re.compile(rb"[A-Za-z0-9._~+/-]{%d,}=*" % _LEAST_CHARACTERS)
# A group may read it: that of a service, for files that belong to root.
_OTHERS = stat.S_IWGRP | stat.S_IRWXO
_MAKE = "Make one by `openssl rand -hex 32`."


class Keys:
    """The keys of a file, one per line; empty lines and lines that begin with # are none. Held as digests."""

    def __init__(self, path: Path) -> None:
        """Read the file.

        Raises `DataError` where it cannot be read, has no key or something that is none, or may be read or changed by
        others. No message has a key in it.
        """
        self._path = path
        self._digests = tuple(_digest(key) for key in _keys_in(path))

    @classmethod
    def of_digests(cls, digests: Iterable[str]) -> Keys:
        """Those that another process read, which told their `digests`; there is no file to read again here."""
        keys = cls.__new__(cls)
        keys._digests = tuple(map(bytes.fromhex, digests))
        return keys

    @property
    def digests(self) -> tuple[str, ...]:
        """What tells a valid key, and from which nobody finds one: they are random."""
        return tuple(digest.hex() for digest in self._digests)

    def read_again(self) -> Keys:
        """What the file holds now. Raises as the first time."""
        return Keys(self._path)

    def replace(self, other: Keys) -> None:
        """From now on those of `other` are valid, and no others."""
        self._digests = other._digests

    def accept(self, given: Iterable[bytes]) -> bool:
        """Whether one of them is valid. The time that it takes says nothing of how near a wrong one is."""
        found = False
        for key in given:
            digest = _digest(key)
            for one in self._digests:
                found |= hmac.compare_digest(digest, one)
        return found


class KeyGuard:
    """ASGI middleware that answers requests without a valid key itself, but for paths that are open to all."""

    def __init__(self, app: ASGIApp, keys: Keys, open_paths: Collection[str]) -> None:
        self._app, self._keys, self._open_paths = app, keys, frozenset(open_paths)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on, or answer 401."""
        if scope["type"] == "lifespan" or scope["path"] in self._open_paths or self._keys.accept(_given(scope)):
            await self._app(scope, receive, send)
            return
        problem = Problem(
            401,
            "unauthorized",
            "there is no valid key in the request",
            "Send one as `Authorization: Bearer KEY` or as `X-API-Key: KEY`.",
            headers={"WWW-Authenticate": "Bearer"},
        )
        await answer_to(scope, problem)(scope, receive, send)


def _given(scope: Scope) -> Iterator[bytes]:
    """The keys in the headers of a request."""
    headers = Headers(scope=scope)
    for value in headers.getlist("Authorization"):
        scheme, _, key = value.partition(" ")
        if scheme.lower() == "bearer":
            yield key.strip().encode("latin-1")
    for value in headers.getlist("X-API-Key"):
        yield value.strip().encode("latin-1")


def _digest(key: bytes) -> bytes:
    """Of one length, whatever that of the key is."""
    return hashlib.sha256(key).digest()


def _keys_in(path: Path) -> list[bytes]:
    try:
        file = os.fdopen(without_waiting(str(path), os.O_RDONLY), "rb")
    except OSError as error:
        problem = f"the keys in {path} cannot be read: {error.strerror or error}"
        raise DataError(problem, "Give --api-key-file a file that this user may read.") from error
    with file:
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode):
            raise DataError(f"{path} is no regular file", "Give --api-key-file a file of one key per line.")
        if status.st_mode & _OTHERS:
            raise DataError(
                f"{path} has keys, and others may read or change it (mode {stat.S_IMODE(status.st_mode):04o})",
                f"Run `chmod 600 {path}`, and make new keys if others could read these.",
            )
        content = file.read(_MOST_BYTES + 1)
    if len(content) > _MOST_BYTES:
        raise DataError(
            f"{path} has more than {_MOST_BYTES:,} bytes", "Give --api-key-file a file of one key per line."
        )
    keys = []
    for number, line in enumerate(content.splitlines(), start=1):
        key = line.strip()
        if not key or key.startswith(b"#"):
            continue
        if not _KEY.fullmatch(key):
            raise DataError(
                f"line {number} of {path} is no key: {_LEAST_CHARACTERS} or more of A-Z a-z 0-9 . _ ~ + / - are one",
                _MAKE,
            )
        keys.append(key)
    if not keys:
        raise DataError(f"{path} has no key", f"Write one per line. {_MAKE}")
    return keys
