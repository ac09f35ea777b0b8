"""Attention over relative positions and over pairs of tokens: golden vectors, and formulas written out per query."""

import json

import pytest
import torch
from safetensors import safe_open

from atma import state as states
from atma.config import ModelConfig
from atma.decoding import Decoder
from atma.mixers import relative_attention as relative
from atma.mixers import tensor_attention as tensor
from atma.model import Model
from atma.ops import native
from tests.laws.conftest import randomise
from tests.test_decoding import both, started

CLOSE = {"rtol": 1e-10, "atol": 1e-10}
OPTIONS = {
    "relative_attention": {"query_heads": 4, "key_value_heads": 2, "head_width": 3, "window": 5},
    "tensor_attention": {"query_heads": 4, "key_value_heads": 2, "head_width": 3, "window": 4},
}


@pytest.fixture(params=OPTIONS)
def mixer(request):
    made = ModelConfig(16, width=8, depth=1, pattern=(request.param,), **OPTIONS[request.param]).mixer(0)
    made.init_weights(torch.Generator().manual_seed(0))
    return randomise(made)


def golden_case(path):
    """Configuration, inputs, expected output, its cotangent and the expected gradients of a file."""
    with safe_open(path, "pt") as file:
        about, names = json.loads(file.metadata()["about"]), list(file.keys())
        x = {name: file.get_tensor(name) for name in names}
    inputs = {name: x[name].requires_grad_() for name in about["inputs"]}
    return about["config"], inputs, x["out"], x["out_grad.out"], {name: x[f"grad.{name}"] for name in inputs}


def assert_golden(found, case):
    _, inputs, out, cotangent, gradients = case
    torch.testing.assert_close(found, out, rtol=0, atol=1e-9 * float(out.abs().max()))
    for name, got in zip(inputs, torch.autograd.grad((found * cotangent).sum(), list(inputs.values())), strict=True):
        expected = gradients[name]
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-9 * float(expected.abs().max()))


@pytest.mark.parametrize("block", [128, 4])
def test_relative_attention_reproduces_its_golden_vector(golden_mixers, monkeypatch, block):
    monkeypatch.setattr(relative, "BLOCK", block)
    case = golden_case(golden_mixers / "relative_attention.safetensors")
    x = case[1]
    tables = relative.Tables(x["u"][None], x["r"][:, None], x["b"][:, None])
    assert len(tables.r) == case[0]["window"]
    q, k, v = (x[name][None, None] for name in "qkv")
    assert_golden(relative.relative_attention(q, k, v, tables, None, None)[0, 0], case)


@pytest.mark.parametrize("numbers", [1 << 22, 49 * 5])
def test_tensor_attention_reproduces_its_golden_vector(golden_mixers, monkeypatch, numbers):
    monkeypatch.setattr(tensor, "NUMBERS", numbers)
    case = golden_case(golden_mixers / "tensor_attention.safetensors")
    x = case[1]
    q, k = x["q"][None, None], torch.cat([x["k1"], x["k2"]], -1)[None, None]
    v = torch.cat([x["v1"], x["v2"]], -1)[None, None]
    assert_golden(tensor.tensor_attention(q, k, v, case[0]["window"], None, None)[0, 0], case)


def convolved(z, taps, bias, heads):
    """Three taps, the last on the token itself, and a bias, shared by the heads: z (T, heads · K)."""
    before = torch.cat([z.new_zeros(2, z.shape[1]), z])
    each, shift = taps.repeat(heads, 1), bias.repeat(heads)
    return torch.stack([(before[t : t + 3] * each.T).sum(0) + shift for t in range(len(z))])


