"""Who may ask and how much: keys, hosts, sizes, ids and the words of every refusal."""

import dataclasses
import json
import socket
import threading

import pytest
from prometheus_client.parser import text_string_to_metric_families

from atma.serve import sampler
from atma.serve.http import guard, protocol, streams
from atma.serve.http.fields import MOST_MESSAGES
from tests.serve.http.conftest import OPTIONS, Live

SHORT = {"prompt": "x", "max_tokens": 2}
KEY = "secret-ké"


def metric(live: Live, name: str, labels: dict[str, str] | None = None) -> float:
    text = live.ask("GET", "/metrics").body.decode()
    samples = [s for family in text_string_to_metric_families(text) for s in family.samples if s.name == name]
    return sum(s.value for s in samples if (labels or {}).items() <= s.labels.items())


@pytest.mark.parametrize(
    ("method", "path", "body", "headers", "status", "code"),
    [
        ("GET", "/nowhere", None, {}, 404, "not_found"),
        ("GET", "/v1/completions", None, {}, 405, "method_not_allowed"),
        ("DELETE", "/v1/models", None, {}, 405, "method_not_allowed"),
        ("PUT", "/v1/completions", SHORT, {}, 405, "method_not_allowed"),
        ("PUT", "/health", None, {}, 405, "method_not_allowed"),
        ("POST", "/health", None, {}, 405, "method_not_allowed"),
        ("POST", "/v1/completions", None, {}, 400, "invalid_value"),
        ("POST", "/v1/completions", b"{", {}, 400, "invalid_json"),
        ("POST", "/v1/completions", b"", {}, 400, "invalid_value"),
        ("POST", "/v1/completions", b"[1]", {}, 400, "invalid_value"),
        ("POST", "/v1/completions", b"null", {}, 400, "invalid_value"),
        ("POST", "/v1/completions", b'{"prompt": NaN}', {}, 400, "invalid_value"),
        ("POST", "/v1/completions", b'{"prompt": "x", "temperature": Infinity}', {}, 400, "invalid_value"),
        ("POST", "/v1/completions", b'{"prompt": "\\ud800"}', {}, 400, "invalid_value"),
        ("POST", "/v1/completions", b'{"prompt": "x", "model": "\\ud800"}', {}, 400, "invalid_value"),
        ("POST", "/v1/completions", b'{"prompt": "\xff"}', {}, 400, "invalid_request"),
        ("POST", "/v1/completions", b'{"prompt": [' + b"9" * 5000 + b"]}", {}, 400, "invalid_request"),
        ("POST", "/v1/completions", b"[" * 100_000, {}, 400, "too_deep"),
        ("POST", "/v1/completions", b'{"a":' * 65 + b"1" + b"}" * 65, {}, 400, "too_deep"),
        ("POST", "/v1/completions", SHORT, {"content-type": "text/plain"}, 415, "content_type"),
        ("POST", "/v1/completions", SHORT, {"content-encoding": "gzip"}, 415, "content_encoding"),
        ("POST", "/v1/completions", {"prompt": "x", "model": "other"}, {}, 404, "model_not_found"),
        ("POST", "/v1/completions", {"prompt": [1] * 300_000}, {}, 400, "context_length_exceeded"),
        (
            "POST",
            "/v1/chat/completions",
            {"messages": [{"role": "user"}] * (MOST_MESSAGES + 1)},
            {},
            400,
            "invalid_value",
        ),
        ("POST", "/v1/chat/completions", {"messages": [3] * 10}, {}, 400, "invalid_value"),
        ("POST", "/tokenize", {}, {}, 400, "invalid_value"),
        ("POST", "/tokenize", b'{"prompt": "\\ud800", "add_special_tokens": false}', {}, 400, "invalid_value"),
        ("POST", "/detokenize", {"tokens": [1 << 40]}, {}, 400, "invalid_value"),
        ("POST", "/detokenize", {"tokens": [300]}, {}, 400, "invalid_value"),
        ("GET", "/health", None, {"host": "evil.example"}, 403, "host"),
    ],
)
def test_every_refusal_is_an_error_in_the_usual_words(live: Live, method, path, body, headers, status, code):
    told = live.ask(method, path, body, headers)
    assert (told.status, told.error()["code"]) == (status, code)
    assert told.headers["x-request-id"]
    assert told.headers["content-type"] == "application/json"


