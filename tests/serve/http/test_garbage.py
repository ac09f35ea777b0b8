"""Whatever is sent, the answer is an error in the usual words, never a 500, and a stream beside it is undisturbed."""

import contextlib
import gc
import http.client
import json
import random
import socket
from collections import Counter
from itertools import islice
from pathlib import Path
from typing import Any

import pytest

from atma.serve.http import guard, protocol
from tests.serve.http.beside import GOOD, Beside, failures, told
from tests.serve.http.conftest import Live, Told
from tests.serve.http.malformed import METHODS, Sent, damaged, requests
from tests.serve.http.nearly_right import BODIES

REFUSED = {400, 404, 405, 408, 413, 415, 429, 431}
OURS = {"internal", "failed", "server_error", "api_error"}
"""What events of a stream call an error that is not the client's."""
GROWTH = 64 << 20
"""Bytes that the process may take more for as many requests again: what is remembered of forms is some of them."""


def request(dice: random.Random) -> bytes:
    """A request that is nearly right, or nothing like one."""
    if dice.random() < 0.1:
        return dice.randbytes(dice.randrange(1, 2000))
    route = dice.choice(list(BODIES))
    body = json.dumps(dice.choice(BODIES[route])).encode()
    body = damaged(body, dice) if dice.random() < 0.7 else body
    length = len(body) if dice.random() < 0.8 else dice.choice([0, 1, len(body) - 1, -1, 10**30, "x", "1, 1"])
    framing = dice.choice(["chunked", "gzip, chunked", "identity", "x"]) if dice.random() < 0.1 else None
    lines = [
        f"{dice.choice(METHODS) if dice.random() < 0.2 else 'POST'} {route} HTTP/1.{dice.choice('1110')}",
        "host: localhost",
        "content-type: " + dice.choice(["application/json"] * 4 + ["text/plain", "application/json; charset=utf-7"]),
        f"transfer-encoding: {framing}" if framing else f"content-length: {length}",
        "connection: close",
    ]
    head = "\r\n".join(lines).encode() + b"\r\n\r\n"
    return (damaged(head, dice) if dice.random() < 0.4 else head) + body


def responses(told: bytes) -> list[tuple[int, bytes]]:
    """Status and head-and-body of each response in what came back."""
    found = []
    for part in told.split(b"HTTP/1.1 ")[1:]:
        found.append((int(part[:3]), part))
    return found


def connected(port: int, seconds: float = 300) -> socket.socket:
    return socket.create_connection(("127.0.0.1", port), seconds)


def exchange(port: int, data: bytes) -> bytes:
    """Send, and read to the end."""
    told = b""
    with contextlib.suppress(ConnectionError, TimeoutError), connected(port, 30) as wire:
        wire.sendall(data)
        while part := wire.recv(65536):
            told += part
    return told


def answered(port: int, sent: Sent) -> Told:
    """Send what no client would, and read the one answer."""
    head = [f"{sent.method} {sent.path} HTTP/1.1", "host: localhost", "connection: close"]
    head += [f"{name}: {value}" for name, value in sent.headers.items()]
    head += [] if sent.body is None else [f"content-length: {len(sent.body)}"]
    with connected(port) as wire:
        wire.sendall("\r\n".join([*head, "", ""]).encode("latin-1") + (sent.body or b""))
        response = http.client.HTTPResponse(wire, method=sent.method)
        response.begin()
        return Told(response.status, {k.lower(): v for k, v in response.getheaders()}, response.read())


def strictly(data: str | bytes) -> Any:
    """JSON, in which NaN is none."""
    return json.loads(data, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))


def check(sent: Sent, told: Told) -> None:
    """A refusal has its reason; what is answered is whole, and in a stream nothing failed by a fault of the server."""
    assert told.status == 200 or told.status in REFUSED, (sent, told.status, told.body)
    assert told.headers["x-request-id"]
    if sent.method == "HEAD":
        assert not told.body
    elif told.status != 200:
        assert told.error()["message"], (sent, told.body)
    elif told.headers["content-type"].startswith("text/event-stream"):
        lines = [line for line in told.body.decode().splitlines() if line.startswith("data: {")]
        for event in (strictly(line[6:]) for line in lines):
            for error in (event.get("error"), (event.get("response") or {}).get("error")):
                assert not error or not OURS & {error.get("code"), error.get("type")}, (sent, event)
    elif told.headers["content-type"] == "application/json":
        strictly(told.body)


