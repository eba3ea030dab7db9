"""Text from elsewhere on a terminal: control characters are shown, not obeyed.

Class names, file names and error messages come from files of other people. An escape sequence in them could retitle the
window, or hide or forge lines; direction marks reverse text. Streams are wrapped once, in `main`, for all commands.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TextIO

from gfldeploy.text import printable

if TYPE_CHECKING:
    from rich.console import Console, ConsoleRenderable
    from rich.segment import Segment


class _Escaping:
    """A text stream whose `write` escapes; everything else is the stream's own, its `buffer` for exact bytes too."""

    def __init__(self, stream: TextIO) -> None:
        self.unescaped = stream

    def write(self, text: str) -> int:
        self.unescaped.write(printable(text))
        return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.unescaped, name)


@contextmanager
def plain_streams() -> Iterator[None]:
    """Have `sys.stdout` and `sys.stderr` escape what is written to them while the block lasts."""
    before = sys.stdout, sys.stderr
    wrapped: Any = tuple(_Escaping(stream) for stream in before)
    sys.stdout, sys.stderr = wrapped
    try:
        yield
    finally:
        for name, ours, theirs in zip(("stdout", "stderr"), wrapped, before, strict=True):
            if getattr(sys, name) is ours:
                setattr(sys, name, theirs)


def escaping_console(stderr: bool = False, width: int | None = None) -> Console:
    """A rich console that writes its own colours and bars as they are, and escapes the text in them."""
    from rich.console import Console, RenderHook
    from rich.segment import Segment as RichSegment

    class _Escaped:
        def __init__(self, inner: ConsoleRenderable) -> None:
            self._inner = inner

        def __rich_console__(self, console: Console, options: Any) -> Iterator[Segment]:
            for segment in console.render(self._inner, options):
                if segment.control:
                    yield segment
                else:
                    yield RichSegment(printable(segment.text), segment.style)

    class _Hook(RenderHook):
        def process_renderables(self, renderables: list[ConsoleRenderable]) -> list[ConsoleRenderable]:
            return [_Escaped(one) for one in renderables]

    stream: Any = sys.stderr if stderr else sys.stdout
    console = Console(file=getattr(stream, "unescaped", stream), width=width, highlight=False)
    console.push_render_hook(_Hook())
    return console
