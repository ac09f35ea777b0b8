"""A mixer that says its form is steady gives a text the same bits alone, beside others, and in any cuts."""

import dataclasses

import pytest
import torch

from atma.config import ModelConfig
from atma.mixers import names, small
from atma.ops import native
from atma.serve.request import Request
from atma.tokenizer import byte_tokenizer
from tests.harness.invariance import speaking
from tests.serve.conftest import SMALL, AuditedEngine, finish

LARGER = dataclasses.replace(SMALL, memory_bytes=64 << 20, step_tokens=23, cache_bytes=0)
CASES = [(kind, i) for kind in names() for i in range(len(small(kind)))]
TEXT = list(b"the quick brown fox jumps over the lazy dog and the slow one")


def told(engine, *prompts):
    """Tokens and log-probabilities of each answer, all at once."""
    handles = [
        engine.submit(Request(prompt, max_tokens=6, temperature=0, logprobs=0, ignore_end=True, echo=True))
        for prompt in prompts
    ]
    finish(engine, *handles)
    return [[(one.token, one.logprob) for one in handle.outputs[0].logprobs[1:]] for handle in handles]


@pytest.mark.skipif(not native.available(torch.float32), reason="exact only by the compiled kernels")
@pytest.mark.parametrize(("kind", "index"), CASES)
@torch.no_grad()
def test_what_says_it_is_exact_has_the_same_bits_beside_others(kind: str, index: int) -> None:
    model = speaking(ModelConfig(257, width=16, depth=2, pattern=(kind,), mlp_multiple=2, **small(kind)[index]))
    engine = AuditedEngine(model, byte_tokenizer(), LARGER)
    if not engine.served.exact:
        pytest.skip("it does not say so")
    alone = [told(engine, prompt)[0] for prompt in (TEXT, TEXT[7:30])]
    assert told(engine, TEXT, TEXT[7:30]) == alone
    wider = AuditedEngine(model, byte_tokenizer(), dataclasses.replace(LARGER, step_tokens=70))
    assert told(wider, TEXT[7:30], TEXT, TEXT[3:50])[:2] == alone[::-1]
