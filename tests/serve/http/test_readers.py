"""Clients that read slowly, or send no more: what waits for them is bounded, and who still listens is answered."""

import asyncio
import json
import socket
import time

import pytest

from atma.serve.asynchronous import AsyncEngine
from atma.serve.http import protocol
from atma.serve.http.answers import ChatShape, TextShape
from atma.serve.http.errors import ApiError
from atma.serve.http.room import Room, gathered_bytes
from atma.serve.http.tokens import TokenNames
from atma.serve.request import Request
from atma.tokenizer import byte_tokenizer
from tests.serve.http.conftest import Live
from tests.serve.http.test_disconnects import asked, opened
from tests.serve.http.test_limits import metric

NAMES = TokenNames(byte_tokenizer())


def waiting_bytes(engine: AsyncEngine) -> int:
    return sum(reader.sent - reader.taken for reader in engine._readers.values())


def stuck(live: Live, **fields) -> socket.socket:
    """A client that asks for much and reads nothing, through the smallest buffers there are."""
    body = json.dumps({"prompt": "x", "ignore_eos": True, "stream": True, "logprobs": 20} | fields).encode()
    wire = socket.socket()
    wire.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    wire.connect(("127.0.0.1", live.port))
    head = "POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
    wire.sendall(f"{head}content-length: {len(body)}\r\n\r\n".encode() + body)
    return wire


def stopped(live: Live) -> bool:
    """Whether no step is made for a moment and every reader is paused; a socket that takes more resumes one."""
    engine, steps = live.service.require().engine, live.stats()["steps"]
    time.sleep(0.2)
    readers = list(engine._readers.values())
    return live.stats()["steps"] == steps and len(readers) == 2 and all(reader.paused for reader in readers)


def test_what_waits_for_slow_readers_is_bounded_and_their_texts_pause(live: Live):
    """Until they leave: then all is free, and meanwhile others are answered."""
    engine = live.service.require().engine
    room, step = engine.engine.config.unread_bytes, 12 * 3000
    with stuck(live, n=8, max_tokens=3000), stuck(live, n=4, max_tokens=3000):
        while not stopped(live):
            assert waiting_bytes(engine) <= 12 * room + step
        assert (live.stats()["running"], live.stats()["waiting"]) == (0, 12)
        assert live.post("/v1/completions", {"prompt": "another", "max_tokens": 5}).status == 200
    assert live.settled()
    assert waiting_bytes(engine) == 0


def test_a_slow_reader_reads_what_a_fast_one_reads(live: Live):
    fields = {"prompt": "slow or fast", "n": 4, "max_tokens": 900, "seed": 5}
    fast = live.post("/v1/completions", {"ignore_eos": True, "stream": True, "logprobs": 20} | fields)
    engine, told = live.service.require().engine, b""
    with stuck(live, **fields) as wire:
        while not any(reader.paused for reader in engine._readers.values()):
            time.sleep(0.01)
        wire.settimeout(60)
        while b"data: [DONE]" not in told[-200:]:
            told += wire.recv(65536)
    texts = [["" for _ in range(4)] for _ in range(2)]
    lines = [line for line in told.decode("utf-8", "replace").splitlines() if line.startswith('data: {"id')]
    for text, events in zip(texts, (fast.events(), map(json.loads, (line[6:] for line in lines))), strict=True):
        for event in events:
            choice = event["choices"][0]
            text[choice["index"]] += choice["text"]
    assert texts[0] == texts[1]
    assert live.settled()


def test_a_stuck_reader_is_cut_off_and_its_request_ends(live: Live, monkeypatch):
    monkeypatch.setattr(live.process.server.config.http, "reader_seconds", 0.2)
    before = metric(live, "atma_disconnects_total")
    wire = stuck(live, n=8, max_tokens=3000)
    while live.service.require().engine._readers or metric(live, "atma_disconnects_total") == before:
        time.sleep(0.02)
    assert live.settled()
    wire.close()


