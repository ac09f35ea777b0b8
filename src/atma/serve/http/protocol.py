"""Connections: slow, silent and malformed ones are ended, and are told why in the same words as everybody."""

import asyncio
import http
import sys
import uuid

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from atma.serve.http.errors import ApiError, encoded
from atma.serve.http.options import CONNECTIONS, HEAD_SECONDS, WRITE_SECONDS


class Connection(H11Protocol):
    """uvicorn's, with limits on the time of a head, the time of a full write buffer, and the number of connections."""

    _head: asyncio.TimerHandle | None = None
    _stalled: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        super().connection_made(transport)
        if len(self.connections) > CONNECTIONS:
            self._refuse(ApiError(503, "busy", "too many connections; ask again later", None, 1))
        else:
            self._head = self.loop.call_later(HEAD_SECONDS, self._slow)

    def connection_lost(self, exc: Exception | None) -> None:
        for timer in (self._head, self._stalled):
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

    def pause_writing(self) -> None:
        super().pause_writing()
        self._stalled = self.loop.call_later(WRITE_SECONDS, self.transport.abort)

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
