"""What every request passes before the application: whose it is, how large it is; and the headers of every answer.

A page of another site can make a browser send requests to this machine. So the Host header must name this server (a
foreign name can be made to lead here), and an Origin header must be the server's own. Otherwise the answer is 403.
"""

import ipaddress
from collections.abc import Iterable
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

MOST_BYTES = 1 << 20  # of a request's body
LOOPBACK = ("localhost", "127.0.0.1", "::1")
ALL_ADDRESSES = ("0.0.0.0", "::")  # noqa: S104  compared with, not listened on

HEADERS = {
    # Scripts and styles are files of this server; nothing is loaded from elsewhere, framed, or written into the page.
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-store",
}


class Guard:
    """An ASGI application around `app`.

    `host` is what the server listens on. Loopback names, `host` and `allowed` are accepted as Host; if the server
    listens on all addresses, so is any numeric address, which no foreign site can claim as its name.
    """

    def __init__(self, app: ASGIApp, host: str, allowed: Iterable[str] = ()) -> None:
        self.app = app
        self._hosts = {name.lower() for name in (*LOOPBACK, host, *allowed)}
        self._any_address = host in ALL_ADDRESSES

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer 403 or 413, or pass the request on."""
        received = 0

        async def receive_limited() -> Message:
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            if received > MOST_BYTES:
                raise HTTPException(413, _too_large())
            return message

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(HEADERS)
            await send(message)

        refusal = self._refusal(Headers(scope=scope))
        if refusal is not None:
            status, detail = refusal
            await JSONResponse({"detail": detail}, status)(scope, receive, send_with_headers)
        else:
            await self.app(scope, receive_limited, send_with_headers)

    def _refusal(self, headers: Headers) -> tuple[int, str] | None:
        hosts, origins = headers.getlist("host"), headers.getlist("origin")
        if len(hosts) != 1 or not self._is_ours(hosts[0]):
            return 403, "Host: not a name of this server; `retro serve --allow-host NAME` accepts it"
        if any(_netloc(origin) != hosts[0].lower() for origin in origins):
            return 403, "Origin: requests of another site are refused"
        length = headers.get("content-length", "0")
        if not length.isdecimal() or int(length) > MOST_BYTES:
            return 413, _too_large()
        return None

    def _is_ours(self, header: str) -> bool:
        try:
            name = urlsplit(f"//{header}").hostname
        except ValueError:
            return False
        if name is None or "@" in header:
            return False
        return name in self._hosts or (self._any_address and _is_address(name))


def _netloc(origin: str) -> str | None:
    """The host and port of an http or https origin; None for any other text."""
    try:
        parts = urlsplit(origin)
    except ValueError:
        return None
    return parts.netloc.lower() if parts.scheme in ("http", "https") else None


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def _too_large() -> str:
    return f"body: expected at most {MOST_BYTES} bytes"
