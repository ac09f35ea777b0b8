"""Neural memories beside a window and over segments: each wiring against what it is said to be, and what is refused."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F

from atma.config import ModelConfig
from atma.mixers import Place, find, neural_segments, small
from atma.mixers.neural_systems import SYSTEMS
from atma.ops.fast_weights.network import network
from atma.serve.request import Request
from atma.tokenizer import byte_tokenizer
from tests.harness.invariance import speaking
from tests.laws.conftest import randomise
from tests.serve.conftest import SMALL as SERVED
from tests.serve.conftest import AuditedEngine, finish
from tests.test_neural_memory import EXACT, inputs

AT_16 = Place(16, 1e-6)
ATTENTION = {"query_heads": 2, "key_value_heads": 1, "head_width": 8}
TINY = ATTENTION | {"memory_chunk": 4}
CALM = {"step_most": 0.1}


def made(name, place=AT_16, **options):
    """A mixer in float64, every parameter random."""
    torch.manual_seed(0)
    cls = find(name).cls
    mixer = cls(cls.configure(dict(find(name).fixed) | options), place)
    mixer.init_weights(torch.Generator().manual_seed(1))
    return randomise(mixer)


def normed(x, epsilon=1e-6):
    """x divided by its root mean square over the last axis."""
    return x / (x.square().mean(-1, keepdim=True) + epsilon).sqrt()


def read_by_hand(q, k, v, rows, seen):
    """Softmax over the persistent rows and keys seen (T, S), one head of keys and values for q (H, T, K)."""
    keys, values = (torch.cat([own, x], 1) for own, x in zip(rows, (k, v), strict=True))
    seen = torch.cat([torch.ones(len(seen), rows[0].shape[1], dtype=torch.bool), seen], 1)
    scores = (q @ keys.mT / q.shape[-1] ** 0.5).masked_fill(~seen, -torch.inf)
    return scores.softmax(-1) @ values


# Persistent rows


@torch.no_grad()
def test_persistent_rows_are_keys_that_every_query_of_a_window_sees():
    core = made("mag", system="titans", window=4, persistent=3, **TINY).window.core
    q, k, v = inputs(1, 2, 9, 8), inputs(1, 1, 9, 8, seed=1), inputs(1, 1, 9, 8, seed=2)
    place = torch.arange(9)
    seen = (place <= place[:, None]) & (place > place[:, None] - 4)
    expected = read_by_hand(q[0], k[0], v[0], (core.persistent_keys, core.persistent_values), seen)
    torch.testing.assert_close(core(q, k, v, None, None)[0][0], expected, **EXACT)
    _, null = core.scale_and_null(q, torch.ones(1, 9))
    rows = core.persistent_keys.expand(2, -1, -1)
    torch.testing.assert_close(null[0], (q[0] @ rows.mT / 8**0.5).logsumexp(-1), **EXACT)


@torch.no_grad()
def test_autocast_keeps_out_of_persistent_rows_and_of_what_a_memory_says_to_a_segment(monkeypatch):
    core = made("mag", system="titans", window=4, persistent=3, **TINY).window.core.float()
    q, k, v = (inputs(1, heads, 9, 8, seed=heads).float() for heads in (2, 1, 1))
    exact, mixer, seen = core(q, k, v, None, None)[0], made("mac", system="titans", **TINY, **CALM).float(), []
    monkeypatch.setattr(
        neural_segments, "network", lambda *given: seen.append(torch.is_autocast_enabled("cpu")) or network(*given)
    )
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(core(q, k, v, None, None)[0], exact)
        assert torch.equal(core.scale_and_null(q, torch.ones(1, 9))[1], core._scores(q).logsumexp(-1))
        assert mixer(inputs(1, 9, 16).float())[0].isfinite().all()
    assert seen and not any(seen)


# MAG, and a memory beside a window


@torch.no_grad()
def test_mag_is_the_window_alone_where_the_memory_is_silent():
    mixer = made("mag", system="titans", window=5, **TINY, **CALM)
    mixer.recalled_gain.zero_()  # the gate is ½ everywhere
    x = inputs(2, 14, 16)
    expected = 0.5 * mixer.out_proj(mixer.attended_gain * normed(mixer.window(x)[0]))
    torch.testing.assert_close(mixer(x)[0], expected, **EXACT)


@torch.no_grad()
def test_mag_is_the_memory_alone_where_all_values_of_the_window_are_one():
    mixer = made("mag", system="titans", window=5, **TINY, **CALM)
    values = inputs(8)
    for zero in (mixer.window.v_proj.weight, mixer.window.canon_v):
        zero.zero_()
    mixer.window.v_proj.bias.copy_(values)
    mixer.window.core.persistent_values.copy_(values)
    x = inputs(2, 14, 16)
    opening = torch.sigmoid(mixer.recalled_gain * normed(mixer.memory(x)[0]))
    expected = mixer.out_proj(mixer.attended_gain * normed(values.repeat(2)) * opening)
    torch.testing.assert_close(mixer(x)[0], expected, **EXACT)


@torch.no_grad()
def test_a_memory_beside_a_window_is_both_mixers_added():
    mixer = made("memory_beside_window", system="yaad", window=5, **TINY)
    window, memory = made("nope", window=5, **ATTENTION), made("yaad", query_heads=2, memory_chunk=4)
    window.load_state_dict(mixer.window.state_dict())
    memory.load_state_dict(mixer.memory.state_dict())
    x = inputs(2, 14, 16)
    torch.testing.assert_close(mixer(x)[0], window(x)[0] + memory(x)[0], **EXACT)
    assert mixer.reach == 4 + 3 and set(mixer.channels()) == {"read", "memory"}


# MAC


def convolved(z, taps):
    """z (L, C) + Σ_i taps_i z_{t−i} of tokens of the segment alone."""
    return z + sum(taps[:, -1 - i] * F.pad(z, (0, 0, i, 0))[: len(z)] for i in range(taps.shape[1]))


def by_hand(mixer, x):
    """MAC of one text x (T, D), token by token: every list of keys is written out."""
    chunk, heads = mixer.chunk, lambda z, count: z.unflatten(-1, (count, -1)).transpose(0, 1)
    state, outputs = mixer.memory.init_state(1, 0), []
    for t in range(len(x)):
        if t % chunk == 0:
            spoken = state.weights if mixer.config.granularity == "chunk" else state.anchor
        own = x[t // chunk * chunk : t + 1]
        asked = F.normalize(heads(mixer.recall_proj(own), 2), dim=-1)[None]
        h = normed(network(spoken, asked, mixer.memory.memory()), 2.0**-23)[0].transpose(0, 1).flatten(1)
        h = h if mixer.merge_proj is None else mixer.merge_proj(h)
        q, k, k_of_h = (
            normed(heads(layer(z), count)).transpose(0, 1).flatten(1)
            for layer, z, count in ((mixer.q_proj, own, 2), (mixer.k_proj, own, 1), (mixer.k_proj, h, 1))
        )
        q, k = convolved(q, mixer.canon_q), convolved(k, mixer.canon_k)
        v = convolved(mixer.v_proj(own), mixer.canon_v)
        keys, values = torch.cat([k_of_h, k])[None], torch.cat([mixer.v_proj(h), v])[None]
        rows = mixer.core.persistent_keys, mixer.core.persistent_values
        read = read_by_hand(heads(q, 2)[:, -1:], keys, values, rows, torch.ones(1, keys.shape[1], dtype=torch.bool))
        y = mixer.y_proj(read.transpose(0, 1).flatten(1))
        written = [
            heads(layer(normed(y)), 2)[None] for layer in (mixer.recall_proj, mixer.write_k_proj, mixer.write_v_proj)
        ]
        now = x[None, t : t + 1]
        read, state = mixer.memory(now, written, mixer.memory.log_keep(now), state, None)
        m = normed(read, 2.0**-23)[0].transpose(0, 1).flatten(1)
        m = m if mixer.merge_proj is None else mixer.merge_proj(m)
        opening = torch.sigmoid(mixer.recalled_gain * normed(m))
        outputs.append(mixer.out_proj(mixer.attended_gain * normed(y) * opening))
    return torch.cat(outputs)


@torch.no_grad()
@pytest.mark.parametrize(
    "options",
    [
        {"system": "titans"} | CALM,
        {"system": "moneta"},
        {"system": "lact", "key_width": 6, "value_width": 6},
        {"system": "allmem", "persistent": 2, "canon_taps": 2},
    ],
)
def test_mac_is_attention_over_persistent_rows_what_the_memory_says_and_the_segment(options):
    mixer = made("mac", **TINY | options)
    x = inputs(2, 14, 16)
    expected = torch.stack([by_hand(mixer, row) for row in x])
    torch.testing.assert_close(mixer(x)[0], expected, **EXACT)


@torch.no_grad()
def test_nothing_but_the_memory_crosses_the_boundary_of_a_segment():
    mixer = made("mac", **TINY, **CALM)
    mixer.memory.gates.step.proj.bias.fill_(-1e4)
    mixer.memory.gates.step.proj.weight.zero_()  # nothing is written
    x, other = inputs(1, 12, 16), inputs(1, 12, 16, seed=1)
    changed = torch.cat([other[:, :8], x[:, 8:]], 1)
    torch.testing.assert_close(mixer(changed)[0][:, 8:], mixer(x)[0][:, 8:], **EXACT)


# Any memory, and what is refused


@torch.no_grad()
@pytest.mark.parametrize("system", SYSTEMS)
@pytest.mark.parametrize("name", ["memory_beside_window", "mag", "mac"])
def test_a_wiring_takes_any_memory_of_the_family_and_may_be_cut_anywhere(name, system):
    kernel = SYSTEMS[system].network == "kernel"
    if name == "mac" and kernel:
        pytest.skip("a kernel has no anchor")
    own = {"key_width": 3} if SYSTEMS[system].feature == "poly" else {}
    mixer = made(name, system=system, **(ATTENTION if kernel else TINY), **own)
    if not kernel:
        gates = (mixer if name == "mac" else mixer.memory).memory.gates
        gates.step.proj.bias.sub_(3)  # such wide W⁰ diverge at the full step
    x = inputs(2, 11, 16)
    state, pieces = mixer.init_state(2, 11), []
    for part in x.split([1, 6, 4], 1):
        y, state = mixer(part, state)
        pieces.append(y)
    torch.testing.assert_close(torch.cat(pieces, 1), mixer(x)[0], **EXACT)


@pytest.mark.parametrize("name", ["memory_beside_window", "mag", "mac"])
def test_a_wiring_is_served_from_kept_states(name):
    mixers = {"it": {"kind": name, **small(name)[0], "head_width": 16}}
    model = speaking(ModelConfig(257, 32, depth=2, pattern=("it",), mixers=mixers, mlp_multiple=2), 0)
    prompt, answers = torch.randint(0, 256, (70,), generator=torch.Generator().manual_seed(0)).tolist(), []
    for cache_bytes in (1 << 22, 0):
        engine = AuditedEngine(
            model, byte_tokenizer(), dataclasses.replace(SERVED, memory_bytes=1 << 24, cache_bytes=cache_bytes)
        )
        for text in (prompt, prompt + prompt[:9]):
            handle = engine.submit(Request(text, max_tokens=12, temperature=0, ignore_end=True, logprobs=0))
            finish(engine, handle)
            answers.append(handle.outputs[0])
    assert [answer.tokens for answer in answers[:2]] == [answer.tokens for answer in answers[2:]]
    assert answers[1].usage.cached >= 64 and answers[3].usage.cached == 0


def test_the_first_options_of_each_wiring_start_as_nothing():
    for name in ("memory_beside_window", "mag", "mac"):
        cls = find(name).cls
        mixer = cls(cls.configure(dict(small(name)[0])), AT_16)
        mixer.init_weights(torch.Generator().manual_seed(1))
        assert not mixer(torch.randn(1, 9, 16))[0].any()


@pytest.mark.parametrize(
    ("name", "options", "told"),
    [
        ("mag", {"out_gate": "silu"}, "'out_gate' must be \"none\" where the memory itself is a gate"),
        ("mag", {"window": 0}, "'window' must be at least 1"),
        ("mag", {"key_value_heads": 3}, "'key_value_heads' must be a divisor of query_heads = 2"),
        ("mag", {"head_width": 4}, "'head_width' must be such that H·K = 16, the width of what the memory reads"),
        ("memory_beside_window", {"heads": 4}, "'heads' must be query_heads = 2 beside a window, not 4"),
        ("mac", {"conv": "canon"}, "'conv' must be \"none\" where the memory reads attention"),
        ("mac", {"system": "dot"}, "'system' must be one with fast weights, which have an anchor to read, not 'dot'"),
        ("mac", {"persistent": 0}, "'persistent' must be at least 1, not 0"),
        ("mag", {"persistent": 0}, "'persistent' must be at least 1, or kind = \"memory_beside_window\", not 0"),
    ],
)
def test_options_that_make_no_wiring_are_refused(name, options, told):
    cls = find(name).cls
    with pytest.raises(ValueError, match=told):
        cls(cls.configure(ATTENTION | options), AT_16)
