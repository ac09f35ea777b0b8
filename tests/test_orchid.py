"""Orchid: its golden vector, and (5.1) to (5.3) token by token; chunks begin at positions, not with calls."""

import json
import math

import pytest
import torch
from safetensors import safe_open

from atma import state as states
from atma.config import ModelConfig
from atma.mixers import orchid
from atma.model import Model
from atma.ops import native
from tests.laws.conftest import randomise
from tests.test_decoding import both, started

CLOSE = {"rtol": 1e-10, "atol": 1e-10}


def made(lags, chunk, width=5):
    mixer = ModelConfig(16, width=width, depth=1, pattern=("orchid",), lags=lags, chunk=chunk).mixer(0)
    mixer.init_weights(torch.Generator().manual_seed(0))
    return randomise(mixer)


def test_it_reproduces_its_golden_vector(golden_mixers):
    with safe_open(golden_mixers / "orchid.safetensors", "pt") as file:
        about, names = json.loads(file.metadata()["about"]), list(file.keys())
        x = {name: file.get_tensor(name) for name in names}
    inputs = [x[name].requires_grad_() for name in about["inputs"]]
    kernel = orchid.Kernel(x["static"], x["mix"], x["rate"].log())
    z, c, chunk = x["z"][None], x["c"][None], about["config"]["segment"]
    found = orchid.convolve(z, c, kernel, chunk, orchid.plain_grid(z, chunk), None)
    total = torch.zeros((), dtype=torch.float64)
    for name, value in zip(("out", "autocorrelation", "kernel"), found, strict=True):
        torch.testing.assert_close(value[0], x[name], rtol=0, atol=1e-9 * float(x[name].abs().max()))
        total = total + (value[0] * x[f"out_grad.{name}"]).sum()
    for name, got in zip(about["inputs"], torch.autograd.grad(total, inputs), strict=True):
        expected = x[f"grad.{name}"]
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-9 * float(expected.abs().max()))


def convolved(x, taps):
    """Three taps, the last on the token itself; zeros before the text."""
    before = torch.cat([x.new_zeros(2, x.shape[1]), x])
    return torch.stack([(before[t : t + 3] * taps.T).sum(0) for t in range(len(x))])


def plain(mixer, x):
    """y (T, D) of x (T, D), and r and h after it, each (L, D), by the formulas alone."""
    w, (lags, chunk), width = dict(mixer.named_parameters()), (mixer.config.lags, mixer.config.chunk), x.shape[1]
    a, b, u = convolved(x @ w["in_proj.weight"].T, w["gate_taps"]).split(width, 1)
    z, c, rho = b * u, convolved(x, w["kernel_taps"]), 1 / (1 + torch.exp(-w["rate"]))
    zero, reads = x.new_zeros(width), []
    r, h = [zero] * lags, [zero] * lags
    for t in range(len(x)):
        past = range(min(lags, t + 1))
        reads.append(a[t] * sum((w["static"][:, s] + h[s]) * z[t - s] for s in past))
        r = [rho * r[s] + (1 - rho) * (c[t] * c[t - s] if s <= t else zero) for s in range(lags)]
        if (t + 1) % chunk == 0:
            unit = [zero, *(one / (r[0] + 1e-6) for one in r), zero]
            h = [sum(w["mix"][:, i] * unit[s + i] for i in range(3)) for s in range(lags)]
    return torch.stack(reads) @ w["out_proj.weight"].T, torch.stack(r), torch.stack(h)


