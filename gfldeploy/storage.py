"""Files at addresses of filesystems, s3://, gs:// and hdfs://, through fsspec.

Nothing else is fetched: an address is a scheme of this list and a path, which goes to that one filesystem as it is, so
that fsspec's chains of addresses mean nothing here. Credentials are looked up by the filesystem's own package.

A request that breaks is tried again a few times. If the store still answers others, it is an error of that one file; if
not, it is an error of the command (`ServerError`), which a run of a million images is to end with rather than write a
million errors.
"""

from __future__ import annotations

import errno
import importlib
import io
import logging
import os
import re
import threading
import time
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, TypeAlias, TypeVar, overload
from urllib.parse import unquote, urlsplit

from gfldeploy.errors import DataError, GfldeployError, MissingDependencyError, ServerError, summary

T = TypeVar("T")

# What each scheme needs, as pip installs it.
PACKAGES: Mapping[str, tuple[str, ...]] = {"s3": ("s3fs",), "gs": ("gcsfs",), "hdfs": ("fsspec", "pyarrow")}
_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.:-]*)://")
_GIVE = f"Give a path, or an address with {', '.join(f'{scheme}://' for scheme in PACKAGES)} or file://."
# Seconds before a request is tried again: of a store that has answered before, and of one that has not.
_WAITS_S = (0.2, 0.6, 1.8, 4.0)
_FIRST_WAITS_S = (0.3,)
_REPEATING = ("gs",)  # whose package does that itself, for half a minute
_CONNECT_S, _READ_S = 4, 10
_CONNECTIONS = 64
_FIRST_BYTES = 1 << 15  # of a file whose header is asked for: nearly all JPEGs have it there
_WHOLE_BYTES = 1 << 24  # nearly all images are smaller: one request is all of them
_MOST_BLOCK = 1 << 22
# Answers of a store that the next request would have too.
_ANSWERS = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError, NotImplementedError)
_ANSWER_NUMBERS = {errno.EINVAL, errno.EPERM, errno.ENOSYS, errno.ENAMETOOLONG, errno.ERANGE} | (
    {errno.EREMCHG} if hasattr(errno, "EREMCHG") else set()  # of Linux
)
# Errors of botocore and google-auth, and codes of S3, that say that no request will be let in.
_NO_CREDENTIALS = re.compile(
    r"NoCredentials|PartialCredentials|CredentialRetrieval|TokenRetrieval|ProfileNotFound|SSO|LoginError|NoAuthToken"
    r"|DefaultCredentials|RefreshError|ConfigParse"
    r"|ExpiredToken|InvalidToken|InvalidAccessKeyId|SignatureDoesNotMatch|RequestTimeTooSkewed|TokenRefreshRequired"
)
_BAD_REQUESTS = re.compile(r"ParamValidation|InvalidBucketName|KeyTooLong|UnsupportedS3")


@dataclass(frozen=True, slots=True)
class Url:
    """A file or folder at an address, such as s3://bucket/folder/image.jpg; `str` gives the address.

    `size` in bytes and `version` (what the filesystem calls ETag, or when it was written): as it was listed; -1 and ""
    where nobody asked.
    """

    text: str
    size: int = field(default=-1, compare=False)
    version: str = field(default="", compare=False)

    def __str__(self) -> str:
        return self.text

    def __truediv__(self, name: str) -> Url:
        return Url(f"{self.text.rstrip('/')}/{name}")

    @property
    def scheme(self) -> str:
        return self.text.partition(":")[0]

    @property
    def store(self) -> str:
        """What answers: all buckets of a scheme, or one HDFS."""
        return f"hdfs://{urlsplit(self.text).netloc}" if self.scheme == "hdfs" else f"{self.scheme}://"

    @property
    def path(self) -> str:
        """As the filesystem has it: bucket and key, or the path of HDFS."""
        return self.text[len(self.store) :].rstrip("/")

    @property
    def name(self) -> str:
        return PurePosixPath(self.path).name

    @property
    def stem(self) -> str:
        return PurePosixPath(self.path).stem

    @property
    def suffix(self) -> str:
        return PurePosixPath(self.path).suffix

    def is_below(self, folder: Url) -> bool:
        """Whether it is the folder, or in it."""
        return f"{self.text.rstrip('/')}/".startswith(f"{folder.text.rstrip('/')}/")


# A file to read, or a folder to write: on this machine, or at an address. `source_of(str(source))` gives it back.
Source: TypeAlias = Path | Url


