"""The engine in its own thread: streams, aborts, and ends."""

import asyncio
import contextlib
import dataclasses
import threading

import pytest

from atma.serve import LLM, AsyncEngine, EngineConfig, Request, RequestError, guides
from atma.serve.structure import Structure
from atma.settings import Settings
from atma.tokenizer import byte_tokenizer
from tests.serve.conftest import SMALL, AuditedEngine


def _run(engine, work):
    """Run a coroutine function over an AsyncEngine of `engine`, and end it."""

    async def whole():
        serving = AsyncEngine(engine)
        try:
            return await asyncio.wait_for(work(serving), 30)
        finally:
            await serving.shutdown()

    return asyncio.run(whole())


def test_a_stream_brings_every_token_and_ends_with_usage(engine) -> None:
    async def work(serving):
        return [event async for event in serving.stream(Request("abc", max_tokens=8, temperature=0, ignore_end=True))]

    events = _run(engine, work)
    assert sum(len(event.tokens) for event in events) == 8
    assert events[-1].finish_reason == "length"
    assert events[-1].usage == (4, 0, 8)
    assert all(event.finish_reason is None for event in events[:-1])


def test_many_streams_at_once_are_each_what_they_are_alone(engine) -> None:
    async def work(serving):
        alone = [await serving.generate(Request(f"text {i}", max_tokens=20, seed=i, cache=False)) for i in range(4)]
        asked = [serving.generate(Request(f"text {i}", max_tokens=20, seed=i)) for i in range(4)]
        return alone, await asyncio.gather(*asked)

    alone, together = _run(engine, work)
    assert [out[0].tokens for out in alone] == [out[0].tokens for out in together]


def test_closing_a_stream_aborts_its_request(engine) -> None:
    async def work(serving):
        stream = serving.stream(Request("abc", max_tokens=900, ignore_end=True))
        async for event in stream:
            if event.tokens:
                break
        await stream.aclose()
        stats = await serving.stats()
        return stats["running"], stats["waiting"]

    assert _run(engine, work) == (0, 0)


def test_a_cancelled_reader_aborts_its_request(engine) -> None:
    async def work(serving):
        task = asyncio.create_task(serving.generate(Request("abc", max_tokens=900, ignore_end=True)))
        await asyncio.sleep(0.1)
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task
        return (await serving.stats())["running"]

    assert _run(engine, work) == 0


def test_an_abort_by_id_ends_the_stream_with_its_reason(engine) -> None:
    async def work(serving):
        events = []
        async for event in serving.stream(Request("abc", max_tokens=900, ignore_end=True, id="mine")):
            events.append(event)
            await serving.abort("mine")
        return events

    assert _run(engine, work)[-1].finish_reason == "abort"


def test_a_refused_request_raises_before_its_first_event(engine) -> None:
    async def work(serving):
        codes = []
        for request in (Request("x", temperature=-1), Request("x", max_tokens=10**9)):
            try:
                await serving.generate(request)
            except RequestError as error:
                codes.append(error.code)
        return codes

    assert _run(engine, work) == ["invalid", "too_long"]


def test_draining_finishes_what_is_under_way_and_refuses_the_rest(engine) -> None:
    async def work(serving):
        under_way = asyncio.create_task(serving.generate(Request("abc", max_tokens=60, ignore_end=True)))
        await asyncio.sleep(0.05)
        await serving.drain()
        with pytest.raises(RequestError) as caught:
            await serving.generate(Request("late"))
        return len((await under_way)[0].tokens), caught.value.code

    assert _run(engine, work) == (60, "closed")


def test_a_fault_of_the_engine_leaves_nobody_waiting(engine) -> None:
    def broken(*_, **__):
        raise RuntimeError("broken")

    async def work(serving):
        engine.scheduler.reading = broken
        return await serving.generate(Request("abc", max_tokens=5))

    output = _run(engine, work)[0]
    assert output.finish_reason == "error"
    assert "broken" in str(output.error)


def test_a_panic_in_the_engine_leaves_nobody_waiting(engine) -> None:
    class Panic(BaseException):
        pass

    def broken(*_, **__):
        raise Panic("broken")

    async def work(serving):
        engine.scheduler.reading = broken
        return await asyncio.wait_for(serving.generate(Request("abc", max_tokens=5)), 5)

    assert "Panic('broken')" in str(_run(engine, work)[0].error)


