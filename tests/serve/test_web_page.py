"""The page at `/`: its own files, nothing from elsewhere."""

from __future__ import annotations

import asyncio
import re
from html.parser import HTMLParser

import httpx
import pytest
from starlette.applications import Starlette

from gfldeploy.serve.web_page import PAGE_PATHS, page_routes


@pytest.fixture(scope="module")
def files() -> dict[str, httpx.Response]:
    """The answers, by path."""

    async def load() -> dict[str, httpx.Response]:
        transport = httpx.ASGITransport(Starlette(routes=list(page_routes())))
        async with httpx.AsyncClient(transport=transport, base_url="http://here") as client:
            return {path: await client.get(path) for path in PAGE_PATHS}

    return asyncio.run(load())


class _Elements(HTMLParser):
    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))


def test_every_file_is_there_under_a_strict_policy(files: dict[str, httpx.Response]) -> None:
    for path in PAGE_PATHS:
        answer = files[path]
        assert answer.status_code == 200
        policy = answer.headers["content-security-policy"]
        assert "default-src 'none'" in policy
        assert "unsafe" not in policy
        assert "*" not in policy


def test_nothing_is_loaded_from_elsewhere_and_nothing_is_inline(files: dict[str, httpx.Response]) -> None:
    elements = _Elements(files["/"].text).found
    for tag, attributes in elements:
        assert "style" not in attributes
        assert not [name for name in attributes if name.startswith("on")]
        assert tag != "style"
        assert tag != "script" or attributes["src"]
        for name in ("src", "href"):
            value = attributes.get(name)
            assert value is None or not re.match(r"(?!data:)\w+:|//", value)
    for path in PAGE_PATHS:
        addresses = set(re.findall(r"https?://[^\s\"'`)]+", files[path].text))
        assert addresses <= {"http://www.w3.org/2000/svg"}  # the name of a kind of document, which nothing loads


def test_every_control_has_a_name(files: dict[str, httpx.Response]) -> None:
    elements = _Elements(files["/"].text).found
    labelled = {attributes.get("for") for tag, attributes in elements if tag == "label"}
    for tag, attributes in elements:
        if tag == "input":
            assert attributes["id"] in labelled
        if tag == "img":
            assert "alt" in attributes
    assert ("html", {"lang": "en"}) in elements


def test_every_element_that_the_script_uses_is_on_the_page(files: dict[str, httpx.Response]) -> None:
    identities = {attributes.get("id") for _, attributes in _Elements(files["/"].text).found}
    used = set(re.findall(r'\bat\("([\w-]+)"\)', files["/page.js"].text))
    assert used
    assert used <= identities
