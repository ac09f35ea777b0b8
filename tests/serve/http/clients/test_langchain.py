"""langchain-openai: chats, forms, tools, texts and vectors; and langchain-anthropic."""

import pytest

pytest.importorskip("llguidance", reason="the extra [guided] is not installed")
pytest.importorskip("langchain_openai", reason="pip install langchain-openai: the client that is tried here")
import langchain_openai as openai
from langchain_core.messages import HumanMessage
from langchain_core.tools import tool

from tests.serve.http.clients.conftest import Person, weather

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]


def options(api, **more):
    return {"base_url": api, "api_key": "none", "model": "tiny", "max_retries": 0, "max_tokens": 300} | more


@pytest.fixture
def chat(api):
    return openai.ChatOpenAI(**options(api))


def test_a_chat_is_answered_whole_streamed_and_many_at_once(chat):
    short = chat.bind(max_tokens=5)
    assert short.invoke("Hi").usage_metadata["output_tokens"] <= 5
    parts = list(short.stream("Hi", stream_usage=True))
    assert next(part.usage_metadata for part in parts if part.usage_metadata)["input_tokens"] > 0
    assert len(short.batch(["a", "b", "c"])) == 3


@pytest.mark.parametrize("method", ["json_schema", "function_calling"])
def test_an_answer_is_an_object(chat, method):
    assert isinstance(chat.with_structured_output(Person, method=method, strict=True).invoke("Who?"), Person)


def test_a_tool_is_called_and_its_result_goes_back(chat):
    known = [tool(weather)]
    held = chat.bind_tools(known, tool_choice="weather", strict=True, parallel_tool_calls=False)
    said = held.invoke("Where?")
    [call] = said.tool_calls
    result = known[0].invoke(call)
    assert result.content == weather(**call["args"])
    free = chat.bind_tools(known).bind(max_tokens=4)
    assert free.invoke([HumanMessage("Where?"), said, result]).response_metadata["finish_reason"]
    streamed = None
    for part in held.stream("Where?"):
        streamed = part if streamed is None else streamed + part
    assert streamed.tool_calls[0]["name"] == "weather"


def test_texts_and_vectors(api):
    texts = openai.OpenAI(**options(api, max_tokens=3, n=2, best_of=2)).generate(["a", "b"])
    assert [len(one) for one in texts.generations] == [2, 2]
    vectors = openai.OpenAIEmbeddings(base_url=api, api_key="none", model="tiny", check_embedding_ctx_length=False)
    found = vectors.embed_documents(["a", "b c"])
    assert [len(one) for one in found] == [32, 32]
    assert found[0] == vectors.embed_query("a")


def test_responses_are_answered(api):
    assert openai.ChatOpenAI(**options(api, use_responses_api=True, max_tokens=5)).invoke("Hi").usage_metadata


def test_anthropics_form(live):
    anthropic = pytest.importorskip("langchain_anthropic", reason="pip install langchain-anthropic")
    asked = {"base_url": live.url, "api_key": "none", "model": "tiny", "max_retries": 0}
    chat = anthropic.ChatAnthropic(**asked, max_tokens=300)
    assert list(chat.bind(max_tokens=3).stream("Hi"))
    for method in ("json_schema", "function_calling"):
        assert isinstance(chat.with_structured_output(Person, method=method).invoke("Who?"), Person)
