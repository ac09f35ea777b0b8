"""Clients that behave badly, for a minute: what is left of them afterwards, and did the others notice?

    python benchmarks/serving.py clients --streams 64 --seconds 60

Of the streams a quarter leave at a random moment and come again, a tenth read one byte a second, the others read their
answers, which must be the texts of a quiet run, one by one, beforehand. Then, when the last has gone, no request, row,
page, asyncio task or descriptor may be left. Server and clients share one process and one event loop, so that all of
these can be counted. Exit status 1 if anything is left, or a text differs.
"""

import argparse
import asyncio
import collections
import contextlib
import gc
import os
import random
import socket
import time
from typing import Any

from serving_client import ask, request_bytes

from atma.serve.http.options import ServerOptions
from atma.serve.http.server import Process, listening
from atma.serve.http.service import Service

ASKED = 48
"""Different prompts."""


class Crowd:
    """What the clients have done."""

    def __init__(self, port: int, texts: list[str], until: float) -> None:
        self.port, self.texts, self.until = port, texts, until
        self.counts: collections.Counter[str] = collections.Counter()

    @property
    def over(self) -> bool:
        return time.monotonic() >= self.until

    async def good(self, chance: random.Random) -> None:
        """Reads its answers and compares them."""
        while not self.over:
            i = chance.randrange(ASKED)
            heard = await ask(self.port, _body(i))
            same = heard.whole and heard.text == self.texts[i]
            self.counts["read to the end, same text" if same else f"differed (status {heard.status})"] += 1

    async def leaving(self, chance: random.Random) -> None:
        """Asks, reads for a while, leaves."""
        while not self.over:
            reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
            writer.write(request_bytes(_body(chance.randrange(ASKED), 2000)))
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(2 * chance.random() ** 2):
                    while await reader.read(100):
                        pass
            writer.transport.abort()
            self.counts["left"] += 1

    async def slow(self, chance: random.Random) -> None:
        """Reads a byte a second."""
        loop = asyncio.get_running_loop()
        while not self.over:
            with socket.socket() as wire:
                wire.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
                wire.setblocking(False)
                await loop.sock_connect(wire, ("127.0.0.1", self.port))
                await loop.sock_sendall(wire, request_bytes(_body(chance.randrange(ASKED), 8000)))
                with contextlib.suppress(ConnectionError):
                    while not self.over and await loop.sock_recv(wire, 1):
                        self.counts["bytes read slowly"] += 1
                        await asyncio.sleep(1)
            self.counts["slow readers that gave up" if self.over else "slow readers that were cut off"] += 1


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="nano")
    parser.add_argument("--streams", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--threads", type=int, default=1)
    return asyncio.run(_run(parser.parse_args(arguments)))


def _body(i: int, most: int = 0) -> dict[str, Any]:
    chance = random.Random(i)
    prompt = [chance.randrange(256) for _ in range(chance.randint(1, 400))]
    return {"prompt": prompt, "max_tokens": most or 20 + 2 * i, "temperature": 0, "ignore_eos": True, "stream": True}


async def _run(options: argparse.Namespace) -> int:
    rows = max(8, options.streams * 3 // 4)
    service = Service(
        options.model, ServerOptions(model_name="it", memory_budget="96MiB", max_rows=rows, threads=options.threads)
    )
    sock = listening("127.0.0.1", 0)
    process = Process(service)
    serving = asyncio.create_task(process.run(sock))
    while service.state == "loading":
        await asyncio.sleep(0.05)
    port = sock.getsockname()[1]
    texts = [(await ask(port, _body(i))).text for i in range(ASKED)]
    await _settled(service, process)
    before = _held(service)
    crowd = Crowd(port, texts, time.monotonic() + options.seconds)
    await _crowded(crowd, options.streams)
    began = time.monotonic()
    await _settled(service, process)
    after = _held(service)
    for what, count in sorted(crowd.counts.items()):
        print(f"{what}: {count}")
    print(f"before: {before}\n after: {after}, {time.monotonic() - began:.1f} s after the last client went")
    process.end()
    await serving
    sock.close()
    left = [name for name in before if after[name] > before[name]]
    differed = sum(count for what, count in crowd.counts.items() if what.startswith("differed"))
    print(f"left behind: {', '.join(left) or 'nothing'}; texts that differed: {differed}")
    return int(bool(left) or differed > 0)


async def _crowded(crowd: Crowd, streams: int) -> None:
    """A quarter leave, a tenth are slow, the rest are good."""
    leave, slow = streams // 4, max(1, streams // 10)
    kinds = [crowd.leaving] * leave + [crowd.slow] * slow + [crowd.good] * (streams - leave - slow)
    await asyncio.gather(*(kind(random.Random(1000 + i)) for i, kind in enumerate(kinds)))


async def _settled(service: Service, process: Process, seconds: float = 30) -> None:
    """Wait until nothing is under way and connections are closed."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        stats = await service.stats() or {}
        state = process.server.server_state
        if not (stats["running"] or stats["waiting"] or state.tasks or state.connections):
            break
        await asyncio.sleep(0.02)
    await asyncio.sleep(0.2)
    gc.collect()


def _held(service: Service) -> dict[str, int]:
    """All that a request could leave behind. Pages: those in use that belong to no kept state."""
    served = service.require().engine
    engine = served.engine
    kept = {page for one in engine.store.cache._kept.values() for page in one.pages.values()}
    return {
        "requests": len(engine.answers.handles) + len(served._readers),
        "rows": len(engine.scheduler.running) + len(engine.scheduler.waiting) + len(engine.writing.sequences),
        "pages": engine.store.budget.pages - engine.store.pool.free - len(kept),
        "references": sum(engine.store.pool.references) - sum(len(one.pages) for one in _kept(engine)),
        "tasks": len(asyncio.all_tasks()),
        "descriptors": len(os.listdir("/proc/self/fd")),
    }


def _kept(engine: Any) -> list[Any]:
    return list(engine.store.cache._kept.values())
