"""Stop tokens over HTTP: those of a request, those of the model's folder, and turns by a template that writes them."""

import asyncio
import shutil
from collections.abc import Iterator

import pytest
from tokenizers import AddedToken

from atma.checkpoint import save_model
from atma.tokenizer import Tokenizer, byte_tokenizer
from tests.serve.conftest import random_model
from tests.serve.http.conftest import OPTIONS, Live

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
START, END = 257, 258
LETTERS = {str(token): 100 for token in (*range(97, 123), END)}
"""Biases with which answers are letters, until an end of turn."""


@pytest.fixture(scope="module")
def chatml(tmp_path_factory) -> Iterator[Live]:
    backend = byte_tokenizer().backend
    backend.add_special_tokens([AddedToken(name, special=True) for name in ("<|im_start|>", "<|im_end|>")])
    folder = tmp_path_factory.mktemp("chatml") / "tiny"
    save_model(folder, random_model(vocabulary=259), Tokenizer(backend, 256))
    (folder / "chat_template.jinja").write_text(CHATML)
    (folder / "generation_config.json").write_text(f'{{"eos_token_id": [256, {END}]}}')
    server = Live(folder)
    yield server
    server.stop()


def turn(live: Live, talk: list[dict], **changes) -> dict:
    body = {"messages": talk, "max_tokens": 400, "logit_bias": LETTERS, "seed": 1, **changes}
    return live.post("/v1/chat/completions", body).json()


def test_an_answer_ends_with_the_end_of_turn_and_the_next_turn_reads_none_of_it_again(chatml: Live):
    talk = [{"role": "user", "content": "Hello there"}]
    first = turn(chatml, talk)
    answer, usage = first["choices"][0], first["usage"]
    said = answer["message"]["content"]
    assert answer["finish_reason"] == "stop"
    assert len(said) >= 5
    assert said.isalpha()
    assert usage["completion_tokens"] == len(said) + 1
    second = turn(chatml, [*talk, answer["message"], {"role": "user", "content": "More"}])
    told = second["usage"]["prompt_tokens_details"]["cached_tokens"]
    assert told == usage["prompt_tokens"] + len(said)
    assert second["usage"]["prompt_tokens"] == told + len("!\n!user\nMore!\n!assistant\n")


def test_a_stream_ends_with_the_end_of_turn_too(chatml: Live):
    talk = [{"role": "user", "content": "Stream"}]
    body = {"messages": talk, "max_tokens": 400, "logit_bias": LETTERS, "seed": 2, "stream": True}
    events = chatml.post("/v1/chat/completions", body).events()
    text = "".join(event["choices"][0]["delta"].get("content", "") for event in events)
    assert text == turn(chatml, talk, seed=2)["choices"][0]["message"]["content"]
    assert events[-1]["choices"][0]["finish_reason"] == "stop"


def test_completions_end_with_the_end_of_turn_unless_ends_are_ignored(chatml: Live):
    body = {"prompt": "once", "max_tokens": 60, "logit_bias": {str(END): 100}, "temperature": 0}
    ended = chatml.post("/v1/completions", body).json()
    assert (ended["choices"][0]["text"], ended["choices"][0]["finish_reason"]) == ("", "stop")
    on = chatml.post("/v1/completions", body | {"ignore_eos": True}).json()
    assert (on["usage"]["completion_tokens"], on["choices"][0]["finish_reason"]) == (60, "length")
    own = chatml.post("/v1/completions", body | {"ignore_eos": True, "stop_token_ids": [END]}).json()
    assert (own["usage"]["completion_tokens"], own["choices"][0]["finish_reason"]) == (1, "stop")


def test_a_stop_token_of_the_request_ends_its_answer_without_being_told(live: Live):
    body = {"prompt": "once", "max_tokens": 9, "logit_bias": {"65": 100}, "temperature": 0, "logprobs": 0}
    assert live.post("/v1/completions", body).json()["choices"][0]["text"] == "A" * 9
    choice = live.post("/v1/completions", body | {"stop_token_ids": [66, 65]}).json()["choices"][0]
    assert (choice["text"], choice["finish_reason"], choice["logprobs"]["tokens"]) == ("", "stop", ["A"])


@pytest.mark.parametrize("wrong", [[257], [-1], ["A"], 65, [True], [1] * 129, {"a": 1}])
@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_a_stop_token_that_is_none_is_refused_by_the_name_it_was_given(live: Live, wrong, path: str):
    body = {"prompt": "x"} if path == "/v1/completions" else {"messages": [{"role": "user", "content": "x"}]}
    told = live.post(path, body | {"max_tokens": 1, "stop_token_ids": wrong})
    assert told.status == 400
    assert told.error()["param"] == "stop_token_ids"
    assert "'stop_token_ids" in told.error()["message"]


def test_no_stop_tokens_are_none(live: Live):
    for none in ([], None):
        told = live.post("/v1/completions", {"prompt": "x", "max_tokens": 1, "stop_token_ids": none})
        assert told.status == 200


def test_a_folder_that_declares_what_is_no_token_is_not_served(folder, tmp_path):
    from atma.serve.http.service import Service

    own = shutil.copytree(folder, tmp_path / "own")
    (own / "generation_config.json").write_text('{"eos_token_id": 9999}')
    with pytest.raises(ValueError, match=r"generation_config\.json: eos_token_id 9999 is no token of the 257"):
        asyncio.run(Service(str(own), OPTIONS).load())
