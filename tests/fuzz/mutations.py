"""Inputs from other inputs: of bytes, of values as JSON and YAML hold them, and of protobuf messages."""

from __future__ import annotations

import json
import random
from typing import Any

__all__ = ["mutate", "mutate_bytes", "mutate_message", "mutate_value"]

# What readers stumble over: numbers at limits, text that is no text, and values of the wrong kind.
ODD_NUMBERS = (
    *(0, -1, 1, 2, 7, -(2**31), 2**31 - 1, 2**31, 2**32, 2**53, 2**63 - 1, -(2**63), 2**64, 10**9, 10**400),
    *(0.0, -0.0, 0.5, -0.5, 1e-320, 1e308, -1e308, float("inf"), float("-inf"), float("nan")),
)
ODD_TEXT = (
    *("", " ", "\0", "a\0b", "\x1b]0;title\x07\x1b[31m", "\x9b31m", "\u202e", "\ud800", "\udcff", "\u2028", "\r\n"),
    *("x" * 5000, ".", "..", "../../etc/passwd", "/etc/passwd", "~root", "/dev/zero", "http://127.0.0.1:1/x", "=1+1"),
    *("nan", "1e999", "0x10", "null", "[/bold]", "{0}", "%s%n", "<script>", "é中\U0001f600", "__import__('os')"),
)
ODD_VALUES: tuple[Any, ...] = (None, True, False, [], {}, [[]], [None], {"": None}, [1, 2], {"a": 1})
ODD_BYTES = (b"", b"\0", b"\xff", b"\x7f" * 4, b"\xff" * 8, b"\x80" * 10, b"[" * 3000, b"{" * 3000, b"\n", b"&a *a")


def mutate(data: bytes, rng: random.Random) -> bytes:
    """Another input: by structure where `data` is JSON, mostly, else by bytes."""
    if rng.random() < 0.85:
        try:
            value = json.loads(data)
        except (ValueError, RecursionError):
            return mutate_bytes(data, rng)
        try:
            return json.dumps(mutate_value(value, rng)).encode("utf-8", "surrogatepass")
        except (ValueError, RecursionError):  # a number of more digits than Python writes
            return data
    return mutate_bytes(data, rng)


def mutate_bytes(data: bytes, rng: random.Random) -> bytes:
    """`data` with up to eight changes: bits, bytes, runs cut, doubled, moved or replaced."""
    out = bytearray(data)
    for _ in range(1 << rng.randrange(4)):
        at = rng.randrange(len(out) + 1)
        length = min(len(out) - at, 1 << rng.randrange(12))
        match rng.randrange(7):
            case 0 if at < len(out):
                out[at] ^= 1 << rng.randrange(8)
            case 1 if at < len(out):
                out[at] = rng.choice((0, 1, 0x7F, 0x80, 0xFF, rng.randrange(256)))
            case 2:
                del out[at : at + length]
            case 3:
                out[at:at] = out[at : at + length] * rng.choice((1, 1, 2, 50))
            case 4:
                out[at:at] = rng.choice(ODD_BYTES)
            case 5:
                start = rng.randrange(len(out) + 1)
                out[at : at + length] = out[start : start + length]
            case _:
                out = out[:at] if rng.random() < 0.1 else out
    return bytes(out)


def mutate_value(value: Any, rng: random.Random) -> Any:
    """A copy of a JSON-like value, with one to four changes anywhere in it."""
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        places = list(_places(value, ()))
        value = _replaced(value, rng.choice(places), places, rng)
    return value


def _places(value: Any, path: tuple[Any, ...], most: int = 5000) -> Any:
    stack = [(path, value)]
    while stack and most:
        path, value = stack.pop()
        most -= 1
        yield path
        if isinstance(value, dict):
            stack += [((*path, key), item) for key, item in value.items()]
        elif isinstance(value, list):
            stack += [((*path, index), item) for index, item in enumerate(value)]


def _at(value: Any, path: tuple[Any, ...]) -> Any:
    for step in path:
        value = value[step]
    return value


def _replaced(value: Any, path: tuple[Any, ...], places: list[tuple[Any, ...]], rng: random.Random) -> Any:
    old = _at(value, path)
    new = _changed(old, lambda: _at(value, rng.choice(places)), rng)
    for depth in range(len(path) - 1, -1, -1):
        holder = _at(value, path[:depth])
        holder = dict(holder) if isinstance(holder, dict) else list(holder)
        holder[path[depth]] = new
        new = holder
    return new


