"""A part of a prediction, from another machine: merged, or refused."""

from __future__ import annotations

import base64
import hashlib
import json
import random
import struct
from collections.abc import Iterable
from pathlib import Path

import mutations

from gfldeploy.predict.parts import merge_parts
from gfldeploy.predict.session import NOTE, PART, RECORDS

_QUESTION = {
    "bundle": "ab" * 32,
    "batch_size": 2,
    "threshold": 0.5,
    "detection": {"class_thresholds": {"ball": 0.25}, "classes": ["0", "ball"], "keep_top_k": 3},
    "draw_threshold": None,
    "inputs": "cd" * 32,
    "part": "1/1",
    "processor": "cpu",
    "software": {"numpy": "2"},
}
_BOX = base64.b64encode(struct.pack("<5fi", 1.5, 2.0, 31.5, 42.25, 0.75, 1)).decode()


def seeds() -> Iterable[bytes]:
    """The note in a line, then the records; one of annotations, and one without images' own ids."""
    found = {"index": 0, "file": "a.jpg", "size": [48, 64], "detections": _BOX, "may_lack_below": 0.25}
    failed = {"index": 1, "file": "b.jpg", "error": "it is empty", "remedy": None}
    records = [
        {"form": 2, **_QUESTION},
        {"shard": 0, "bad": {"1": "it ends its worker"}},
        {"shard": 0, "batch": 0, "batches": [[found, failed]]},
        {"shard": 0, "end": 2, "processor": "cpu"},
    ]
    about = {"images": 2, "listed": 2, "classes": ["box", "ball"], "records": ""}
    for ids in ({"ids": None, "categories": None}, {"ids": [7, "x"], "categories": [1, None]}):
        lines = [{"what": PART, **_QUESTION, **about, **ids}, *records]
        yield "".join(f"{json.dumps(one)}\n" for one in lines).encode()


def mutate(data: bytes, rng: random.Random) -> bytes:
    """One line is damaged."""
    lines = data.split(b"\n")
    place = rng.randrange(len(lines))
    lines[place] = mutations.mutate(lines[place], rng)
    return b"\n".join(lines)


def one(data: bytes, folder: Path) -> None:
    """Merge it; the digest in the note is made right, or nothing behind it would ever be read."""
    note, _, records = data.partition(b"\n")
    part = folder / "part"
    part.mkdir()
    (part / NOTE).write_bytes(note.replace(b'"records": ""', b'"records": "%s"' % _digest(records)))
    (part / RECORDS).write_bytes(records)
    merge_parts(part, output=folder / "found")


def _digest(data: bytes) -> bytes:
    return hashlib.sha256(data).hexdigest().encode()
