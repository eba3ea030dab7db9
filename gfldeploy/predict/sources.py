"""The inputs of detection: files, folders, videos, arrays, here or at addresses of filesystems (`storage.Url`).

The size of an image is known before its pixels.
"""

from __future__ import annotations

import io
import itertools
import math
import os
import stat
import tempfile
import threading
from collections import Counter
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from concurrent.futures import Executor, Future
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import IO, TYPE_CHECKING, Any, BinaryIO, Literal, TypeAlias, TypeVar

import numpy as np
from numpy.typing import NDArray

from gfldeploy.at_once import at_once
from gfldeploy.errors import DataError
from gfldeploy.files import StrPath
from gfldeploy.images.decode import decode_image, image_size, load_cv2, open_file, read_file, read_image, size_of
from gfldeploy.images.formats import IMAGE_SUFFIXES, MAX_PIXELS
from gfldeploy.images.native_stderr import heard
from gfldeploy.storage import Inputs, Source, Url, files_at, look_at, read_range, source_of
from gfldeploy.system import descriptor_path, named_path
from gfldeploy.text import first_of

if TYPE_CHECKING:
    from PIL.Image import Image as PilImage

VIDEO_SUFFIXES = frozenset(
    {
        *(".3gp", ".asf", ".avi", ".flv", ".ivf", ".m2ts", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".mts"),
        *(".ogv", ".ts", ".vob", ".webm", ".wmv"),
    }
)
T = TypeVar("T")
# A file, the content of one, pixels (uint8 [h, w, 3]), or a PIL image.
Image: TypeAlias = "StrPath | Url | bytes | NDArray[np.uint8] | PilImage"
ColorOrder: TypeAlias = Literal["rgb", "bgr"]

# The bytes of containers at a place of their header. FFmpeg itself would also follow playlists (HLS, DASH, concat
# scripts), which name other files and addresses.
_CONTAINERS = (
    *((4, kind) for kind in (b"ftyp", b"moov", b"mdat", b"free", b"skip", b"wide", b"pnot")),  # MP4, QuickTime
    *((0, kind) for kind in (b"\x1a\x45\xdf\xa3", b"FLV", b"OggS", b"DKIF")),  # Matroska, Flash, Ogg, IVF
    *((0, kind) for kind in (b"\0\0\1\xba", b"\0\0\1\xb3", b"\x30\x26\xb2\x75")),  # MPEG, MPEG, ASF
    (8, b"AVI "),
)
_TRANSPORT_PACKETS = (188, 192)  # of MPEG-TS: every one begins with 0x47, here after 0 or 4 bytes
_HEADER_BYTES = 1 << 10
# Of the frames that a video says it has, as many are counted before it is read; 4 days at 25 a second.
_MOST_FRAMES = 10_000_000
# A video ends early if it lacks more frames and more time than containers are wrong by.
_MISSING_SHARE, _MISSING_FRAMES = 0.01, 2
_MOST_RATE = 1000.0  # frames a second
_MOST_KINDS = 5  # that a note names
REQUESTS = 32  # at once, for files at addresses
_MOST_VIDEO_BYTES = 1 << 33  # of one that is copied from an address
_COPY_BYTES = 1 << 24  # a request
_COPY = "video"
_MOST_LINE = 1 << 16  # of a list of files
# So many files of a list at addresses are looked at before they are read.
MOST_LOOKED_AT = 10_000


@dataclass(frozen=True)
class Picture:
    """One image before it is read.

    `source`: the file, its content, which may be on its way, or the pixels, RGB uint8 [h, w, 3]. `size`: (h, w) in
    pixels; None if it is not known, which `error` explains. `frame`, from 0, and `time_s`, in seconds: of a frame of
    the video `name`.
    """

    name: str
    source: Source | bytes | Future[bytes] | NDArray[np.uint8]
    size: tuple[int, int] | None
    error: DataError | None = None
    frame: int | None = None
    time_s: float | None = None

    def read(self, reduction: int = 1) -> NDArray[np.uint8]:
        """The pixels, RGB uint8; of a file by `read_image`. Raises `DataError`."""
        if self.error is not None:
            raise self.error
        if isinstance(self.source, bytes):
            return decode_image(self.source, "the image", reduction)
        if isinstance(self.source, np.ndarray):
            return self.source
        if isinstance(self.source, Future):
            image = decode_image(self.source.result(), self.name, reduction)
        else:
            image = read_image(self.source, reduction)
        if reduction == 1 and image.shape[:2] != self.size:
            raise DataError(f"{self.name} has changed while it was read", "Run it again.")
        return image

    def fetched_by(self, pool: Executor) -> Picture:
        """The same; if it is a file at an address, the pool is asked to fetch it."""
        if not isinstance(self.source, Url) or self.error is not None:
            return self
        return replace(self, source=pool.submit(read_file, self.source))