def test_a_request_keeps_its_sane_id_and_is_given_another_for_an_insane_one(live: Live):
    assert live.ask("GET", "/health", headers={"x-request-id": "My.id_1-2"}).headers["x-request-id"] == "My.id_1-2"
    assert live.post("/v1/completions", SHORT, {"x-request-id": "abc"}).headers["x-request-id"] == "abc"
    for bad in ("a b", "x" * 129, "a\tb", "é"):
        told = live.ask("GET", "/health", headers={"x-request-id": bad.encode("latin-1")})  # pyright: ignore
        assert told.headers["x-request-id"] != bad
        assert told.headers["x-request-id"].isalnum()


def test_a_body_that_is_too_large_is_refused_announced_or_not(live: Live):
    most = OPTIONS.body_bytes
    body = b'{"prompt": "' + b"x" * most + b'"}'
    assert live.post("/v1/completions", body).error()["code"] == "too_large"
    chunked = b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
    chunked += b"transfer-encoding: chunked\r\n\r\n" + b"100000\r\n" + b"x" * (1 << 20) + b"\r\n"
    told = live.raw(chunked + (b"100000\r\n" + b"x" * (1 << 20) + b"\r\n") * 8 + b"0\r\n\r\n", 3)
    assert not told or told.startswith(b"HTTP/1.1 413 ")
    announced = b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
    told = live.raw(announced + b"content-length: 99999999999\r\n\r\n", 3)
    assert told.startswith(b"HTTP/1.1 413 ")
    assert live.process.server.config.app._held == 0  # pyright: ignore


def test_strings_do_not_count_as_depth_and_no_string_takes_long_to_read():
    assert guard.deepest(b'{"a": "[[[[[[{{{{\\"[[[["}') == 1
    assert guard.deepest(b'[[["]]]"]]]') == 3
    assert guard.deepest(b'"\\"' * 2_000_000) == 0
    assert guard.deepest(b'"' + b"\\" * 2_000_001) == 0


def test_bodies_of_all_requests_together_are_bounded(folder, monkeypatch):
    live = Live(folder, dataclasses.replace(OPTIONS, max_body="1KiB"))
    try:
        app = live.process.server.config.app
        app._held = 8 * 1024 - 10  # pyright: ignore
        told = live.post("/v1/completions", SHORT)
        assert (told.status, told.error()["code"], told.headers["retry-after"]) == (503, "busy", "1")
        app._held = 0  # pyright: ignore
        assert live.post("/v1/completions", SHORT).status == 200
    finally:
        live.stop()


def test_heads_that_are_too_long_are_refused(live: Live):
    told = live.raw(b"GET / HTTP/1.1\r\nhost: localhost\r\nx: " + b"a" * 100_000 + b"\r\n\r\n", 3)
    assert not told or told.startswith(b"HTTP/1.1 431 ")
    told = live.raw(b"GET / HTTP/1.1\r\nhost: localhost\r\nx: " + b"a" * 40_000, 120)
    assert told.startswith(b"HTTP/1.1 431 ")
    assert json.loads(told.partition(b"\r\n\r\n")[2])["error"]["code"] == "malformed_http"


def test_slow_heads_and_slow_bodies_are_given_up(live: Live, monkeypatch):
    monkeypatch.setattr(protocol, "HEAD_SECONDS", 0.2)
    monkeypatch.setattr(guard, "BODY_SECONDS", 0.2)
    for start in (b"", b"GET / HT"):
        assert b"408 Request Timeout" in live.raw(start)
    with socket.create_connection(("127.0.0.1", live.port), timeout=300) as wire:
        wire.sendall(b"GET /health HTTP/1.1\r\nhost: localhost\r\n\r\n")
        told = b""
        while not told.endswith(b"}"):
            told += wire.recv(65536)
        wire.sendall(b"GET /he")
        assert wire.recv(65536).startswith(b"HTTP/1.1 408 Request Timeout")
        assert wire.recv(65536) == b""
    head = b"POST /tokenize HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\ncontent-length: 9\r\n\r\n"
    assert live.raw(head + b"{", 120).startswith(b"HTTP/1.1 408 ")


