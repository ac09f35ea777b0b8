"""Tokens in turn, by the compiled kernels: what one gives depends on nothing beside it, by any rule and decay."""

import pytest
import torch

from atma.ops import native, recurrence

pytestmark = pytest.mark.skipif(not native.available(torch.float32), reason=native.status().reason)
BATCH, HEADS, GROUPS, LENGTH, WIDTH, VALUE_WIDTH = 2, 4, 2, 9, 24, 20
DECAYS = {
    "none": None,
    "head": (HEADS,),
    "token": (BATCH, HEADS, LENGTH),
    "key": (BATCH, HEADS, LENGTH, WIDTH),
    "value": (BATCH, HEADS, LENGTH, VALUE_WIDTH),
}
KINDS = [(rule, decay) for rule in ("add", "delta") for decay in DECAYS if (rule, decay) != ("delta", "value")]


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


class Given:
    """A call's tensors, of which some tokens, rows or heads can be taken."""

    def __init__(self, rule, decay, weighed, dtype, strength=1.0, shared=False):
        shape = DECAYS[decay]
        self.rule, self.axis = rule, ("key", "value")[decay == "value"]
        heads = (1, 1, HEADS) if shared else (HEADS, GROUPS, 1)
        q = draw(BATCH, heads[0], LENGTH, WIDTH)
        k = torch.nn.functional.normalize(draw(BATCH, heads[1], LENGTH, WIDTH, seed=1), dim=-1)
        v = draw(BATCH, heads[2], LENGTH, VALUE_WIDTH, seed=2)
        log_decay = None if shape is None else -strength * draw(*shape, seed=3).abs()
        beta = draw(BATCH, HEADS, LENGTH, seed=4).sigmoid() if weighed else None
        self.tensors = [None if x is None else x.to(dtype) for x in (q, k, v, log_decay, beta)]
        self.memory = draw(BATCH, HEADS, VALUE_WIDTH, WIDTH, seed=5).to(dtype)

    def part(self, rows=slice(None), tokens=slice(None)):
        return [x if x is None or x.ndim == 1 else x[rows, :, tokens] for x in self.tensors]

    def run(self, tensors, memory, backend="native", steady=False):
        q, k, v, log_decay, beta = tensors
        return recurrence(q, k, v, log_decay, beta, memory.clone(), None, self.rule, self.axis, backend, steady)

    def in_turn(self, tensors, memory):
        with torch.inference_mode():
            return self.run(tensors, memory, steady=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("weighed", [True, False], ids=["beta", "no beta"])
@pytest.mark.parametrize("shared", [False, True], ids=["", "one query and key"])
@pytest.mark.parametrize(("rule", "decay"), KINDS)
def test_tokens_in_turn_equal_the_oracle(rule, decay, shared, weighed, dtype):
    given = Given(rule, decay, weighed, dtype, shared=shared)
    exact = [None if x is None else x.double() for x in given.part()]
    oracle = given.run(exact, given.memory.double(), backend="reference")
    bound = 1e-12 if dtype == torch.float64 else 1e-5
    for found, expected in zip(given.in_turn(given.part(), given.memory), oracle, strict=True):
        torch.testing.assert_close(found.double(), expected, rtol=bound, atol=bound)


@pytest.mark.parametrize("cut", [1, 4, 8])
@pytest.mark.parametrize(("rule", "decay"), KINDS)
def test_a_cut_text_has_the_same_bits(rule, decay, cut):
    given = Given(rule, decay, True, torch.float32)
    whole, after = given.in_turn(given.part(), given.memory)
    first, between = given.in_turn(given.part(tokens=slice(cut)), given.memory)
    rest, last = given.in_turn(given.part(tokens=slice(cut, None)), between)
    assert torch.equal(torch.cat([first, rest], 2), whole)
    assert torch.equal(last, after)


@pytest.mark.parametrize(("rule", "decay"), KINDS)
def test_a_row_alone_has_the_bits_it_has_beside_others(rule, decay):
    given = Given(rule, decay, True, torch.float32)
    together, after = given.in_turn(given.part(), given.memory)
    for row in range(BATCH):
        one = slice(row, row + 1)
        alone, last = given.in_turn(given.part(rows=one), given.memory[one])
        assert torch.equal(alone, together[one])
        assert torch.equal(last, after[one])


@pytest.mark.parametrize(("rule", "decay"), [kind for kind in KINDS if kind[1] != "none"])
def test_what_has_decayed_away_is_exactly_nothing(rule, decay):
    """log a = −400 is a decay of 0 in float32: the memory before a token leaves no trace, however large it was."""
    given = Given(rule, decay, True, torch.float32)
    tensors = given.part()
    tensors[3] = torch.full(DECAYS[decay], -400.0)
    large, nothing = 1e30 * given.memory, 0.0 * given.memory
    assert torch.equal(given.in_turn(tensors, large)[0], given.in_turn(tensors, nothing)[0])
    chunked = [given.run(tensors, memory)[0] for memory in (large, nothing)]
    assert torch.equal(*chunked)
