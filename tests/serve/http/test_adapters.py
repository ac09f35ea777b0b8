"""Adapters over HTTP: models of their own names, for OpenAI's client and in every kind of request."""

import dataclasses
import subprocess
import sys

import openai
import pytest
import torch

from atma.checkpoint import load_model, save_model
from atma.lora import LoraConfig, adapted_layers, attach, merge, save_adapters
from atma.serve.http.service import Service
from atma.serve.llm import LLM
from atma.serve.request import RequestError
from atma.tokenizer import byte_tokenizer
from tests.serve.conftest import random_model
from tests.serve.http.conftest import OPTIONS, Live
from tests.serve.http.test_limits import metric

TEXT = {"prompt": "Once upon", "max_tokens": 12, "temperature": 0, "ignore_eos": True}
CHAT = {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 12, "temperature": 0, "ignore_eos": True}


@pytest.fixture(scope="module")
def folders(folder, tmp_path_factory):
    """A folder of adapters, and the model with these merged."""
    place = tmp_path_factory.mktemp("adapters")
    model, tokenizer = load_model(folder)
    attached = attach(model, LoraConfig(4), torch.Generator().manual_seed(1))
    with torch.no_grad():
        for layer in adapted_layers(model).values():
            layer.lora_b.normal_(std=0.1, generator=torch.Generator().manual_seed(2))
    save_adapters(place / "own", model, attached, str(folder))
    merge(model)
    save_model(place / "merged", model, tokenizer)
    return place


@pytest.fixture(scope="module")
def worn(folder, folders):
    server = Live(folder, dataclasses.replace(OPTIONS, adapter=(f"poet={folders / 'own'}", f"again={folders / 'own'}")))
    yield server
    server.stop()


@pytest.fixture(scope="module")
def merged(folders):
    server = Live(folders / "merged")
    yield server
    server.stop()


def test_openai_finds_an_adapter_as_a_model_and_is_answered_in_its_words(worn, merged, live):
    with openai.OpenAI(base_url=f"{worn.url}/v1", api_key="none", max_retries=0) as client:
        listed = client.models.list().data
        assert [(one.id, (one.model_extra or {}).get("parent")) for one in listed] == [
            ("tiny", None),
            ("poet", "tiny"),
            ("again", "tiny"),
        ]
        assert client.models.retrieve("poet").id == "poet"
        with pytest.raises(
            openai.NotFoundError, match="no model 'other' here; this server has 'tiny', 'poet', 'again'"
        ):
            client.completions.create(model="other", prompt="a")
        fields = {"max_tokens": 12, "temperature": 0, "extra_body": {"ignore_eos": True}}
        found = client.completions.create(model="poet", prompt="Once upon", **fields)
        chunks = list(client.completions.create(model="poet", prompt="Once upon", stream=True, **fields))
    assert found.model == "poet" == chunks[0].model
    assert found.choices[0].text == "".join(chunk.choices[0].text for chunk in chunks if chunk.choices)
    assert found.choices[0].text == merged.post("/v1/completions", TEXT).json()["choices"][0]["text"]
    assert found.choices[0].text != live.post("/v1/completions", TEXT).json()["choices"][0]["text"]


def test_every_kind_of_request_names_an_adapter(worn, merged, live):
    for path, body, told in (
        ("/v1/chat/completions", CHAT, lambda x: x["choices"]),
        ("/v1/messages", {k: v for k, v in CHAT.items() if k != "ignore_eos"}, lambda x: x["content"]),
        ("/v1/embeddings", {"input": "Once upon"}, lambda x: x["data"]),
        (
            "/v1/responses",
            {"input": "Hello", "max_output_tokens": 12, "temperature": 0, "store": False},
            lambda x: x["output"][0]["content"],
        ),
    ):
        answers = [
            server.post(path, body if name is None else body | {"model": name}).json()
            for server, name in ((worn, "poet"), (merged, None), (worn, "tiny"), (live, None))
        ]
        assert [answer["model"] for answer in answers] == ["poet", "tiny", "tiny", "tiny"]
        found, wanted, own, bare = map(told, answers)
        if path == "/v1/embeddings":
            found, wanted, own, bare = (torch.tensor(some[0]["embedding"]) for some in (found, wanted, own, bare))
            torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
            assert torch.equal(own, bare)
            assert not torch.allclose(found, bare, atol=1e-3)
        else:
            assert found == wanted
            assert own == bare != wanted
    for path, body in (("/tokenize", {"prompt": "a"}), ("/detokenize", {"tokens": [97]})):
        assert worn.post(path, body | {"model": "poet"}).status == 200
        assert worn.post(path, body | {"model": "other"}).error()["code"] == "model_not_found"


def test_states_of_an_adapter_are_its_own_and_of_its_numbers(worn):
    prompt = {"prompt": "A beginning that nobody else has asked for", "max_tokens": 2}

    def cached(model):
        told = worn.post("/v1/completions", prompt | {"model": model}).json()
        return told["usage"]["prompt_tokens_details"]["cached_tokens"]

    assert [cached(name) for name in ("tiny", "poet", "tiny", "again")] == [0, 0, 43, 43]


def test_requests_are_counted_by_the_name_that_they_ask_for(worn):
    def counts():
        return [metric(worn, "atma_http_requests_total", {"model_name": name}) for name in ("tiny", "poet")]

    before = counts()
    worn.post("/v1/completions", TEXT | {"model": "poet"})
    after = counts()
    assert after[1] - before[1] == 1
    assert metric(worn, "atma_adapters") == 2
    assert metric(worn, "atma_adapter_bytes") > 0


def test_a_server_does_not_begin_with_adapters_that_do_not_fit(folder, folders, tmp_path):
    def told(*options):
        command = [sys.executable, "-m", "atma", "serve", str(folder), "--port", "0", *options]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
        assert done.returncode == 2
        return done.stderr.strip().splitlines()[-1]

    other = tmp_path / "other"
    save_model(other, random_model(seed=3), byte_tokenizer())
    assert "must be like NAME=FOLDER" in told("--adapter", "poet")
    assert "each a name of its own" in told("--adapter", "a=b", "--adapter", "a=c")
    assert "no adapters here" in told("--adapter", f"a={tmp_path}", "--adapter", f"b={tmp_path}")
    with pytest.raises(ValueError, match="the model itself is called so; name the adapter otherwise"):
        Service(str(folder), dataclasses.replace(OPTIONS, adapter=("tiny=x",)))
    with pytest.raises(ValueError, match="trained on another model"):
        LLM(other, adapters={"a": folders / "own"})


def test_an_llm_answers_in_the_words_of_an_adapter(folder, folders):
    options = {"max_tokens": 12, "temperature": 0, "ignore_end": True}
    with LLM(folder, adapters={"poet": folders / "own"}) as llm, LLM(folders / "merged") as whole:
        found = llm.generate("Once upon", adapter="poet", **options)
        wanted = whole.generate("Once upon", **options)
        assert found.tokens == wanted.tokens != llm.generate("Once upon", **options).tokens
        assert "".join(llm.stream("Once upon", adapter="poet", **options)) == found.text
        talk = [{"role": "user", "content": "Hello"}]
        asked = {"template": "plain", **options}
        assert llm.chat(talk, adapter="poet", **asked).tokens == whole.chat(talk, **asked).tokens
        with pytest.raises(RequestError, match="'adapter' 'other' is not loaded; there are poet"):
            llm.generate("a", adapter="other")