def picture_of(image: Image, color: ColorOrder = "rgb") -> Picture:
    """A file, the content of one, an array, uint8 [h, w, 3], or a PIL image. What cannot be used has its `error`.

    A file may be at an address of a filesystem. `color`: of arrays. EXIF orientation is applied to PIL images as to
    files. Raises `ValueError` for another kind of array, `TypeError` for anything else, and `ServerError` if what is at
    an address does not answer at all.
    """
    if isinstance(image, np.ndarray):
        if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8 or 0 in image.shape:
            raise ValueError(
                f"an image must be {color.upper()}, uint8 [h, w, 3], not {image.dtype} {list(image.shape)}"
            )
        # A copy in any case: whoever gives it may use the same memory for the next one, as cameras do.
        if color == "bgr":  # NumPy would take ten times as long
            cv2 = load_cv2()
            pixels = np.asarray(cv2.cvtColor(np.ascontiguousarray(image), cv2.COLOR_BGR2RGB), np.uint8)
        else:
            pixels = np.array(image, order="C")
        return Picture("array", pixels, (image.shape[0], image.shape[1]))
    if not isinstance(image, bytes | str | os.PathLike | Url):
        return _pil_picture(image)
    name = "bytes" if isinstance(image, bytes) else str(image)
    source: bytes | Source = b""
    try:
        source = image if isinstance(image, bytes) else source_of(image)
        size = size_of(io.BytesIO(source)) if isinstance(source, bytes) else image_size(source)
    except DataError as error:
        return Picture(name, source, None, error)
    return Picture(name, source, size)


