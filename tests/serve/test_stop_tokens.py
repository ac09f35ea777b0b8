"""Stop tokens in the engine: they end an answer without being part of its text, and what is kept of it is exact."""

import pytest

from atma.checkpoint import save_model
from atma.serve.llm import LLM
from atma.serve.request import Request, RequestError
from atma.settings import Settings
from atma.tokenizer import byte_tokenizer
from tests.serve.conftest import SMALL, AuditedEngine, finish, random_model

TEXT = [256, *b"the beginning of a conversation"]


def _answer(engine, **changes):
    request = {"max_tokens": 40, "temperature": 0, "logprobs": 0, **changes}
    handle = engine.submit(Request(TEXT, **request))
    finish(engine, handle)
    return handle.outputs[0]


def _cut(tokens: list[int], stop: int) -> list[int]:
    return tokens[: tokens.index(stop) + 1]


def test_an_answer_ends_with_the_first_stop_token_which_is_not_in_its_text(engine) -> None:
    whole = _answer(engine, ignore_end=True)
    stop = whole.tokens[7]
    expected = _cut(whole.tokens, stop)
    ended = _answer(engine, stop_tokens=(stop, 256))
    assert (ended.tokens, ended.finish_reason) == (expected, "stop")
    assert ended.logprobs == whole.logprobs[: len(expected)]
    assert ended.text.encode("utf-8", "replace").count(bytes([stop])) == 0
    assert ended.text == bytes(expected[:-1]).decode("utf-8", "replace")[: len(ended.text)]


def test_a_stop_token_ends_an_answer_that_ignores_the_end_of_text(engine) -> None:
    stop = _answer(engine, ignore_end=True).tokens[3]
    assert _answer(engine, ignore_end=True, stop_tokens=(stop,)).finish_reason == "stop"


def test_text_held_back_for_a_stop_text_comes_out_before_a_stop_token(engine) -> None:
    chosen = {"logit_bias": {97: 100.0, 99: 100.0}, "temperature": 1, "stop": ("ab",), "stop_tokens": (99,)}
    answers = [_answer(engine, seed=seed, **chosen) for seed in range(6)]
    assert max(len(answer.tokens) for answer in answers) > 2
    for answer in answers:
        assert answer.tokens == [97] * (len(answer.tokens) - 1) + [99]
        assert answer.text == "a" * (len(answer.tokens) - 1)


@pytest.mark.parametrize("including", [False, True])
def test_the_next_turn_goes_on_from_the_state_before_the_stop_token_to_the_bit(engine, including: bool) -> None:
    stop = _answer(engine, ignore_end=True, cache=False).tokens[7]
    ended = _answer(engine, stop_tokens=(stop,))
    read = TEXT + ended.tokens[: None if including else -1]
    asked = Request([*read, *b" and then"], max_tokens=6, temperature=0, logprobs=0, ignore_end=True)
    handle = engine.submit(asked)
    finish(engine, handle)
    turn, cold = handle.outputs[0], AuditedEngine(random_model(), byte_tokenizer(), SMALL)
    alone = cold.submit(asked)
    finish(cold, alone)
    assert turn.usage.cached == len(TEXT) + len(ended.tokens) - 1
    assert (turn.tokens, turn.logprobs) == (alone.outputs[0].tokens, alone.outputs[0].logprobs)


@pytest.mark.parametrize("wrong", [(257,), (5, -1), ("a",), (True,)])
def test_a_stop_token_outside_the_vocabulary_is_refused(engine, wrong) -> None:
    with pytest.raises(RequestError, match="'stop_tokens'") as refused:
        engine.submit(Request(TEXT, stop_tokens=wrong))
    assert (refused.value.code, refused.value.parameter) == ("invalid", "stop_tokens")


def test_llm_takes_the_ends_of_its_folder_and_of_its_settings(tmp_path) -> None:
    save_model(tmp_path / "model", random_model(), byte_tokenizer())
    settings = Settings(max_tokens=40, temperature=0)
    [whole] = LLM(tmp_path / "model").generate([TEXT], settings)
    stop = whole.tokens[7]
    (tmp_path / "model" / "generation_config.json").write_text(f'{{"eos_token_id": [{stop}, 256]}}')
    llm = LLM(tmp_path / "model")
    assert llm.generate([TEXT], settings)[0].tokens == _cut(whole.tokens, stop)
    on = Settings(max_tokens=40, temperature=0, ignore_end=True)
    assert len(llm.generate([TEXT], on)[0].tokens) == 40
    own = Settings(max_tokens=40, temperature=0, ignore_end=True, stop_tokens=(stop,))
    assert llm.generate([TEXT], own)[0].tokens == _cut(whole.tokens, stop)
