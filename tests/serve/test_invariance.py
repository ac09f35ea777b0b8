"""An answer is the same alone and in any batch; the run of 1,000 requests is in benchmarks/serving.py."""

from pathlib import Path

import pytest

from atma.config import preset
from atma.loading import load
from atma.serve.engine import Engine
from atma.serve.settings import EngineConfig
from atma.tokenizer import byte_tokenizer
from tests.harness.invariance import alone, differences, random_requests, speaking, together


@pytest.mark.parametrize(
    "name", ["random nano-test", "nano", pytest.param("nano int8", marks=pytest.mark.slow), "nano int4"]
)
def test_a_request_alone_and_in_batches_up_to_32_has_the_same_text(name: str) -> None:
    if name.startswith("nano"):
        loaded = load("nano", weights=name.removeprefix("nano").strip() or None)
        model, tokenizer = loaded.model, loaded.tokenizer
    else:
        model, tokenizer = speaking(preset("nano-test")), byte_tokenizer()
    corpus = tokenizer.encode(Path(__file__).read_text(encoding="utf-8"))
    requests = random_requests(48, corpus, seed=1, prompt=120, answer=16)
    one = alone(Engine(model, tokenizer, EngineConfig(64 << 20, 0, max_rows=1)), requests)
    engine = Engine(model, tokenizer, EngineConfig(64 << 20, 16 << 20))
    other, rows = together(engine, requests, seed=2)
    found = differences(one, other)
    assert (found.texts, found.tokens) == (0, 0)
    assert found.logprobs == 0 or not engine.served.exact
    assert max(rows) > 16
