"""`atma.LLM`: one prompt gives one completion, a list a list; streams that may be left, and chats that go on."""

import gc

import numpy as np
import pytest
import torch

from atma.checkpoint import save_model
from atma.serve.completion import Completion
from atma.serve.llm import LLM
from atma.serve.request import RequestError
from atma.settings import Settings
from atma.tokenizer import byte_tokenizer
from tests.serve.conftest import SMALL, random_model

CHAT = [{"role": "user", "content": "Good morning"}]
GREEDY = Settings(max_tokens=12, temperature=0, ignore_end=True)


@pytest.fixture
def folder(tmp_path):
    save_model(tmp_path / "model", random_model(), byte_tokenizer())
    return tmp_path / "model"


@pytest.fixture
def llm(folder):
    with LLM(folder, SMALL) as made:
        yield made


def test_one_prompt_gives_one_completion_and_a_list_a_list(llm) -> None:
    one = llm.generate("abc", GREEDY)
    assert isinstance(one, Completion)
    assert llm.generate(["abc", "b"], GREEDY)[0].tokens == one.tokens
    assert llm.generate([], GREEDY) == []


def test_token_ids_are_one_prompt_and_lists_of_them_several(llm) -> None:
    ids = [256, *b"abc"]
    assert llm.generate(ids, GREEDY).tokens == llm.generate("abc", GREEDY).tokens
    assert [one.tokens for one in llm.generate([ids], GREEDY)] == [llm.generate(ids, GREEDY).tokens]


@pytest.mark.parametrize("kind", [np.array, torch.tensor, tuple, lambda ids: list(np.array(ids))])
def test_token_ids_may_be_an_array_or_a_tensor(llm, kind) -> None:
    ids = [256, *b"abc"]
    expected = llm.generate(ids, GREEDY)
    assert llm.generate(kind(ids), GREEDY).tokens == expected.tokens
    assert llm.generate([kind(ids)], GREEDY)[0].tokens == expected.tokens
    assert "".join(llm.stream(kind(ids), GREEDY)) == expected.text


def test_rows_of_an_array_are_several_prompts(llm) -> None:
    assert len(llm.generate(np.array([[256, 97], [256, 98]]), GREEDY)) == 2


@pytest.mark.parametrize("wrong", [None, 5, b"abc", ["a", 5], [1.5], {"a": 1}, [True], np.array([0.5])])
def test_what_is_no_prompt_is_told(llm, wrong) -> None:
    with pytest.raises(RequestError, match="a prompt must be a text or a list of token ids, not"):
        llm.generate(wrong)


def test_a_completion_prints_as_its_text_and_says_what_it_is(llm) -> None:
    completion = llm.generate("abc", GREEDY)
    assert str(completion) == completion.text
    assert "12 tokens, 'length'" in repr(completion)
    assert "<pre" in completion._repr_html_()
    assert "&lt;b&gt;" in Completion("<b>", [1], "stop")._repr_html_()


def test_keyword_arguments_stand_in_the_place_of_settings(llm) -> None:
    assert len(llm.generate("abc", GREEDY, max_tokens=3).tokens) == 3
    assert (
        llm.generate("abc", max_tokens=12, temperature=0, ignore_end=True).tokens == llm.generate("abc", GREEDY).tokens
    )


def test_an_unknown_argument_is_told_with_the_nearest(llm) -> None:
    with pytest.raises(ValueError, match="'max_token'; did you mean 'max_tokens'"):
        llm.generate("abc", max_token=1)
    with pytest.raises(ValueError, match="'temperature' must be 0 or more"):
        llm.generate("abc", temperature=-1.0)


def test_pieces_of_a_stream_are_the_text(llm) -> None:
    stream = llm.stream("abc", GREEDY)
    assert stream.completion is None
    assert "".join(stream) == llm.generate("abc", GREEDY).text
    assert stream.completion.finish_reason == "length"


@pytest.mark.parametrize("leave", ["close", "with", "let go"])
def test_a_stream_that_is_left_holds_nothing(llm, leave: str) -> None:
    def free() -> tuple[int, int]:
        stats = llm.engine.stats()
        return stats["running"], stats["waiting"]

    stream = llm.stream("abc", GREEDY, max_tokens=200)
    next(stream)
    assert free() == (1, 0)
    if leave == "close":
        stream.close()
    elif leave == "with":
        with stream:
            next(stream)
    else:
        del stream
        gc.collect()
        assert free() == (1, 0), "not before the next call"
        llm.generate("b", GREEDY, max_tokens=1)
    assert free() == (0, 0)
    assert not llm.engine.answers.handles


def test_a_stream_that_was_closed_gives_nothing_more(llm) -> None:
    stream = llm.stream("abc", GREEDY)
    stream.close()
    assert list(stream) == []
    assert stream.completion is None