def test_a_reader_that_never_reads_is_given_up(live: Live, monkeypatch):
    """With small buffers, a stream that nobody takes fills them; the connection ends and so does the request."""
    monkeypatch.setattr(live.process.server.config.http, "reader_seconds", 0.2)
    body = json.dumps({"prompt": "x", "max_tokens": 500, "ignore_eos": True, "n": 8, "stream": True, "logprobs": 20})
    head = "POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
    wire = socket.socket()
    wire.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    wire.connect(("127.0.0.1", live.port))
    wire.sendall(f"{head}content-length: {len(body)}\r\n\r\n{body}".encode())
    before = metric(live, "atma_disconnects_total")
    assert live.settled()
    assert metric(live, "atma_disconnects_total") == before + 1
    wire.close()


def test_with_a_key_every_route_but_health_and_the_page_asks_for_it(folder):
    live = Live(folder, dataclasses.replace(OPTIONS, api_key="secret"))
    try:
        routes = [("GET", "/v1/models"), ("GET", "/metrics"), ("GET", "/openapi.json"), ("GET", "/nowhere")]
        routes += [("POST", p) for p in ("/v1/completions", "/v1/chat/completions", "/tokenize", "/detokenize")]
        for method, path in routes:
            for given in ("", "secret", "Bearer", "Bearer secre", "Bearer secrets", "Basic secret", f"Bearer {KEY}"):
                headers = {"authorization": given.encode("latin-1")} if given else {}
                told = live.ask(method, path, SHORT if method == "POST" else None, headers)  # pyright: ignore
                assert (told.status, told.error()["code"]) == (401, "invalid_api_key")
                assert told.headers["www-authenticate"] == "Bearer"
        assert live.ask("GET", "/health").status == live.ask("GET", "/").status == 200
        for good in ("Bearer secret", "bearer  secret"):
            assert live.post("/v1/completions", SHORT, {"authorization": good, "host": "any.example"}).status == 200
    finally:
        live.stop()


def test_a_full_queue_is_429_with_a_time_to_try_again(folder):
    live = Live(folder, dataclasses.replace(OPTIONS, max_rows=1, max_waiting=2))
    try:
        told = live.post("/v1/completions", {"prompt": "x", "n": 4, "max_tokens": 2})
        assert (told.status, told.error()["code"], told.headers["retry-after"]) == (429, "queue_full", "1")
        assert told.error()["type"] == "rate_limit_error"
        assert metric(live, "atma_rejects_total", {"reason": "queue_full"}) == 1
        assert live.post("/v1/completions", SHORT).status == 200
    finally:
        live.stop()


def test_metrics_count_requests_tokens_and_times(live: Live):
    counted = {"route": "/v1/completions", "status": "200"}
    names = ["atma_time_to_first_token_seconds_count", "atma_inter_token_seconds_count", "atma_request_seconds_count"]
    names += ["atma_cache_queries_total", "atma_tokens_written_total", "atma_cache_hits_total"]
    before = {name: metric(live, name) for name in names} | {"": metric(live, "atma_http_requests_total", counted)}
    for _ in range(2):
        asked = {"prompt": "All that counts is counted here. " * 4, "max_tokens": 5, "ignore_eos": True}
        assert live.post("/v1/completions", asked).status == 200
    after = {name: metric(live, name) for name in names} | {"": metric(live, "atma_http_requests_total", counted)}
    rises = {name: after[name] - before[name] for name in before}
    assert list(rises.values()) == [2, 8, 2, 2, 10, 1, 2]
    assert metric(live, "atma_cache_saved_tokens_total") > 0
    assert metric(live, "atma_cache_bytes") > 0
    assert metric(live, "atma_requests_running") == metric(live, "atma_requests_waiting") == 0


def test_the_log_has_sizes_and_times_and_no_text(live: Live, caplog):
    with caplog.at_level("INFO", "atma.serve"):
        asked = {"prompt": "a secret of mine", "max_tokens": 3, "ignore_eos": True}
        live.post("/v1/completions", asked, {"x-request-id": "logged"})
        live.post("/v1/completions", {"prompt": "a secret of mine", "stop": "a secret of mine " * 20})
    lines = [record.getMessage() for record in caplog.records]
    assert any(line.startswith("/v1/completions 200 id=logged prompt=17 cached=0 answer=3 first=") for line in lines)
    assert "secret" not in " ".join(lines)


