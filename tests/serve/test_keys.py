"""The file of keys, and who gets in with them."""

from __future__ import annotations

import os
from pathlib import Path

import httpx
import pytest
from served import talk
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.routing import Route
from starlette.types import ASGIApp

from gfldeploy.errors import DataError
from gfldeploy.serve.keys import KeyGuard, Keys

KEY, SECOND = "0123456789abcdef0123", "c2Vjb25kLWtleS1vZi10aGUtZmlsZQ=="


def key_file(folder: Path, content: str | bytes, mode: int = 0o600) -> Path:
    path = folder / "keys"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    path.chmod(mode)
    return path


@pytest.fixture
def keys(tmp_path: Path) -> Keys:
    return Keys(key_file(tmp_path, f"# of the camera\n{KEY}\n\n  {SECOND}  \r\n"))


def guarded(keys: Keys) -> ASGIApp:
    async def answer(request: Request) -> PlainTextResponse:
        return PlainTextResponse("in")

    app = Starlette(routes=[Route("/health/live", answer), Route("/work", answer, methods=["POST"])])
    return KeyGuard(app, keys, ["/health/live"])


def ask(keys: Keys, headers: dict[str, str], path: str = "/work", method: str = "POST") -> httpx.Response:
    given = [(name.encode(), value.encode("latin-1")) for name, value in headers.items()]

    async def work(client: httpx.AsyncClient) -> httpx.Response:
        return await client.request(method, path, headers=given)

    return talk(guarded(keys), work)


@pytest.mark.parametrize("key", [KEY, SECOND])
def test_a_key_opens(keys: Keys, key: str) -> None:
    for headers in ({"Authorization": f"Bearer {key}"}, {"authorization": f"bearer  {key}"}, {"X-API-Key": key}):
        assert ask(keys, headers).text == "in"


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"Authorization": "Bearer"},
        {"Authorization": f"Basic {KEY}"},
        {"Authorization": KEY},
        {"X-API-Key": ""},
        {"X-API-Key": KEY[:-1]},
        {"X-API-Key": f"{KEY}0"},
        {"X-API-Key": "# of the camera"},
        {"X-API-Key": "\xff" * 10_000},
    ],
)
def test_nothing_else_does(keys: Keys, headers: dict[str, str]) -> None:
    for path in ("/work", "/absent", "/health/live/", "//health/live", "/health/live%2f..%2fwork"):
        answer = ask(keys, headers, path)
        assert answer.status_code == 401 and answer.headers["WWW-Authenticate"] == "Bearer"
        assert answer.json()["error"]["code"] == "unauthorized" and "X-API-Key" in answer.json()["error"]["remedy"]
    assert ask(keys, headers, "/health/live", "GET").text == "in"


def test_keys_are_replaced_at_once(keys: Keys, tmp_path: Path) -> None:
    other = "another-key-of-32-characters-000"
    keys.replace(Keys(key_file(tmp_path, other)))
    assert ask(keys, {"X-API-Key": KEY}).status_code == 401
    assert ask(keys, {"X-API-Key": other}).status_code == 200


def test_keys_are_not_kept(keys: Keys) -> None:
    assert KEY not in str(vars(keys)) and KEY.encode() not in str(vars(keys)).encode()


@pytest.mark.parametrize(
    ("content", "mode", "problem"),
    [
        ("", 0o600, "has no key"),
        ("\n# none\n", 0o600, "has no key"),
        (KEY, 0o644, "others may read or change it (mode 0644)"),
        (KEY, 0o660, "others may read or change it (mode 0660)"),
        (f"{KEY}\nshort\n", 0o600, "line 2 of"),
        (f"{KEY} {SECOND}", 0o600, "line 1 of"),
        (b"\xff\xfe" + KEY.encode("utf-16-le"), 0o600, "line 1 of"),
        (f"{KEY}\n" * 60_000, 0o600, "has more than 1,048,576 bytes"),
    ],
)
def test_a_file_that_protects_nothing_is_refused(tmp_path: Path, content: str | bytes, mode: int, problem: str) -> None:
    path = key_file(tmp_path, content, mode)
    with pytest.raises(DataError) as raised:
        Keys(path)
    assert problem in raised.value.problem and str(path) in str(raised.value)
    assert raised.value.remedy and KEY not in str(raised.value) and "short" not in str(raised.value)


def test_a_group_may_read_it(tmp_path: Path) -> None:
    assert Keys(key_file(tmp_path, KEY, 0o640)).accept([KEY.encode()])


def test_what_is_no_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="No such file"):
        Keys(tmp_path / "absent")
    with pytest.raises(DataError, match="Is a directory"):
        Keys(tmp_path)
    os.mkfifo(tmp_path / "fifo", 0o600)
    with pytest.raises(DataError, match="is no regular file"):
        Keys(tmp_path / "fifo")
