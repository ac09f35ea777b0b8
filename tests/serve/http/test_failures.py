"""Whatever goes wrong, a request is answered: with an error in the usual words, or an event that ends its stream."""

import pytest

from atma.serve import cache
from atma.serve.http.answers import Answer, ChatShape
from atma.tokenizer import Tokenizer
from tests.serve.http.conftest import Live

TALK = {"messages": [{"role": "user", "content": "xyz"}], "max_tokens": 2}
TEXT = {"prompt": "xyz", "max_tokens": 2}


class Unforeseen(Exception):
    """What no code expects."""


def failing(*_, **__):
    raise Unforeseen("nobody thought of this")


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("path", "body"), [("/v1/completions", TEXT), ("/v1/chat/completions", TALK), ("/tokenize", {"prompt": "xyz"})]
)
def test_a_tokenizer_that_fails_is_told_and_logged(live: Live, monkeypatch, caplog, path, body, stream):
    monkeypatch.setattr(Tokenizer, "encode", failing)
    monkeypatch.setattr(Tokenizer, "encode_rendered", failing, raising=False)
    told = live.post(path, body | ({"stream": True} if stream and path != "/tokenize" else {}))
    assert (told.status, told.error()["code"]) == (500, "internal")
    assert told.headers["content-type"] == "application/json"
    assert told.headers["x-request-id"] in told.error()["message"]
    assert any("Unforeseen" in record.getMessage() for record in caplog.records)
    monkeypatch.undo()
    assert live.settled()
    assert live.post(path, body).status == 200


def test_an_answer_that_cannot_be_put_together_is_told_whole_and_streamed(live: Live, monkeypatch, caplog):
    asked = TALK | {"max_tokens": 5, "ignore_eos": True}
    monkeypatch.setattr(ChatShape, "logprobs", failing)
    told = live.post("/v1/chat/completions", asked)
    assert (told.status, told.error()["code"]) == (500, "internal")
    monkeypatch.undo()
    chunk, count = Answer.chunk, iter(range(100))
    monkeypatch.setattr(Answer, "chunk", lambda *given: failing() if next(count) == 3 else chunk(*given))
    told = live.post("/v1/chat/completions", asked | {"stream": True})
    assert told.status == 200
    assert told.events()[-1]["error"]["code"] == "internal"
    assert sum("Unforeseen" in record.getMessage() for record in caplog.records) == 2
    monkeypatch.undo()
    assert live.settled()


def test_a_detokenizer_that_fails_is_told(live: Live, monkeypatch):
    monkeypatch.setattr(Tokenizer, "decode", failing)
    told = live.post("/detokenize", {"tokens": [1]})
    assert (told.status, told.error()["code"]) == (500, "internal")
    echo = live.post("/v1/completions", {"prompt": [1, 2], "max_tokens": 1, "echo": True})
    assert (echo.status, echo.error()["code"]) == (500, "failed")
    assert "echoed" in echo.error()["message"]


def test_a_kept_state_that_cannot_be_looked_for_costs_its_own_request_alone(live: Live, monkeypatch):
    find = cache.StateCache.find
    monkeypatch.setattr(cache.StateCache, "find", lambda *given: failing() if given[3] == "poison" else find(*given))
    told = live.post("/v1/completions", TEXT | {"cache_salt": "poison"})
    assert (told.status, told.error()["code"]) == (500, "failed")
    assert live.post("/v1/completions", TEXT).status == 200


def test_a_route_that_is_read_can_be_asked_for_its_head(live: Live):
    for path in ("/health", "/v1/models", "/v1/models/tiny", "/metrics", "/openapi.json", "/"):
        told, head = live.ask("GET", path), live.ask("HEAD", path)
        assert (head.status, head.body, told.status) == (200, b"", 200), path
        assert head.headers["content-type"] == told.headers["content-type"]
    assert live.ask("HEAD", "/v1/completions").status == 405
    assert live.ask("HEAD", "/nowhere").status == 404


@pytest.mark.parametrize(("path", "methods"), [("/v1/completions", "POST"), ("/v1/models", "GET, HEAD")])
def test_a_route_that_has_other_methods_tells_them(live: Live, path: str, methods: str) -> None:
    assert live.ask("DELETE", path).headers["allow"] == methods
