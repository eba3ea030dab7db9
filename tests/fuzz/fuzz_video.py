"""Video files: how many frames of which size they claim, and the frames."""

from __future__ import annotations

import os
import random
import struct
import tempfile
from collections.abc import Iterable
from pathlib import Path

import cv2
import mutations
import numpy as np

os.environ.setdefault("OPENCV_FFMPEG_LOGLEVEL", "-8")

from gfldeploy.images.decode import load_cv2
from gfldeploy.predict.sources import is_video, picture_sizes, video_frames, video_rate

_SIZES = (0, 1, 0x7FFF, 0xFFFF, 1 << 20, 1 << 27, (1 << 31) - 1, 1 << 31, (1 << 32) - 1)


def seeds() -> Iterable[bytes]:
    load_cv2()
    with tempfile.TemporaryDirectory() as folder:
        for name, codec in (("mp4", "mp4v"), ("mp4", "vp09"), ("avi", "MJPG"), ("webm", "VP80"), ("mpg", "MPG1")):
            path = Path(folder) / f"{codec}.{name}"
            writer = cv2.VideoWriter(str(path), cv2.CAP_FFMPEG, cv2.VideoWriter.fourcc(*codec), 25, (64, 48))
            for number in range(4):
                writer.write(np.full((48, 64, 3), 40 * number, np.uint8))
            writer.release()
            if path.exists() and path.stat().st_size:
                yield path.read_bytes()
    yield b"#EXTM3U\n#EXTINF:1,\n/etc/passwd\n"
    yield b"ffconcat version 1.0\nfile /etc/passwd\n"


def mutate(data: bytes, rng: random.Random) -> bytes:
    if rng.random() < 0.5 and len(data) > 8:
        out = bytearray(data)
        for _ in range(rng.randrange(1, 4)):
            form = rng.choice(("<H", ">H", "<I", ">I"))
            value = rng.choice(_SIZES) & ((1 << 8 * struct.calcsize(form)) - 1)
            struct.pack_into(form, out, rng.randrange(len(out) - 4), value)
        return bytes(out)
    return mutations.mutate_bytes(data, rng)


def one(data: bytes, folder: Path) -> None:
    path = folder / "clip.mp4"
    path.write_bytes(data)
    other = folder / "clip"
    other.write_bytes(data)
    is_video(other)
    sum(1 for _ in picture_sizes([path]))
    video_rate(path)
    for picture in video_frames(path):
        picture.read()
