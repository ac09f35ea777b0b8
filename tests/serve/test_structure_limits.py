"""What a form may cost: its own answer ends, and nobody beside it notices."""

import pytest

pytest.importorskip("llguidance", reason="the extra [guided] is not installed")

from atma.serve.engine import Engine
from atma.serve.request import Request
from atma.serve.settings import EngineConfig
from atma.serve.structure import Structure
from atma.tokenizer import train_bpe
from tests.serve.conftest import finish, random_model


def test_a_grammar_whose_masks_take_long_ends_its_own_answer_alone() -> None:
    tokenizer = train_bpe(["a" * 64, "ab" * 32, "aab" * 20] * 20, 272)
    engine = Engine(random_model(vocabulary=272), tokenizer, EngineConfig(32 << 20, 0))
    form = Structure(grammar='start: "b" "b" "b" "b" e\ne: e e | "a" | "b"')  # harmless for as long as it is tried
    [longest] = tokenizer.encode("a" * 32)
    asked = Request("x", structure=form, max_tokens=8, ignore_end=True, logit_bias={longest: 90.0})
    handles = [engine.submit(asked), engine.submit(Request("free", max_tokens=20, ignore_end=True))]
    finish(engine, *handles)
    slow, free = (handle.outputs[0] for handle in handles)
    assert slow.finish_reason == "error" and "Too many items" in str(slow.error), slow
    assert (free.finish_reason, len(free.tokens)) == ("length", 20)
