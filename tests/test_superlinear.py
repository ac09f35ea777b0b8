"""Superlinear attention: by its formulas, one query at a time; what spans cover; steps, serving and refusals."""

import dataclasses
import math
from itertools import pairwise

import pytest
import torch

from atma.config import ModelConfig
from atma.decoding import Decoder
from atma.mixers import superlinear
from atma.ops import native
from atma.serve.request import Request
from atma.serve.working import Meter
from atma.state import fork
from atma.tokenizer import byte_tokenizer
from tests.harness.invariance import alone, speaking, together
from tests.laws.conftest import randomise
from tests.serve.conftest import SMALL, AuditedEngine

CLOSE = {"rtol": 1e-10, "atol": 1e-10}
TINY = {"query_heads": 4, "key_value_heads": 2, "head_width": 8}
WIDTH = 16
needs_kernels = pytest.mark.skipif(not native.available(), reason="the compiled kernels are not available here")


def mixer_of(**options):
    mixer = ModelConfig(WIDTH, width=WIDTH, depth=1, pattern=("superlinear",), **TINY, **options).mixer(0)
    mixer.init_weights(torch.Generator().manual_seed(0))
    return randomise(mixer)


def inputs(tokens, rows=1, seed=1):
    return torch.randn(rows, tokens, WIDTH, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def accumulated(mixer, x, g):
    """m_t of every token of x (T, D) for the key head g, by its recurrence."""
    K = mixer.head_width
    new = x @ mixer.anchor_m.weight[g * K : (g + 1) * K].T
    keep = torch.sigmoid(x @ mixer.anchor_keep.weight[g] + mixer.anchor_keep.bias[g] + 3.9)
    m, found = torch.zeros(K, dtype=x.dtype), []
    for t in range(len(x)):
        m = keep[t] * m + (1 - keep[t]) * new[t]
        found.append(m)
    return torch.stack(found)


def one_read(i, sizes, scores, logits, values, window_score):
    """What the query at i reads: scores and logits (T,) of it with every anchor and key, values (T, K)."""
    s_w, k = sizes
    window = math.floor((s_w + 1) ** 2) - 1
    stripes = [s for s in range(s_w + 1, i + 1) if s**2 <= i]
    best = sorted(stripes, key=lambda s: (-float(scores[i - s**2].detach()), s))[:k]
    ranges = [(max(0, i - window + 1), i)]
    ranges += [(max(0, i - s**2 - 3 * s), min(i - s**2 + s, i - window)) for s in best]
    gate = torch.softmax(torch.stack([window_score, *(scores[i - s**2] for s in best)]), 0)
    parts = [torch.softmax(logits[a : b + 1], 0) @ values[a : b + 1] for a, b in ranges]
    return sum(share * part for share, part in zip(gate, parts, strict=True))


def by_formula(mixer, x, sizes):
    """y (1, T, D) of one text, every query and head by itself."""
    projected, K = mixer.project(x), mixer.head_width
    q, k = mixer.core.turn(projected.q, projected.k, None, None)
    read = torch.zeros_like(q)
    for h in range(mixer.heads):
        g = h * mixer.groups // mixer.heads
        anchor_k = x[0] @ mixer.anchor_k.weight[g * K : (g + 1) * K].T + accumulated(mixer, x[0], g)
        scores = x[0] @ mixer.anchor_q.weight[h * K : (h + 1) * K].T @ anchor_k.T / K**0.5
        logits = mixer.core.scale * q[0, h] @ k[0, g].T
        for i in range(x.shape[1]):
            read[0, h, i] = one_read(i, sizes, scores[i], logits[i], projected.v[0, g], mixer.window_score[h])
    return mixer.output(x, projected, (read, None), None, None)[0]


@pytest.mark.parametrize(("stripes", "spans"), [(1, 2), (2, 1), (1, 4), (3, 2)])
@pytest.mark.parametrize("core", ["nope", "rope"])
def test_it_is_what_its_formulas_say_with_and_without_a_state(stripes, spans, core):
    mixer, x = mixer_of(stripes=stripes, spans=spans, core=core), inputs(67)
    expected = by_formula(mixer, x, (stripes, spans))
    torch.testing.assert_close(mixer(x)[0], expected, **CLOSE)
    with torch.no_grad():
        first, state = mixer(x[:, :23], mixer.init_state(1, 90))
        second, state = mixer(x[:, 23:60], state)
        steps = []
        for t in range(60, 67):
            y, state = mixer(x[:, t : t + 1], state)
            steps.append(y)
    torch.testing.assert_close(torch.cat([first, second, *steps], 1), expected, **CLOSE)


def test_of_equal_anchors_the_nearest_are_read():
    mixer, x = mixer_of(stripes=1, spans=2), inputs(50)
    with torch.no_grad():
        mixer.anchor_q.weight.zero_()
        equal = mixer(x)[0]
        torch.testing.assert_close(equal, by_formula(mixer, x, (1, 2)), **CLOSE)
        x[:, :7] += 1  # beyond the span of the third stripe of the last token
        torch.testing.assert_close(mixer(x)[0][:, 49], equal[:, 49], **CLOSE)


@pytest.mark.parametrize("stateful", [False, True])
def test_pieces_change_nothing_gradients_included(monkeypatch, stateful):
    mixer, x = mixer_of(stripes=1), inputs(40, rows=2).requires_grad_()
    found = []
    for numbers in (1 << 22, 5000):
        monkeypatch.setattr(superlinear, "AT_ONCE", numbers)
        y, _ = mixer(x, mixer.init_state(2, 50) if stateful else None)
        wanted = (x, mixer.anchor_q.weight, mixer.anchor_keep.weight, mixer.window_score, mixer.k_proj.weight)
        found.append((y, *torch.autograd.grad(y.square().sum(), wanted)))
    for one, other in pairwise(found):
        assert all(bool(z.abs().max() > 0) for z in other)
        torch.testing.assert_close(one, other, **CLOSE)


def test_both_forms_have_the_same_gradients():
    mixer, x = mixer_of(stripes=1), inputs(40).requires_grad_()
    wanted = [x, *(p for name, p in mixer.named_parameters() if "anchor" in name or name == "window_score")]
    found = [
        torch.autograd.grad(mixer(x, state)[0].square().sum(), wanted) for state in (None, mixer.init_state(1, 40))
    ]
    torch.testing.assert_close(*found, **CLOSE)


def test_every_earlier_token_lies_in_the_window_or_in_some_span():
    for s_w in (1, 2, 65):
        window = (s_w + 1) ** 2 - 1
        for i in (window - 1, window, window + 1, 6 * window, 12 * window + 7):
            seen = set(range(max(0, i - window + 1), i + 1))
            for s in range(s_w + 1, math.isqrt(i) + 1):
                seen |= set(range(max(0, i - s * s - 3 * s), min(i - s * s + s, i - window) + 1))
            # The first query beyond its window has no anchor yet, and does not read the token that has left it.
            assert seen == set(range(1 if i == window else 0, i + 1))


def test_within_its_window_it_is_softmax_attention():
    mixer, x = mixer_of(stripes=3), inputs(16)
    plain = ModelConfig(WIDTH, width=WIDTH, depth=1, pattern=("nope",), **TINY).mixer(0).double()
    plain.load_state_dict(mixer.state_dict(), strict=False)
    torch.testing.assert_close(mixer(x[:, :15])[0], plain(x[:, :15])[0], **CLOSE)
    further = inputs(20, seed=2)
    assert not torch.allclose(mixer(further)[0][:, 16:], plain(further)[0][:, 16:])


def model_of():
    config = ModelConfig(257, 32, depth=2, pattern=("superlinear",), mlp_multiple=2, stripes=1, **TINY)
    return speaking(config)


@needs_kernels
def test_steps_are_recorded_and_are_the_model_s():
    model = model_of().double()
    tokens = torch.randint(0, 257, (2, 60), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        _, state = model(tokens[:, :30], model.init_state(2, 64))
        other, decoder = fork(state), Decoder(model, state)
        for t in range(30, 60):
            hidden, other = model(tokens[:, t : t + 1], other)
            found, expected = decoder.step(tokens[:, t : t + 1]), model.logits(hidden[:, -1])
            assert decoder.how.startswith("recorded"), decoder.how
            torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-11)


def test_it_is_served():
    model, generator = model_of(), torch.Generator().manual_seed(3)
    prompts = [torch.randint(0, 257, (n,), generator=generator).tolist() for n in (5, 40, 77)]
    requests = [Request(p, max_tokens=12, temperature=0, logprobs=0, ignore_end=True) for p in prompts]
    config = dataclasses.replace(SMALL, memory_bytes=4 << 20)
    engine = AuditedEngine(model, byte_tokenizer(), config)
    outputs = alone(engine, requests)
    beside, _ = together(AuditedEngine(model, byte_tokenizer(), config), requests, 0)
    for prompt, output, other in zip(prompts, outputs, beside, strict=True):
        text = torch.tensor([[*prompt, *output.tokens]])
        with torch.inference_mode():
            logits = model.logits(model(text)[0])[0, len(prompt) - 1 : -1]
        assert output.tokens == logits.argmax(-1).tolist() == other.tokens


@pytest.mark.parametrize(("option", "value"), [("stripes", 0), ("spans", 0), ("window", 8), ("core", "polar")])
def test_what_it_cannot_take_is_refused_by_name(option, value):
    with pytest.raises(ValueError, match=f"'{option}'"):
        ModelConfig(16, width=16, depth=1, pattern=("superlinear",), **{option: value})


@torch.no_grad()
def test_a_long_call_takes_no_more_memory_than_its_pieces(monkeypatch):
    mixer, x = mixer_of(stripes=1), inputs(1024)
    taken = []
    for numbers in (1 << 30, 1 << 16):
        monkeypatch.setattr(superlinear, "AT_ONCE", numbers)
        for state in (None, mixer.init_state(1, 1024)):
            with Meter() as meter:
                mixer(x, state)
            taken.append(meter.most)
    keys = 1024 * 4 * 2 * (4 * 32) * 8 * 8  # bytes of what all queries gather
    assert taken[1] > keys and all(8 * most < keys for most in taken[2:]), (keys, taken)
