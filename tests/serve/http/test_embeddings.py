"""Vectors of texts: those of the model itself, the same bits in every batch, by the real client, chats beside."""

import base64
import dataclasses
import math
import struct
import threading

import openai
import pytest
import torch

from atma.serve.http import embeddings
from atma.serve.request import Request, RequestError
from tests.serve.conftest import finish, random_model
from tests.serve.http.conftest import OPTIONS, Live

TEXTS = ["one", "two two", "a much longer text than the others, of several pages of keys " * 3, "z"]


def expected(text: str, pooling: str, normalised: bool = True) -> list[float]:
    with torch.no_grad():
        hidden = random_model()(torch.tensor([[256, *text.encode()]]))[0][0].double()
    vector = hidden[-1] if pooling == "last" else hidden.mean(0)
    return (vector / vector.norm() if normalised else vector).tolist()


def ask(live: Live, given, **fields) -> list[list[float]]:
    told = live.post("/v1/embeddings", {"input": given} | fields)
    assert told.status == 200, told.body
    return [one["embedding"] for one in told.json()["data"]]


@pytest.fixture(scope="module")
def mean(folder):
    server = Live(folder, dataclasses.replace(OPTIONS, pooling="mean"))
    yield server
    server.stop()


def test_a_vector_is_the_last_hidden_state_or_the_mean_of_all(live: Live, mean: Live):
    for server, pooling in ((live, "last"), (mean, "mean")):
        for text, found in zip(TEXTS, ask(server, TEXTS), strict=True):
            assert found == pytest.approx(expected(text, pooling), abs=2e-6)
            assert math.hypot(*found) == pytest.approx(1, abs=1e-6)
        [plain] = ask(server, TEXTS[2], normalize=False)
        assert plain == pytest.approx(expected(TEXTS[2], pooling, False), rel=1e-4, abs=1e-4)


@pytest.mark.parametrize("server", ["live", "mean"])
def test_a_vector_is_the_same_bits_alone_in_a_batch_and_as_tokens(server, request):
    live = request.getfixturevalue(server)
    together = ask(live, TEXTS * 5, encoding_format="base64")
    alone = [ask(live, text, encoding_format="base64")[0] for text in TEXTS]
    assert together == alone * 5
    assert ask(live, [[256, *text.encode()] for text in TEXTS], encoding_format="base64") == alone
    assert ask(live, [256, *TEXTS[0].encode()], encoding_format="base64") == alone[:1]


def test_both_encodings_are_the_same_numbers(live: Live):
    [numbers], [text] = ask(live, "x"), ask(live, "x", encoding_format="base64")
    data = base64.b64decode(text)
    assert list(struct.unpack(f"<{len(data) // 4}f", data)) == [
        struct.unpack("f", struct.pack("f", x))[0] for x in numbers
    ]


def test_the_real_client_gets_vectors(live: Live, client: openai.OpenAI):
    told = client.embeddings.create(model="tiny", input=TEXTS)
    assert [one.index for one in told.data] == [0, 1, 2, 3]
    assert told.data[1].embedding == pytest.approx(expected(TEXTS[1], "last"), abs=2e-6)
    assert told.usage.prompt_tokens == told.usage.total_tokens == sum(map(len, TEXTS)) + 4
    wide = client.embeddings.create(model="tiny", input="x", dimensions=32, encoding_format="float", user="someone")
    assert len(wide.data[0].embedding) == 32
    with pytest.raises(openai.BadRequestError, match="32 numbers"):
        client.embeddings.create(model="tiny", input="x", dimensions=16)


@pytest.fixture
def small(folder):
    """A server whose memory holds little, so that a text too long for it is soon read."""
    server = Live(folder, dataclasses.replace(OPTIONS, memory_budget="15MiB"))
    yield server
    server.stop()


def test_what_is_too_long_is_refused_unless_its_end_is_asked_for(small: Live):
    live = small
    longest = live.ask("GET", "/v1/models").json()["data"][0]["max_model_len"]
    long = "x" * (longest + 50)
    told = live.post("/v1/embeddings", {"input": ["short", long]})
    assert (told.status, told.error()["code"], told.error()["param"]) == (400, "context_length_exceeded", "input")
    assert ask(live, long, truncate_prompt_tokens=3) == ask(live, [list(b"xxx")])
    assert live.post("/v1/embeddings", {"input": long, "truncate_prompt_tokens": -1}).json()["usage"] == {
        "prompt_tokens": longest,
        "total_tokens": longest,
    }


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({}, "input"),
        ({"input": []}, "input"),
        ({"input": [[]]}, "input"),
        ({"input": ["x", 1]}, "input"),
        ({"input": [257]}, "input"),
        ({"input": ["x"] * 2049}, "input"),
        ({"input": "x", "encoding_format": "int8"}, "encoding_format"),
        ({"input": "x", "dimensions": 0}, "dimensions"),
        ({"input": "x", "truncate_prompt_tokens": 0}, "truncate_prompt_tokens"),
        ({"input": "x", "stream": True}, "stream"),
        ({"input": "\ud800"}, "input"),
    ],
)
def test_what_is_no_text_is_refused_by_name(live: Live, fields, param):
    told = live.post("/v1/embeddings", fields)
    assert told.status == 400
    assert told.error()["param"] == param
    assert live.post("/v1/embeddings", {"input": "x", "model": "other"}).status == 404


def test_vectors_that_could_not_be_held_are_refused_with_a_mend_of_their_own(live: Live, monkeypatch):
    monkeypatch.setattr(embeddings, "answer_bytes", lambda count, width: 1 << 40)
    refused = live.post("/v1/embeddings", {"input": ["a", "b"]})
    assert (refused.status, refused.error()["code"], refused.error()["param"]) == (400, "answer_too_large", "input")
    assert "fewer texts" in refused.error()["message"]
    assert "stream" not in refused.error()["message"]


def test_many_texts_leave_chats_and_their_states_alone(live: Live):
    chat = {"prompt": "kept", "max_tokens": 60, "temperature": 0, "ignore_eos": True}
    before = live.post("/v1/completions", chat).json()
    kept = live.stats()["kept_states"]
    many = threading.Thread(target=ask, args=(live, [f"{i} " * (i % 60 + 1) for i in range(600)]))
    many.start()
    beside = [live.post("/v1/completions", chat).json() for _ in range(4)]
    many.join()
    assert {one["choices"][0]["text"] for one in beside} == {before["choices"][0]["text"]}
    assert all(one["usage"]["prompt_tokens_details"]["cached_tokens"] == 5 for one in beside)
    assert live.stats()["kept_states"] == kept
    assert live.settled()


@pytest.mark.parametrize("pooling", ["last", "mean"])
def test_an_interrupted_text_has_the_same_vector(engine, pooling):
    text = "interrupted while it is read " * 3
    alone = engine.submit(Request(text, max_tokens=0, embed=pooling))
    finish(engine, alone)
    again = engine.submit(Request(text, max_tokens=0, embed=pooling, cache=False))
    engine.step()
    engine.pause(again.id)
    engine.step()
    engine.resume(again.id)
    finish(engine, again)
    assert torch.equal(alone.outputs[0].embedding, again.outputs[0].embedding)
    assert again.outputs[0].finish_reason == "stop"
    assert again.outputs[0].usage.completion == 0


def test_a_vector_is_asked_for_alone(engine):
    for wrong in (Request("x", embed="last", n=2), Request("x", embed="last", echo=True)):
        with pytest.raises(RequestError, match="embed"):
            engine.submit(wrong)