class Inputs(Sequence[Source]):
    """Files in little more memory than their names: a million `Path` objects take half a gigabyte."""

    def __init__(self, sources: Iterable[Source] = (), *, once: bool = False) -> None:
        """`once`: leave out those that were there before; as they are taken, that takes more memory."""
        self._text = bytearray()
        self._ends = array("Q")
        seen: set[bytes] = set()
        for source in sources:
            entry = f"{source.text}\0{source.size}\0{source.version}" if isinstance(source, Url) else os.fspath(source)
            data = os.fsencode(entry)
            if once:
                key = data.partition(b"\0")[0]
                if key in seen:
                    continue
                seen.add(key)
            self._text += data
            self._ends.append(len(self._text))

    def __len__(self) -> int:
        return len(self._ends)

    @overload
    def __getitem__(self, place: int) -> Source: ...
    @overload
    def __getitem__(self, place: slice) -> list[Source]: ...
    def __getitem__(self, place: int | slice) -> Source | list[Source]:
        if isinstance(place, slice):
            return [self._at(one) for one in range(len(self))[place]]
        return self._at(range(len(self))[place])

    def __iter__(self) -> Iterator[Source]:
        return map(self._at, range(len(self)))

    def _at(self, place: int) -> Source:
        data = self._text[self._ends[place - 1] if place else 0 : self._ends[place]]
        text, *about = os.fsdecode(bytes(data)).split("\0")
        return Url(text, int(about[0]), about[1]) if about else Path(text)


def source_of(given: str | os.PathLike[str] | Url) -> Source:
    """A path, or the address of a filesystem. Raises `DataError` for addresses of any other kind."""
    if isinstance(given, Url):
        return given
    text = os.fspath(given)
    found = _SCHEME.match(text) if "://" in text else None
    if found is None:
        return Path(text)
    scheme, rest = found[1].lower(), text[found.end() :]
    if scheme == "file":
        host, _, path = rest.partition("/")
        if host not in ("", "localhost") or not path:
            raise DataError(f"{text[:200]} is no file of this machine", "Write file:///folder/name, or the path.")
        found_path = unquote(path, errors="surrogateescape")
        return Path(found_path if Path(found_path).drive else f"/{found_path}")  # drives are of Windows
    if scheme not in PACKAGES:
        raise DataError(f"{scheme[:40]}:// is no address that is read here", _GIVE)
    place, _, path = rest.partition("/")
    if "@" in place and (scheme != "hdfs" or ":" in place.partition("@")[0]):
        # Not shown: it would be in logs.
        raise DataError(
            f"an address with {scheme}:// has a password in it",
            "Leave it out: credentials come from where the filesystem's own tools have them, such as AWS_PROFILE.",
        )
    if (
        (not place and scheme != "hdfs")
        or any(ord(one) < 32 or one == "\x7f" for one in text)
        or not _is_host(scheme, text)
    ):
        raise DataError(
            f"{text[:200]!r} is no address of a file",
            f"Write {scheme}://{'host:port' if scheme == 'hdfs' else 'bucket'}/folder/name.",
        )
    return Url(f"{scheme}://{rest}")


def _is_host(scheme: str, text: str) -> bool:
    """Whether a Hadoop address has a host and a port that can be; other places are names of buckets."""
    if scheme == "hdfs":
        try:
            return urlsplit(text).port != 0
        except ValueError:
            return False
    return True


def is_address(text: str) -> bool:
    """Whether `source_of` takes it for an address, or refuses it as one."""
    return "://" in text and _SCHEME.match(text) is not None


def look_at(url: Url) -> Url | None:
    """The file with its size and version; None for a folder. Raises `FileNotFoundError` and what `_ask` does."""
    info = _ask(url, lambda filesystem, path: filesystem.info(path))
    return _listed(url.text, info) if info.get("type") == "file" else None


def files_at(folder: Url) -> Iterator[Url]:
    """All files below a folder, in no order, with size and version. Raises what `_ask` does."""
    start, top = len(folder.path), folder.text.rstrip("/")
    found: dict[str, Any] = _ask(folder, lambda filesystem, path: filesystem.find(path, detail=True))
    while found:
        name, info = found.popitem()
        below = name[start:]
        # An empty object with a name such as "folder/" stands for a folder.
        if info.get("type") == "file" and below.startswith("/") and not below.endswith("/"):
            yield _listed(top + below, info)


def read_url(url: Url, most_bytes: int) -> bytes:
    """The whole file. Raises `DataError` for a larger one, `FileNotFoundError`, and what `_ask` does."""
    first = min(_WHOLE_BYTES, most_bytes + 1)
    data = read_range(url, 0, first)
    if len(data) < first:
        return data
    size = _size(url)
    check_size(url, size, most_bytes)
    data += read_range(url, first, size) if size > first else b""
    if len(data) != size:
        raise DataError(f"{url} has changed while it was read", "Run it again.")
    return data


def check_size(path: Source, size: int, most_bytes: int) -> None:
    """Raise `DataError` for an image file that is too large."""
    if size > most_bytes:
        raise DataError(f"the image file {path} has {size / 1e9:.1f} GB", "Scale it down, or cut it.")


