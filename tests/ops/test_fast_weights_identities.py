"""What neural memories are equal to: other forms of themselves, and other operations (mixers.md, section 4.13)."""

from itertools import product

import pytest
import torch
import torch.nn.functional as F

from atma.ops import gated_delta, recurrence, use_backend
from atma.ops.fast_weights import empty, kernel_memory, newton_schulz
from atma.ops.fast_weights.kernel import unfolded
from atma.ops.fast_weights.network import gradients, network
from tests.ops.memories import BACKENDS, PRESETS, assert_same, kernel_text, text


@pytest.fixture(autouse=True, params=BACKENDS)
def _backend(request):
    with use_backend(request.param):
        yield


LOSSES = {
    "dot": lambda f, v, _: -(f * v).sum(),
    "l2": lambda f, v, _: 0.5 * (f - v).square().sum(),
    "lp": lambda f, v, _: (((f - v).square() + 1e-6) ** 1.5).sum() / 3,
    "huber": lambda f, v, d: F.huber_loss(
        (f - v).norm(dim=-1), torch.zeros(f.shape[:-1]).double(), delta=d, reduction="sum"
    ),
    "huber_coordinate": lambda f, v, d: F.huber_loss(f, v, delta=d, reduction="sum"),
}


@pytest.mark.parametrize(("kind", "bias"), list(product(["matrix", "mlp", "gated"], LOSSES)))
def test_inner_gradients_are_those_of_the_inner_loss(kind, bias):
    for activation, norm, residual in product(("gelu", "silu"), (False, True), ("none", "skip")):
        given = text(network=kind, bias=bias, activation=activation, norm=norm, residual=residual)
        weights = tuple(w.expand(2, *w.shape).clone().requires_grad_() for w in given.memory.initial)
        loss = LOSSES[bias](network(weights, given.k, given.memory), given.v, 0.7)
        delta = torch.tensor(0.7, dtype=torch.float64)
        found = [e.mT @ z for e, z in gradients(weights, given.k, given.v, delta, given.memory)]
        for one, wanted in zip(found, torch.autograd.grad(loss, weights), strict=True):
            torch.testing.assert_close(one, wanted, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("anchor", ["all", "hidden"])
def test_a_matrix_is_the_delta_rule(anchor):
    if anchor == "all":
        given = text(chunk=1)
        given = given._replace(gates=given.gates._replace(keep=None))
        decay = None
    else:
        given = text(chunk=4, anchor="hidden")
        decay = given.gates.keep.log()
    memory = given.memory.initial[0].expand(2, -1, -1, -1)
    read, state = given.run()
    rule = (given.q, given.k, given.v, decay, given.gates.step, memory)
    wanted, after = recurrence(*rule, rule="delta") if decay is None else gated_delta(*rule)
    assert_same((read, *state.weights), (wanted, after))


def test_a_matrix_with_the_dot_loss_is_a_sum_of_recurrences_one_for_each_lag():
    for window in (1, 3):
        given = text(bias="dot", window=window)
        gates = given.gates
        memory = given.memory.initial[0].expand(2, -1, -1, -1)
        wanted = 0
        for j in range(window):
            k, v = (F.pad(x, (0, 0, j, 0))[:, :, : x.shape[2]] for x in (given.k, given.v))
            beta = gates.step * (1 if window == 1 else gates.omega[..., j])
            wanted = wanted + recurrence(given.q, k, v, gates.keep.log(), beta, memory if j == 0 else None)[0]
        torch.testing.assert_close(given.run()[0], wanted, rtol=1e-10, atol=1e-10)


SAME = [
    ({"bias": "lp", "p": 2.0}, {}, {}, {}),
    ({"bias": "huber"}, {"delta": 1e6}, {}, {}),
    ({"bias": "huber_switch"}, {"delta": 1e6}, {}, {}),
    ({"bias": "huber_coordinate"}, {"delta": 1e6}, {}, {}),
    ({"retention": "lq", "q": 2.0}, {}, {}, {}),
    ({"optimiser": "momentum"}, {"momentum": 0.0}, {}, {"momentum": None}),
    ({"window": 3}, {"omega": torch.tensor([1.0, 0, 0])}, {}, {"omega": None}),
]


@pytest.mark.parametrize(("options", "fixed", "plain", "left"), SAME, ids=[str(one[0]) for one in SAME])
@pytest.mark.parametrize("kind", ["matrix", "mlp", "gated"])
def test_options_at_their_neutral_value_are_the_plain_memory(kind, options, fixed, plain, left):
    given = text(network=kind, **options)
    filled = {name: torch.zeros_like(getattr(given.gates, name)) + value for name, value in fixed.items()}
    given = given._replace(gates=given.gates._replace(**filled))
    other = text(network=kind, **plain)
    gates = given.gates._replace(**{"delta": None} | left)
    other = given._replace(gates=gates, memory=given.memory._replace(rule=other.memory.rule))
    found, wanted = given.run(), other.run()
    assert_same((found[0], *found[1].weights), (wanted[0], *wanted[1].weights))


def test_a_gated_network_whose_gate_stays_one_is_an_mlp():
    given = text(tokens=11, network="gated", granularity="chunk", gates="matrix")
    k, q = (torch.cat([x[..., :-1], torch.ones_like(x[..., -1:])], -1) for x in (given.k, given.q))
    w1, w2, w3 = given.memory.initial
    one = torch.zeros_like(w3)
    one[..., -1] = 1
    step = given.gates.step * torch.tensor([1.0, 1, 0]).double()
    keep = torch.ones_like(given.gates.keep)
    gated = given._replace(q=q, k=k, gates=given.gates._replace(step=step, keep=keep))
    gated = gated._replace(memory=given.memory._replace(initial=(w1, w2, one)))
    other = text(network="mlp", granularity="chunk", gates="matrix").memory._replace(initial=(w1, w2))
    mlp = gated._replace(gates=gated.gates._replace(step=step[..., :2]), memory=other)
    torch.testing.assert_close(gated.run()[0], mlp.run()[0], rtol=1e-12, atol=1e-12)


def test_channel_gates_multiply_the_axis_of_values_of_each_matrix():
    given = text(tokens=1, network="gated", optimiser="momentum", gates="channel", decay_to="initial")
    gates = given.gates._replace(keep=given.gates.keep / 2)
    held = empty(given.memory, 2)
    held = held._replace(weights=tuple(w + 1 for w in held.weights), momentum=tuple(w + 2 for w in held.weights))
    weights = tuple(w.detach().requires_grad_() for w in held.anchor)
    loss = LOSSES["l2"](network(weights, given.k, given.memory), given.v, None)
    _, state = given._replace(gates=gates).run(held)
    for i, (w, slope) in enumerate(zip(weights, torch.autograd.grad(loss, weights), strict=True)):
        row = "bhv,bhvr->bhvr" if i == 0 else "bhv,bhrv->bhrv"
        theta, gamma, eta = (gate[:, :, 0] for gate in gates[:3])
        momentum = torch.einsum(row, eta, held.momentum[i]) - torch.einsum(row, theta, slope)
        torch.testing.assert_close(state.momentum[i], momentum, rtol=1e-10, atol=1e-10)
        wanted = w.detach() + torch.einsum(row, gamma, held.weights[i] - w.detach()) + momentum
        torch.testing.assert_close(state.weights[i], wanted, rtol=1e-10, atol=1e-10)


def test_kl_multiplies_weights_and_keeps_the_sum_of_every_row():
    given = text(network="mlp", retention="kl", chunk=1)
    state = empty(given.memory, 2)
    for n in range(11):
        before = tuple(w.detach().requires_grad_() for w in state.anchor)
        loss = LOSSES["l2"](network(before, given.k[:, :, n : n + 1], given.memory), given.v[:, :, n : n + 1], None)
        theta, gamma = given.gates.step[:, :, n, None, None], given.gates.keep[:, :, n, None, None]
        _, state = given.part(slice(n, n + 1)).run(state)
        for old, new, slope in zip(before, state.anchor, torch.autograd.grad(loss, before), strict=True):
            wanted = old.shape[-1] * (gamma * old.log() - theta * slope).softmax(-1)
            torch.testing.assert_close(new, wanted.detach(), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("optimiser", ["gd", "momentum", "muon"])
@pytest.mark.parametrize("gates", ["head", "channel"])
def test_writes_at_the_end_of_chunks_of_one_token_are_writes_of_tokens(optimiser, gates):
    options = {"chunk": 1, "optimiser": optimiser, "window": 3, "gates": gates} | {"network": "mlp", "norm": True}
    token, end = text(**options), text(granularity="chunk", **options)
    found, wanted = end.run()[1], token.run()[1]
    assert_same((found.weights, found.anchor, found.momentum), (wanted.weights, wanted.anchor, wanted.momentum))
    behind = end.run()[0][:, :, 1:]  # a read knows the tokens before its own
    moved = token._replace(q=torch.cat([token.q[:, :, 1:], token.q[:, :, :1]], 2)).run()[0]
    torch.testing.assert_close(behind, moved[:, :, :-1], rtol=1e-10, atol=1e-10)


def test_without_decay_a_chunk_of_anchored_steps_is_one_write_at_its_end():
    token, end = (text(tokens=12, network="mlp", granularity=one) for one in ("token", "chunk"))
    found, wanted = (one._replace(gates=one.gates._replace(keep=None)).run()[1] for one in (end, token))
    assert_same(found.weights, wanted.weights)


def test_muon_at_the_end_of_a_chunk_takes_the_mean_step_and_momentum():
    given = text(tokens=4, batch=1, granularity="chunk", optimiser="muon")
    step, eta = (x.mean(2)[..., None, None] for x in (given.gates.step, given.gates.momentum))
    before = empty(given.memory, 1)
    held = before._replace(momentum=(torch.full_like(before.weights[0], 0.3),))
    [w] = given.memory.initial
    u = ((given.k @ w.mT - given.v).mT @ given.k)[0]
    wanted = given.gates.keep.prod(2)[0, :, None, None] * w + step[0] * newton_schulz(eta[0] * 0.3 - u)
    torch.testing.assert_close(given.run(held)[1].weights[0][0], wanted, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(("kind", "anchor"), [("matrix", "all"), ("matrix", "hidden"), ("mlp", "hidden")])
def test_equal_tokens_do_not_diverge_where_the_output_layer_is_never_stale(kind, anchor):
    given = text(network=kind, residual="identity", chunk=64, anchor=anchor)
    equal = given.part([0] * 63)
    equal = equal._replace(gates=equal.gates._replace(step=torch.full_like(equal.gates.step, 0.3), keep=None))
    _, after = equal.run()
    before = empty(given.memory, 2).weights
    k, v = equal.k[:, :, :1], equal.v[:, :, :1]
    [(e, z), *_] = gradients(before, k, v, None, given.memory)
    left = network((after.weights[0], *before[1:]), k, given.memory) - v
    square = z.square().sum(-1, keepdim=True)
    shrunk = 1 - 63 * 0.3 * square if anchor == "all" else (1 - 0.3 * square) ** 63
    torch.testing.assert_close(left, shrunk * e, rtol=1e-10, atol=1e-10)
    assert (shrunk.abs() < 1).all() == (anchor == "hidden")


def test_newton_schulz_of_nothing_is_nothing_and_its_gradient_finite():
    nothing = torch.zeros(3, 5, requires_grad=True)
    found = newton_schulz(nothing)
    assert not found.any()
    [gradient] = torch.autograd.grad(found.sum(), nothing)
    assert gradient.isfinite().all()


@pytest.mark.parametrize("schedule", ["muon", "lact"])
def test_newton_schulz_knows_no_scale_and_ends_near_one(schedule):
    matrix = torch.randn(2, 3, 7, 4, dtype=torch.float64)
    found = newton_schulz(matrix, schedule)
    torch.testing.assert_close(newton_schulz(10 * matrix, schedule), found, rtol=1e-6, atol=1e-6)
    singular = torch.linalg.svdvals(found)
    assert singular.min() > 0.6 and singular.max() < 1.3


def test_a_sharp_kernel_memory_reads_the_value_of_the_equal_key():
    given = kernel_text("dot")
    memory = given.memory._replace(sharpness=torch.full((2,), 1e6, dtype=torch.float64))
    read, _ = kernel_memory(given.k, given.k, given.v, torch.ones_like(given.omega), memory)
    torch.testing.assert_close(read, given.v, rtol=1e-8, atol=1e-8)


def test_a_kernel_memory_of_the_delta_rule_solves_a_triangular_system():
    given = kernel_text("dot")
    kernel = (given.memory.sharpness[:, None, None] * (given.k @ given.k.mT - 1)).exp()
    system = torch.eye(11) + given.omega * kernel.tril(-1)
    wanted = torch.linalg.solve_triangular(system, given.omega * given.v, upper=False)
    torch.testing.assert_close(unfolded(given.run()[1]).written, wanted, rtol=1e-10, atol=1e-10)


def test_the_mean_of_a_chunks_steps_is_read():
    given = text(tokens=4, batch=1, **PRESETS["ttt_linear"])
    [w] = empty(given.memory, 1).weights
    pairs = gradients((w,), given.k, given.v, None, given.memory)
    [steps] = [(given.gates.step[..., None, None] * e[..., None] * z[..., None, :]).cumsum(2) for e, z in pairs]
    means = [w - steps[:, :, i] / (i + 1) for i in range(4)]
    wanted = [network((one,), given.q[:, :, i : i + 1], given.memory) for i, one in enumerate(means)]
    read, state = given.run()
    assert_same((read, *state.weights, *state.anchor), (torch.cat(wanted, 2), means[3], means[3]))
