"""Models read through a selection policy are served to the bit, whatever is beside a text or was kept of it."""

import dataclasses

import pytest
import torch

from atma.mixers.table import POLICIES
from atma.ops import native
from atma.selection import select
from atma.serve.carry import Carrier
from atma.tokenizer import byte_tokenizer
from tests.harness.conversations import Cold, Trace
from tests.serve.conftest import SMALL, AuditedEngine, random_model

KIB = 1 << 10
TEXTS = {
    "top_pages": "top_pages page=4 k=2 window=6",
    "longheads": "longheads chunk=8 budget=32",
    "hip": "hip k=8 sinks=4 window=6",
    "hylra": "hylra sources=0 page=4 share=3 least=6 window=5",
    "echo": "echo sources=0",
    "evict": "evict budget=24 window=8 block=8",
    "shadows": "shadows",
    "int8": "int8",
}
CORES = dict.fromkeys(TEXTS, ("polar", "rope")) | {"shadows": ("polar",)}
CASES = [(name, core) for name in TEXTS for core in CORES[name]]
pytestmark = pytest.mark.skipif(not native.available(torch.float32), reason="exact only by the compiled kernels")


def test_every_policy_is_served_here():
    assert set(TEXTS) == set(POLICIES) - {"pages"}  # of mixers that are served up to rounding


def answers(name: str, core: str, seeds: range, rounds: int) -> tuple[int, float]:
    """Answers compared, none of which differs, and the share of prompt tokens that came from kept states."""
    model, tokenizer = select(random_model(core), TEXTS[name]), byte_tokenizer()
    carrier = Carrier(model)
    assert carrier.recordable
    # With some policies a row takes more beside its pages: room for as many rows and kept states as elsewhere.
    more = (2 * SMALL.max_rows + 12) * carrier.row_bytes
    config = dataclasses.replace(SMALL, memory_bytes=SMALL.memory_bytes + 400 * KIB + more)
    config = dataclasses.replace(config, cache_bytes=SMALL.cache_bytes + 100 * KIB + 8 * carrier.row_bytes)
    cold, corpus = Cold(model, tokenizer.vocab_size, config.page_tokens), []
    corpus = torch.randint(0, 257, (2000,), generator=torch.Generator().manual_seed(9)).tolist()
    found: list[tuple[int, int]] = []
    cached = read = 0
    for seed in seeds:
        trace = Trace(
            lambda: AuditedEngine(model, tokenizer, config),
            seed,
            corpus,
            180,
            lambda prompt, output: found.append(cold.differences(prompt, output)),
        )
        trace.run(rounds)
        cached, read = cached + trace.cached, read + trace.read
    assert set(found) == {(0, 0)}
    return len(found), cached / read


@pytest.mark.parametrize(("name", "core"), CASES)
def test_answers_of_random_conversations_are_to_the_bit_those_of_a_cold_read(name, core):
    compared, cached = answers(name, core, range(1), 5)
    assert compared >= 5 and cached > 0.1


@pytest.mark.slow
@pytest.mark.parametrize(("name", "core"), CASES)
def test_two_thousand_answers_are_to_the_bit_those_of_a_cold_read(name, core):
    compared, cached = answers(name, core, range(100, 180), 12)
    assert compared >= 2000 and cached > 0.1


def test_pages_that_a_policys_do_not_divide_are_told():
    model = select(random_model("polar"), "top_pages page=5")
    with pytest.raises(ValueError, match=r"pages of 5 tokens do not divide the engine's, of 16 \(page_tokens\)"):
        AuditedEngine(model, byte_tokenizer(), SMALL)