def _pil_picture(image: PilImage) -> Picture:
    from PIL import Image as Pil
    from PIL import ImageOps

    if not isinstance(image, Pil.Image):
        raise TypeError(f"an image is a path, bytes, an array or a PIL image, not {type(image).__name__}")
    name = str(getattr(image, "filename", "") or "PIL image")
    try:
        turned = ImageOps.exif_transpose(image)
        if image.mode.startswith(("I;16", "I")):  # 16 bits, as OpenCV makes them 8
            pixels = np.repeat((np.asarray(turned) // 256).clip(0, 255).astype(np.uint8)[..., np.newaxis], 3, axis=2)
        else:
            # Without alpha, whatever is under it, as for files.
            pixels = np.asarray(turned.convert("RGBA" if image.mode == "P" else "RGB"))[..., :3]
    except (OSError, SyntaxError, ValueError) as error:
        return Picture(name, b"", None, DataError(f"{name} cannot be read: {error}", "Give another image."))
    if 0 in pixels.shape:
        return Picture(name, b"", None, DataError(f"{name} has no pixels", "Give another image."))
    return Picture(name, np.ascontiguousarray(pixels), (pixels.shape[0], pixels.shape[1]))


def is_one_image(images: object) -> bool:
    """Whether it is one image, not several."""
    if isinstance(images, str | bytes | os.PathLike | Url):
        return True
    return images.ndim in (2, 3) if isinstance(images, np.ndarray) else hasattr(images, "convert")


def pictures(
    inputs: Sequence[Source],
    sizes: Mapping[Source, tuple[int, int] | None] = MappingProxyType({}),
    bad: Mapping[int, str] = MappingProxyType({}),
) -> Generator[Picture]:
    """Every image of these files, in order; of a video, its frames.

    `sizes`: of image files whose headers were read. `bad`: files that are errors and are not opened, by their place
    among the inputs, and why.
    """

    def picture(path: Source) -> Picture | None:
        if size := sizes.get(path):
            return Picture(str(path), path, size)
        return None if is_video(path) else picture_of(path)

    good = [path for place, path in enumerate(inputs) if place not in bad] if bad else inputs
    with closing(_ahead(picture, good)) as ahead:
        for place, path in enumerate(inputs):
            if place in bad:
                yield Picture(str(path), path, None, DataError(f"{path} cannot be used: {bad[place]}"))
            elif (found := next(ahead)) is None:
                yield from video_frames(path)
            else:
                yield found


def _ahead(work: Callable[[Source], T], inputs: Sequence[Source]) -> Generator[T]:
    """`work` of each, in order; of several at once where it waits for answers from elsewhere."""
    if any(isinstance(path, Url) for path in inputs):
        yield from at_once(work, inputs, REQUESTS)
    else:
        yield from map(work, inputs)


def is_video(path: Source) -> bool:
    """By the name; if that is of neither images nor videos, by the header of the file."""
    suffix = path.suffix.lower()
    if suffix in VIDEO_SUFFIXES | IMAGE_SUFFIXES:
        return suffix in VIDEO_SUFFIXES
    return _is_container(path) and _header(path)[8:12] not in (b"avif", b"avis")  # an AVIF begins as an MP4 does


def read_list(path: Path) -> Inputs:
    """The files that a text file names, one in each line, as they would be given by themselves; empty lines are none.

    Raises `DataError` for a list that cannot be read or is empty, and for an address of another kind.
    """

    def named() -> Iterator[Source]:
        with path.open("rb") as file:
            for number, line in enumerate(iter(lambda: file.readline(_MOST_LINE), b""), start=1):
                name = line.removeprefix(b"\xef\xbb\xbf" if number == 1 else b"").rstrip(b"\r\n")
                if len(line) == _MOST_LINE or b"\0" in name:
                    raise DataError(f"line {number} of {path} names no file", "Write one path or address in each line.")
                if name.strip():
                    yield source_of(os.fsdecode(name))

    try:
        found = Inputs(named(), once=True)
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror or error}", "Give a text file.") from error
    if not found:
        raise DataError(f"{path} names no files", "Write one path or address in each line.")
    return found


def looked_at(inputs: Inputs, note: Callable[[str], None] = lambda sentence: None) -> Inputs:
    """The same, those at addresses with size and version, by which a file that has changed is noticed.

    They take a request each: of more than `MOST_LOOKED_AT` none is looked at, and `note` is told. What is not there is
    left as it is. Raises `ServerError` if a store does not answer.
    """
    remote = sum(isinstance(path, Url) and not path.version for path in inputs)
    if remote > MOST_LOOKED_AT:
        note(
            f"{remote:,} files at addresses are not looked at before they are read: one that changes between an "
            "interrupted run and the next is not noticed"
        )
    if not 0 < remote <= MOST_LOOKED_AT:
        return inputs

    def look(path: Source) -> Source:
        if not isinstance(path, Url) or path.version:
            return path
        try:
            return look_at(path) or path
        except (OSError, ValueError, DataError):  # told when it is read
            return path

    return Inputs(_ahead(look, inputs))


def version_of(path: Source) -> tuple[str, int, int | str]:
    """By which a file is known again: its name, its size in bytes, and when it was changed, or its version."""
    if isinstance(path, Url):
        return str(path), path.size, path.version
    try:
        status = path.stat()
    except OSError:
        return str(path), 0, 0
    return str(path), status.st_size, status.st_mtime_ns


def list_inputs(
    inputs: Sequence[Source], exclude: Sequence[Source] = (), note: Callable[[str], None] = lambda sentence: None
) -> Inputs:
    """The files named, each once, and in place of a folder the images and videos below it, sorted, folder by folder.

    Links are followed, each folder once. Left out are the folders `exclude`, hidden files and folders, and, with a
    sentence to `note`: pipes, devices, folders that cannot be read, and files that are no images or videos by name.
    Raises `DataError` for what is not there, and for a folder without images; `ServerError` if a store does not answer.
    """
    walk = _Walk(inputs, exclude)
    found = Inputs(_named(inputs, walk), once=len(inputs) > 1)
    for sentence in walk.told():
        note(sentence)
    return found


def _named(inputs: Sequence[Source], walk: _Walk) -> Iterator[Source]:
    for path in inputs:
        if isinstance(path, Url):
            yield from walk.at(path)
            continue
        try:
            status = path.stat()
        except (OSError, ValueError) as error:
            reason = None if isinstance(error, FileNotFoundError) else getattr(error, "strerror", None) or error
            raise DataError(
                f"cannot read {path}: {reason}" if reason else f"there is no {path}",
                "Give image files, videos, or folders of them.",
            ) from error
        if not stat.S_ISDIR(status.st_mode):
            yield path
            continue
        count = 0
        for count, file in enumerate(walk.below(path), start=1):  # noqa: B007
            yield file
        if not count and not walk.repeated:
            raise walk.no_images(path)


class _Walk:
    """The files below folders, and those left out. `repeated`: some folder was met again."""

    def __init__(self, inputs: Sequence[Source], exclude: Sequence[Source]) -> None:
        self.repeated = False
        here = [path for path in inputs if isinstance(path, Path)]
        self._exclude = {folder.resolve() for folder in exclude if isinstance(folder, Path)}
        self._exclude_at = [folder for folder in exclude if isinstance(folder, Url)]
        self._seen: set[tuple[int, int]] = set()
        self._named = {path.resolve() for path in here if path.is_dir()} if len(inputs) > 1 else set()
        self._others: Counter[str] = Counter()
        self._special: list[Path] = []
        self._unread: list[str] = []

    def below(self, folder: Path) -> Iterator[Path]:
        for name, folders, files in os.walk(folder, followlinks=True, onerror=self._failed):
            here = Path(name)
            status = here.stat()
            if (status.st_dev, status.st_ino) in self._seen:
                self.repeated = True
                folders.clear()
                continue
            self._seen.add((status.st_dev, status.st_ino))
            # In place: `walk` enters the folders that are left, in this order.
            folders[:] = sorted(one for one in folders if self._enters(here / one, folder))
            for file in sorted(files):
                path = here / file
                if file[0] == ".":
                    continue
                if path.suffix.lower() not in IMAGE_SUFFIXES | VIDEO_SUFFIXES:
                    self._others[path.suffix.lower() or "no suffix"] += 1
                elif not path.is_file() and path.exists():
                    self._special.append(path)
                else:
                    yield path

    def at(self, url: Url) -> list[Url]:
        """The file at an address, or those below it, in the order in which `below` would have them."""
        try:
            if (file := look_at(url)) is not None:
                return [file]
            found = list(files_at(url))
        except FileNotFoundError:
            raise DataError(f"there is no {url}", "Give image files, videos, or folders of them.") from None
        except (OSError, ValueError) as error:
            raise DataError(f"cannot read {url}: {error}", "Check the address and its permissions.") from error
        start = len(url.text.rstrip("/")) + 1
        kept: list[tuple[list[tuple[bool, str]], Url]] = []
        for one in found:
            *folders, name = one.text[start:].split("/")
            if any(part.startswith(".") for part in (*folders, name)) or any(map(one.is_below, self._exclude_at)):
                continue
            if (suffix := one.suffix.lower()) in IMAGE_SUFFIXES | VIDEO_SUFFIXES:
                # In a folder first the files, then its folders.
                kept.append(([*((True, folder) for folder in folders), (False, name)], one))
            else:
                self._others[suffix or "no suffix"] += 1
        if not kept:
            raise self.no_images(url)
        return [one for _, one in sorted(kept, key=lambda pair: pair[0])]

    def no_images(self, folder: Source) -> DataError:
        return DataError(
            f"there are no images in {folder}" + (f" ({self.told()[0]})" if self.told() else ""),
            f"Give a folder with {', '.join(sorted(IMAGE_SUFFIXES | VIDEO_SUFFIXES))} files.",
        )

    def told(self) -> list[str]:
        """Sentences about the files left out."""
        told = []
        if self._others:
            kinds = ", ".join(f"{count} {kind}" for kind, count in self._others.most_common(_MOST_KINDS))
            more = ", ..." if len(self._others) > _MOST_KINDS else ""
            told.append(f"skipped {self._others.total()} files that are no images or videos by name: {kinds}{more}")
        if self._special:
            told.append(f"skipped {first_of(self._special)}: no regular file")
        if self._unread:
            told.append(f"cannot read the folder {first_of(self._unread)}")
        return told

    def _enters(self, path: Path, root: Path) -> bool:
        """Whether to go into this folder: not if a link leads to a folder that is found by its own name."""
        if path.name[0] == "." or path.resolve() in self._exclude:
            return False
        target = path.resolve()
        hidden = any(part[0] == "." for part in target.parts[1:])
        roots = self._named | {root.resolve()}
        return not (path.is_symlink() and not hidden and any(target.is_relative_to(one) for one in roots))

    def _failed(self, error: OSError) -> None:
        self._unread.append(f"{error.filename}: {error.strerror}")


def picture_sizes(
    inputs: Sequence[Source], images: dict[Source, tuple[int, int] | None] | None = None
) -> Iterator[tuple[int, int] | None]:
    """(h, w) in pixels of every image of these files, None if it cannot be read.

    Of a video, as many as its header says that it has frames, which may be wrong: at least one. `images` receives those
    of the image files.
    """

    def size_at(path: Source) -> tuple[tuple[int, int] | None] | None:
        return None if is_video(path) else (picture_of(path).size,)

    with closing(_ahead(size_at, inputs)) as ahead:
        for path, found in zip(inputs, ahead, strict=True):
            if found is not None:
                if images is not None:
                    images[path] = found[0]
                yield found[0]
                continue
            with _opened(path) as video:
                size = video.size if video and min(video.size) > 0 else None
                # Each frame has at least a byte, whatever the header says.
                count = min(video.frames, video.size_bytes, _MOST_FRAMES) if video else 1
            yield from itertools.repeat(size, max(count, 1))


def _header(path: Source) -> bytes:
    with open_file(path, most_bytes=None) as file:
        return file.read(_HEADER_BYTES)


def _is_container(path: Source) -> bool:
    """Whether it begins as a video file does, and not as a list of others."""
    try:
        header = _header(path)
    except DataError:
        return False
    return any(header.startswith(kind, place) for place, kind in _CONTAINERS) or any(
        len(header) > 2 * step and all(header[place] == 0x47 for place in range(step - 188, len(header), step))
        for step in _TRANSPORT_PACKETS
    )


@dataclass(frozen=True)
class _Video:
    """An open `cv2.VideoCapture`, and its header: (h, w) in pixels, the number of frames (0: unknown), the rate.

    `size_bytes`: of the file.
    """

    capture: Any
    size: tuple[int, int]
    frames: int
    rate: float
    size_bytes: int = 0


@contextmanager
def _opened(path: Source) -> Iterator[_Video | None]:
    """A video, decoded in one thread; None if it cannot be read, or its frames exceed `MAX_PIXELS`."""
    cv2 = load_cv2()
    if not _is_container(path):
        yield None
        return
    with _on_disk(path) as file:
        # Not by its name if possible: FFmpeg takes some for addresses, though none that is an absolute path.
        name = descriptor_path(file.fileno()) or named_path(file.name)
        if name is None:
            yield None
            return
        capture, _ = heard(lambda: cv2.VideoCapture(name, cv2.CAP_FFMPEG, [cv2.CAP_PROP_N_THREADS, 1]))
        try:
            keys = (cv2.CAP_PROP_FRAME_HEIGHT, cv2.CAP_PROP_FRAME_WIDTH, cv2.CAP_PROP_FRAME_COUNT, cv2.CAP_PROP_FPS)
            height, width, count, rate = map(capture.get, keys)
            frames = int(count) if math.isfinite(count) and count > 0 else 0
            usable = capture.isOpened() and int(height) * int(width) <= MAX_PIXELS
            size_bytes = os.fstat(file.fileno()).st_size
            yield _Video(capture, (int(height), int(width)), frames, rate, size_bytes) if usable else None
        finally:
            capture.release()


@contextmanager
def _on_disk(path: Source) -> Iterator[BinaryIO | IO[bytes]]:
    """The file, or a copy of the one at the address, which FFmpeg cannot read there."""
    if isinstance(path, Url):
        with _copies.of(path) as copy:
            yield copy
    else:
        with open_file(path, most_bytes=None) as file:
            yield file


class _Copies:
    """The last file that was copied from an address: sizes, frames and rate need it.

    It has a name on the disk only where C code cannot open it without one.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._key: object = None
        self._handle: int | None = None
        self._folder: tempfile.TemporaryDirectory[str] | None = None

    @contextmanager
    def of(self, url: Url) -> Iterator[IO[bytes]]:
        """A copy. Raises `DataError`."""
        with self._lock:
            try:
                key = version_of(look_at(url) or url)
                if self._key != key:
                    self._drop()
                    self._make(url)
                    self._key = key
                copy = self._open()
            except (OSError, ValueError) as error:
                reason = getattr(error, "strerror", None) or error
                problem = f"cannot copy the video {url}: {reason}"
                raise DataError(problem, "Free some space for temporary files (TMPDIR), or give a file.") from error
        with copy:
            yield copy

    def _drop(self) -> None:
        if self._handle is not None:
            os.close(self._handle)
        if self._folder is not None:
            self._folder.cleanup()
        self._key = self._handle = self._folder = None

    def _make(self, url: Url) -> None:
        if descriptor_path(0) is not None:
            with tempfile.TemporaryFile() as file:
                _copy(url, file)
                self._handle = os.dup(file.fileno())
            return
        # Not one that is removed when it is closed: Windows lets nobody else open it.
        self._folder = tempfile.TemporaryDirectory(prefix="gfldeploy-", ignore_cleanup_errors=True)
        with (Path(self._folder.name) / _COPY).open("wb") as file:
            _copy(url, file)

    def _open(self) -> IO[bytes]:
        if self._folder is not None:
            return (Path(self._folder.name) / _COPY).open("rb")
        assert self._handle is not None
        return os.fdopen(os.dup(self._handle), "rb")


_copies = _Copies()


def _copy(url: Url, file: IO[bytes]) -> None:
    for start in range(0, _MOST_VIDEO_BYTES, _COPY_BYTES):
        block = read_range(url, start, start + _COPY_BYTES)
        file.write(block)
        if len(block) < _COPY_BYTES:
            file.flush()
            return
    problem = f"the video {url} has more than {_MOST_VIDEO_BYTES / 1e9:.0f} GB"
    raise DataError(problem, "Copy it to a disk and give its path, or cut it.")


def video_rate(path: Source) -> float:
    """Frames a second; 0 if the file does not say."""
    with _opened(path) as video:
        return video.rate if video and 0 < video.rate <= _MOST_RATE else 0.0


def video_frames(path: Source) -> Iterator[Picture]:
    """Its frames in order, turned if the file says so.

    At least one picture: a video without a readable frame becomes one with an `error`, and a video that ends before its
    header says has a last picture with an `error` and without a `frame`.
    """
    cv2 = load_cv2()
    number, time_s, error = 0, 0.0, None
    with _opened(path) as video:
        while video:
            read, frame = video.capture.read()
            if not read or frame is None or frame.shape[0] * frame.shape[1] > MAX_PIXELS:
                break
            time_s = video.capture.get(cv2.CAP_PROP_POS_MSEC) / 1e3
            rgb = cv2.cvtColor(frame, cv2.COLOR_BGR2RGB)
            yield Picture(str(path), rgb, (rgb.shape[0], rgb.shape[1]), None, number, time_s)
            number += 1
        if number == 0:
            error = DataError(f"{path} is damaged or not a video that OpenCV reads", "Convert it to MP4.")
        elif video and _ends_early(video, number, time_s):
            problem = f"{path} ends early: its header says {video.frames} frames, and {number} could be read"
            error = DataError(problem, "Copy it again.")
    if error:
        yield Picture(str(path), path, None, error)


def _ends_early(video: _Video, number: int, time_s: float) -> bool:
    """Whether it was cut, where `number` frames were read, the last at `time_s`.

    By frames and by time: some containers have no count, and OpenCV makes one from the duration and a nominal rate.
    """
    missing = video.frames - number
    if missing < _MISSING_FRAMES or missing < video.frames * _MISSING_SHARE or not 0 < video.rate < math.inf:
        return False
    return time_s < (video.frames - _MISSING_FRAMES) / video.rate * (1 - _MISSING_SHARE)