@pytest.mark.parametrize(("lags", "chunk"), [(6, 4), (3, 1), (1, 5), (12, 5)])
def test_outputs_state_and_gradients_are_those_of_the_formulas(lags, chunk):
    mixer, x = made(lags, chunk), torch.randn(18, 5, dtype=torch.float64, requires_grad=True)
    expected, r, h = plain(mixer, x)
    y, state = mixer(x[None], mixer.init_state(1, 18))
    for found, wanted in ((mixer(x[None])[0][0], expected), (y[0], expected)):
        torch.testing.assert_close(found, wanted, **CLOSE)
    torch.testing.assert_close(state.correlation[0].T, r, **CLOSE)
    torch.testing.assert_close(state.kernel[0].T, h, **CLOSE)
    cotangent, weights = torch.randn_like(expected), [x, *mixer.parameters()]
    alone = mixer(x[None])[0][0]
    wanted = torch.autograd.grad((expected * cotangent).sum(), weights)
    for z in (y[0], alone):
        for mine, theirs in zip(torch.autograd.grad((z * cotangent).sum(), weights), wanted, strict=True):
            torch.testing.assert_close(mine, theirs, **CLOSE)


@torch.no_grad()
@pytest.mark.parametrize("tokens", [1, 2, 7, 20])
def test_rows_anywhere_in_their_chunks_go_on_as_each_alone(tokens):
    mixer = made(7, 5)
    texts = [torch.randn(1, length, 5, dtype=torch.float64) for length in (1, 4, 5, 9, 23)]
    held = [mixer(text, mixer.init_state(1, 0))[1] for text in texts]
    more = torch.randn(5, tokens, 5, dtype=torch.float64)
    y, state = mixer(more, states.stack(held))
    for i, text in enumerate(texts):
        whole, r, h = plain(mixer, torch.cat([text[0], more[i]]))
        torch.testing.assert_close(y[i], whole[-tokens:], **CLOSE)
        torch.testing.assert_close(state.correlation[i].T, r, **CLOSE)
        torch.testing.assert_close(state.kernel[i].T, h, **CLOSE)


@torch.no_grad()
def test_it_starts_with_the_initial_values_of_the_specification():
    mixer = ModelConfig(16, width=400, depth=1, pattern=("orchid",)).mixer(0)
    mixer.init_weights(torch.Generator().manual_seed(0))
    assert (mixer.config.lags, mixer.config.chunk) == (128, 64)
    torch.testing.assert_close(torch.sigmoid(mixer.rate), torch.full((400,), 0.98))
    assert not mixer.mix.any() and not mixer.out_proj.weight.any() and mixer.in_proj.bias is None
    for taps in (mixer.gate_taps, mixer.kernel_taps):
        assert 0.95 / math.sqrt(3) < taps.abs().max() <= 1 / math.sqrt(3) + 1e-6
    fading = torch.exp(-(128.0 ** torch.linspace(-1, 0, 400))[:, None] * torch.arange(128))
    whole = (mixer.static / fading)[fading > 1e-20]  # what is left of N(0, 1/L), where enough of it is
    assert abs(whole.std() * math.sqrt(128) - 1) < 5 / math.sqrt(2 * len(whole))
    torch.testing.assert_close(mixer.static[0, 127] / fading[0, 127], mixer.static[0, 127] * math.exp(127 / 128))


@torch.no_grad()
def test_the_kernel_is_the_static_one_in_the_first_chunk_and_follows_the_text_from_the_second():
    mixer, x = made(6, 4), torch.randn(1, 9, 5, dtype=torch.float64)
    y = mixer(x)[0]
    mixer.mix.zero_()
    static = mixer(x)[0]
    torch.testing.assert_close(y[:, :4], static[:, :4], **CLOSE)
    assert not torch.isclose(y[:, 4:], static[:, 4:]).any()


@pytest.mark.parametrize("wrong", ["lags", "chunk"])
def test_what_does_not_fit_is_told(wrong):
    with pytest.raises(ValueError, match=f"'{wrong}' must be at least 1, not 0"):
        ModelConfig(16, width=8, depth=1, pattern=("orchid",), **{wrong: 0})


@pytest.mark.skipif(not native.available(), reason="the compiled kernels are not available here")
def test_decoding_steps_are_recorded_and_are_the_model_s():
    model = randomise(Model(ModelConfig(23, width=16, depth=2, pattern=("orchid",), lags=6, chunk=4, mlp_multiple=1)))
    for decoder, found, expected, _ in both(model, started(model)):
        assert decoder.how.startswith("recorded"), decoder.how
        torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-11)
