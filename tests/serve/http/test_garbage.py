"""Whatever is sent, the answer is an error in the usual words, never a 500, and a stream beside it is undisturbed."""

import contextlib
import json
import random
import socket
import threading

import pytest

from atma.serve.http import guard, protocol
from tests.serve.http.conftest import Live

ROUTES = ["/v1/chat/completions", "/v1/completions", "/v1/embeddings", "/v1/messages", "/v1/responses"]
ROUTES += ["/tokenize", "/detokenize", "/v1/messages/count_tokens"]
BODIES = {
    "/v1/chat/completions": {
        "model": "tiny",
        "messages": [
            {"role": "system", "content": "Be"},
            {"role": "user", "content": [{"type": "text", "text": "Hi"}]},
        ],
        "max_tokens": 3,
        "temperature": 0.5,
        "logprobs": True,
        "top_logprobs": 2,
        "stop": ["x", "y"],
        "logit_bias": {"65": 1.5},
        "stream": False,
        "n": 2,
        "min_tokens": 1,
        "skip_special_tokens": False,
        "chat_template_kwargs": {"enable_thinking": False, "x": [{"y": "z"}]},
        "return_token_ids": True,
        "best_of": 1,
        "xtc_probability": 0,
    },
    "/v1/completions": {
        "prompt": [[1, 2, 3], [4]],
        "max_tokens": 2,
        "echo": True,
        "logprobs": 1,
        "seed": 3,
        "stream": True,
        "stream_options": {"include_usage": True, "continuous_usage_stats": True},
        "top_p": 0.9,
        "top_k": 5,
        "presence_penalty": 0.1,
        "repetition_penalty": 1.1,
    },
    "/v1/embeddings": {
        "input": ["some", "texts"],
        "encoding_format": "base64",
        "dimensions": 32,
        "truncate_prompt_tokens": 4,
        "normalize": False,
    },
    "/v1/messages": {
        "model": "tiny",
        "max_tokens": 3,
        "system": [{"type": "text", "text": "Be", "cache_control": {"type": "ephemeral"}}],
        "messages": [
            {"role": "user", "content": [{"type": "text", "text": "Hi"}]},
            {"role": "assistant", "content": "x"},
        ],
        "stop_sequences": ["y"],
        "stream": True,
        "tools": [],
        "thinking": {"type": "disabled"},
    },
    "/v1/messages/count_tokens": {
        "messages": [
            {"role": "user", "content": "Hi"},
            {
                "role": "assistant",
                "content": [
                    {"type": "text", "text": "x"},
                    {"type": "tool_use", "id": "t", "name": "f", "input": {"a": [1]}},
                ],
            },
            {
                "role": "user",
                "content": [
                    {"type": "tool_result", "tool_use_id": "t", "content": [{"type": "text", "text": "y"}]},
                    {"type": "text", "text": "z"},
                ],
            },
        ],
        "tools": [{"name": "f", "description": "x", "input_schema": {"type": "object"}, "strict": True}],
        "tool_choice": {"type": "none"},
    },
    "/v1/responses": {
        "model": "tiny",
        "input": [
            {"role": "developer", "content": "Be"},
            {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "Hi"}]},
            {"type": "function_call", "call_id": "c", "name": "f", "arguments": "{}"},
            {"type": "function_call_output", "call_id": "c", "output": "4"},
        ],
        "instructions": "Be brief",
        "max_output_tokens": 3,
        "temperature": 0.5,
        "top_logprobs": 2,
        "include": ["message.output_text.logprobs"],
        "text": {"format": {"type": "text"}, "verbosity": "medium"},
        "tools": [{"type": "function", "name": "f", "parameters": {"type": "object"}, "strict": False}],
        "tool_choice": "none",
        "metadata": {"a": "b"},
        "reasoning": {"effort": "none"},
        "stream": False,
        "store": True,
    },
    "/tokenize": {"prompt": "some text", "add_special_tokens": False},
    "/detokenize": {"tokens": [1, 2, 250, 256]},
}
BESIDE = {"prompt": "undisturbed", "max_tokens": 40, "temperature": 0, "ignore_eos": True, "stream": True}
STRANGE = [None, True, -1, 0, 1, 2**31, 2**63, 2**64, 1e308, -0.0, 1e-320, "", "x", "\ud800", "\0", "😀" * 50, [], {}]
STRANGE += [[[]], [None], [1, "x"], {"a": {}}, ["x"] * 200, "9" * 400, [2**70], {"type": "text"}, {"65": "1"}]
METHODS = ["GET", "POST", "PUT", "DELETE", "HEAD", "OPTIONS", "BREW"]


