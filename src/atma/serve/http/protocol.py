"""Connections: slow, silent and malformed ones are ended, and are told why in the same words as everybody."""

import asyncio
import http
import socket
import sys
import uuid

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from atma.serve.http.errors import ApiError, encoded
from atma.serve.http.options import CONNECTIONS, HEAD_SECONDS

PROBES = {"TCP_KEEPIDLE": 10, "TCP_KEEPINTVL": 10, "TCP_KEEPCNT": 3}
QUIET_SECONDS = 2.0
"""What a client that has closed its sending side is left alone before the server finds out whether it has left."""
WATCH_SECONDS = 0.25


class Connection(H11Protocol):
    """uvicorn's, with limits on the time of a head, the time of a full write buffer, and the number of connections."""

    _head: asyncio.TimerHandle | None = None
    _stalled: asyncio.TimerHandle | None = None
    _watch: asyncio.TimerHandle | None = None
    _half_closed = _sounded = False
    reader_seconds = 30.0
    """A client that does not let a full buffer empty for so long is cut off."""

    @classmethod
    def cutting_off(cls, seconds: float) -> "type[Connection]":
        """The class of connections with these `reader_seconds`."""
        return type(cls.__name__, (cls,), {"reader_seconds": seconds})

    def connection_made(self, transport: asyncio.Transport) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        super().connection_made(transport)
        if len(self.connections) > CONNECTIONS:
            self._refuse(ApiError(503, "busy", "too many connections; ask again later", None, 1))
        else:
            self._head = self.loop.call_later(HEAD_SECONDS, self._slow)

    def connection_lost(self, exc: Exception | None) -> None:
        for timer in (self._head, self._stalled, self._watch):
            if timer is not None:
                timer.cancel()
        self._unset_keepalive_if_required()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        reading = self.conn.their_state is h11.IDLE and not self.transport.is_closing()
        if reading and self._head is None and self.timeout_keep_alive_task is None:
            self._head = self.loop.call_later(HEAD_SECONDS, self._slow)
        elif not reading and self._head is not None:
            self._head.cancel()
            self._head = None

    def eof_received(self) -> bool:  # pyright: ignore[reportIncompatibleMethodOverride]
        """The client sends no more. It may still read: what it has asked for whole is answered, then all is closed.

        Or it has left. That shows only when something is sent to it, or after a while to the system's own probes.
        """
        if not self._answering():
            return False
        self._half_closed = True
        sock = self.transport.get_extra_info("socket")
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for name, value in PROBES.items():
            if hasattr(socket, name):
                sock.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
        self._watch = self.loop.call_later(QUIET_SECONDS, self._sound, sock)
        return True

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self._half_closed and not self._answering():
            self.transport.close()

    def _answering(self) -> bool:
        """Whether a request that came whole has no whole answer yet."""
        return self.cycle is not None and not (self.cycle.more_body or self.cycle.response_complete)

    def _sound(self, sock: socket.socket) -> None:
        """Close where the system knows that a client with its sending side closed is gone; now and then find out.

        An answer that has not begun may be preceded by a line without meaning, which a system whose client has left
        answers with a reset.
        """
        if sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR):
            self.transport.abort()
            return
        begun = self.cycle.response_started or self.conn.our_state is not h11.SEND_RESPONSE
        if self.scope["http_version"] == "1.1" and not (begun or self._sounded):
            self._sounded = True
            line = h11.InformationalResponse(status_code=100, headers=[], reason="Continue")
            self.transport.write(self.conn.send(line) or b"")
        self._watch = self.loop.call_later(WATCH_SECONDS, self._sound, sock)

    def pause_writing(self) -> None:
        super().pause_writing()
        self._stalled = self.loop.call_later(self.reader_seconds, self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._stalled is not None:
            self._stalled.cancel()
            self._stalled = None

    def send_400_response(self, msg: str) -> None:
        """Malformed HTTP. h11 says which status fits."""
        error = sys.exception()
        status = error.error_status_hint if isinstance(error, h11.RemoteProtocolError) else 400
        self._refuse(ApiError(status, "malformed_http", f"this is not HTTP as this server reads it: {error}"))

    def _slow(self) -> None:
        self._head = None
        self._refuse(ApiError(408, "slow", f"the request's head did not come within {HEAD_SECONDS:.0f} seconds"))

    def _refuse(self, error: ApiError) -> None:
        """Answer, if no answer has begun, and close; a request under way learns that the client is gone."""
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE) and not self.transport.is_closing():
            body = encoded(error.body)
            headers = {
                "content-type": "application/json",
                "content-length": str(len(body)),
                "connection": "close",
                "x-request-id": uuid.uuid4().hex,
            }
            if error.retry_after is not None:
                headers["retry-after"] = str(error.retry_after)
            head = f"HTTP/1.1 {error.status} {http.HTTPStatus(error.status).phrase}\r\n"
            lines = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
            self.transport.write(f"{head}{lines}\r\n".encode() + body)
        if self.cycle is not None:
            self.cycle.disconnected = True
            self.cycle.message_event.set()
        self.transport.close()
