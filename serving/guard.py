"""What every request passes first: who asks, from where, how much and how slowly; and a line in the access log."""

from __future__ import annotations

import asyncio
import json
import logging
import socket
import time
from collections.abc import Callable
from http.client import responses
from typing import Any
from urllib.parse import urlsplit

from uvicorn.protocols.http.h11_impl import H11Protocol

from . import metrics
from .errors import BadRequest, Forbidden, NoKey, ServingError, TooLarge, TooSlow, Unavailable
from .settings import Keys, ServerSettings

LOG = logging.getLogger("video_ma2mba.serving")
_DRAINED = 2**26  # bytes of a refused request that are still taken, so that its sender can hear the answer
_DRAIN_SECONDS = 10.0
_HEADER_SECONDS = 20.0
_METHODS = ("GET", "POST", "DELETE", "OPTIONS", "HEAD", "PUT", "PATCH")
LOOPBACK = ("127.0.0.1", "localhost", "::1")


class Guard:
    """The application behind it is asked only what may be asked.

    Args:
        app: the application, of ASGI. closing: whether the server stops.
        hosts: names by which it may be called; empty: any. A page from elsewhere that had its own name lead here
            (DNS rebinding) calls it by that.
    """

    def __init__(self, app: Any, settings: ServerSettings, keys: Keys, closing: Callable[[], bool]):
        self.app, self.settings, self.keys, self.closing = app, settings, keys, closing
        self.open = 0

    async def __call__(self, scope: dict[str, Any], receive: Any, send: Any) -> None:
        """Of ASGI."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        began = time.monotonic()
        talk = _Talk(scope, receive, send, self.settings)
        scope.setdefault("state", {})["owner"] = ""
        self.open += 1
        try:
            try:
                scope["state"]["owner"] = self._admit(scope)
                talk.most = self._most_bytes(scope)
                talk.check_length()
                await self.app(scope, talk.receive, talk.send)
            except ServingError as error:
                await talk.answer(error)
        except _Gone:
            pass
        finally:
            self.open -= 1
            self._note(scope, talk, time.monotonic() - began)

    def _admit(self, scope: dict[str, Any]) -> str:
        """Whose request it is. Raises ServingError."""
        headers = {name.lower(): value.decode("latin-1") for name, value in scope["headers"]}
        if self.settings.hosts:
            host = urlsplit(f"//{headers.get(b'host', '')}").hostname or ""
            if host not in self.settings.hosts:
                raise Forbidden(f"this server is not called {host[:100]!r}")
        origin = headers.get(b"origin", "")
        own = not origin or urlsplit(origin).netloc == headers.get(b"host")
        if not own and not {origin, "*"} & {*self.settings.allow_origins}:
            raise Forbidden(f"pages of {origin[:100]} may not use this server: allow them with --allow-origin")
        path = scope["path"]
        public = path in ("/health", "/metrics") or scope["method"] == "OPTIONS"
        owner = ""
        if self.keys.needed and not public:
            kind, _, key = headers.get(b"authorization", "").partition(" ")
            if kind.lower() != "bearer" or not key.strip():
                raise NoKey("this server needs a key: send Authorization: Bearer KEY")
            known = self.keys.owner(key.strip())
            if known is None:
                raise NoKey("the key is not one of this server's")
            owner = known
        if self.closing() and not public:
            raise Unavailable("the server is stopping: ask again in a moment")
        if self.open > self.settings.most_connections and not public:
            raise Unavailable(f"the server works at {self.settings.most_connections} requests already")
        return owner

    def _most_bytes(self, scope: dict[str, Any]) -> int:
        if scope["path"].startswith("/v1/videos"):
            return self.settings.max_upload_bytes + 2**20
        return self.settings.most_json

    def _note(self, scope: dict[str, Any], talk: _Talk, seconds: float) -> None:
        route = getattr(scope.get("route"), "path", "other")  # as declared: ids in it would be metrics of their own
        status = talk.status or 499  # gone before the answer began
        method = scope["method"] if scope["method"] in _METHODS else "other"
        metrics.REQUESTS.labels(method, route, status).inc()
        metrics.SECONDS.labels(route).observe(seconds)
        client = (scope.get("client") or ("-",))[0]
        owner = scope["state"]["owner"]
        path = json.dumps(scope["path"][:200])[1:-1]  # nothing of the query, nothing that ends the line
        LOG.info(
            '%s %s "%s %s" %s %.0fms %dB',
            client,
            owner[:8] or "-",
            scope["method"],
            path,
            status,
            seconds * 1e3,
            talk.sent,
        )


class _Gone(Exception):
    """The client does not take its answer."""


class _Talk:
    """One request and its answer, with limits of size and time."""

    def __init__(self, scope: dict[str, Any], receive: Any, send: Any, settings: ServerSettings):
        self._receive, self._send, self.settings = receive, send, settings
        self.headers = {name.lower(): value for name, value in scope["headers"]}
        self.most = settings.most_json
        self.status = self.taken = self.sent = 0
        self._replaced = False
        self._whole = not ({b"content-length", b"transfer-encoding"} & self.headers.keys())
        self._began = time.monotonic()

    def check_length(self) -> None:
        """Refuse at once what says that it is too large."""
        length = self.headers.get(b"content-length", b"0")
        if length.isdigit() and int(length) > self.most:
            raise TooLarge(f"the request has {int(length):,} bytes, and this server takes {self.most:,}")

    async def receive(self) -> dict[str, Any]:
        """The next part of the request, or that the client has gone."""
        if self._whole:
            return await self._receive()
        patience = self.settings.idle_seconds + self.taken / self.settings.slowest - (time.monotonic() - self._began)
        try:
            message = await asyncio.wait_for(self._receive(), min(max(patience, 0.0), self.settings.idle_seconds))
        except asyncio.TimeoutError:
            self._whole = True
            raise TooSlow("the request came too slowly, or stopped in the middle") from None
        self.taken += len(message.get("body", b""))
        self._whole = not message.get("more_body", False)
        if self.taken > self.most:
            raise TooLarge(f"the request has more than {self.most:,} bytes")
        return message

    async def send(self, message: dict[str, Any]) -> None:
        """A part of the answer; one that nobody takes is given up."""
        if self._replaced:
            return
        if message["type"] == "http.response.start":
            kind = dict(message.get("headers", ())).get(b"content-type", b"")
            if message["status"] >= 400 and not kind.startswith(b"application/json"):  # a library's own text
                error = BadRequest(responses.get(message["status"], "refused"))
                error.status = message["status"]
                await self.answer(error)
                self._replaced = True
                return
            if message["status"] >= 400 and not self._whole:
                await self._drain()
            self.status = message["status"]
        self.sent += len(message.get("body", b""))
        try:
            await asyncio.wait_for(self._send(message), self.settings.idle_seconds)
        except asyncio.TimeoutError:
            raise _Gone from None

    async def _drain(self) -> None:
        """Take the rest of a request that is refused: whoever is still sending does not hear."""
        if self.headers.get(b"expect", b"").lower() == b"100-continue" and not self.taken:
            return
        deadline = time.monotonic() + _DRAIN_SECONDS
        taken = 0
        while not self._whole and taken < _DRAINED and time.monotonic() < deadline:
            try:
                message = await asyncio.wait_for(self._receive(), max(0.1, deadline - time.monotonic()))
            except asyncio.TimeoutError:
                return
            taken += len(message.get("body", b""))
            self._whole = not message.get("more_body", False)

    async def answer(self, error: ServingError) -> None:
        """Refuse."""
        if self.status:  # too late
            return
        body = json.dumps(error.body()).encode()
        headers = {"content-type": "application/json", "content-length": str(len(body)), **error.headers}
        pairs = [(name.lower().encode(), value.encode()) for name, value in headers.items()]
        await self.send({"type": "http.response.start", "status": error.status, "headers": pairs})
        await self.send({"type": "http.response.body", "body": body})


class PatientProtocol(H11Protocol):
    """uvicorn's, which gives up connections whose request does not come."""

    _timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        """Of asyncio."""
        super().connection_made(transport)
        bound = transport.get_extra_info("socket")
        if bound is not None and bound.family != getattr(socket, "AF_UNIX", None):
            bound.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # asyncio does so for some sockets alone
        self._wait()

    def data_received(self, data: bytes) -> None:
        """Of asyncio."""
        super().data_received(data)
        self._wait()

    def connection_lost(self, exc: Exception | None) -> None:
        """Of asyncio."""
        self._stop_waiting()
        super().connection_lost(exc)

    def _wait(self) -> None:
        busy = self.cycle is not None and not self.cycle.response_complete
        if busy:
            self._stop_waiting()
        elif self._timer is None:
            self._timer = self.loop.call_later(_HEADER_SECONDS, self._give_up)

    def _give_up(self) -> None:
        self._timer = None
        if self.cycle is None or self.cycle.response_complete:
            self.transport.close()

    def _stop_waiting(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
