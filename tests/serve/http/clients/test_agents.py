"""openai-agents, by chats and by Responses: objects, tools, another agent, and a talk that goes on.

Every answer is held to a form that ends: by Responses the client refuses one that `max_tokens` cut.
"""

import asyncio

import openai
import pytest

pytest.importorskip("llguidance", reason="the extra [guided] is not installed")
pytest.importorskip("agents", reason="pip install openai-agents: the client that is tried here")
import agents

from tests.serve.http.clients.conftest import Person, weather

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]


@pytest.fixture(params=["OpenAIChatCompletionsModel", "OpenAIResponsesModel"])
def run(request, api):
    """Runs what is made of an agent's maker, in a loop and with a client of its own."""
    agents.set_tracing_disabled(True)

    def run(work):
        async def all_of_it():
            async with openai.AsyncOpenAI(base_url=api, api_key="none", max_retries=0) as client:
                model = getattr(agents, request.param)(model="tiny", openai_client=client)

                def agent(name="a", settings=None, **fields):
                    chosen = agents.ModelSettings(**{"max_tokens": 300} | (settings or {}))
                    return agents.Agent(name=name, instructions="Be", model=model, model_settings=chosen, **fields)

                return await work(agent)

        return asyncio.run(all_of_it())

    return run


ONE = {"tool_choice": "required", "parallel_tool_calls": False}


def test_a_talk_goes_on(run):
    async def work(agent):
        first = await agents.Runner.run(agent(output_type=Person), "Hi")
        talk = [*first.to_input_list(), {"role": "user", "content": "And?"}]
        return await agents.Runner.run(agent(output_type=Person), talk)

    assert run(work).context_wrapper.usage.input_tokens_details.cached_tokens > 0


def test_an_answer_is_an_object(run):
    async def work(agent):
        return await agents.Runner.run(agent(output_type=Person), "Who?")

    assert isinstance(run(work).final_output, Person)


def test_a_tool_is_called_and_its_result_goes_back(run):
    async def work(agent):
        one = agent(settings=ONE, tools=[agents.function_tool(weather)], output_type=Person)
        return await agents.Runner.run(one, "Where?", max_turns=40)

    first, second, *_, last = (item.type for item in run(work).new_items)
    assert (first, second, last) == ("tool_call_item", "tool_call_output_item", "message_output_item")


def test_a_stream_with_a_tool(run):
    async def work(agent):
        one = agent(settings=ONE | {"include_usage": True}, tools=[agents.function_tool(weather)], output_type=Person)
        told = agents.Runner.run_streamed(one, "Where?", max_turns=40)
        kinds = {event.type async for event in told.stream_events()}
        return kinds, told.context_wrapper.usage

    kinds, usage = run(work)
    assert kinds >= {"raw_response_event", "run_item_stream_event"}
    assert usage.output_tokens > 0


def test_another_agent_takes_over(run):
    async def work(agent):
        return await agents.Runner.run(agent(settings=ONE, handoffs=[agent("b", output_type=Person)]), "Hi")

    assert run(work).last_agent.name == "b"
