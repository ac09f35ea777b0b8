"""pydantic-ai, by chats, by Responses and by Anthropic's form: talks, objects, tools and streams."""

import asyncio
from importlib import import_module

import pytest

pytest.importorskip("llguidance", reason="the extra [guided] is not installed")
pytest.importorskip("pydantic_ai", reason="pip install 'pydantic-ai-slim[openai,anthropic]'")
import pydantic_ai as ai

from tests.serve.http.clients.conftest import Person, weather

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]
KINDS = {"OpenAIChatModel": "openai", "OpenAIResponsesModel": "openai", "AnthropicModel": "anthropic"}
PROVIDERS = {"openai": "OpenAIProvider", "anthropic": "AnthropicProvider"}


@pytest.fixture(params=list(KINDS))
def model(request, live, api):
    maker = KINDS[request.param]
    provider = getattr(import_module(f"pydantic_ai.providers.{maker}"), PROVIDERS[maker])
    where = api if maker == "openai" else live.url
    made = provider(base_url=where, api_key="none")
    return getattr(import_module(f"pydantic_ai.models.{maker}"), request.param)("tiny", provider=made)


def ask(agent, *asked, **fields):
    return asyncio.run(agent.run(*asked, **fields))


def test_a_talk_goes_on(model):
    agent = ai.Agent(model, instructions="Be", model_settings={"max_tokens": 9})
    first = ask(agent, "Hi")
    assert ask(agent, "And?", message_history=first.all_messages()).usage.input_tokens > first.usage.input_tokens


def test_an_answer_is_an_object_by_a_tool_or_by_a_schema(model):
    by_schema = [] if type(model).__name__ == "AnthropicModel" else [ai.NativeOutput(Person)]  # for known names alone
    for kind in (Person, *by_schema):
        agent = ai.Agent(model, output_type=kind, model_settings={"max_tokens": 400}, retries=3)
        assert isinstance(ask(agent, "Who?").output, Person)


def test_tools_are_called_until_there_is_an_answer(model):
    agent = ai.Agent(model, output_type=Person, model_settings={"max_tokens": 400, "parallel_tool_calls": False})
    agent.tool_plain(weather)
    told = ask(agent, "Where?", usage_limits=ai.UsageLimits(request_limit=50))
    assert isinstance(told.output, Person)


def test_a_stream(model):
    async def work():
        async with ai.Agent(model, output_type=Person, model_settings={"max_tokens": 400}).run_stream("Who?") as told:
            return [one async for one in told.stream_output()]

    assert isinstance(asyncio.run(work())[-1], Person)