def test_forms_that_wait_to_be_compiled_when_the_engine_ends_are_refused(engine) -> None:
    """The one that is being compiled, those behind it, and those that come later."""
    begun, release, prepare = threading.Event(), threading.Event(), engine.prepare

    def slow(request):
        begun.set()
        assert release.wait(10)
        return prepare(dataclasses.replace(request, structure=None))

    async def work(serving):
        engine.prepare = slow
        asked = [Request(f"text {i}", structure=Structure(regex="a")) for i in range(4)]
        tasks = [asyncio.create_task(serving.generate(one)) for one in asked[:3]]
        await asyncio.to_thread(begun.wait, 10)
        await serving.shutdown()
        tasks.append(asyncio.create_task(serving.generate(asked[3])))
        await asyncio.sleep(0.05)
        release.set()
        return [await asyncio.wait_for(asyncio.gather(task, return_exceptions=True), 5) for task in tasks]

    found = [error for [error] in _run(engine, work)]
    assert [getattr(error, "code", error) for error in found] == ["closed"] * 4


def test_what_judges_by_a_form_is_compiled_once_by_the_thread_that_compiles(engine, monkeypatch) -> None:
    pytest.importorskip("llguidance", reason="the extra [guided] is not installed")
    compile_, threads = guides._compiled, []

    def noted(*given):
        threads.append(threading.current_thread().name)
        return compile_(*given)

    async def work(serving):
        fits = await serving.judge(Structure(json={"type": "integer"}))
        engine.guides._known.clear()
        with pytest.raises(RequestError, match="cannot be compiled"):
            await serving.judge(Structure(regex="("))
        return [fits(text) for text in ("12", "1x", "", "-3")]

    monkeypatch.setattr(guides, "_compiled", noted)
    assert _run(engine, work) == [True, False, False, True]
    assert [name.startswith("atma-compile") for name in threads] == [True, True]


def test_many_prompts_come_back_in_their_order() -> None:
    llm = LLM("nano", EngineConfig(max_waiting=3, max_rows=2, memory_bytes=64 << 20, cache_bytes=16 << 20))
    settings = Settings(max_tokens=5, temperature=0)
    prompts = [f"def function_{i}(" for i in range(8)]
    outputs = llm.generate(prompts, settings)
    assert [out.tokens for out in outputs] == [llm.generate([prompt], settings)[0].tokens for prompt in prompts]


def test_a_reader_that_takes_nothing_pauses_its_request_and_is_resumed(model) -> None:
    """Nobody else waits for it, and what it reads in the end is what it would have read at once."""
    config = dataclasses.replace(SMALL, unread_bytes=4000)
    asked = Request("abc", max_tokens=200, seed=1, logprobs=3, ignore_end=True)

    async def work(serving):
        expected = await serving.generate(asked)
        stream = serving.stream(asked)
        events = [await anext(stream)]
        [reader] = serving._readers.values()
        while not reader.paused:
            await asyncio.sleep(0.001)
        assert reader.sent - reader.taken < 4000 + 1000
        assert (await serving.stats())["running"] == 0
        assert (await serving.generate(Request("other", max_tokens=5)))[0].finish_reason
        events += [event async for event in stream]
        return expected[0].tokens, [token for event in events for token in event.tokens], await serving.stats()

    expected, read, stats = _run(AuditedEngine(model, byte_tokenizer(), config), work)
    assert read == expected
    assert stats["preemptions"] > 0


def test_what_is_paused_is_aborted_when_the_engine_ends(model) -> None:
    async def work(serving):
        stream = serving.stream(Request("abc", max_tokens=300, ignore_end=True))
        await anext(stream)
        while not next(iter(serving._readers.values())).paused:
            await asyncio.sleep(0.001)
        await serving.shutdown()
        return [event async for event in stream][-1].finish_reason

    config = dataclasses.replace(SMALL, unread_bytes=4000)
    assert _run(AuditedEngine(model, byte_tokenizer(), config), work) == "abort"


def test_handles_of_streams_hold_no_answer(engine) -> None:
    async def work(serving):
        stream = serving.stream(Request("abc", max_tokens=20, ignore_end=True))
        await anext(stream)
        handle = next(iter(engine.answers.handles.values()))
        events = [event async for event in stream]
        return len(events), handle.done, handle.outputs[0].tokens

    assert _run(engine, work) == (19, True, [])
