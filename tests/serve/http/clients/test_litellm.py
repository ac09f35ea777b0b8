"""litellm: chats by several of its providers, texts, vectors, objects, tools, Responses and Anthropic's form."""

import os

import pytest

os.environ.setdefault("LITELLM_LOCAL_MODEL_COST_MAP", "True")  # else importing it asks the network for prices
pytest.importorskip("llguidance", reason="the extra [guided] is not installed")
pytest.importorskip("litellm", reason="pip install litellm: the client that is tried here")
import litellm

from tests.serve.http.clients.conftest import Person

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]
TALK = [{"role": "user", "content": "Who?"}]
TOOL = {"type": "function", "function": {"name": "person", "parameters": Person.model_json_schema(), "strict": True}}
NAMED = {"type": "function", "function": {"name": "person"}}


@pytest.fixture
def asked(api):
    return {"model": "openai/tiny", "api_base": api, "api_key": "none", "max_retries": 0}


@pytest.mark.parametrize("provider", ["openai", "hosted_vllm", "litellm_proxy"])
def test_a_chat_is_answered_whole_and_streamed(asked, provider):
    asked |= {"model": f"{provider}/tiny", "messages": TALK, "max_tokens": 5}
    assert litellm.completion(**asked).usage.completion_tokens <= 5
    chunks = list(litellm.completion(**asked, stream=True, stream_options={"include_usage": True}))
    assert litellm.stream_chunk_builder(chunks, messages=TALK).choices[0].finish_reason in ("stop", "length")


def test_texts_and_vectors(asked):
    text = litellm.text_completion(**asked | {"model": "text-completion-openai/tiny"}, prompt="x", max_tokens=3)
    assert text.choices[0].finish_reason
    assert [len(one["embedding"]) for one in litellm.embedding(**asked, input=["a", "b"]).data] == [32, 32]


def test_an_answer_is_an_object(asked):
    said = litellm.completion(**asked, messages=TALK, response_format=Person, max_tokens=400).choices[0].message
    Person.model_validate_json(said.content)


def test_a_tool_is_called_and_its_result_goes_back(asked):
    held = asked | {"messages": TALK, "tools": [TOOL], "tool_choice": NAMED, "max_tokens": 400}
    said = litellm.completion(**held).choices[0].message
    [call] = said.tool_calls
    Person.model_validate_json(call.function.arguments)
    talk = [*TALK, said, {"role": "tool", "tool_call_id": call.id, "name": "person", "content": "known"}]
    assert litellm.completion(**asked, messages=talk, tools=[TOOL], max_tokens=3).choices[0].finish_reason
    built = litellm.stream_chunk_builder(list(litellm.completion(**held, stream=True)), messages=TALK)
    Person.model_validate_json(built.choices[0].message.tool_calls[0].function.arguments)


def test_responses_and_anthropics_form(asked, live):
    assert litellm.responses(**asked, input="Hi", max_output_tokens=16).usage.output_tokens <= 16
    other = asked | {"model": "anthropic/tiny", "api_base": live.url, "messages": TALK, "max_tokens": 3}
    assert litellm.completion(**other).usage.completion_tokens <= 3
    assert list(litellm.completion(**other, stream=True))
