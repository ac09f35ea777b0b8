"""A served text of a model whose layers all have a window holds the pages of its window, however long it is."""

import dataclasses

import pytest
import torch

from atma.config import ModelConfig
from atma.model import Model
from atma.ops import native
from atma.serve.request import Request, RequestError
from atma.tokenizer import byte_tokenizer
from tests.harness.conversations import Cold
from tests.harness.invariance import speaking
from tests.serve.conftest import SMALL, AuditedEngine, finish, random_model

WINDOW = 24
PAGE = SMALL.page_tokens
WRITING = -(-(WINDOW - 1) // PAGE) + 2
"""Pages of a text that is being written, at the most."""


def tokens_of(count: int, seed: int = 0) -> list[int]:
    return torch.randint(0, 256, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


def windowed() -> Model:
    return random_model("rope", True, WINDOW)


def asked(prompt: list[int], count: int, **more) -> Request:
    return Request(prompt, max_tokens=count, temperature=0, ignore_end=True, logprobs=0, **more)


def mixed() -> Model:
    shape = {"query_heads": 2, "key_value_heads": 1, "head_width": 16, "core": "nope", "memory": False}
    mixers = {"far": {"kind": "attention"} | shape, "near": {"kind": "attention", "window": WINDOW} | shape}
    return speaking(ModelConfig(257, 32, depth=2, pattern=("far", "near"), mixers=mixers, mlp_multiple=2), 0)


def answer(engine, request: Request):
    handle = engine.submit(request)
    finish(engine, handle)
    return handle.outputs[0]


def test_a_text_gives_back_its_pages_while_it_is_read_and_written() -> None:
    engine = AuditedEngine(windowed(), byte_tokenizer(), dataclasses.replace(SMALL, cache_bytes=0))
    handle = engine.submit(asked(tokens_of(700), 200))
    held = []
    while not handle.done:
        engine.step()
        running = engine.scheduler.running
        held += [(bool(s.written), len(s.pages)) for s in running]
        assert engine.store.budget.pages - engine.store.pool.free == sum(len(s.pages) for s in running)
    assert max(pages for written, pages in held if written) <= WRITING
    assert max(pages for _, pages in held) <= WRITING + -(-SMALL.step_tokens // PAGE)
    assert engine.store.pool.free == engine.store.budget.pages


@pytest.mark.skipif(not native.available(torch.float32), reason="exact only by the compiled kernels")
def test_a_text_longer_than_all_memory_is_served_to_the_bit() -> None:
    model = windowed()
    engine = AuditedEngine(model, byte_tokenizer(), SMALL)
    room = engine.store.budget.pages * PAGE
    prompt = tokens_of(2 * room)
    output = answer(engine, asked(prompt, 100))
    assert Cold(model, 257, PAGE).differences(prompt, output) == (0, 0)
    again = answer(engine, asked(prompt + output.tokens + tokens_of(30, 1), 40))
    assert again.usage.cached == len(prompt) + 99
    assert Cold(model, 257, PAGE).differences(prompt + output.tokens + tokens_of(30, 1), again) == (0, 0)


@pytest.mark.skipif(not native.available(torch.float32), reason="exact only by the compiled kernels")
@pytest.mark.parametrize("recorded_bytes", [0, SMALL.recorded_bytes])
def test_many_long_texts_at_once_are_served_to_the_bit(recorded_bytes: int) -> None:
    model = windowed()
    engine = AuditedEngine(model, byte_tokenizer(), dataclasses.replace(SMALL, recorded_bytes=recorded_bytes))
    beginning = tokens_of(90)
    prompts = [beginning[: 20 * i] + tokens_of(150 * i + 1, i) for i in range(8)]
    handles = [engine.submit(asked(prompt, 60)) for prompt in prompts]
    finish(engine, *handles)
    cold = Cold(model, 257, PAGE)
    for prompt, handle in zip(prompts, handles, strict=True):
        assert cold.differences(prompt, handle.outputs[0]) == (0, 0)


def test_a_kept_state_refers_to_the_pages_of_its_window() -> None:
    engine = AuditedEngine(windowed(), byte_tokenizer(), SMALL)
    answer(engine, asked(tokens_of(300), 20))
    kept = engine.store.cache._kept.values()
    assert any(one.standing.position >= 300 for one in kept)
    for one in kept:
        position = one.standing.position
        read = range(max(0, position - WINDOW + 1), position)
        assert set(one.pages) == {place // PAGE for place in read}


@pytest.mark.parametrize("length", [5, WINDOW - 1, WINDOW, 330])
def test_a_state_on_disk_is_its_window_and_goes_on_after_a_restart(length: int, tmp_path) -> None:
    model = windowed()
    config = dataclasses.replace(SMALL, snapshot_tokens=0, cache_folder=tmp_path)
    prompt, first = tokens_of(length), AuditedEngine(model, byte_tokenizer(), config)
    output = answer(first, asked(prompt, 10))
    first.close()
    sizes = [path.stat().st_size for path in tmp_path.iterdir()]
    token = 2 * 16 * 4  # one layer's key and value of 16 numbers
    assert max(sizes) < 8192 + first.store.budget.row_bytes + token * min(length + 10, WINDOW)
    second = AuditedEngine(model, byte_tokenizer(), config)
    longer = prompt + output.tokens + tokens_of(9, 1)
    again = answer(second, asked(longer, 20))
    assert again.usage.cached == length + 9
    assert again.logprobs == answer(AuditedEngine(model, byte_tokenizer(), SMALL), asked(longer, 20)).logprobs


def test_no_text_is_too_long_where_every_layer_has_a_window() -> None:
    request = asked(tokens_of(100), 10_000_000)
    assert AuditedEngine(windowed(), byte_tokenizer(), SMALL).prepare(request) == request.prompt
    for model in (random_model("rope", True), mixed()):
        with pytest.raises(RequestError, match="more than the"):
            AuditedEngine(model, byte_tokenizer(), SMALL).prepare(request)


def test_a_model_of_which_nothing_lies_in_pages_serves_any_length_with_few(tmp_path) -> None:
    model = speaking(ModelConfig(257, 32, depth=2, pattern=("gated_conv",), mlp_multiple=2), 0)
    config, prompt = dataclasses.replace(SMALL, cache_folder=tmp_path), tokens_of(3000)
    engine = AuditedEngine(model, byte_tokenizer(), config)
    assert engine.store.budget.page_bytes == 0
    assert engine.store.budget.pages < 300
    output = answer(engine, asked(prompt, 40))
    engine.close()
    longer = prompt + output.tokens + [7]
    again = answer(AuditedEngine(model, byte_tokenizer(), config), asked(longer, 20))
    assert again.usage.cached == len(longer) - 2
    assert again.logprobs == answer(AuditedEngine(model, byte_tokenizer(), SMALL), asked(longer, 20)).logprobs


def test_a_window_beyond_all_memory_bounds_texts_as_no_window_does() -> None:
    engine = AuditedEngine(random_model("rope", True, 100_000), byte_tokenizer(), SMALL)
    assert engine.store.longest_text == engine.store.budget.pages * PAGE
    assert len(answer(engine, asked(tokens_of(200), 50)).tokens) == 50


@pytest.mark.skipif(not native.available(torch.float32), reason="exact only by the compiled kernels")
def test_beside_layers_without_a_window_pages_are_held_whole_to_the_bit(tmp_path) -> None:
    model, config = mixed(), dataclasses.replace(SMALL, cache_folder=tmp_path)
    prompt, cold = tokens_of(200), Cold(model, 257, PAGE)
    engine = AuditedEngine(model, byte_tokenizer(), config)
    output = answer(engine, asked(prompt, 40))
    assert engine.store.pool.window is None
    assert cold.differences(prompt, output) == (0, 0)
    engine.close()
    again = AuditedEngine(model, byte_tokenizer(), config)
    longer = prompt + output.tokens + [7]
    assert cold.differences(longer, answer(again, asked(longer, 20))) == (0, 0)
    assert again.store.saved == len(longer) - 2


def test_without_the_compiled_kernels_a_long_text_agrees_up_to_rounding(monkeypatch) -> None:
    model, prompt = windowed(), tokens_of(2500)
    with torch.inference_mode():
        expected = model.logits(model(torch.tensor([prompt]))[0][0, -1])
    monkeypatch.setattr(native, "available", lambda *dtypes: False)
    monkeypatch.setattr("atma.ops.backend._decided", {})
    monkeypatch.setattr("atma.ops.backend._native_hindrance", lambda: "switched off")
    engine = AuditedEngine(model, byte_tokenizer(), SMALL)
    assert engine.store.budget.pages * PAGE < len(prompt)
    output = answer(engine, asked(prompt, 1))
    logprob = expected[:257].float().log_softmax(-1)[output.tokens[0]]
    assert abs(output.logprobs[0].logprob - float(logprob)) < 1e-4
