"""Mixers as a user writes them, in plain PyTorch: recorded once, replayed on new values as PyTorch computes them."""

import functools
import math

import pytest
import torch
import torch.nn.functional as F

from atma.ops import native
from atma.ops.native.recorder import Recorder, Unrecordable

pytestmark = pytest.mark.skipif(native.status().library is None, reason="no compiled kernels here")

B, H, K, D, S = 2, 3, 8, 24, 12
TOLERANCE = {torch.float32: 1e-6, torch.float64: 1e-12, torch.bfloat16: 0.02}
EXACT = [torch.float32, torch.float64]


@functools.cache
def weights(dtype, *shape):
    generator = torch.Generator().manual_seed(math.prod(shape))
    return (torch.randn(*shape, generator=generator, dtype=torch.float64) / math.sqrt(shape[-1])).to(dtype)


def heads(x, name):
    """x (B, D) to (B, H, K) by a linear layer of its own."""
    return F.linear(x, weights(x.dtype, D, D) * (1 + name)).view(B, H, K)


def linear_attention(x, length, total, norm):
    q, k, v = F.elu(heads(x, 0)) + 1, F.elu(heads(x, 1)) + 1, heads(x, 2)
    total += k[..., :, None] * v[..., None, :]
    norm = norm + k
    y = torch.einsum("bhk,bhkv->bhv", q, total) / (torch.einsum("bhk,bhk->bh", q, norm)[..., None] + 1e-3)
    return y.reshape(B, D), (total, norm)


def retention(x, length, total):
    q, k, v = heads(x, 0), heads(x, 1), heads(x, 2)
    gamma = (1 - 2 ** (-5.0 - torch.arange(H, dtype=x.dtype)))[:, None, None]
    total = gamma * total + k.unsqueeze(-1) @ v.unsqueeze(-2)
    y = F.layer_norm((q.unsqueeze(-2) @ total).squeeze(-2) * K**-0.5, (K,)).flatten(1)
    return F.silu(x) * y, (total,)


def moving_average(x, length, mean, square):
    mean.lerp_(x, 0.1)
    square.mul_(0.9).addcmul_(x, x, value=0.1)
    gate = torch.sigmoid(x @ weights(x.dtype, D, D) + 1)
    return gate * (x - mean) / (square - mean.square() + 1e-2).clamp(min=1e-2).sqrt() + (1 - gate) * x, (mean, square)


def rotary(x, position):
    """x (B, H, K) turned by its position (B,)."""
    angle = position[:, None] * 10000.0 ** (-torch.arange(0, K, 2, dtype=x.dtype) / K)
    cos, sin = (f(angle)[:, None].repeat(1, 1, 2) for f in (torch.cos, torch.sin))
    a, b = x.chunk(2, -1)
    return x * cos + torch.cat((-b, a), -1) * sin


def softmax_attention(x, length, keys, values):
    x = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)
    q, k, v = rotary(heads(x, 0), length), rotary(heads(x, 1), length), heads(x, 2)
    keys[torch.arange(B), :, length.long()] = k
    values.scatter_(2, length.long()[:, None, None, None].expand(B, H, 1, K), v[:, :, None])
    scores = (q[:, :, None] @ keys.mT) / math.sqrt(K)
    visible = torch.arange(S) <= length[:, None]
    weight = scores.masked_fill(~visible[:, None, None], float("-inf")).softmax(-1)
    return (weight @ values).transpose(1, 2).reshape(B, D), (keys, values)


def fused_attention(x, length, keys, values):
    q, k, v = heads(x, 0), heads(x, 1), heads(x, 2)
    here = (torch.arange(S) == length[:, None])[:, None, :, None]
    keys, values = torch.where(here, k[:, :, None], keys), torch.where(here, v[:, :, None], values)
    mask = torch.where(torch.arange(S) <= length[:, None], 0.0, -math.inf)[:, None, None].to(x.dtype)
    y = F.scaled_dot_product_attention(q[:, :, None], keys, values, mask.expand(B, H, 1, S))
    return y.transpose(1, 2).reshape(B, D), (keys, values)


def window(x, length, ring):
    """The last four inputs in a ring, by a chunked form that takes one token as any number of them."""
    at = (length % 4).long()
    ring.index_copy_(1, torch.stack([at[0]]), x[:, None])
    back = (at[:1] - torch.arange(4)) % 4
    recent = ring.index_select(1, back)
    decay = F.logsigmoid(recent).cumsum(1).exp() * F.softplus(recent)
    taken = torch.take_along_dim(ring, at[:, None, None].expand(B, 1, D), 1)
    padded = F.pad(taken[:, 0].view(B, H, K), (1, 0))[..., :-1].flatten(1)
    y = (decay * recent).sum(1) + torch.logsumexp(recent, 1) + recent.amax((1, 2), keepdim=True)[:, 0] + padded
    return torch.baddbmm(y[:, :, None], torch.outer(x[0], x[1]).tril().expand(B, D, D), x[:, :, None])[..., 0], (ring,)


