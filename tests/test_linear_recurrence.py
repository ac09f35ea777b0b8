"""Linear recurrences as mixers: a plain restatement of every system, and what each starts from."""

import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from atma.config import ModelConfig
from atma.mixers import MEMORIES, MIXERS, Place, find, small
from atma.mixers.linear_recurrence import LinearRecurrence
from atma.mixers.recurrent_reading import Inputs, recur
from atma.mixers.recurrent_systems import SYSTEMS
from atma.model import Model
from atma.ops import use_backend
from atma.train.optim import parameter_groups
from tests.laws.conftest import randomise

NAMES = [name for name, (place, _) in MIXERS.items() if place.startswith("linear_recurrence")]
MEMORY_NAMES = [name for name, (place, _) in MEMORIES.items() if place.startswith("recurrent_memory")]
EXACT = {"rtol": 1e-10, "atol": 1e-10}


def made(name, layer=0, depth=1, random=True, **options) -> LinearRecurrence:
    """The mixer of a layer of a model of width 16, in float64."""
    config = ModelConfig(16, width=16, depth=depth, pattern=(name,), **{**small(name)[0], **options})
    mixer = config.mixer(layer)
    mixer.init_weights(torch.Generator().manual_seed(1))
    return randomise(mixer) if random else mixer.double()