def test_an_answer_in_one_body_that_could_not_be_held_is_refused_with_the_mend(live: Live):
    body = {"prompt": "x", "max_tokens": 1500, "n": 16, "ignore_eos": True, "logprobs": 20}
    refused = live.post("/v1/completions", body)
    assert (refused.status, refused.error()["code"]) == (400, "answer_too_large")
    assert "stream it" in refused.error()["message"]
    assert live.post("/v1/completions", body | {"max_tokens": 20}).status == 200


def test_what_is_gathered_is_counted_by_tokens_scores_and_echoes():
    plain = Request("x", max_tokens=1000)
    text, chat = TextShape(NAMES, True, False, False), ChatShape(NAMES, True)
    assert gathered_bytes([plain], text, False, 10_000, 4, 0) == 0
    assert gathered_bytes([plain], text, True, 10_000, 4, 0) == 24 * 1000
    assert gathered_bytes([plain], text, True, 10, 4, 0) == 24 * 10
    scored = Request("x", max_tokens=1000, n=2, logprobs=5)
    assert gathered_bytes([scored], chat, True, 10_000, 4, 0) == 2 * 1000 * (24 + 620)
    assert gathered_bytes([scored], chat, True, 10_000, 4, 10**9) == 0
    echo = Request([1] * 500, max_tokens=0, echo=True, logprobs=1)
    assert gathered_bytes([echo], text, False, 10_000, 4, 0) == 500 * 330
    assert gathered_bytes([echo] * 8, text, False, 10_000, 4, 0) == 4 * 500 * 330


def test_room_is_given_in_the_order_of_asking():
    async def run() -> list[str]:
        room, order = Room(10), []

        async def one(name: str, count: int) -> None:
            await room.take(count)
            order.append(name)
            await asyncio.sleep(0)
            room.give(count)

        await asyncio.gather(one("a", 6), one("b", 8), one("c", 2))
        with pytest.raises(ApiError, match="of at most 10"):
            await room.take(11)
        assert room.held == 0
        return order

    assert asyncio.run(run()) == ["a", "b", "c"]


@pytest.mark.parametrize("fields", [{"stream": False}, {"stream": True}, {"stream": False, "n": 3}])
def test_a_client_that_sends_no_more_is_answered(live: Live, fields):
    told = b""
    with opened(live, asked(7, max_tokens=40, **fields)) as wire:
        wire.shutdown(socket.SHUT_WR)
        while part := wire.recv(65536):
            told += part
    assert told.startswith(b"HTTP/1.1 200 OK")
    assert b'"finish_reason":"length"' in told
    assert live.settled()


def test_requests_sent_together_before_the_end_are_all_answered(live: Live):
    one = b"GET /health HTTP/1.1\r\nhost: localhost\r\n\r\n"
    with socket.create_connection(("127.0.0.1", live.port), timeout=20) as wire:
        wire.sendall(one * 3)
        wire.shutdown(socket.SHUT_WR)
        told = b""
        while part := wire.recv(65536):
            told += part
    assert told.count(b"HTTP/1.1 200 OK") == 3


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_after_its_last_byte_is_found_out(live: Live, monkeypatch, caplog, stream):
    """It looks like one that only sends no more, until something is sent to it."""
    monkeypatch.setattr(protocol, "QUIET_SECONDS", 0.05)
    with opened(live, asked(8, max_tokens=3000, n=2, stream=stream)) as wire:
        wire.shutdown(socket.SHUT_WR)
        while live.stats()["writing"] < 2:
            time.sleep(0.01)
    assert live.settled()
    assert not [record for record in caplog.records if record.levelname == "ERROR"]


def test_a_request_that_is_cut_in_its_body_is_forgotten(live: Live):
    with socket.create_connection(("127.0.0.1", live.port), timeout=20) as wire:
        wire.sendall(b"POST /tokenize HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n")
        wire.sendall(b"content-length: 100\r\n\r\n{")
        wire.shutdown(socket.SHUT_WR)
        assert wire.recv(65536) == b""
    assert live.settled()