MIXERS = {
    linear_attention: [(B, H, K, K), (B, H, K)],
    retention: [(B, H, K, K)],
    moving_average: [(B, D), (B, D)],
    softmax_attention: [(B, H, S, K), (B, H, S, K)],
    fused_attention: [(B, H, S, K), (B, H, S, K)],
    window: [(B, 4, D)],
}


@pytest.mark.parametrize("dtype", EXACT)
@pytest.mark.parametrize("mixer", MIXERS, ids=lambda mixer: mixer.__name__)
def test_a_mixer_of_plain_operations_is_replayed_on_new_values(mixer, dtype):
    state = [torch.zeros(shape, dtype=dtype) for shape in MIXERS[mixer]]
    mine, program = [part.clone() for part in state], None
    x, length = torch.zeros(B, D, dtype=dtype), torch.zeros(B, dtype=torch.int32)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for step in range(7):
            x.copy_(torch.randn(B, D, generator=generator))
            length.copy_(torch.tensor([step, step + 3]))
            expected, state = mixer(x, length, *state)
            if program is None:
                with Recorder([x, length, *mine]) as recorder:
                    found, after = mixer(x, length, *mine)
                    for old, new in zip(mine, after, strict=True):
                        recorder.copy(old, new)
                program = recorder.program()
            else:
                program.replay()
            for a, b in zip((found, *mine), (expected, *state), strict=True):
                # Sums of a few dozen numbers of size 1 and above, in another order.
                torch.testing.assert_close(a, b, rtol=4 * TOLERANCE[dtype], atol=4 * TOLERANCE[dtype])