def plain_relative(weights, x):
    reads = []
    q, k, v = (
        convolved(x @ weights[f"{n}_proj.weight"].T, weights[f"{n}_taps"], weights[f"{n}_bias"], heads)
        for n, heads in (("q", 4), ("k", 2), ("v", 2))
    )
    for h in range(4):
        own, shared = slice(3 * h, 3 * h + 3), slice(3 * (h // 2), 3 * (h // 2) + 3)
        u, r, b = weights["u"][h], weights["r"][:, h], weights["b"][:, h]
        for i in range(len(x)):
            js = range(max(0, i - 4), i + 1)
            logits = [(q[i, own] + u) @ k[j, shared] + q[i, own] @ r[i - j] + b[i - j] for j in js]
            share = torch.softmax(torch.stack(logits) / 3**0.5, 0)
            reads.append(sum(p * v[j, shared] for p, j in zip(share, js, strict=True)))
    return torch.stack(reads).view(4, len(x), 3).transpose(0, 1).flatten(1) @ weights["out_proj.weight"].T


def plain_tensor(weights, x):
    reads = []
    q, k, v = ((x @ weights[f"{n}_proj.weight"].T).unflatten(1, (-1, 3)) for n in "qkv")
    q, k = (z / (z.square().mean(-1, keepdim=True) + 2**-23).sqrt() for z in (q, k))
    for h in range(4):
        k1, k2, v1, v2 = (z[:, 2 * (h // 2) + which] for z in (k, v) for which in (0, 1))
        for i in range(len(x)):
            pairs = [(j, l) for j in range(max(0, i - 3), i + 1) for l in range(max(0, i - 3), i + 1)]
            share = torch.softmax(torch.stack([(q[i, h] * k1[j] * k2[l]).sum() / 3 for j, l in pairs]), 0)
            reads.append(sum(p * v1[j] * v2[l] for p, (j, l) in zip(share, pairs, strict=True)))
    return torch.stack(reads).view(4, len(x), 3).transpose(0, 1).flatten(1) @ weights["out_proj.weight"].T


def test_outputs_and_gradients_are_those_of_the_formulas(mixer):
    plain = plain_relative if isinstance(mixer, relative.RelativeAttention) else plain_tensor
    x = torch.randn(11, 8, dtype=torch.float64, requires_grad=True)
    expected, y = plain(dict(mixer.named_parameters()), x), mixer(x[None])[0][0]
    torch.testing.assert_close(y, expected, **CLOSE)
    cotangent, weights = torch.randn_like(y), [x, *mixer.parameters()]
    found, wanted = (torch.autograd.grad((z * cotangent).sum(), weights, allow_unused=True) for z in (y, expected))
    for mine, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(mine, theirs, **CLOSE)


@torch.no_grad()
def test_a_state_holds_the_window_and_no_more(mixer):
    window, x = mixer.config.window, torch.randn(2, 3 * mixer.config.window, 8, dtype=torch.float64)
    state = mixer(x, mixer.init_state(2, 1000))[1]
    assert states.capacity(state) == 0 and state.keys.shape[2] == state.values.shape[2] == window
    after = mixer.reach + 1
    y = mixer(torch.cat([x[:, -after + 1 :] * 0 + 7, x[:, : after + 1]], 1), mixer.init_state(2, 1000))[0]
    other = mixer(torch.cat([x[:, -after + 1 :] * 0 - 7, x[:, : after + 1]], 1), mixer.init_state(2, 1000))[0]
    assert not torch.allclose(y[:, -3], other[:, -3]) and torch.equal(y[:, -2:], other[:, -2:])


def test_relative_attention_starts_as_plain_attention_without_positions():
    mixer = ModelConfig(16, width=8, depth=1, pattern=("relative_attention",), head_width=4).mixer(0)
    mixer.init_weights(None)
    assert mixer.r.shape == (128, 8, 4) and mixer.config.window == 128
    for name in ("u", "r", "b", "q_bias", "k_bias", "v_bias"):
        assert not getattr(mixer, name).any()
    for taps in (mixer.q_taps, mixer.k_taps, mixer.v_taps):
        assert taps.tolist() == [[0.0, 0.0, 1.0]] * 4
    assert not mixer.out_proj.weight.any() and mixer.out_proj.bias is None


def test_tensor_attention_starts_with_a_window_of_32_and_a_zero_projection():
    mixer = ModelConfig(16, width=8, depth=1, pattern=("tensor_attention",), head_width=4).mixer(0)
    mixer.init_weights(None)
    assert mixer.config.window == 32 and not mixer.out_proj.weight.any()
    assert all(layer.bias is None for layer in mixer.modules() if isinstance(layer, torch.nn.Linear))


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("wrong", [{"window": 0}, {"key_value_heads": 3}])
def test_what_does_not_fit_is_told(name, wrong):
    with pytest.raises(ValueError, match=f"'{next(iter(wrong))}' must be"):
        ModelConfig(16, width=8, depth=1, pattern=(name,), **(OPTIONS[name] | wrong))


@pytest.mark.skipif(not native.available(), reason="the compiled kernels are not available here")
@pytest.mark.parametrize("name", OPTIONS)
def test_decoding_steps_are_recorded_and_are_the_model_s(name):
    config = ModelConfig(23, width=16, depth=2, pattern=(name,), mlp_multiple=1, **OPTIONS[name])
    model = randomise(Model(config))
    for decoder, found, expected, _ in both(model, started(model)):
        assert isinstance(decoder, Decoder) and decoder.how.startswith("recorded"), decoder.how
        torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-11)
