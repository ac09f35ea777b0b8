"""The real OpenAI client, sync and async, gets what it expects from this server."""

import asyncio
import math

import openai
import pytest

from atma.serve.http.tokens import TextLogprobs, TokenNames
from atma.serve.request import Logprob
from tests.serve.http.conftest import Live

HELLO = [{"role": "user", "content": "Hello"}]


def chat(client: openai.OpenAI, messages=HELLO, **fields):
    fields = {"model": "tiny", "max_tokens": 12, "temperature": 0} | fields
    return client.chat.completions.create(messages=messages, **fields)


def text(client: openai.OpenAI, prompt="Once upon", **fields):
    fields = {"model": "tiny", "max_tokens": 12, "temperature": 0, "extra_body": {"ignore_eos": True}} | fields
    return client.completions.create(prompt=prompt, **fields)


def test_models_are_listed_and_found(client):
    listed = client.models.list().data
    assert [model.id for model in listed] == ["tiny"]
    assert client.models.retrieve("tiny").id == "tiny"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("other")


def test_a_chat_is_answered(client):
    answer = chat(client)
    assert answer.object == "chat.completion"
    assert answer.id.startswith("chatcmpl-")
    assert answer.model == "tiny"
    [choice] = answer.choices
    assert choice.message.role == "assistant"
    assert choice.finish_reason in ("length", "stop")
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
    assert answer.usage.prompt_tokens == len("\0User: Hello\nAssistant:")


def test_a_streamed_chat_is_the_same_text(client):
    whole, chunks = chat(client).choices[0], list(chat(client, stream=True))
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[0].choices[0].delta.content == ""
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == whole.message.content
    assert [c.choices[0].finish_reason for c in chunks[:-1]] == [None] * (len(chunks) - 1)
    assert chunks[-1].choices[0].finish_reason == whole.finish_reason
    assert len({chunk.id for chunk in chunks}) == 1
    assert all(chunk.usage is None for chunk in chunks)


def test_a_stream_tells_its_usage_only_if_asked(client):
    chunks = list(chat(client, stream=True, stream_options={"include_usage": True}))
    assert chunks[-1].choices == []
    assert chunks[-1].usage == chat(client).usage.model_copy(
        update={"prompt_tokens_details": chunks[-1].usage.prompt_tokens_details}
    )
    assert all(chunk.usage is None for chunk in chunks[:-1])


