"""Clients that leave: their requests end within two steps, and nothing of them stays."""

import gc
import json
import random
import socket
import time
from concurrent.futures import ThreadPoolExecutor

from tests.serve.http.conftest import Live, descriptors
from tests.serve.http.test_limits import metric


def opened(live: Live, body: dict) -> socket.socket:
    """A connection on which a request has been sent."""
    data = json.dumps(body).encode()
    wire = socket.create_connection(("127.0.0.1", live.port), timeout=300)
    head = "POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
    wire.sendall(f"{head}content-length: {len(data)}\r\n\r\n".encode() + data)
    return wire


def asked(i: int, **fields) -> dict:
    return {
        "prompt": f"text {i} " * 20,
        "max_tokens": 60,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
    } | fields


def run(live: Live, i: int, leaves: bool) -> str:
    """A stream to its end, or its first bytes."""
    if not leaves:
        return "".join(event["choices"][0]["text"] for event in live.post("/v1/completions", asked(i)).events())
    with opened(live, asked(i, max_tokens=4000)) as wire:
        time.sleep(random.Random(i).random() / 10)
        wire.recv(100)
    return ""


def test_a_quarter_of_many_clients_leave_and_nothing_of_them_stays(live: Live):
    alone = [run(live, i, False) for i in range(12)]
    assert live.settled()
    gc.collect()
    before, gone = (descriptors(), live.tasks()), metric(live, "atma_disconnects_total")
    engine = live.service.require().engine
    with ThreadPoolExecutor(16) as pool:
        texts = list(pool.map(lambda i: run(live, i, i >= 12), range(16)))
    assert texts[:12] == alone
    assert live.settled()
    time.sleep(0.2)
    gc.collect()
    memory, kept = engine.engine.store, engine.engine.store.cache._kept.values()
    held = {page for one in kept for page in one.pages.values()}
    assert memory.budget.pages - memory.pool.free == len(held)
    assert engine._readers == {}
    assert engine.engine.answers.handles == {}
    assert metric(live, "atma_disconnects_total") == gone + 4
    until = time.monotonic() + 300
    while (descriptors() > before[0] or live.tasks() > before[1]) and time.monotonic() < until:
        time.sleep(0.05)  # connections that are closed on this side alone so far
    assert descriptors() <= before[0]
    assert live.tasks() <= before[1]


def test_a_client_that_leaves_ends_its_request_within_two_steps(live: Live):
    """Counted by the tokens that are written after the server has seen the connection end."""
    for body in (asked(1, max_tokens=100_000 // 30), asked(2, max_tokens=3000, stream=False, n=3)):
        wire = opened(live, body)
        while live.stats()["writing"] < body.get("n", 1):
            time.sleep(0.01)
        wire.close()
        while live.process.server.server_state.connections:
            time.sleep(0.001)
        seen = live.stats()["steps"]
        while live.stats()["running"]:
            time.sleep(0.001)
        assert live.stats()["steps"] - seen <= 2
        assert live.settled()


def test_a_client_that_leaves_while_it_waits_or_is_read_is_forgotten(live: Live):
    wires = [opened(live, asked(i, prompt=f"{i} long prompt " * 400, n=8)) for i in range(3)]
    time.sleep(0.05)
    for wire in wires:
        wire.close()
    assert live.settled()
    assert live.stats()["waiting"] == 0


def test_a_client_that_leaves_in_the_middle_of_its_body_is_forgotten(live: Live):
    tasks = live.tasks()
    for _ in range(10):
        wire = socket.create_connection(("127.0.0.1", live.port))
        wire.sendall(b"POST /tokenize HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n")
        wire.sendall(b"content-length: 100000\r\n\r\n{")
        wire.close()
    assert live.settled()
    until = time.monotonic() + 300
    while live.tasks() > tasks and time.monotonic() < until:
        time.sleep(0.01)
    assert live.tasks() <= tasks
    assert live.process.server.config.app._held == 0  # pyright: ignore