def read_range(url: Url, start: int, stop: int) -> bytes:
    """These bytes of the file, fewer at its end. Raises `FileNotFoundError`, and what `_ask` does."""

    def read(filesystem: Any, path: str) -> bytes:
        # Arrow cannot seek, even to 0, where it only streams.
        data: bytes = filesystem.cat_file(path, start=start or (None if url.scheme == "hdfs" else 0), end=stop)
        return data[: stop - start]  # a server may ignore the range

    try:
        return _ask(url, read)
    except _ANSWERS:
        raise
    except (OSError, ValueError):
        # There is no such range of an empty file, or beyond the end.
        if start < _size(url):
            raise
        return b""


def open_url(url: Url, most_bytes: int | None) -> BinaryIO:
    """The file, open for reading of parts: few bytes are fetched for its header. Errors are those of `read_range`.

    Reading all of it is refused if it has more than `most_bytes` (`DataError`).
    """
    return io.BufferedReader(_Ranged(url, most_bytes))


class _Ranged(io.RawIOBase):
    """A file of which parts are read. It keeps its first block and the last one, and asks for more each time."""

    def __init__(self, url: Url, most_bytes: int | None) -> None:
        self._url, self._most = url, most_bytes
        self._place = 0
        self._size: int | None = None if url.size < 0 else url.size
        self._head = b""
        self._block, self._start = b"", 0
        self._next = _FIRST_BYTES

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET, /) -> int:
        if whence == io.SEEK_END:
            self._size = _size(self._url) if self._size is None else self._size
        self._place = max({io.SEEK_SET: 0, io.SEEK_CUR: self._place, io.SEEK_END: self._size or 0}[whence] + offset, 0)
        return self._place

    def readinto(self, buffer: Any, /) -> int:
        wanted = len(buffer)
        found = self._held()
        if not found and wanted and (self._size is None or self._place < self._size):
            self._fetch(wanted)
            found = self._held()
        count = min(len(found), wanted)
        buffer[:count] = found[:count]
        self._place += count
        return count

    def readall(self) -> bytes:
        if self._most is None:
            raise OSError(errno.EFBIG, "its length is not limited")
        if self._size is not None and self._size == len(self._head):
            data = self._head
        else:
            data = read_url(self._url, self._most)
        rest = data[self._place :]
        self._place += len(rest)
        return rest

    def _held(self) -> memoryview:
        """What is here of the file from this place on."""
        for start, block in ((0, self._head), (self._start, self._block)):
            if start <= self._place < start + len(block):
                return memoryview(block)[self._place - start :]
        return memoryview(b"")

    def _fetch(self, wanted: int) -> None:
        stop = self._place + max(wanted, self._next)
        block = read_range(self._url, self._place, stop)
        if self._place + len(block) < stop:
            self._size = self._place + len(block)
        if self._place == 0:
            self._head = block
        else:
            self._block, self._start = block, self._place
        self._next = min(self._next * 8, _MOST_BLOCK)


def write_url(url: Url, content: bytes) -> None:
    """Replace the file. Raises `OSError` and what `_ask` does."""
    _ask(url, lambda filesystem, path: filesystem.pipe_file(path, content))


def upload(file: Path, url: Url) -> None:
    """Replace the file at the address by one of this machine. Raises `OSError` and what `_ask` does."""
    _ask(url, lambda filesystem, path: filesystem.put_file(str(file), path))
    if (size := _size(url)) != file.stat().st_size:
        raise OSError(errno.EIO, f"{size:,} bytes of {url} arrived, and {file.stat().st_size:,} were sent")


def remove_url(url: Url) -> None:
    """Remove the file, if it is there. Raises `OSError` and what `_ask` does."""
    with suppress(FileNotFoundError):
        _ask(url, lambda filesystem, path: filesystem.rm_file(path))


def _size(url: Url) -> int:
    return int(_ask(url, lambda filesystem, path: filesystem.info(path))["size"])


def _listed(text: str, info: Mapping[str, Any]) -> Url:
    version = next((str(info[key]) for key in ("ETag", "etag", "mtime", "updated") if info.get(key)), "")
    return Url(text, int(info.get("size") or 0), version)


class _Store:
    """A filesystem of fsspec, and when it answered last, by `time.monotonic`; 0: never."""

    def __init__(self, url: Url) -> None:
        self.answered = 0.0
        self.filesystem = _filesystem(url)


_stores: dict[tuple[int, str], _Store] = {}
_making = threading.Lock()


def _store(url: Url) -> _Store:
    key = os.getpid(), url.store  # connections are not inherited
    with _making:
        if key not in _stores:
            _stores[key] = _Store(url)
        return _stores[key]


