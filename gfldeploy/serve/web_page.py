"""The page at `/`: a picture in, boxes out, and the server's counters. Files of the package; nothing from elsewhere."""

from __future__ import annotations

from importlib import resources

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

_FILES = {
    "/": ("page.html", "text/html"),
    "/page.css": ("page.css", "text/css"),
    "/page.js": ("page.js", "text/javascript"),
}
PAGE_PATHS = tuple(_FILES)
_HEADERS = {
    # Its own files, the picture that was chosen, and its own server.
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob: data:; "
    "connect-src 'self'; form-action 'none'; base-uri 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}


def page_routes() -> list[Route]:
    """The page and what it loads."""
    folder = resources.files("gfldeploy.serve") / "page"
    contents = {path: (folder / name).read_bytes() for path, (name, _) in _FILES.items()}

    async def page(request: Request) -> Response:
        path = request.url.path
        return Response(contents[path], headers=_HEADERS, media_type=_FILES[path][1])

    return [Route(path, page) for path in _FILES]