def test_texts_become_tokens_and_tokens_texts(live: Live):
    told = live.post("/tokenize", {"prompt": "äx"}).json()
    assert told["tokens"] == [256, *"äx".encode()]
    assert told["count"] == 4
    assert told["max_model_len"] == live.ask("GET", "/v1/models").json()["data"][0]["max_model_len"] > 1000
    assert live.post("/tokenize", {"prompt": "x", "add_special_tokens": False}).json()["tokens"] == [120]
    named = live.post("/tokenize", {"prompt": "<|endoftext|>", "add_special_tokens": False}).json()["tokens"]
    assert named == [256]  # the name alone; in a text, and where a text begins as it does elsewhere, it is characters
    for text in ({"prompt": "<|endoftext|>!", "add_special_tokens": False}, {"prompt": "<|endoftext|>"}):
        assert live.post("/tokenize", text).json()["count"] == 14
    chat = live.post("/tokenize", {"messages": [{"role": "user", "content": "Hi"}]}).json()["tokens"]
    assert live.post("/detokenize", {"tokens": chat}).json() == {"prompt": "<|endoftext|>User: Hi\nAssistant:"}
    assert live.post("/detokenize", {"tokens": []}).json() == {"prompt": ""}


def test_a_conversation_has_one_affinity_through_all_its_turns(live: Live):
    def of(messages, headers=None):
        asked = {"messages": messages, "max_tokens": 1}
        return live.post("/v1/chat/completions", asked, headers).headers["x-atma-affinity"]

    start = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    later = [*start, {"role": "assistant", "content": "Yes?"}, {"role": "user", "content": "Go on"}]
    other = [*start[:1], {"role": "user", "content": "Ho"}]
    assert of(start) == of(later) != of(other)
    assert of(start, {"x-atma-affinity": "mine-1"}) == "mine-1"
    assert of(start, {"x-atma-affinity": "not sane"}) == of(start)
    text = live.post("/v1/completions", SHORT).headers["x-atma-affinity"]
    assert text == live.post("/v1/completions", SHORT | {"max_tokens": 1}).headers["x-atma-affinity"]


def test_salts_keep_states_apart(live: Live):
    def cached(salt: str) -> int:
        asked = {"prompt": "The same beginning of a longer text", "max_tokens": 1, "cache_salt": salt}
        return live.post("/v1/completions", asked).json()["usage"]["prompt_tokens_details"]["cached_tokens"]

    assert [cached("a"), cached("a") > 0, cached("b"), cached("")] == [0, True, 0, 0]


def test_a_long_silence_is_filled_with_comments(live: Live, monkeypatch):
    monkeypatch.setattr(streams, "PING_SECONDS", 0.001)
    told = live.post("/v1/completions", {"prompt": "long " * 2000, "max_tokens": 2, "stream": True})
    assert told.body.count(b": ping\n\n") >= 2
    assert told.events()[-1]["choices"][0]["finish_reason"] in ("length", "stop")


def test_what_fails_in_the_middle_of_a_stream_is_told_in_it_and_harms_nobody_else(live: Live, monkeypatch):
    monkeypatch.setattr(streams, "PING_SECONDS", 0.001)
    healthy: list = []
    asked = {"prompt": "healthy", "max_tokens": 60, "stream": True, "ignore_eos": True, "temperature": 0}
    alone = live.post("/v1/completions", asked).events()
    thread = threading.Thread(target=lambda: healthy.append(live.post("/v1/completions", asked)))
    choose = sampler.choose

    def poisoned(logits, sequences, end):
        pairs = zip(choose(logits, sequences, end), sequences, strict=True)
        return [None if s.request.seed == 666 and s.written == 3 else token for token, s in pairs]

    monkeypatch.setattr(sampler, "choose", poisoned)
    thread.start()
    broken = live.post("/v1/completions", asked | {"prompt": "broken", "seed": 666})
    thread.join()
    assert broken.status == 200
    assert broken.events()[-1]["error"]["message"] == "the model's logits are not finite"
    whole = live.post("/v1/completions", asked | {"prompt": "broken", "seed": 666, "stream": False})
    assert (whole.status, whole.error()["code"]) == (500, "failed")
    text = "".join(e["choices"][0]["text"] for e in healthy[0].events())
    assert text == "".join(e["choices"][0]["text"] for e in alone)
    monkeypatch.undo()
    assert live.settled()