@pytest.fixture
def impatient(full: Live, monkeypatch):
    """The server waits for nothing for long, so that what is incomplete ends soon."""
    monkeypatch.setattr(protocol, "HEAD_SECONDS", 0.1)
    monkeypatch.setattr(guard, "BODY_SECONDS", 0.1)
    monkeypatch.setattr(full.process.server.config, "timeout_keep_alive", 0.1)


def kept(live: Live) -> str:
    """The id of an answer that is kept."""
    return live.post("/v1/responses", {"input": "Hi", "max_output_tokens": 2}).json()["id"]


def resident() -> int:
    """Bytes of this process in memory, 0 where that is not told."""
    gc.collect()
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    return next((int(line.split()[1]) << 10 for line in lines if line.startswith("VmRSS:")), 0)


def check_mutated(live: Live, seed: int, count: int) -> Counter[int]:
    """How often each status came back."""
    found: Counter[int] = Counter()
    for sent in islice(requests(random.Random(seed), kept(live)), count):
        told = answered(live.port, sent)
        check(sent, told)
        found[told.status] += 1
    return found


def check_raw(live: Live, seed: int, count: int) -> None:
    dice, seen = random.Random(seed), set()
    for _ in range(count):
        sent = request(dice)
        for status, part in responses(exchange(live.port, sent)):
            seen.add(status)
            assert status < 500 or status in (501, 503), (sent, part)
            assert b"\r\nx-request-id: " in part, (sent, part)
            if status >= 400 and not sent.startswith(b"HEAD"):
                assert json.loads(part.partition(b"\r\n\r\n")[2])["error"]["message"], (sent, part)
    assert seen >= {200, 400, 405, 415}


def test_mutated_bodies_are_answered_or_refused(full: Live, caplog):
    with caplog.at_level("ERROR", "atma.serve"), Beside(full):
        assert set(check_mutated(full, 1, 300)) >= {200, 400, 404, 405, 415}
    assert full.settled()
    assert not failures(caplog)


def test_garbage_on_the_wire_is_refused(full: Live, impatient):
    with Beside(full):
        check_raw(full, 9, 200)
    assert full.settled()


@pytest.mark.slow
def test_twenty_thousand_malformed_requests_leave_nothing_behind(full: Live, caplog, capsys):
    before = {name: told(full, name) for name in GOOD}
    with caplog.at_level("ERROR", "atma.serve"), Beside(full) as beside:
        found = check_mutated(full, 2, 10_000)  # what is remembered has been remembered
        tasks, began = full.tasks(), resident()
        found += check_mutated(full, 3, 10_000)
    assert full.settled()
    grown = resident() - began
    with capsys.disabled():
        print(f"\n{dict(found)}, {beside.rounds} undisturbed; {began >> 20} MiB, then {grown >> 10} KiB more")
    assert grown < GROWTH
    assert not failures(caplog)
    assert full.tasks() <= tasks + 2
    assert {name: told(full, name) for name in GOOD} == before


@pytest.mark.slow
def test_ten_thousand_pieces_of_garbage_on_the_wire_leave_nothing_behind(full: Live, impatient, caplog):
    tasks = full.tasks()
    with caplog.at_level("ERROR", "atma.serve"), Beside(full):
        check_raw(full, 4, 10_000)
    assert full.settled()
    assert not failures(caplog)
    assert full.tasks() <= tasks + 2
    assert full.post("/tokenize", {"prompt": "x"}).status == 200


@pytest.mark.slow
def test_requests_made_from_the_schema_get_what_the_schema_says(live: Live):
    schemathesis = pytest.importorskip("schemathesis")
    import hypothesis

    schema = schemathesis.openapi.from_url(f"{live.url}/openapi.json")
    for result in schema.get_all_operations():
        operation = result.ok()

        @hypothesis.given(case=operation.as_strategy())
        @hypothesis.settings(max_examples=300, suppress_health_check=list(hypothesis.HealthCheck))
        def sent(case):
            if isinstance(case.body, dict):
                case.body["max_output_tokens" if case.path == "/v1/responses" else "max_tokens"] = 2
            assert case.call(timeout=60).status_code < 500

        sent()