OPERATIONS = {
    "scalars": lambda x, y: 2 - x + (3 / (y.abs() + 1)) - 0.5 * x,
    "factors": lambda x, y: torch.add(x, y, alpha=2) - torch.sub(x, 3, alpha=0.5) + torch.rsub(x, y, alpha=3),
    "powers": lambda x, y: x**2 + x**3 + x.abs() ** 0.5 + (y.abs() + 0.5) ** x + 2**x + (x.abs() + 1) ** -1,
    "exponentials": lambda x, y: x.exp() + x.exp2() + x.expm1() + (y.abs() + 1).log() + y.abs().log1p(),
    "activations": lambda x, y: F.relu(x) + F.silu(y) + F.gelu(x) + F.softplus(y) + x.tanh() + F.elu(y) + x.erf(),
    "comparisons": lambda x, y: torch.stack([x < y, x <= 0, x > y, x >= 0.5, x == y, x != 0], -1),
    "booleans": lambda x, y: (~(x > 0) & (y > 0)) | torch.logical_and(x < 0, y < x),
    "integers": lambda x, y: ((x * 9).int() % 4) - ((y * 9).long() // 2) + (x * 9).floor() % 2.5 + (-x * 9).int() % -3,
    "choices": lambda x, y: torch.where(x > y, x, 1.0) + torch.where(x > 0, 2.0, y) + x.masked_fill(y > 0, -1),
    "extremes": lambda x, y: torch.minimum(x, y) + torch.maximum(x, -y) + x.clamp(max=0.5) + y.clamp(-0.2, 0.3),
    "sums": lambda x, y: x.sum() + y.sum(1, keepdim=True) + x.mean((0, 2), keepdim=True) + y.mean(),
    "last": lambda x, y: x.amax(-1) + y.amin(-1) + x.logsumexp(-1) + y.norm(dim=-1) + x.sum(-1),
    "softmax": lambda x, y: x.softmax(-1) + y.softmax(1) + x.log_softmax(0),
    "any": lambda x, y: (x > 1).any(-1) | (y < 1).all(0).all(),
    "products": lambda x, y: x @ y.mT + (x.mT @ y)[:, :5, :5] + (x[0] @ y[0].mT) + torch.dot(x[0, 0], y[0, 0]),
    "vectors": lambda x, y: x[0] @ y[0, 0] + torch.addmm(x[:, :, 0].mT @ y[:, :, 1], x[0], y[1].mT)[0],
    "moved": lambda x, y: x.roll(2, 1) + F.pad(y, (1, 2, 1, 0), value=3.0)[:, :-1, :-3] + x.repeat(1, 2, 1)[:, 3:8],
    "triangles": lambda x, y: x.tril() * 2 + y.triu(1),
    "indices": lambda x, y: (
        x[(y[:, 0, :3] * 2).long().clamp(-3, 2), 1] + y[:, (x[0, 0, :3] * 2).int().clamp(0, 4)].sum(0)
    ),
    "in place": lambda x, y: (
        (x + 1).mul_(y).add_(x, alpha=2).exp_().clamp_(max=3).sub_(1).div_(2).masked_fill_(x > 0, 7)
    ),
    "a constant written": lambda x, y: torch.zeros_like(x).add_(1).index_put_((torch.arange(2),), y[:2]).add_(x),
    "set by a mask": lambda x, y: (
        x.clone().masked_fill_(y > 0, 0).index_put_((x > 1,), torch.tensor(5.0, dtype=x.dtype))
    ),
}


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("name", OPERATIONS)
def test_an_operation_is_computed_again_from_new_values(name, dtype):
    compute = OPERATIONS[name]
    x, y = (torch.full((3, 5, 40), value, dtype=dtype) for value in (0.25, 0.5))
    with torch.no_grad(), Recorder([x, y]) as recorder:
        found = compute(x, y)
    program = recorder.program()
    for seed in range(3):
        generator = torch.Generator().manual_seed(seed)
        for given in (x, y):
            given.copy_(torch.randn(x.shape, generator=generator))
        program.replay()
        expected = compute(x, y)
        assert (found.shape, found.dtype) == (expected.shape, expected.dtype)
        # Up to a dozen roundings, of sums of up to 600 numbers in another order.
        bound = 20 * TOLERANCE[dtype] if dtype != torch.bfloat16 else 0.1
        torch.testing.assert_close(found, expected, rtol=bound, atol=bound)


def test_threads_share_what_is_large_and_give_the_same_bits():
    x, threads, found = torch.randn(9, 70, 200, generator=torch.Generator().manual_seed(0)), torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            with torch.no_grad(), Recorder([x]):
                found.append((x.softmax(-1), x.sum(1), x @ x.mT))
    finally:
        torch.set_num_threads(threads)
    for others in found[1:]:
        assert all(map(torch.equal, found[0], others))
    torch.testing.assert_close(found[0], (x.softmax(-1), x.sum(1), x @ x.mT), rtol=1e-4, atol=1e-4)


def test_what_a_step_reads_before_it_writes_a_constant_is_as_the_first_time():
    x = torch.ones(3)
    with torch.no_grad(), Recorder([x]) as recorder:
        count = torch.zeros(3)
        before = x + count
        count += x
        after = x + count
    for value in (2.0, 5.0):
        x.fill_(value)
        recorder.program().replay()
        assert torch.equal(before, torch.full((3,), value)) and torch.equal(after, torch.full((3,), 2 * value))


def test_writing_what_is_neither_of_the_state_nor_made_in_the_step_is_refused():
    x, buffer = torch.ones(3), torch.zeros(3)
    with torch.no_grad(), pytest.raises(Unrecordable, match="neither of the state"), Recorder([x]):
        buffer += x
    assert not buffer.any()


@pytest.mark.parametrize("reading", [True, False])
def test_an_index_beyond_its_tensor_is_an_error_at_every_replay_and_touches_nothing(reading):
    held, at = torch.arange(6.0), torch.tensor([2])
    with torch.no_grad(), Recorder([held, at]) as recorder:
        held[at] if reading else held.index_copy_(0, at, torch.ones(1))
    before = held.clone()
    for beyond in (6, -7, 1 << 40):
        at.fill_(beyond)
        with pytest.raises(IndexError, match="1 indices are beyond"):
            recorder.program().replay()
    assert torch.equal(held, before)
    at.fill_(5)
    recorder.program().replay()


def test_an_index_beyond_its_tensor_is_an_error_while_it_is_recorded():
    held, at = torch.arange(6.0), torch.tensor([6])
    with (
        torch.no_grad(),
        pytest.raises(IndexError, match="from 6 to 6 pass a dimension of size 6"),
        Recorder([held, at]),
    ):
        held.index_copy_(0, at, torch.ones(1))


def test_what_is_refused_is_named():
    x = torch.ones(3, 3)
    with torch.no_grad(), pytest.raises(Unrecordable, match=r"aten\.sort"), Recorder([x]):
        x.sort()
    with torch.no_grad(), pytest.raises(Unrecordable, match=r"aten\.erfinv_"), Recorder([x]):
        x.erfinv_()
    with torch.no_grad(), pytest.raises(Unrecordable, match=r"aten\._to_copy\.default: torch\.float16"), Recorder([x]):
        x.half()
    with torch.no_grad(), pytest.raises(Unrecordable, match=r"aten\.exp_\.default: the exp of integers"), Recorder([x]):
        x.int().exp_()


@pytest.mark.parametrize(
    "compute",
    [
        lambda x: x.sort(),
        lambda x: x.int() ** 3,
        lambda x: torch.nn.functional.gelu(x, approximate="tanh"),
        lambda x: x.norm(1, dim=0),
        lambda x: x.to(torch.float16),
        lambda x: x[x > 0],
        lambda x: x.random_(),
        lambda x: x.zero_().int().add_(x.int(), alpha=2).bitwise_and(3),
        lambda x: torch.rand(3) + x[:, 0],
    ],
)
def test_what_has_no_kernel_is_refused_rather_than_frozen(compute):
    x = torch.randn(3, 4)
    with pytest.raises(Unrecordable), torch.no_grad(), Recorder([x]):
        compute(x)


def test_a_copy_that_calls_itself_a_view_is_refused():
    x = torch.randn(3, 4)
    with torch.inference_mode(), pytest.raises(Unrecordable), Recorder([x]):
        x.t().flatten().add(1)
