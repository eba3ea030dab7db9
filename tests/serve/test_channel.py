"""What the processes of one server say to each other."""

from __future__ import annotations

import asyncio
import socket
from typing import Any

import pytest

from gfldeploy.errors import BundleError, ServerError
from gfldeploy.serve.channel import Channel


def test_news_and_questions_both_ways() -> None:
    heard: list[Any] = []

    async def note(text: Any) -> None:
        heard.append(text)

    async def double(number: Any) -> Any:
        await asyncio.sleep(0)
        return 2 * number

    async def fail(_: Any) -> Any:
        raise BundleError("it is damaged", "Copy it again.")

    async def err(_: Any) -> Any:
        raise MemoryError("no room")

    async def run() -> None:
        one, other = socket.socketpair()
        with one, other:
            parent = Channel(one, {"note": note, "double": double})
            child = Channel(other, {"double": double, "fail": fail, "err": err})
            child.tell("note", "before anybody listens")
            tasks = [asyncio.create_task(end.run()) for end in (parent, child)]
            while not heard:
                await asyncio.sleep(0.001)
            await asyncio.to_thread(child.tell, "note", "\u4e2d\n")
            assert await asyncio.gather(*(parent.ask("double", n) for n in range(9))) == [2 * n for n in range(9)]
            assert await child.ask("double", "x" * 1_000_000) == "x" * 2_000_000
            with pytest.raises(BundleError, match="damaged") as raised:
                await parent.ask("fail")
            assert raised.value.remedy == "Copy it again."
            with pytest.raises(ServerError, match="failed: no room"):  # else whoever asks waits for ever
                await parent.ask("err")
            assert heard == ["before anybody listens", "\u4e2d\n"]
            tasks[1].cancel()
            await asyncio.wait(tasks)
            with pytest.raises(ServerError):
                await parent.ask("double", 1)

    asyncio.run(asyncio.wait_for(run(), 60))


def test_a_question_to_a_process_that_ends_is_answered() -> None:
    async def hang(_: Any) -> Any:
        await asyncio.Event().wait()

    async def run() -> None:
        one, other = socket.socketpair()
        with one, other:
            parent, child = Channel(one, {}), Channel(other, {"hang": hang})
            tasks = [asyncio.create_task(end.run()) for end in (parent, child)]
            await asyncio.sleep(0.01)
            asked = asyncio.create_task(parent.ask("hang"))
            await asyncio.sleep(0.01)
            tasks[1].cancel()
            with pytest.raises(ServerError, match="has ended"):
                await asked

    asyncio.run(asyncio.wait_for(run(), 60))
