"""Refuse requests of browsers: a page that somebody opens on the server's machine must not control the engine.

The server of vLLM has no password for most of its addresses. Without this a page could pause the engine or replace its
weights with a plain form: what CORS forbids is only to read the answer.
"""

from collections.abc import Awaitable, Callable
from typing import Any

_OF_BROWSERS = (b"origin", b"sec-fetch-site")
"""Headers that say from which page a request comes: browsers send one of them, trainers neither."""


class BrowserGuard:
    """An ASGI application in front of another, https://asgi.readthedocs.io/en/latest/specs/www.html."""

    def __init__(self, app: Callable[..., Awaitable[None]]):
        self._app = app

    async def __call__(self, scope: dict[str, Any], receive: Any, send: Callable[..., Awaitable[None]]) -> None:
        """Answer a request or a connection, unless it comes from a browser."""
        if not any(name in _OF_BROWSERS for name, _ in scope.get("headers", ())):
            await self._app(scope, receive, send)
        elif scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
        else:
            await send({"type": "http.response.start", "status": 403, "headers": [(b"content-type", b"text/plain")]})
            await send({"type": "http.response.body", "body": b"this server answers no browser\n"})