def test_several_choices_are_told_apart_whole_and_streamed(client):
    fields = {"n": 3, "temperature": 1.5, "seed": 7}
    whole = chat(client, **fields)
    streamed = ["", "", ""]
    for chunk in chat(client, stream=True, **fields):
        streamed[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
    assert [choice.index for choice in whole.choices] == [0, 1, 2]
    assert [choice.message.content for choice in whole.choices] == streamed
    assert len(set(streamed)) > 1


def test_equal_seeds_give_equal_answers_and_others_other_ones(client):
    seeds = [chat(client, temperature=2, seed=seed).choices[0].message.content for seed in (1, 1, 2, -5)]
    assert seeds[0] == seeds[1]
    assert len(set(seeds)) == 3


def test_a_chat_tells_log_probabilities(client):
    answer = chat(client, logprobs=True, top_logprobs=3, max_tokens=5)
    content = answer.choices[0].logprobs.content
    assert len(content) == answer.usage.completion_tokens
    for one in content:
        assert len(one.top_logprobs) == 3
        assert one.logprob == max(best.logprob for best in one.top_logprobs)
        assert -100 < one.logprob <= 0
        assert one.bytes == [] or len(one.bytes) == 1


def test_streamed_log_probabilities_are_the_same(client):
    whole = chat(client, logprobs=True, top_logprobs=2).choices[0].logprobs.content
    chunks = chat(client, logprobs=True, top_logprobs=2, stream=True)
    parts = [one for chunk in chunks if chunk.choices[0].logprobs for one in chunk.choices[0].logprobs.content]
    assert parts == whole


def test_an_answer_ends_before_a_stop_text(client):
    whole = text(client, max_tokens=40, seed=3, temperature=1).choices[0].text
    stop = whole[10:12]
    cut = text(client, max_tokens=40, seed=3, temperature=1, stop=stop).choices[0]
    assert (cut.text, cut.finish_reason) == (whole[: whole.index(stop)], "stop")
    assert text(client, max_tokens=40, seed=3, temperature=1, stop=["never", stop]).choices[0].text == cut.text


def test_max_completion_tokens_bounds_the_answer(client):
    answer = chat(client, max_tokens=openai.NOT_GIVEN, max_completion_tokens=3, extra_body={"ignore_eos": True})
    assert answer.usage.completion_tokens == 3
    assert answer.choices[0].finish_reason == "length"


def test_a_biased_token_is_always_chosen_and_a_forbidden_one_never(client):
    assert text(client, logit_bias={"65": 100}, max_tokens=4).choices[0].text == "AAAA"
    free = text(client, max_tokens=1, logprobs=1).choices[0]
    [token] = text(client, max_tokens=1, logprobs=1).choices[0].logprobs.tokens
    bias = {str(ord(token)): -100} if len(token) == 1 else {token: -100}
    if len(token) == 1:
        assert text(client, max_tokens=1, logit_bias=bias).choices[0].text != free.text


def test_the_coldest_temperature_is_greedy(client):
    assert text(client, temperature=5e-324).choices[0].text == text(client).choices[0].text


def test_penalties_change_the_answer(client):
    plain = text(client, max_tokens=40).choices[0].text
    assert text(client, max_tokens=40, frequency_penalty=2).choices[0].text != plain
    extra = {"ignore_eos": True, "repetition_penalty": 1.8}
    assert text(client, max_tokens=40, extra_body=extra).choices[0].text != plain


@pytest.mark.parametrize("field", [{"top_p": 0.0001}, {"extra_body": {"top_k": 1}}, {"extra_body": {"min_p": 1.0}}])
def test_the_narrowest_filter_is_greedy(client, field):
    field = {key: value | {"ignore_eos": True} if key == "extra_body" else value for key, value in field.items()}
    assert text(client, temperature=2, seed=1, **field).choices[0].text == text(client).choices[0].text


def test_a_text_is_continued_whole_and_streamed(client):
    whole = text(client)
    assert whole.object == "text_completion"
    assert "".join(chunk.choices[0].text for chunk in text(client, stream=True)) == whole.choices[0].text
    assert whole.usage.completion_tokens == 12


def test_many_texts_are_continued_in_their_order(client):
    prompts = ["one", "two two", "three three three"]
    together = text(client, prompts, n=2, seed=4, temperature=1)
    alone = [text(client, prompt, n=2, seed=4, temperature=1) for prompt in prompts]
    assert [c.text for c in together.choices] == [c.text for answer in alone for c in answer.choices]
    assert [c.index for c in together.choices] == list(range(6))
    assert together.usage.prompt_tokens == sum(answer.usage.prompt_tokens for answer in alone)
    assert together.usage.completion_tokens == 6 * 12


def test_many_texts_are_streamed_side_by_side(client):
    prompts, parts = ["one", "two two"], ["", ""]
    for chunk in text(client, prompts, stream=True):
        parts[chunk.choices[0].index] += chunk.choices[0].text
    assert parts == [c.text for c in text(client, prompts).choices]


def test_token_ids_are_continued_as_they_are(client):
    ids = [256, *b"Once upon"]
    assert text(client, ids).choices[0].text == text(client).choices[0].text
    assert text(client, ids).usage.prompt_tokens == len(ids)
    several = text(client, [ids, list(b"xyz")])
    assert [c.text for c in several.choices] == [
        text(client).choices[0].text,
        text(client, list(b"xyz")).choices[0].text,
    ]


def test_an_echo_begins_with_the_prompt(client):
    plain, echoed = text(client).choices[0].text, text(client, echo=True).choices[0].text
    assert echoed == "Once upon" + plain


@pytest.mark.parametrize("max_tokens", [0, 1])
def test_an_echo_scores_the_prompt_as_evaluations_read_it(client, max_tokens):
    """As lm-eval asks for log-likelihoods of token ids: rows of one batch, the context's length cut off."""
    rows = [list(b"The cat sat on the mat"), list(b"A"), list(b"Zwei \xc3\xa4")]
    answer = text(client, rows, echo=True, logprobs=1, max_tokens=max_tokens, seed=1234)
    for row, choice in zip(rows, sorted(answer.choices, key=lambda c: c.index), strict=True):
        scored = choice.logprobs
        length = len(row) + max_tokens
        assert len(scored.tokens) == len(scored.token_logprobs) == len(scored.top_logprobs) == length
        assert scored.token_logprobs[0] is None
        assert scored.top_logprobs[0] is None
        for logprob, best in zip(scored.token_logprobs[1:], scored.top_logprobs[1:], strict=True):
            assert -100 < logprob <= max(best.values()) <= 0
        assert choice.finish_reason == "length"
        assert answer.usage.completion_tokens == 3 * max_tokens


def test_the_scores_of_an_echo_are_those_of_writing_it(client):
    written = text(client, list(b"Once"), max_tokens=8, logprobs=2).choices[0]
    tokens = [*b"Once", *(t[0] for t in _ids(client, written))]
    read = text(client, tokens, max_tokens=0, echo=True, logprobs=2).choices[0].logprobs
    assert read.token_logprobs[4:] == written.logprobs.token_logprobs


def _ids(client, choice):
    """The byte of every token name."""
    for name in choice.logprobs.tokens:
        yield [256] if name == "<|endoftext|>" else [int(name[-2:], 16)] if name.startswith("bytes:") else name.encode()


def test_offsets_count_characters(client):
    scored = text(client, "äö x", max_tokens=0, echo=True, logprobs=0).choices[0].logprobs
    assert scored.tokens[:3] == ["<|endoftext|>", "bytes:\\xc3", "bytes:\\xa4"]
    assert scored.text_offset == [0, 0, 0, 1, 1, 2, 3]


def test_several_parts_of_a_message_are_one_text(client):
    parts = [{"type": "text", "text": "He"}, {"type": "text", "text": "llo"}]
    asked = chat(client, [{"role": "user", "content": parts}])
    assert asked.choices[0].message.content == chat(client).choices[0].message.content


def test_an_answer_can_be_sent_back_as_it_came(client):
    first = chat(client, extra_body={"ignore_eos": True}, max_tokens=30)
    talk = [*HELLO, first.choices[0].message.model_dump(), {"role": "user", "content": "And then?"}]
    second = chat(client, talk)
    assert second.usage.prompt_tokens_details.cached_tokens >= first.usage.prompt_tokens


@pytest.mark.parametrize(
    "fields",
    [
        {"user": "someone", "metadata": {"a": "b"}, "service_tier": "auto", "parallel_tool_calls": True},
        {"tools": [], "tool_choice": "none", "response_format": {"type": "text"}, "store": False},
        {"logit_bias": {}, "stop": [], "presence_penalty": 0, "frequency_penalty": 0, "top_p": 1, "n": 1},
        {"stop": None, "seed": None, "logprobs": None, "top_logprobs": None, "max_completion_tokens": None},
    ],
)
def test_fields_that_change_nothing_are_accepted(client, fields):
    assert chat(client, **fields).choices[0].message.content == chat(client).choices[0].message.content


TOOL = {"type": "function", "function": {"name": "f", "parameters": {}}}


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"tools": [TOOL]}, "tools"),
        ({"response_format": {"type": "structural_tag"}}, "response_format"),
        ({"store": True}, "store"),
        ({"extra_body": {"temperature_": 1}}, "did you mean 'temperature'"),
        ({"extra_body": {"chat_template": "{{ 1 }}"}}, "chat_template"),
        ({"temperature": -1}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"n": 17}, "'n'"),
        ({"stop": [""]}, "stop"),
        ({"stop": ["a"] * 17}, "stop"),
        ({"logit_bias": {"x": 1}}, "logit_bias"),
        ({"logit_bias": {"1": 101}}, "logit_bias"),
        ({"logit_bias": {"257": 1}}, "257"),
        ({"presence_penalty": 3}, "presence_penalty"),
        ({"extra_body": {"repetition_penalty": 5e-324}}, "repetition_penalty"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"top_logprobs": 2}, "logprobs"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "function", "content": "x"}]}, "role"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://x"}}]}]},
            "image",
        ),
        ({"max_tokens": 10**9}, "memory"),
    ],
)
def test_what_cannot_be_honoured_is_refused_by_name(client, fields, named):
    with pytest.raises(openai.BadRequestError, match=named) as told:
        chat(client, **fields)
    assert told.value.body["type"] == "invalid_request_error"
    assert told.value.request_id


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"suffix": "end"}, "suffix"),
        ({"best_of": 3}, "best_of"),
        ({"prompt": []}, "prompt"),
        ({"prompt": [[]]}, "prompt"),
        ({"prompt": ["a", 1]}, "prompt"),
        ({"prompt": [257]}, "257"),
        ({"prompt": ["x"] * 129}, "128"),
        ({"prompt": ["x"] * 20, "n": 16}, "answers"),
        ({"logprobs": 21}, "logprobs"),
        ({"max_tokens": 0}, "max_tokens"),
    ],
)
def test_what_a_text_cannot_be_asked_for_is_refused_by_name(client, fields, named):
    with pytest.raises(openai.BadRequestError, match=named):
        text(client, **({"prompt": "x"} | fields))


