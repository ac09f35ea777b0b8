"""Triton recurrences beyond the gated delta rule against the oracle: on a GPU where there is one, else interpreted."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F

from tests.ops.on_gpu import DEVICE, draw, error, is_real, placed, results  # isort: skip (before Triton)

from atma.ops import recurrence
from atma.ops.recurrent import gpu, reference

KINDS = [("none", "add"), ("none", "delta"), ("token", "add"), ("key", "add"), ("key", "delta"), ("value", "add")]
CHANNELS = KINDS[3:]
kinds = pytest.mark.parametrize("kind", KINDS, ids="-".join)
channels = pytest.mark.parametrize("kind", CHANNELS, ids="-".join)


def case(length, kind, packed=False, groups=(2, 2), width=16, depth=24, batch=1):
    """Two query heads on `groups` key and value heads; unit keys and queries; a memory from before."""
    heads = 2
    q, k = (F.normalize(draw(batch, n, length, width, seed=n), dim=-1) for n in (heads, groups[0]))
    v, memory = draw(batch, groups[1], length, depth, seed=7), draw(batch, heads, depth, width)
    shape = {"none": None, "token": (), "key": (width,), "value": (depth,)}[kind[0]]
    log_decay = None if shape is None else F.logsigmoid(draw(batch, heads, length, *shape) + 2)
    beta = torch.sigmoid(draw(batch, heads, length, seed=3))
    ids = (torch.arange(length)[:, None] >= torch.tensor([length // 3, length // 2])).sum(-1) if packed else None
    return [q, k, v, log_decay, beta, memory, None if ids is None else ids.expand(batch, -1)]


def of(module, kind):
    """The function of a backend for this kind."""
    return module.by_value if kind[0] == "value" else partial(module.recurrence, rule=kind[1])


def single(arguments):
    return [x.float() if is_real(x) and x.dtype == torch.float64 else x for x in arguments]


def errors(kind, arguments):
    """Of outputs, memory and every gradient, in float32."""
    exact = results(of(reference, kind), placed(arguments, device="cpu"))
    return error(results(of(gpu, kind), placed(single(arguments))), exact)


@kinds
@pytest.mark.parametrize(("packed", "length"), [(True, 41), (False, 33)], ids=["packed", "one document"])
def test_outputs_memory_and_gradients_equal_the_oracle(packed, length, kind):
    assert max(errors(kind, case(length, kind, packed))) <= 1e-5


@pytest.mark.parametrize(
    ("kind", "groups", "width", "depth"),
    [
        (("token", "delta"), (2, 1), 5, 20),
        (("token", "add"), (1, 2), 5, 20),
        (("key", "delta"), (1, 2), 40, 5),
        pytest.param(("key", "add"), (2, 1), 5, 40, marks=pytest.mark.slow),
        (("value", "add"), (1, 1), 5, 40),
    ],
)
def test_any_width_and_other_head_counts_of_keys_than_of_values(kind, groups, width, depth):
    assert max(errors(kind, case(5, kind, True, groups, width, depth, batch=2))) <= 1e-5


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "width", "depth"),
    [
        (("token", "delta"), 16, 130),
        (("key", "delta"), 16, 130),
        (("key", "delta"), 130, 16),
        (("value", "add"), 16, 130),
    ],
)
def test_heads_wider_than_a_tile(kind, width, depth):
    assert max(errors(kind, case(3, kind, True, (1, 1), width, depth))) <= 1e-5


@channels
def test_strong_decay_between_tokens_that_hardly_decay_keeps_its_digits(kind):
    """e^(40 · 10) is no float32: an exponent above 0, or a difference of sums, would show."""
    arguments = case(40, kind)
    strong = (torch.arange(40)[:, None] % 20 < 10) ^ (torch.arange(arguments[3].shape[-1]) % 3 == 0)
    arguments[3] = torch.where(strong, -40.0, -0.01).double().expand_as(arguments[3]).contiguous()
    assert max(errors(kind, arguments)) <= 1e-5


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "dtype"), [*((kind, torch.bfloat16) for kind in (KINDS[2], *CHANNELS)), (("key", "delta"), torch.float16)]
)
def test_low_precision_is_within_twice_the_error_of_plain_low_precision(kind, dtype):
    arguments = case(60, kind, dtype == torch.float16, (1, 1), 32, 32)
    low = single([x.to(dtype) for x in arguments[:3]] + arguments[3:])
    exact = results(of(reference, kind), placed([x.double() if is_real(x) else x for x in low], device="cpu"))
    plain = results(of(reference, kind), placed(low, dtype, device="cpu"))
    found = results(of(gpu, kind), placed(low))
    assert [x.dtype for x in found] == [dtype, torch.float32, dtype, dtype, dtype, *[torch.float32] * 3]
    for ours, theirs in zip(error(found, exact), error(plain, exact), strict=True):
        assert ours <= 2 * theirs


@pytest.mark.parametrize("kind", [("key", "delta"), ("value", "add")], ids="-".join)
def test_a_document_sees_nothing_of_the_one_before_it(kind):
    """Bit-identical outputs, memory and gradients when the first document, its gates and the first memory change."""
    packed, seen = single(case(40, kind, groups=(1, 1))), []
    for seed in (0, 5):
        arguments = [*packed[:5], packed[5] * (1 + seed), (torch.arange(40) >= 21).long()[None]]
        for at in range(5):
            arguments[at] = arguments[at].clone()
            arguments[at][:, :, :21] *= 1 + seed / 9
        arguments = placed(arguments)
        out, after = of(gpu, kind)(*arguments)
        given = [draw(*x.shape, seed=9, dtype=torch.float32).to(DEVICE) for x in (out, after)]
        gradients = torch.autograd.grad((out, after), arguments[:5], given)
        seen.append([after.detach(), out[:, :, 21:].detach(), *(x[:, :, 21:] for x in gradients)])
    assert all(torch.equal(a, b) for a, b in zip(*seen, strict=True))


@kinds
def test_one_token_without_gradient_takes_the_step_and_leaves_the_old_memory_alone(kind, monkeypatch):
    low = single(case(1, kind, groups=(1, 2), width=20, depth=40, batch=2))
    exact = of(reference, kind)(*(x.double() if is_real(x) else x for x in low))
    arguments = placed(low)
    for name in ("by_token", "by_channel", "over_values"):
        monkeypatch.setattr(gpu, name, None)
    with torch.no_grad():
        found = of(gpu, kind)(*arguments)
    assert max(error([x.cpu() for x in found], exact)) <= 1e-6
    assert torch.equal(arguments[5].cpu(), low[5])


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_the_custom_operators_keep_their_contract():
    channel, value = (placed(single(case(2, kind, True, (1, 1)))) for kind in CHANNELS[1:])
    torch.library.opcheck(torch.ops.atma.recurrence_channel_gpu.default, (*channel, True))
    torch.library.opcheck(torch.ops.atma.recurrence_value_gpu.default, tuple(value))


@kinds
def test_the_public_function_takes_it_without_gates_or_memory(kind):
    q, k, v, log_decay, *_ = placed(single(case(5, kind, groups=(1, 2))))
    rest = (log_decay, None, None, None, kind[1], "value" if kind[0] == "value" else "key")
    for queries in (q, q[:, :1]):  # one a head, and one for all
        with torch.no_grad():
            ours, theirs = (recurrence(queries, k, v, *rest, backend=backend) for backend in ("gpu", "reference"))
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