def _changed(old: Any, another: Any, rng: random.Random) -> Any:
    choice = rng.random()
    if choice < 0.15:
        return rng.choice(ODD_VALUES)
    if choice < 0.25:
        return another()
    if choice < 0.28:
        for _ in range(rng.choice((10, 100, 900, 5000))):
            old = [old] if rng.random() < 0.5 else {"a": old}
        return old
    if isinstance(old, dict) and old and choice < 0.9:
        key = rng.choice(list(old))
        match rng.randrange(4):
            case 0:
                return {name: item for name, item in old.items() if name != key}
            case 1:
                return old | {rng.choice(ODD_TEXT): another()}
            case 2:
                return {rng.choice(ODD_TEXT) if name == key else name: item for name, item in old.items()}
            case _:
                return old | {key: rng.choice((*ODD_NUMBERS, *ODD_TEXT, *ODD_VALUES))}
    if isinstance(old, list) and choice < 0.9:
        at = rng.randrange(len(old) + 1)
        match rng.randrange(4):
            case 0:
                return old[:at]
            case 1:
                return [*old[:at], rng.choice((*ODD_NUMBERS, *ODD_TEXT, *ODD_VALUES)), *old[at:]]
            case 2:
                return old * rng.choice((2, 3, 100)) if len(old) < 1000 else old
            case _:
                return [*old[:at], *old[at + 1 :]]
    if isinstance(old, str) and choice < 0.6 and old:
        at = rng.randrange(len(old))
        return old[:at] + rng.choice(ODD_TEXT) + old[at + rng.randrange(2) :]
    if isinstance(old, int | float) and choice < 0.6:
        return rng.choice((-old, old * 2, old + 1, old - 1, str(old)))
    return rng.choice(ODD_TEXT) if rng.random() < 0.4 else rng.choice(ODD_NUMBERS)


def mutate_message(message: Any, rng: random.Random) -> bytes:
    """The bytes of a protobuf message after one to four changes of fields anywhere in it; at times of bytes, too."""
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        _change_message(message, rng)
    data = message.SerializeToString()
    return mutate_bytes(data, rng) if rng.random() < 0.1 else data


def _change_message(message: Any, rng: random.Random) -> None:
    """Walk down set fields at random, and change the one where the walk ends."""
    while True:
        fields = message.DESCRIPTOR.fields if rng.random() < 0.1 else [field for field, _ in message.ListFields()]
        if not fields:
            fields = message.DESCRIPTOR.fields
        field = rng.choice(list(fields))
        value = getattr(message, field.name)
        repeated = hasattr(value, "__len__") and not isinstance(value, str | bytes)
        if repeated and field.message_type is not None and len(value):
            at = rng.randrange(len(value))
            if rng.random() < 0.8:
                message = value[at]
                continue
            match rng.randrange(3):
                case 0:
                    del value[at]
                case 1:
                    value.add().CopyFrom(value[at])
                case _:
                    value[at].CopyFrom(value[rng.randrange(len(value))])
            return
        if field.message_type is not None and not repeated:
            if rng.random() < 0.1:
                message.ClearField(field.name)
                return
            message = value
            continue
        if field.message_type is not None:
            value.add()
            return
        if not repeated:
            try:
                setattr(message, field.name, _scalar(value, field, rng))
            except (ValueError, TypeError, UnicodeError):
                message.ClearField(field.name)
            return
        try:
            if len(value) and rng.random() < 0.7:
                at = rng.randrange(len(value))
                value[at] = _scalar(value[at], field, rng)
            elif len(value) and rng.random() < 0.5:
                del value[rng.randrange(len(value)) :]
            else:
                value.append(_scalar(value[0] if len(value) else field.default_value or 0, field, rng))
        except (ValueError, TypeError, UnicodeError):
            message.ClearField(field.name)
        return


def _scalar(old: Any, field: Any, rng: random.Random) -> Any:
    if field.enum_type is not None:
        return rng.choice([value.number for value in field.enum_type.values])
    if isinstance(old, bool):
        return not old
    if isinstance(old, bytes):
        return mutate_bytes(old[:100000], rng)
    if isinstance(old, str):
        return rng.choice([text for text in ODD_TEXT if text.isprintable()] + [old + "x", old[1:]])
    if isinstance(old, float):
        return float(rng.choice([number for number in ODD_NUMBERS if abs(number) < 1e300 or number != number]))
    return rng.choice([n for n in ODD_NUMBERS if isinstance(n, int) and abs(n) <= 2**63] + [old + 1, -old, old * 1000])