def test_another_model_is_not_found(client):
    with pytest.raises(openai.NotFoundError, match="tiny") as told:
        chat(client, model="gpt-4")
    assert told.value.code == "model_not_found"


def test_neutral_suffix_and_best_of_are_accepted(client):
    assert text(client, suffix="", best_of=1).choices[0].text == text(client).choices[0].text


def test_the_async_client_streams_many_answers_at_once(live: Live, client):
    prompts = [f"Number {i} " * (i + 1) for i in range(8)]

    async def one(asked: openai.AsyncOpenAI, prompt: str) -> str:
        messages = [{"role": "user", "content": prompt}]
        stream = await asked.chat.completions.create(
            model="tiny", messages=messages, max_tokens=12, temperature=0, stream=True
        )
        return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])

    async def all_at_once() -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{live.url}/v1", api_key="none", max_retries=0) as asked:
            return await asyncio.gather(*(one(asked, prompt) for prompt in prompts))

    together = asyncio.run(all_at_once())
    alone = [chat(client, [{"role": "user", "content": p}]).choices[0].message.content for p in prompts]
    assert together == alone


def test_the_async_client_answers_and_is_refused(live: Live):
    async def both() -> tuple[int, str]:
        async with openai.AsyncOpenAI(base_url=f"{live.url}/v1", api_key="none", max_retries=0) as asked:
            answer = await asked.completions.create(model="tiny", prompt="x", max_tokens=2)
            try:
                await asked.completions.create(model="tiny", prompt="x", max_tokens=2, temperature=math.pi * 100)
            except openai.BadRequestError as error:
                return answer.usage.completion_tokens, error.param
        raise AssertionError("not refused")

    count, parameter = asyncio.run(both())
    assert 1 <= count <= 2
    assert parameter == "temperature"


