"""A server that answers as a test says, whatever HTTP thinks of it: on a real socket, in a thread of its own."""

from __future__ import annotations

import asyncio
import json
import ssl
import threading
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Self

MODEL = {
    "bundle": {"name": "tiny", "directory": "tiny_dir", "digest": "ab" * 32},
    "engine": "openvino",
    "engine_version": "1.2.3",
    "precision": "int8",
    "device": "cpu",
    "tf32": False,
    "threads": 1,
    "streams": 2,
    "input_size": None,
    "batch_size": 4,
    "load_s": 0.5,
    "classes": ["box", "ball"],
}


@dataclass(frozen=True)
class Asked:
    """A request: `number` counts those to detect, from 0, and `use` those on its connection."""

    line: str
    headers: dict[str, str]
    body: bytes
    number: int
    use: int


# What is sent back as it is; None closes the connection.
Script = Callable[[Asked], Awaitable[bytes | None]]


def reply(status: int = 200, content: object = None, *headers: str) -> bytes:
    body = json.dumps({"images": []} if content is None else content).encode()
    lines = [f"HTTP/1.1 {status} X", f"content-length: {len(body)}", *headers]
    return "\r\n".join([*lines, "", ""]).encode() + body


def error(status: int, code: str) -> bytes:
    return reply(status, {"error": {"code": code, "message": f"it is {code}", "remedy": "None."}})


async def answer(asked: Asked) -> bytes | None:
    return reply()


class ScriptedServer:
    """A context manager. `script` answers what is to be detected, `model` is the answer to /v1/model."""

    def __init__(self, script: Script = answer, model: bytes | None = None, tls: ssl.SSLContext | None = None) -> None:
        self.asked: list[Asked] = []
        self._script, self._model, self._tls = script, reply(200, MODEL) if model is None else model, tls
        self._loop = asyncio.new_event_loop()
        self._ready, self._stop = threading.Event(), asyncio.Event()
        self._thread = threading.Thread(target=lambda: self._loop.run_until_complete(self._serve()))

    def __enter__(self) -> Self:
        self._thread.start()
        self._ready.wait()
        return self

    def __exit__(self, *_: object) -> None:
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join()
        self._loop.close()

    @property
    def url(self) -> str:
        return f"http{'s' if self._tls else ''}://127.0.0.1:{self.port}"

    async def _serve(self) -> None:
        server = await asyncio.start_server(self._talk, "127.0.0.1", 0, ssl=self._tls)
        self.port = server.sockets[0].getsockname()[1]
        self._ready.set()
        await self._stop.wait()
        server.close()
        for task in asyncio.all_tasks() - {asyncio.current_task()}:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    async def _talk(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        use = 0
        try:
            while header := await reader.readuntil(b"\r\n\r\n"):
                line, *lines = header.decode().rstrip().split("\r\n")
                headers = {name.lower(): value for name, value in (one.split(": ", 1) for one in lines)}
                body = await reader.readexactly(int(headers.get("content-length", 0)))
                use += 1
                if line.startswith("GET"):
                    writer.write(self._model)
                    continue
                asked = Asked(line, headers, body, len(self.asked), use)
                self.asked.append(asked)
                if (sent := await self._script(asked)) is None:
                    break
                writer.write(sent)
        except (asyncio.IncompleteReadError, asyncio.CancelledError, ConnectionError):
            pass
        finally:
            writer.close()
