"""Fields that clients send besides: what asks for nothing is taken, what would change the answer is refused by name."""

import dataclasses

import pytest

from atma.serve.http.bodies import ChatBody, CompletionBody
from atma.serve.http.neutral import ASIDE, MOST_IGNORED, NEUTRAL
from tests.serve.http.conftest import OPTIONS, Live

TEXT = {"prompt": "Once", "max_tokens": 6, "temperature": 0}
CHAT = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 6, "temperature": 0}
PEERS = {
    "guidellm": {
        "stream_options": {"include_usage": True, "continuous_usage_stats": True},
        "max_completion_tokens": 6,
        "stop": None,
        "ignore_eos": True,
        "stream": True,
    },
    "vllm bench": {"repetition_penalty": 1.0, "logprobs": None, "stream": True, "ignore_eos": True},
    "vLLM's own names": {
        "best_of": 1,
        "use_beam_search": False,
        "top_k": -1,
        "min_p": 0.0,
        "repetition_penalty": 1.0,
        "length_penalty": 1.0,
        "stop_token_ids": [],
        "include_stop_str_in_output": False,
        "ignore_eos": False,
        "min_tokens": 0,
        "skip_special_tokens": True,
        "spaces_between_special_tokens": True,
        "truncate_prompt_tokens": None,
        "prompt_logprobs": None,
        "allowed_token_ids": None,
        "bad_words": [],
        "priority": 0,
        "request_id": "x",
        "return_token_ids": None,
        "kv_transfer_params": None,
        "vllm_xargs": {},
        "top_logprobs": 0,
        "stream_options": None,
    },
    "sglang": {"return_hidden_states": False, "separate_reasoning": True, "no_stop_trim": False, "session_params": {}},
    "llama.cpp's page": {
        "dynatemp_range": 0,
        "dynatemp_exponent": 1,
        "top_k": 40,
        "xtc_probability": 0,
        "xtc_threshold": 0.1,
        "typ_p": 1,
        "repeat_last_n": 64,
        "repeat_penalty": 1,
        "dry_multiplier": 0,
        "dry_base": 1.75,
        "dry_allowed_length": 2,
        "dry_penalty_last_n": -1,
        "timings_per_token": False,
        "cache_prompt": True,
        "reasoning_format": "auto",
    },
    "genai-perf": {"min_tokens": 6, "ignore_eos": True, "nvext": {}, "stream": True},
    "transformers": {"do_sample": True, "num_beams": 1, "no_repeat_ngram_size": 0, "return_full_text": False},
    "nulls everywhere": {"anything": None, "tools": None, "response_format": {"type": "text", "json_schema": None}},
}


@pytest.mark.parametrize("fields", PEERS.values(), ids=PEERS)
def test_what_clients_send_by_habit_is_taken(live: Live, fields):
    messages = [{"role": "user", "content": "Hi", "name": None, "tool_calls": None, "cache_control": {"type": "x"}}]
    assert live.post("/v1/chat/completions", CHAT | fields | {"messages": messages}).status == 200
    fields = {key: value for key, value in fields.items() if key not in ("max_completion_tokens", "top_logprobs")}
    assert live.post("/v1/completions", TEXT | fields).status == 200


def test_every_known_field_is_taken_with_each_value_that_asks_for_nothing(live: Live):
    plain = live.post("/v1/completions", TEXT).json()["choices"]
    for name in ASIDE - CompletionBody.model_fields.keys():
        assert live.post("/v1/completions", TEXT | {name: "any"}).json()["choices"] == plain
    for name, values in NEUTRAL.items():
        for value in values:
            if name not in CompletionBody.model_fields:
                assert live.post("/v1/completions", TEXT | {name: value}).json()["choices"] == plain, (name, value)


@pytest.mark.parametrize("name", sorted(NEUTRAL.keys() - ChatBody.model_fields.keys()))
def test_every_known_field_is_refused_by_name_with_a_value_that_asks_for_something(live: Live, name):
    told = live.post("/v1/chat/completions", CHAT | {name: ["surely", "not", 7]})
    assert told.status == 400
    assert told.error()["param"] == name
    assert name in told.error()["message"]


def test_true_is_not_one_and_false_is_not_zero(live: Live):
    assert live.post("/v1/completions", TEXT | {"best_of": True}).error()["param"] == "best_of"
    assert live.post("/v1/completions", TEXT | {"n_probs": False}).error()["param"] == "n_probs"


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"best_of": 3}, "best_of"),
        ({"temperature_2": 1}, "temperature_2"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"stream": True, "stream_options": {"x": 1}}, "stream_options"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"min_tokens": 7}, "min_tokens"),
        ({"min_tokens": -1}, "min_tokens"),
        ({"skip_special_tokens": False, "spaces_between_special_tokens": True}, "spaces_between_special_tokens"),
        ({"messages": [{"role": "user", "content": "x", "weight": 1}]}, "messages"),
        ({"max_tokens": -2}, "max_tokens"),
    ],
)
def test_what_is_refused_names_its_field(live: Live, fields, param):
    told = live.post("/v1/chat/completions", CHAT | fields)
    assert told.status == 400
    assert told.error()["param"] == param