def test_two_streams_and_a_call_between_them_do_not_mix(llm) -> None:
    alone = llm.generate("abc", GREEDY).text
    first, second = llm.stream("abc", GREEDY), llm.stream("abc", GREEDY)
    begun = next(first)
    assert llm.generate("abc", GREEDY).text == alone
    assert "".join(second) == alone
    assert begun + "".join(first) == alone


def test_a_bad_request_is_told_before_a_stream_begins(llm) -> None:
    with pytest.raises(RequestError, match="outside the vocabulary"):
        llm.stream([999], GREEDY)


def test_a_model_without_a_chat_template_says_what_to_do(llm) -> None:
    with pytest.raises(ValueError, match=r"no chat template.*chat_template.jinja.*template='plain'"):
        llm.chat(CHAT)
    with pytest.raises(ValueError, match="no such file; built in"):
        llm.chat(CHAT, template="chatmll")


@pytest.mark.parametrize("wrong", ["hello", [], [{"role": "user"}], [{"role": "user", "content": 3}], CHAT[0]])
def test_what_is_no_chat_is_told_with_what_is_one(llm, wrong) -> None:
    with pytest.raises(ValueError, match="messages must be a list such as"):
        llm.chat(wrong, template="plain")


def test_a_folder_with_a_template_is_asked_by_it(folder) -> None:
    (folder / "chat_template.jinja").write_text("{% for m in messages %}<{{ m.content }}>{% endfor %}")
    with LLM(folder, SMALL) as llm:
        answer = llm.chat(CHAT, GREEDY)
        assert answer.tokens == llm.generate([*b"<Good morning>"], GREEDY).tokens


def test_the_next_turn_reads_only_what_is_new(llm) -> None:
    first = llm.chat(CHAT, GREEDY, template="plain", stop=())
    later = [*CHAT, {"role": "assistant", "content": "x"}, {"role": "user", "content": "And now?"}]
    second = llm.chat(later, GREEDY, template="plain")
    assert first.usage.cached == 0
    assert second.usage.cached >= first.usage.prompt - 1
    with LLM(llm._folder, SMALL) as cold:
        assert cold.chat(later, GREEDY, template="plain").tokens == second.tokens


def test_a_chat_may_be_streamed(llm) -> None:
    pieces = llm.chat(CHAT, GREEDY, stream=True, template="plain")
    assert "".join(pieces) == llm.chat(CHAT, GREEDY, template="plain").text


def test_a_closed_llm_takes_no_more_and_ends_its_processes(folder) -> None:
    llm = LLM(folder, SMALL)
    llm.chat(CHAT, GREEDY, template="plain")
    renderer = llm._renderers["plain"]
    llm.close()
    llm.close()
    assert renderer._process is None
    with pytest.raises(RequestError, match="closed"):
        llm.generate("abc")
    with pytest.raises(RequestError, match="closed"):
        llm.chat(CHAT, GREEDY, template="plain")
    assert not llm._renderers


def test_type_device_and_threads_may_be_chosen(folder) -> None:
    before = torch.get_num_threads()
    with LLM(folder, SMALL, dtype="float64", device="cpu", threads=1) as llm:
        assert "float64 on cpu" in repr(llm)
        assert torch.get_num_threads() == 1
    torch.set_num_threads(before)
    for given, told in (
        ({"dtype": "int8"}, "'dtype' must be one of"),
        ({"threads": 0}, "'threads' must be"),
        ({"device": "abacus"}, "device abacus"),
    ):
        with pytest.raises(ValueError, match=told):
            LLM(folder, SMALL, **given)


def test_the_former_name_of_an_argument_is_understood_and_told(folder) -> None:
    with pytest.warns(
        DeprecationWarning, match=r"LLM\(path=...\) is deprecated since atma .*; write LLM\(model=...\)"
    ) as told:
        LLM(path=folder, config=SMALL).close()
    assert told[0].filename == __file__
    with pytest.raises(TypeError, match="LLM has no argument 'paths'"):
        LLM(paths=folder)


def test_several_threads_take_turns(llm) -> None:
    from concurrent.futures import ThreadPoolExecutor

    prompts = [f"{n} and" for n in range(6)]
    alone = [one.tokens for one in llm.generate(prompts, GREEDY)]
    with ThreadPoolExecutor(3) as pool:
        together = list(pool.map(lambda prompt: llm.generate(prompt, GREEDY).tokens, prompts))
    assert together == alone
    assert llm.engine.stats()["running"] == 0


def test_a_call_that_is_interrupted_leaves_nothing_running(llm, monkeypatch) -> None:
    steps = []

    def interrupted():
        steps.append(1)
        if len(steps) == 3:
            raise KeyboardInterrupt
        return step()

    step = llm.engine.step
    monkeypatch.setattr(llm.engine, "step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        llm.generate("abc", GREEDY, max_tokens=50)
    llm.generate("b", GREEDY, max_tokens=1)
    assert (llm.engine.stats()["running"], llm.engine.stats()["waiting"]) == (0, 0)