def test_a_stream_that_the_client_leaves_is_given_up(live: Live, client):
    stream = text(client, max_tokens=5000, stream=True)
    next(iter(stream))
    stream.close()
    assert live.settled()


def test_of_two_limits_the_lower_holds(live: Live):
    for limits in ((8, 2), (2, 8), (2, None), (None, 2)):
        fields = dict(zip(("max_tokens", "max_completion_tokens"), limits, strict=True))
        body = {"messages": [{"role": "user", "content": "a"}], "ignore_eos": True} | fields
        assert live.post("/v1/chat/completions", body).json()["usage"]["completion_tokens"] == 2, limits


def test_null_is_nothing_in_fields_that_nobody_knows(live: Live):
    said = {"role": "assistant", "content": "b", "name": None, "tool_call_id": None, "anything": None}
    talk = [{"role": "user", "content": [{"type": "text", "text": "a", "cache_control": None}, None]}, said]
    said |= {"provider_specific_fields": {"refusal": None}, "audio": {"id": None}, "thinking_blocks": [], "x": ""}
    talk[0]["content"].append({"type": "text", "text": None})
    body = {"messages": talk, "max_tokens": 1, "min_tokens": None, "logit_bias": {"5": None}, "whatever": None}
    body |= {"response_format": {"type": "text", "schema": None}, "tools": None, "stream_options": None}
    assert live.post("/v1/chat/completions", body).status == 200
    for missing in ("messages", "prompt"):
        told = live.post("/v1/completions" if missing == "prompt" else "/v1/chat/completions", {missing: None})
        assert (told.status, told.error()["param"]) == (400, missing)
    said["anything"] = 0
    assert "anything" in live.post("/v1/chat/completions", {"messages": talk}).error()["message"]


def test_offsets_point_into_the_echo_of_a_tokenizer_that_puts_a_space_first():
    class Pieces:
        def token_bytes(self, token: int) -> bytes:
            return (b" river", b" st", b"one", b"", b"\xe2\x82", b"\xac", b" x")[token]

        class backend:
            @staticmethod
            def id_to_token(token: int) -> str:
                return "</s>"

    def offsets(tokens: list[int], echoed: str | None, spelled: bool = False) -> list[int]:
        told = TextLogprobs(TokenNames(Pieces()))  # pyright: ignore
        return told.of([Logprob(token, 0.0, ()) for token in tokens], echoed, spelled)["text_offset"]

    assert offsets([3, 0, 1, 2], "river stone") == [0, 0, 5, 8]
    assert offsets([0, 1, 2], " river stone") == [0, 6, 9]
    assert offsets([3, 0, 3, 0], "</s>river</s>river", True) == [0, 4, 9, 13]
    assert offsets([0, 4, 5, 6], "river€ x") == [0, 5, 5, 6]
    assert offsets([0, 1], None) == [0, 6]
    assert offsets([3, 0, 3, 3, 1, 2], "riveré🙂 stone") == [0, 0, 5, 5, 7, 10]
    assert offsets([0, 4, 6], None) == [0, 6, 7]


def test_offsets_of_an_answer_begin_where_the_echo_ends():
    class Pieces:
        def token_bytes(self, token: int) -> bytes:
            return (b"a", b"")[token]

        class backend:
            @staticmethod
            def id_to_token(token: int) -> str:
                return "<unk>"

    told = TextLogprobs(TokenNames(Pieces()))  # pyright: ignore
    assert told.of([Logprob(0, 0.0, ()), Logprob(1, 0.0, ())], "aéé")["text_offset"] == [0, 1]
    assert told.of([Logprob(0, 0.0, ())])["text_offset"] == [3]