def test_options_of_streams_that_ask_for_nothing_are_taken_without_a_stream(live: Live):
    for options in ({}, {"include_usage": False}, {"include_usage": None, "continuous_usage_stats": False}):
        assert live.post("/v1/completions", TEXT | {"stream_options": options}).status == 200


def test_a_length_of_minus_one_is_all_there_is_room_for(live: Live):
    told = live.post("/v1/chat/completions", CHAT | {"max_tokens": -1, "logit_bias": {"256": 100}})
    assert told.json()["choices"][0]["finish_reason"] == "stop"
    most = live.post("/tokenize", {"messages": CHAT["messages"]}).json()
    most = most["max_model_len"] - most["count"] + 1
    asked = CHAT | {"max_tokens": -1, "min_tokens": 2**30}
    assert f"max_tokens, {most}," in live.post("/v1/chat/completions", asked | {"stream": True}).error()["message"]
    room = OPTIONS.answer_bytes // 24
    assert room < most
    assert f"max_tokens, {room}," in live.post("/v1/chat/completions", asked).error()["message"]


def test_nothing_ends_an_answer_before_its_least_length(live: Live):
    likeliest = live.post("/v1/completions", TEXT | {"max_tokens": 1, "return_token_ids": True})
    [first] = likeliest.json()["choices"][0]["token_ids"]
    ends = TEXT | {"stop_token_ids": [first]}
    assert live.post("/v1/completions", ends).json()["usage"]["completion_tokens"] == 1
    for least in (1, 4):
        told = live.post("/v1/completions", ends | {"min_tokens": least, "return_token_ids": True}).json()
        assert told["usage"]["completion_tokens"] > least or told["choices"][0]["finish_reason"] == "length"
        assert first not in told["choices"][0]["token_ids"][:least]


def test_stop_texts_are_not_looked_for_before_the_least_length(live: Live):
    free = TEXT | {"max_tokens": 12, "ignore_eos": True, "logit_bias": {"65": 100}}
    told = live.post("/v1/completions", free | {"stop": "AA", "min_tokens": 5}).json()
    assert told["choices"][0]["text"] == "AAAAA"
    assert told["usage"]["completion_tokens"] == 7


def test_a_stop_is_part_of_the_text_when_asked_for(live: Live):
    free = TEXT | {"max_tokens": 12, "ignore_eos": True, "logit_bias": {"65": 100}}
    for stream in (False, True):
        asked = free | {"include_stop_str_in_output": True, "stream": stream}
        found = [text(live, asked | {"stop": ["AAA", "AAAB"]}), text(live, asked | {"stop_token_ids": [65]})]
        assert found == [("AAA", "stop"), ("A", "stop")]


def test_special_tokens_are_spelled_when_asked_for(live: Live):
    spelled = TEXT | {"max_tokens": 3, "logit_bias": {"256": 100}, "skip_special_tokens": False}
    assert text(live, spelled) == ("", "stop")
    assert text(live, spelled | {"include_stop_str_in_output": True}) == ("<|endoftext|>", "stop")
    assert text(live, spelled | {"ignore_eos": True}) == ("<|endoftext|>" * 3, "length")
    echoed = spelled | {"ignore_eos": True, "echo": True, "logprobs": 0, "max_tokens": 1}
    choice = live.post("/v1/completions", echoed).json()["choices"][0]
    assert choice["text"] == "<|endoftext|>Once<|endoftext|>"
    assert choice["logprobs"]["text_offset"] == [0, 13, 14, 15, 16, 17]
    assert text(live, echoed | {"skip_special_tokens": True}) == ("Once", "length")


def text(live: Live, body) -> tuple[str, str]:
    """The text of the only choice, and why it ended."""
    told = live.post("/v1/completions", body)
    if not body.get("stream"):
        choice = told.json()["choices"][0]
        return choice["text"], choice["finish_reason"]
    choices = [event["choices"][0] for event in told.events()]
    return "".join(choice["text"] for choice in choices), choices[-1]["finish_reason"]


def test_token_ids_are_told_whole_and_streamed(live: Live):
    asked = {"return_token_ids": True, "n": 2, "temperature": 1, "seed": 3}
    several = TEXT | asked | {"prompt": ["ab", "c"]}
    whole = live.post("/v1/completions", several).json()["choices"]
    assert [choice["prompt_token_ids"] for choice in whole] == [[256, 97, 98]] * 2 + [[256, 99]] * 2
    streamed: list[list[int]] = [[] for _ in whole]
    prompts = {}
    for event in live.post("/v1/completions", several | {"stream": True}).events():
        choice = event["choices"][0]
        streamed[choice["index"]] += choice["token_ids"]
        if "prompt_token_ids" in choice:
            assert choice["index"] not in prompts
            prompts[choice["index"]] = choice["prompt_token_ids"]
    assert streamed == [choice["token_ids"] for choice in whole]
    assert [prompts[i] for i in range(4)] == [choice["prompt_token_ids"] for choice in whole]


