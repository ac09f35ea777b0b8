"""The process around the server: its address, its log, and how it ends.

The first SIGTERM or Ctrl-C drains: health says so, new requests are refused with 503, answers under way get
`drain_seconds` to end and are then aborted, and the process ends with status 0. A second one ends it at once.
"""

import asyncio
import contextlib
import logging
import signal
import socket
import sys
import time
from collections.abc import Generator

import uvicorn

from atma.serve.http.allocator import few_heaps
from atma.serve.http.app import create_app
from atma.serve.http.logs import logs
from atma.serve.http.options import HEAD_BYTES, SEND_BUFFER, ServerOptions
from atma.serve.http.protocol import Connection
from atma.serve.http.service import Service

LOG = logging.getLogger("atma.serve")
CLOSING_SECONDS = 3
SIGNALS = (signal.SIGTERM, signal.SIGINT)


def serve(path: str, options: ServerOptions) -> None:
    """Serve a model until a signal ends it. ValueError, OSError: what the user can mend."""
    options.require_safe()
    few_heaps()
    service = Service(path, options)
    with logs(options.access_log), listening(options.host, options.port) as sock:
        print(f"atma: loading {service.name}", file=sys.stderr, flush=True)
        asyncio.run(Process(service).run(sock))


def listening(host: str, port: int) -> socket.socket:
    """A socket at an address. ValueError if that is not this machine's, or taken."""
    family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    sock = socket.socket(family, kind, protocol)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER)
    try:
        sock.bind(address)
        sock.listen(256)
    except OSError as error:
        sock.close()
        raise ValueError(f"cannot listen at {host} port {port}: {error.strerror}; name another --port") from None
    sock.setblocking(False)
    return sock


class Quiet(uvicorn.Server):
    """uvicorn that leaves signals to `Process`."""

    @contextlib.contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        yield


class Process:
    """One server from its first connection to its end."""

    def __init__(self, service: Service) -> None:
        self.service = service
        config = uvicorn.Config(
            create_app(service),
            http=Connection.cutting_off(service.options.reader_seconds),
            loop="asyncio",
            ws="none",
            lifespan="off",
            log_config=None,
            log_level="critical",
            access_log=False,
            proxy_headers=False,
            server_header=False,
            timeout_graceful_shutdown=CLOSING_SECONDS,
            h11_max_incomplete_event_size=HEAD_BYTES,
        )
        self.server = Quiet(config)
        self._ending = asyncio.Event()

    async def run(self, sock: socket.socket) -> None:
        """Listen, load, answer, drain. Whatever keeps the model from loading is raised once all is closed."""
        loop = asyncio.get_running_loop()
        with contextlib.suppress(NotImplementedError, RuntimeError, ValueError):  # not in the main thread
            for number in SIGNALS:
                loop.add_signal_handler(number, self.end, number)
        serving = asyncio.create_task(self.server.serve(sockets=[sock]))
        loading, ending = asyncio.create_task(self._load(sock)), asyncio.create_task(self._ending.wait())
        try:
            await asyncio.wait((loading, ending, serving), return_when=asyncio.FIRST_COMPLETED)
            if loading.done() and loading.exception() is None:
                await asyncio.wait((ending, serving), return_when=asyncio.FIRST_COMPLETED)
                await self._drain()
        finally:
            for task in (loading, ending):
                task.cancel()
            self.server.should_exit = True
            await asyncio.gather(serving, loading, ending, return_exceptions=True)
        for task in (loading, serving):
            if not task.cancelled() and (error := task.exception()) is not None:
                raise error

    def end(self, number: int | None = None) -> None:
        """Begin to drain; when that has begun, a second signal ends the process at once."""
        if self._ending.is_set() and number is not None:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        self.service.drain()
        self._ending.set()

    async def _load(self, sock: socket.socket) -> None:
        began = time.perf_counter()
        await self.service.load()
        host, port = sock.getsockname()[:2]
        shown = f"[{host}]" if ":" in host else host
        seconds = time.perf_counter() - began
        print(f"atma: serving {self.service.name} at http://{shown}:{port} (loaded in {seconds:.1f} s)", flush=True)

    async def _drain(self) -> None:
        """Let answers under way end, for as long as they have; abort the rest; end the engine."""
        seconds = self.service.options.drain_seconds
        LOG.info("draining: at most %g s for answers under way", seconds)
        until = asyncio.get_running_loop().time() + seconds
        while self.server.server_state.tasks and asyncio.get_running_loop().time() < until:
            await asyncio.sleep(0.05)
        await self.service.close(abort=True)
