"""Serves the pages of a command to browsers: on this machine only, or to whoever holds the token."""

import argparse
import hmac
import ipaddress
import secrets
import socket
import sys
from collections.abc import Sequence
from http.cookies import SimpleCookie

import uvicorn
from starlette.datastructures import QueryParams
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.responses import PlainTextResponse, RedirectResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from controlbooth.data.errors import UserError

TOKEN = "token"
"""The name of the query parameter and of the cookie that carry the token."""
LOOPBACK = ("localhost", "127.0.0.1", "[::1]")
"""What a browser on this machine, or at the other end of an SSH tunnel, calls it."""
TOKEN_BYTES = 16
WITHOUT_ACCESS = "This page needs the address that the command printed, with its token.\n"


def add_options(parser: argparse.ArgumentParser, port: int) -> None:
    """Adds --host and --port, whose default is `port`, to a verb's command line."""
    parser.add_argument(
        "--host",
        default="127.0.0.1",
        metavar="ADDRESS",
        help="where to listen; anything but this machine itself asks for a token (default: 127.0.0.1, this machine)",
    )
    parser.add_argument("--port", type=int, default=port, metavar="N", help=f"0 takes a free one (default: {port})")


def middleware(host: str, token: str | None) -> list[Middleware]:
    """Returns what stands before an application: names of this machine only on loopback, and the token elsewhere.

    The check of names keeps a page of the internet from reading ours through a name that it points at 127.0.0.1.
    """
    if token is not None:
        return [Middleware(TokenRequired, token=token)]
    return [Middleware(TrustedHostMiddleware, allowed_hosts=[host, *LOOPBACK])]


def token_for(host: str) -> str | None:
    """Returns a new token, or None for an address that only this machine reaches."""
    if host in LOOPBACK:
        return None
    try:
        return None if ipaddress.ip_address(host).is_loopback else secrets.token_urlsafe(TOKEN_BYTES)
    except ValueError:
        return secrets.token_urlsafe(TOKEN_BYTES)


class TokenRequired:
    """Lets a request through that has the token in its address, which becomes a cookie, or in that cookie."""

    def __init__(self, app: ASGIApp, token: str):
        self.app = app
        self.token = token

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        headers = {name: value for name, value in scope["headers"]}
        cookie = SimpleCookie(headers.get(b"cookie", b"").decode("latin-1")).get(TOKEN)
        if cookie is not None and self._is_right(cookie.value):
            return await self.app(scope, receive, send)
        query = QueryParams(scope["query_string"])
        if not self._is_right(query.get(TOKEN, "")):
            return await PlainTextResponse(WITHOUT_ACCESS, status_code=403)(scope, receive, send)
        # The token leaves the address, so that it is in no bookmark, no screenshot and no Referer header.
        rest = str(QueryParams([(name, value) for name, value in query.multi_items() if name != TOKEN]))
        response = RedirectResponse(scope["path"] + (f"?{rest}" if rest else ""), status_code=303)
        response.set_cookie(TOKEN, self.token, httponly=True, samesite="strict")
        await response(scope, receive, send)

    def _is_right(self, given: str) -> bool:
        return hmac.compare_digest(given.encode(), self.token.encode())


def serve(app: ASGIApp, host: str, port: int, token: str | None, pages: Sequence[str] = ("/",)) -> None:
    """Serves an application until Ctrl-C or SIGTERM, and prints the address of each of its `pages` first.

    Raises a UserError where the address is not of this machine or the port is taken.
    """
    listening = _listen(host, port)
    port = listening.getsockname()[1]
    for page in pages:
        print(address(host, port, token, page), flush=True)
    if token is None:
        print(
            f"From another computer: ssh -N -L {port}:localhost:{port} THIS-MACHINE, then http://localhost:{port}/",
            flush=True,
        )
    print("Ctrl-C ends it.", file=sys.stderr, flush=True)
    configuration = uvicorn.Config(
        app, log_level="warning", access_log=False, lifespan="on", timeout_graceful_shutdown=3
    )
    try:
        uvicorn.Server(configuration).run(sockets=[listening])
    except KeyboardInterrupt:
        pass  # how a server that a person watches is ended


def address(host: str, port: int, token: str | None, page: str = "/") -> str:
    """Returns what to open in a browser."""
    shown = socket.gethostname() if host in ("0.0.0.0", "::") else f"[{host}]" if ":" in host else host
    between = "&" if "?" in page else "?"
    return f"http://{shown}:{port}{page}" + (f"{between}{TOKEN}={token}" if token else "")


def _listen(host: str, port: int) -> socket.socket:
    if not 0 <= port < 2**16:
        raise UserError(f"--port {port}: a port is a number from 0, which takes a free one, to 65535")
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, _, _, _, where = found[0]
        return socket.create_server(where[:2], family=family, backlog=1024)
    except (OSError, OverflowError) as error:
        raise UserError(
            f"cannot listen on {host}, port {port}: {error}. --port 0 takes a free port, and --host an address of "
            "this machine"
        ) from None