def inputs(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# Every system, restated: one text x (T, D), one token at a time


def sp(x):
    return torch.log(1 + torch.exp(x))


def silu(x):
    return x / (1 + torch.exp(-x))


def convolved(z, conv):
    padded = torch.cat([torch.zeros(3, z.shape[1], dtype=z.dtype), z])
    return torch.stack([(padded[t : t + 4] * conv.taps.T).sum(0) for t in range(len(z))])


def heads(z, count):
    return z.view(len(z), count, -1)


def loop(q, k, v, a=None, beta=None, delta=False):
    """q, k (T, H, K), v (T, H, V), a (T, H, K or 1), beta (T, H): what is read (T, H, V)."""
    reads = []
    for h in range(v.shape[1]):
        M = torch.zeros(v.shape[2], k.shape[2], dtype=v.dtype)
        for t in range(len(v)):
            M = M if a is None else M * a[t, h]
            w = v[t, h] - M @ k[t, h] if delta else v[t, h]
            M = M + (1 if beta is None else beta[t, h]) * torch.outer(w, k[t, h])
            reads.append(M @ q[t, h])
    return torch.stack(reads).view(v.shape[1], len(v), -1).transpose(0, 1)


def normed(read, gain, epsilon):
    return read / (read.square().mean(-1, keepdim=True) + epsilon).sqrt() * gain


def normalised(m, x, phi):
    q, k, v = (heads(layer(x), m.heads) for layer in (m.q_proj, m.k_proj, m.v_proj))
    q, k = phi(q), phi(k)
    return loop(q, k, v) / (loop(q, k, torch.ones_like(v[..., :1])) + 1e-12)


def linear(m, x):
    read = normalised(m, x, lambda z: torch.where(z > 0, z + 1, z.exp()))
    return m.readout.out_proj(normed(read, 1, 2**-23).flatten(1) * torch.sigmoid(m.readout.gate_proj(x)))


def based(m, x):
    def phi(z):
        K = z.shape[-1]
        pairs = [z[..., i] * z[..., j] / math.sqrt(2 * K if i == j else K) for i in range(K) for j in range(i, K)]
        return torch.cat([torch.ones_like(z[..., :1]), z / K**0.25, torch.stack(pairs, -1)], -1)

    return m.readout.out_proj(normalised(m, x, phi).flatten(1))


def hedgehog(m, x):
    def phi(z):
        y = torch.einsum("hkl,thl->thk", m.feature.weight, z) + m.feature.shift
        return torch.cat([y.softmax(-1), (-y).softmax(-1)], -1)

    return m.readout.out_proj(normalised(m, x, phi).flatten(1))


def lightning(m, x):
    q, k, v = (heads(silu(layer(x)), m.heads) for layer in (m.q_proj, m.k_proj, m.v_proj))
    place, H = m.sizes.place, m.heads
    share = 1 - place.layer / (place.layers - 1) + 1e-5
    rate = torch.tensor([math.exp(-(2 ** (-8 * h / H)) * share) for h in range(1, H + 1)], dtype=x.dtype)
    read = loop(q, k, v, rate.expand(len(x), -1)[..., None]).flatten(1)
    gate = torch.sigmoid(m.readout.gate_proj(m.readout.down_proj(x)))
    return m.readout.out_proj(normed(read, 1, 1e-6) * gate)


def retnet(m, x):
    q, k, v = (heads(layer(x), m.heads) for layer in (m.q_proj, m.k_proj, m.v_proj))
    half = q.shape[-1] // 2
    angle = torch.arange(len(x))[:, None, None] * 10000.0 ** (-torch.arange(half, dtype=x.dtype) / half)
    turn = torch.polar(torch.ones_like(angle), angle)

    def turned(z):
        z = torch.complex(z[..., :half], z[..., half:]) * turn
        return torch.cat([z.real, z.imag], -1)

    a = torch.tensor([1 - 2.0 ** (-5 - h) for h in range(m.heads)], dtype=x.dtype).expand(len(x), -1)[..., None]
    read = loop(turned(q) / math.sqrt(2 * half), turned(k), v, a)
    return m.readout.out_proj(normed(read, m.readout.gain, 1e-5).flatten(1) * silu(m.readout.gate_proj(x)))


def gla(m, x):
    q, k, v = (heads(layer(x), m.heads) for layer in (m.q_proj, m.k_proj, m.v_proj))
    gate = m.gates.decay
    a = heads(torch.sigmoid(gate.up_proj(gate.down_proj(x))) ** (1 / 16), m.heads)
    read = loop(q / math.sqrt(q.shape[-1]), k, v, a)
    return m.readout.out_proj(normed(read, m.readout.gain, 1e-5).flatten(1) * silu(m.readout.gate_proj(x)))


def hgrn2(m, x):
    gate, layer = m.gates.decay, m.sizes.place.among
    shares = gate.table.softmax(0)
    floor = shares[: layer + 1].sum(0) - shares[0]
    a = heads(floor + (1 - floor) * torch.sigmoid(gate.forget_proj(x)), m.heads)
    q, v = heads(silu(m.q_proj(x)), m.heads), heads(m.v_proj(x), m.heads)
    read = loop(q / math.sqrt(q.shape[-1]), 1 - a, v, a)
    return m.readout.out_proj(normed(read.flatten(1), m.readout.gain, 1e-5))


def mamba2(m, x):
    z = torch.cat([m.q_proj(x), m.k_proj(x), m.v_proj(x)], -1)
    q, k, v = silu(convolved(z, m.conv) + m.conv.bias).split(m.widths, -1)
    q, k, v = q[:, None].expand(-1, m.heads, -1), k[:, None].expand(-1, m.heads, -1), heads(v, m.heads)
    step = sp(m.gates.decay.step_proj(x) + m.gates.decay.bias)
    y = loop(q, k, v, torch.exp(-m.gates.decay.rate.exp() * step)[..., None], step) + m.skip[:, None] * v
    return m.readout.out_proj(normed(y.flatten(1) * silu(m.readout.gate_proj(x)), m.readout.gain, 1e-5))


def delta(m, x, a, gate, double=1):
    z = silu(convolved(torch.cat([m.q_proj(x), m.k_proj(x), m.v_proj(x)], -1), m.conv))
    q, k, v = (heads(part, m.heads) for part in z.split(m.widths, -1))
    q, k = q / q.norm(dim=-1, keepdim=True) / math.sqrt(q.shape[-1]), k / k.norm(dim=-1, keepdim=True)
    read = loop(q, k, v, a, double * torch.sigmoid(m.gates.beta_proj(x)), delta=True)
    return m.readout.out_proj(normed(read, m.readout.gain, 1e-5).flatten(1) * gate)


def deltanet(m, x):
    return delta(m, x, None, 1, 2)


def gated_deltanet(m, x):
    gate = m.gates.decay
    a = torch.exp(-gate.rate.exp() * sp(gate.step_proj(x) + gate.bias))[..., None]
    return delta(m, x, a, silu(m.readout.gate_proj(x)))


def kda(m, x):
    gate = m.gates.decay
    a = torch.exp(-gate.rate.exp()[:, None] * heads(sp(gate.up_proj(gate.down_proj(x)) + gate.bias), m.heads))
    return delta(m, x, a, torch.sigmoid(m.readout.gate_proj(m.readout.down_proj(x))))


def delta_memory(m, x, lifted=lambda x: x):
    z = torch.cat([m.q_proj(x), m.k_proj(x), m.v_proj(x)], -1)
    q, k, v = (heads(part, m.heads) for part in (z + convolved(z, m.conv)).split(m.widths, -1))
    q, k = lifted(q / q.norm(dim=-1, keepdim=True)), lifted(k / k.norm(dim=-1, keepdim=True))
    a = torch.sigmoid(m.gates.decay.proj(x) + 3.9)[..., None]
    read = loop(q, k, v, a, torch.sigmoid(m.gates.beta_proj(x)), delta=True)
    return m.readout.out_proj(normed(read, 1, 2**-23).flatten(1) * torch.sigmoid(m.readout.gate_proj(x)))


def poly_delta(m, x):
    def products(x):  # φ(q)·φ(k) = Σ a_i (q·k)^i / Σ a_i
        parts = [x.new_ones(*x.shape[:-1], 1), x, (x[..., None] * x[..., None, :]).flatten(-2)]
        return torch.cat([part * a.sqrt() for part, a in zip(parts, m.feature.raw.softmax(0), strict=True)], -1)

    return delta_memory(m, x, products)


@torch.no_grad()
@pytest.mark.parametrize("name", NAMES)
def test_every_system_equals_its_formulas_one_token_at_a_time(name):
    for layer in (1, 2):
        mixer, x = made(name, layer, 4), inputs(1, 9, 16)
        with use_backend("reference"):
            y, _ = mixer(x)
        torch.testing.assert_close(y[0], globals()[name](mixer, x[0]), **EXACT)


@torch.no_grad()
def test_the_first_forgetting_layer_has_no_floor_and_a_lone_one_no_table():
    first, lone = made("hgrn2", 0, 3), made("hgrn2", 0, 1)
    x = inputs(2, 5, 16)
    lone.load_state_dict({key: value for key, value in first.state_dict().items() if "table" not in key})
    torch.testing.assert_close(first(x)[0], lone(x)[0], **EXACT)
    assert lone.gates.decay.table is None
    torch.testing.assert_close(
        first.log_decay(x), F.logsigmoid(first.gates.decay.forget_proj(x)).view(2, 5, 2, 8).mean(-1).mT, **EXACT
    )
    last = made("hgrn2", 2, 3, random=False)
    torch.testing.assert_close(last.gates(x - x)[0].exp(), inputs(2, 2, 5, 8).fill_(2 / 3 + 1 / 6), **EXACT)


@torch.no_grad()
def test_channels_that_decay_alike_are_the_gated_delta_rule():
    one, other = made("kda", heads=2, key_width=4, value_width=8), made("gated_deltanet", heads=2, key_width=4)
    step = other.gates.decay
    channels = one.gates.decay
    channels.down_proj.weight.zero_()
    channels.down_proj.weight[:2] = step.step_proj.weight
    channels.up_proj.weight.zero_()
    for head in range(2):
        channels.up_proj.weight[4 * head : 4 * head + 4, head] = 1
    channels.bias.copy_(step.bias.repeat_interleave(4))
    channels.rate.copy_(step.rate)
    x = inputs(2, 70, 16)
    scalar, channel = other.gates(x)[0], one.gates(x)[0]
    torch.testing.assert_close(channel, scalar[..., None].expand_as(channel), **EXACT)
    one.gates.beta_proj.load_state_dict(other.gates.beta_proj.state_dict())
    (q, k, v), _ = other._project(x, None, None)
    q, k = other.feature(q), other.feature(k)
    both = [recur(Inputs(q, k, v, *m.gates(x)), None, None, m.config, False) for m in (one, other)]
    for a, b in zip(*both, strict=True):
        torch.testing.assert_close(a, b, **EXACT)


@torch.no_grad()
def test_the_memory_alone_is_the_third_channel_on_the_same_queries_keys_and_values():
    mixer = made("delta_memory")
    heads = SimpleNamespace(place=Place(16, 1e-6), heads=2, groups=2, head_width=8, window=None)
    memory = randomise(find("delta", "memory").cls(find("delta", "memory").cls.Config(), heads))
    memory.decay_proj.load_state_dict(mixer.gates.decay.proj.state_dict())
    memory.beta_proj.load_state_dict(mixer.gates.beta_proj.state_dict())
    for own, other in ((memory.gate_proj, mixer.readout.gate_proj), (memory.out_proj, mixer.readout.out_proj)):
        own.weight.copy_(other.weight)
        own.bias.zero_()
    x = inputs(2, 70, 16)
    (q, k, v), _ = mixer._project(x, None, None)
    torch.testing.assert_close(mixer(x)[0], memory(x, q, k, v, None)[0], **EXACT)


# What each starts from


@pytest.mark.parametrize("name", [name for name in NAMES if SYSTEMS[name].start == "published"])
def test_at_the_start_a_mixer_adds_nothing_and_its_parts_are_in_their_ranges(name):
    mixer = made(name, random=False)
    assert not mixer(inputs(2, 5, 16))[0].any()
    for key, value in mixer.named_parameters():
        part = key.rpartition(".")[2]
        if part == "taps":
            assert value.abs().max() <= 0.5 and value.std() > 0.2
        elif part == "rate":
            least = 1 if name in ("mamba2", "kda") else 1e-4
            assert (value.exp() >= least - 1e-12).all() and (value.exp() <= 16).all()
        elif part == "bias" and key == "gates.decay.bias":
            assert (sp(value) >= 1e-3 - 1e-9).all() and (sp(value) <= 0.1 + 1e-9).all()
        elif part in ("bias", "shift", "table"):
            assert not value.any()
        elif part in ("gain", "skip"):
            assert (value == 1).all()
        elif key == "feature.weight":
            assert torch.equal(value, torch.eye(8).double().expand(2, 8, 8))
        elif key != "readout.out_proj.weight":
            bound = value.shape[1] ** -0.5
            assert value.abs().max() <= bound and value.std() > 0.4 * bound


def test_a_seed_is_all_that_a_start_depends_on():
    for name in NAMES:
        first, second = (made(name, 1, 3, random=False).state_dict() for _ in range(2))
        assert all(torch.equal(first[key], second[key]) for key in first)


def test_everything_learned_learns_and_only_matrices_go_to_muon():
    for name in NAMES:
        model = Model(ModelConfig(23, width=16, depth=2, pattern=(name,), **small(name)[0])).double()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.1 * inputs(*parameter.shape))
        tokens = torch.randint(0, 23, (2, 12), generator=torch.Generator().manual_seed(0))
        model.loss(model(tokens)[0], tokens.roll(-1, 1)).mean().backward()
        silent = {key for key, value in model.named_parameters() if value.grad is None or not value.grad.any()}
        assert silent == set(), name
        kept = {key.rpartition(".")[2] for key in parameter_groups(model)["vector"]}
        assert kept >= {key.rpartition(".")[2] for key, value in model.blocks.named_parameters() if value.ndim == 1}
        assert not {"taps", "table", "shift"} & {key.rpartition(".")[2] for key in parameter_groups(model)["matrix"]}