def mutated(value, dice: random.Random):
    """A JSON value with something in it replaced, removed, doubled or added."""
    if dice.random() < 0.25 or not isinstance(value, dict | list) or not value:
        return dice.choice(STRANGE)
    if isinstance(value, list):
        i = dice.randrange(len(value))
        return [*value[:i], mutated(value[i], dice), *value[i + dice.randrange(2) :]]
    key, kind = dice.choice(list(value)), dice.randrange(4)
    if kind == 0:
        return {k: v for k, v in value.items() if k != key}
    if kind == 1:
        return value | {dice.choice(["", "tools", "user", "\ud800", key.upper(), "x" * 300]): dice.choice(STRANGE)}
    return value | {key: mutated(value[key], dice)}


def damaged(data: bytes, dice: random.Random) -> bytes:
    """Bytes cut, doubled, turned over or replaced."""
    at, kind = dice.randrange(len(data) + 1), dice.randrange(5)
    if kind == 0:
        return data[:at]
    if kind == 1:
        return data[:at] + dice.randbytes(dice.randrange(1, 9)) + data[at:]
    if kind == 2:
        return data[:at] + data[at : at + 20] * dice.randrange(2, 50) + data[at:]
    if kind == 3:
        return data[:at] + bytes([dice.randrange(256)]) + data[at + 1 :]
    return data[at:] + data[:at]


def request(dice: random.Random) -> bytes:
    """A request that is nearly right, or nothing like one."""
    if dice.random() < 0.1:
        return dice.randbytes(dice.randrange(1, 2000))
    route = dice.choice(ROUTES)
    body = damaged(json.dumps(BODIES[route]).encode(), dice)
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


def exchange(port: int, data: bytes) -> bytes:
    """Send, and read to the end."""
    told = b""
    with contextlib.suppress(ConnectionError, TimeoutError), socket.create_connection(("127.0.0.1", port), 30) as wire:
        wire.sendall(data)
        while part := wire.recv(65536):
            told += part
    return told


class Beside:
    """A stream that goes on while others misbehave, again and again; every answer is compared with the first."""

    def __init__(self, live: Live) -> None:
        self.live, self.stop, self.texts = live, threading.Event(), []
        self.thread = threading.Thread(target=self._run)

    def _run(self) -> None:
        while not self.stop.is_set():
            events = self.live.post("/v1/completions", BESIDE).events()
            self.texts.append("".join(event["choices"][0]["text"] for event in events))

    def __enter__(self) -> "Beside":
        self.thread.start()
        return self

    def __exit__(self, *_) -> None:
        self.stop.set()
        self.thread.join()
        assert self.texts
        assert len(set(self.texts)) == 1


@pytest.fixture
def impatient(live: Live, monkeypatch):
    """The server waits for nothing for long, so that what is incomplete ends soon."""
    monkeypatch.setattr(protocol, "HEAD_SECONDS", 0.1)
    monkeypatch.setattr(guard, "BODY_SECONDS", 0.1)
    monkeypatch.setattr(live.process.server.config, "timeout_keep_alive", 0.1)


def check_mutated(live: Live, seed: int, count: int) -> None:
    dice = random.Random(seed)
    for _ in range(count):
        route = dice.choice(ROUTES)
        body = BODIES[route]
        for _ in range(dice.randrange(1, 3)):
            body = mutated(body, dice)
        told = live.post(route, json.dumps(body).encode())
        assert told.status in (200, 400, 404), (route, body, told.body)
        if told.status != 200:
            told.error()
        assert told.headers["x-request-id"]


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


def test_mutated_bodies_are_answered_or_refused(live: Live):
    with Beside(live):
        check_mutated(live, 1, 200)
    assert live.settled()


def test_garbage_on_the_wire_is_refused(live: Live, impatient):
    with Beside(live):
        check_raw(live, 9, 200)
    assert live.settled()


@pytest.mark.slow
def test_twenty_thousand_pieces_of_garbage_leave_nothing_behind(live: Live, impatient):
    tasks = live.tasks()
    with Beside(live):
        check_mutated(live, 3, 10_000)
        check_raw(live, 4, 10_000)
    assert live.settled()
    assert live.tasks() <= tasks + 2
    assert live.post("/tokenize", {"prompt": "x"}).status == 200


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