def _filesystem(url: Url) -> Any:
    """Raises `MissingDependencyError`, and `ServerError` for what the filesystem's package lacks."""
    try:
        for name in PACKAGES[url.scheme]:
            importlib.import_module(name)
        import fsspec
    except ImportError as error:
        packages = " ".join(PACKAGES[url.scheme])
        problem = f"{url.scheme}:// needs {error.name or packages}, not installed here"
        raise MissingDependencyError(problem, f"Run: pip install {packages}") from error
    # What it has to say comes as an error; without a handler Python would write it to stderr, of each attempt.
    logging.getLogger(PACKAGES[url.scheme][0]).addHandler(logging.NullHandler())
    settings: dict[str, Any] = {"use_listings_cache": False}
    if url.scheme == "s3":
        retries = {"total_max_attempts": 1}  # `_ask` does that
        limits = {"connect_timeout": _CONNECT_S, "read_timeout": _READ_S, "max_pool_connections": _CONNECTIONS}
        settings["config_kwargs"] = {**limits, "retries": retries}
    elif url.scheme == "hdfs":
        place = urlsplit(url.text)
        settings = {"host": place.hostname or "default", "port": place.port or 0, "user": place.username}
    try:
        filesystem = fsspec.filesystem(url.scheme, skip_instance_cache=True, **settings)
        if url.scheme == "s3":
            filesystem.retries = 1
            filesystem.connect()  # once, not in several threads
    except Exception as error:
        if url.scheme == "hdfs":
            remedy = "HDFS needs Java and Hadoop's libraries: set JAVA_HOME, HADOOP_HOME, CLASSPATH."
            raise ServerError(f"{url.store} cannot be opened: {summary(error)}", remedy) from error
        raise _refused(url, error) from error
    return filesystem


def _ask(url: Url, question: Callable[[Any, str], T]) -> T:
    """The answer of the store of `url` to a question: a function of the filesystem and of the path there.

    Raises `OSError` and `ValueError` for what the store says of this file, such as `FileNotFoundError`; `DataError` if
    the connection breaks again and again, but the store answers; `ServerError` if it does not answer, or lets nobody
    in; `MissingDependencyError`.
    """
    store = _store(url)
    began = time.monotonic()
    waits = iter(() if url.scheme in _REPEATING else _WAITS_S if store.answered else _FIRST_WAITS_S)
    while True:
        try:
            answer = question(store.filesystem, url.path)
        except Exception as error:
            if _is_no_credentials(error):
                raise _refused(url, error) from error
            if _is_answer(error):
                store.answered = time.monotonic()
                raise
            wait = next(waits, None)
            if wait is None:
                if store.answered < began and not _answers(store, url):
                    remedy = "Check the address, the network and, of S3, AWS_ENDPOINT_URL; then run it again."
                    raise ServerError(f"the store of {url} does not answer: {summary(error)}", remedy) from error
                problem = f"cannot read {url}: the connection broke again and again: {summary(error)}"
                raise DataError(problem, "Run it again.") from error
            time.sleep(wait)
        else:
            store.answered = time.monotonic()
            return answer


def _answers(store: _Store, url: Url) -> bool:
    """Whether the store says anything, of the bucket of this file."""
    try:
        store.filesystem.info(url.path.partition("/")[0] or "/")
    except Exception as error:  # noqa: BLE001 - each package has its own
        return _is_answer(error)
    return True


def _is_answer(error: Exception) -> bool:
    if isinstance(error, OSError) and error.errno in _ANSWER_NUMBERS:
        return True
    return isinstance(error, (*_ANSWERS, ValueError, TypeError, GfldeployError)) or _says(error, _BAD_REQUESTS)


def _is_no_credentials(error: Exception) -> bool:
    return _says(error, _NO_CREDENTIALS)


def _says(error: BaseException | None, words: re.Pattern[str]) -> bool:
    """Whether the error, or what it came from, is of such a kind: its class, or the code that S3 gives."""
    while error is not None:
        response = getattr(error, "response", None)
        code = response.get("Error", {}).get("Code") if isinstance(response, dict) else ""
        kinds = [kind.__name__ for kind in type(error).__mro__]
        if any(words.search(one) for one in (*kinds, str(code))):
            return True
        error = error.__cause__
    return False


def _refused(url: Url, error: Exception) -> ServerError:
    where = {
        "s3": "AWS_PROFILE, AWS_ACCESS_KEY_ID, or ~/.aws (FSSPEC_S3_ANON=true for public buckets)",
        "gs": "GOOGLE_APPLICATION_CREDENTIALS, or `gcloud auth application-default login`",
    }.get(url.scheme, "its own configuration")
    return ServerError(f"the store of {url} lets nobody in: {summary(error)}", f"Check the credentials: {where}.")