def test_token_ids_of_a_chat_are_told_once_for_its_prompt(live: Live):
    asked = CHAT | {"return_token_ids": True}
    whole = live.post("/v1/chat/completions", asked).json()
    events = live.post("/v1/chat/completions", asked | {"stream": True}).events()
    read = live.post("/tokenize", {"messages": CHAT["messages"]}).json()["tokens"]
    assert whole["prompt_token_ids"] == read
    assert [event["prompt_token_ids"] for event in events if "prompt_token_ids" in event] == [read]
    ids = [token for event in events for token in event["choices"][0].get("token_ids", [])]
    assert ids == whole["choices"][0]["token_ids"]
    assert len(ids) == whole["usage"]["completion_tokens"]


def test_usage_goes_on_through_a_stream_when_asked_for(live: Live):
    asked = TEXT | {"ignore_eos": True, "stream": True, "stream_options": {"continuous_usage_stats": True}}
    *chunks, last = live.post("/v1/completions", asked).events()
    assert [chunk["usage"]["completion_tokens"] for chunk in chunks] == list(range(1, 7))
    assert last["usage"] == chunks[-1]["usage"]
    assert {chunk["usage"]["prompt_tokens"] for chunk in chunks} == {5}


def test_a_text_that_is_not_to_be_cached_reads_and_keeps_nothing(live: Live):
    asked = TEXT | {"prompt": "Nothing of this is to be kept", "cache_prompt": False}
    cached = [live.post("/v1/completions", asked).json()["usage"] for _ in range(2)]
    assert [usage["prompt_tokens_details"]["cached_tokens"] for usage in cached] == [0, 0]


def test_as_many_answers_as_are_told_are_not_the_best_of_more(live: Live):
    asked = TEXT | {"n": 2, "temperature": 1, "seed": 3}
    told = [live.post("/v1/completions", asked | more).json()["choices"] for more in ({}, {"best_of": 2})]
    assert told[0] == told[1]
    assert live.post("/v1/completions", asked | {"best_of": 3}).error()["param"] == "best_of"


@pytest.mark.parametrize(
    ("path", "given", "same"),
    [
        ("/v1/completions", {"prompt": [1.0, 2, 3.0], "max_tokens": 3.0, "temperature": 0, "stop_token_ids": [7.0]}, {
            "prompt": [1, 2, 3], "max_tokens": 3, "temperature": 0, "stop_token_ids": [7]}),
        ("/v1/chat/completions", CHAT | {"max_tokens": 2.0, "top_k": 5.0, "seed": -0.0}, CHAT | {
            "max_tokens": 2, "top_k": 5, "seed": 0}),
        ("/v1/embeddings", {"input": [[1.0], [2]]}, {"input": [[1], [2]]}),
        ("/detokenize", {"tokens": [65.0, 66]}, {"tokens": [65, 66]}),
    ],
)  # fmt: skip
def test_a_whole_number_may_be_written_with_a_point(live: Live, path, given, same):
    told, other = (live.post(path, one).json() for one in (given, same))
    unlike = ("id", "created", "usage")
    assert {k: v for k, v in told.items() if k not in unlike} == {k: v for k, v in other.items() if k not in unlike}


@pytest.mark.parametrize("token", [1.5, 1e300, -1.0, True, "1"])
def test_what_is_no_whole_number_is_no_token(live: Live, token):
    told = live.post("/v1/completions", TEXT | {"prompt": [token, 2]})
    assert (told.status, told.error()["param"]) == (400, "prompt")


@pytest.fixture(scope="module")
def lenient(folder):
    server = Live(folder, dataclasses.replace(OPTIONS, lenient=True))
    yield server
    server.stop()


def test_a_lenient_server_passes_over_what_nobody_knows_and_names_it(lenient: Live):
    told = lenient.post("/v1/completions", TEXT | {"temperature_2": 1, "x\ny": {"z": 1}, "best_of": 1})
    assert told.status == 200
    assert told.headers["x-atma-ignored"] == "temperature_2, x?y"
    assert "x-atma-ignored" not in lenient.post("/v1/completions", TEXT).headers
    chat = CHAT | {"messages": [{"role": "user", "content": "x", "weight": 1}], "stream": True, "nobody": 1}
    assert set(lenient.post("/v1/chat/completions", chat).headers["x-atma-ignored"].split(", ")) == {"weight", "nobody"}


def test_a_lenient_server_still_refuses_what_it_knows_it_cannot_do(lenient: Live):
    assert lenient.post("/v1/completions", TEXT | {"best_of": 3}).error()["param"] == "best_of"
    many = TEXT | {f"x{i}": i for i in range(1, MOST_IGNORED + 2)}
    assert lenient.post("/v1/completions", many).error()["param"] == f"x{MOST_IGNORED + 1}"
