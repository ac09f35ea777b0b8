"""Operations whose result for a row is the same bits whatever else is in the call, beside plain PyTorch."""

import itertools

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from atma.ops import causal_conv, gated_conv, gated_delta, native, use_backend
from atma.ops.dense import gated as gated_mlp
from atma.ops.dense import rms_norm
from atma.ops.native.recorder import Recorder
from atma.ops.recurrent import reference
from atma.ops.rows import (
    expm1,
    forbid,
    gate,
    gate_heads,
    largest,
    log_sigmoid,
    pack,
    product,
    rotate,
    row_of,
    sigmoid,
    unit,
)

pytestmark = pytest.mark.skipif(not native.available(torch.float32), reason="needs the compiled kernels")
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-5, torch.bfloat16: 3e-2}
DTYPES = list(TOLERANCE)


def _random(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("inputs", "outputs"), [(1, 1), (7, 3), (64, 257), (130, 64), (512, 65), (900, 20)])
@torch.no_grad()
def test_a_product_is_that_of_pytorch_and_of_its_row_alone(inputs, outputs, dtype) -> None:
    x, weight, bias = _random(101, inputs), _random(outputs, inputs, seed=1), _random(outputs, seed=2)
    packed, x, bias = pack(weight.to(dtype)), x.to(dtype), bias.to(dtype)
    whole = product(x, packed, bias)
    expected = F.linear(x.double(), weight.to(dtype).double(), bias.double())
    scale = max(1.0, float(expected.abs().max()))
    torch.testing.assert_close(whole.double(), expected, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype] * scale)
    for rows in (1, 2, 5, 6, 7, 48, 49):
        assert torch.equal(product(x[20 : 20 + rows], packed, bias), whole[20 : 20 + rows])
    assert torch.equal(product(x, packed, None)[0], product(x[:1], packed, None)[0])
    before = torch.get_num_threads()
    try:
        for threads, rows in itertools.product((1, 2, 3, 5), (1, 2, 49, 64, 101)):
            torch.set_num_threads(threads)
            assert torch.equal(product(x[:rows], packed, bias), whole[:rows])
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("outputs", [1, 65, 257])
def test_rows_of_a_packed_weight_are_those_of_the_weight(outputs, dtype) -> None:
    weight = _random(outputs, 33, dtype=dtype)
    index = torch.randint(0, outputs, (3, 5), generator=torch.Generator().manual_seed(1)).t()
    assert torch.equal(row_of(index, pack(weight)), weight[index])


def test_a_weight_on_no_kernel_cannot_be_packed() -> None:
    with pytest.raises(ValueError, match=r"no compiled kernels for torch\.float16"):
        pack(torch.zeros(2, 2, dtype=torch.float16))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [1, 8, 33, 64])
@torch.no_grad()
def test_a_gate_is_that_of_pytorch_and_of_its_token_alone(width, dtype) -> None:
    x, both = _random(2, 3, 9, width, dtype=dtype), 20 * _random(2, 9, 3, 2 * width, seed=1, dtype=dtype)
    opening = both.chunk(2, -1)[1].transpose(1, 2)
    whole = gate(x, opening)
    expected = (x.double() * torch.sigmoid(opening.double())).transpose(1, 2).flatten(2)
    torch.testing.assert_close(whole.double(), expected, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])
    assert torch.equal(gate(x[1:, :, 4:5], opening[1:, :, 4:5]), whole[1:, 4:5])


def test_a_gate_has_its_gradient_where_one_is_recorded() -> None:
    x, opening = _random(1, 2, 3, 4).requires_grad_(), _random(1, 2, 3, 4, seed=1).requires_grad_()
    assert torch.autograd.gradcheck(gate, (x, opening))


@pytest.mark.parametrize("dtype", DTYPES)
@torch.no_grad()
def test_a_rotation_is_that_of_pytorch_and_of_its_token_alone(dtype) -> None:
    x = _random(2, 9, 3, 32, dtype=dtype).transpose(1, 2)
    position = torch.tensor([[0, 1, 2, 3, 4, 5, 6, 7, 8], [10**6 + i for i in range(9)]], dtype=torch.int32)
    frequency = (1 / 1024) ** torch.linspace(0, 1, 8, dtype=torch.float64)
    whole = rotate(x, position, frequency)
    with use_backend("cpu"):
        expected = rotate(x, position, frequency)
    torch.testing.assert_close(whole, expected, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])
    for t in range(9):
        assert torch.equal(rotate(x[1:, :, t : t + 1], position[1:, t : t + 1], frequency), whole[1:, :, t : t + 1])
    assert torch.equal(rotate(x, position[:1], frequency)[0], whole[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("width", [1, 7, 16, 33, 1000])
@torch.no_grad()
def test_the_largest_number_of_each_row_is_the_first_of_equals_and_none_where_it_is_not_finite(width, dtype) -> None:
    x = torch.randint(0, 4, (60, width), generator=torch.Generator().manual_seed(width)).to(dtype)
    rows = torch.arange(60)
    for place, number in enumerate((float("nan"), float("inf"), float("-inf"))):
        x[rows[place::4], (7 * rows[place::4]) % width] = number
    expected = []
    for row in x.tolist():
        top = max(row)
        whole = all(number == number for number in row) and abs(top) != float("inf")
        expected.append(row.index(top) if whole else -1)
    assert largest(x).tolist() == expected
    assert largest(torch.cat([x, x], 1)[:, :width]).tolist() == expected
    with use_backend("cpu"):
        assert [token < 0 for token in largest(x).tolist()] == [token < 0 for token in expected]


def _memory(dtype, heads=4, groups=2, tokens=37, width=24):
    attended = (
        _random(2, heads, tokens, width, dtype=dtype),
        *(_random(2, groups, tokens, width, seed=seed, dtype=dtype) for seed in (1, 2)),
    )
    projected = tuple(_random(2, tokens, size, seed=size, dtype=dtype) for size in (heads, heads, heads * width))
    work = torch.promote_types(dtype, torch.float32)
    return attended, projected, _random(2, heads, width, width, seed=5).to(work)


def _in_turn(attended, projected, memory, constants, retention=None):
    """What a memory of a global mixer computes but for its projections, as it is served."""
    (q, k, v), (decay, beta, opening) = attended, projected
    decay_bias, beta_bias, most, epsilon = constants
    work = memory.dtype
    log_decay = log_sigmoid(decay.to(work) + decay_bias, True).clamp(max=most)
    if retention is not None:
        log_decay = log_decay + log_sigmoid(retention, True)
    betas = sigmoid(beta.to(work) + beta_bias, True)
    read, after = gated_delta(unit(q, True), unit(k, True), v, log_decay.mT, betas.mT, memory, steady=True)
    assert after is memory
    return gate_heads(rms_norm(read, None, read.shape[-1], epsilon), opening, True)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [24, 32])
@torch.no_grad()
def test_operations_in_token_order_are_a_memory_of_the_reference(width, dtype) -> None:
    (q, k, v), (decay, beta, opening), memory = _memory(dtype, width=width)
    constants, whole = (3.9, 0.5, -0.01, 2.0**-23), memory.clone()
    read = _in_turn((q, k, v), (decay, beta, opening), whole, constants)
    rates = F.logsigmoid(decay.double() + 3.9).clamp(max=-0.01).mT
    unit_q, unit_k = F.normalize(q.double(), dim=-1), F.normalize(k.double(), dim=-1)
    betas = torch.sigmoid(beta.double() + 0.5).mT
    expected, after = reference.recurrence(unit_q, unit_k, v.double(), rates, betas, memory.double(), None, "delta")
    normed = F.rms_norm(expected, (width,), None, 2.0**-23).transpose(1, 2).flatten(2)
    expected = normed * torch.sigmoid(opening.double())
    torch.testing.assert_close(read.double(), expected, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype] * 10)
    torch.testing.assert_close(whole.double(), after, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [7, 24, 64])
@torch.no_grad()
def test_operations_in_token_order_give_the_same_bits_in_any_cut_and_beside_any_rows(width, dtype) -> None:
    (q, k, v), projected, memory = _memory(dtype, width=width)
    constants, whole, retention = (3.9, 0.5, -0.01, 2.0**-23), memory.clone(), _random(4, seed=9).to(memory.dtype)
    read = _in_turn((q, k, v), projected, whole, constants, retention)
    for b in range(2):
        cut, at = memory[b : b + 1].clone(), 0
        for count in (1, 1, 20, 2, 13):
            part = slice(at, at + count)
            attended = tuple(x[b : b + 1, :, part] for x in (q, k, v))
            gates = tuple(x[b : b + 1, part] for x in projected)
            assert torch.equal(_in_turn(attended, gates, cut, constants, retention)[0], read[b, part])
            at += count
        assert torch.equal(cut[0], whole[b])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("width", "value_width"), [(16, 16), (5, 33), (32, 7), (64, 16)])
@torch.no_grad()
def test_the_delta_rule_in_token_order_is_that_of_the_reference(width, value_width, dtype) -> None:
    q, k = F.normalize(_random(2, 4, 19, width), dim=-1), F.normalize(_random(2, 2, 19, width, seed=1), dim=-1)
    v, memory = _random(2, 2, 19, value_width, seed=2), _random(2, 4, value_width, width, seed=3)
    gates = F.logsigmoid(_random(2, 4, 19, seed=4) + 3), torch.sigmoid(_random(2, 4, 19, seed=5))
    given = [x.to(dtype) for x in (q, k, v, *gates)]
    expected, after = reference.recurrence(*(x.double() for x in given), memory, None, "delta")
    for start in (memory.to(dtype), memory.to(dtype).mT.contiguous().mT):
        found, held = gated_delta(*given, start, steady=True)
        assert (held is start) == start.is_contiguous()
        torch.testing.assert_close(found.double(), expected, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])
        torch.testing.assert_close(held.double(), after, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])
    from_nothing = gated_delta(*given, torch.zeros_like(held), steady=True)
    for found, expected in zip(gated_delta(*given, steady=True), from_nothing, strict=True):
        assert torch.equal(found, expected)


def test_token_order_is_refused_where_it_cannot_be() -> None:
    q, gates = _random(1, 1, 2, 4), torch.zeros(1, 1, 2, dtype=torch.float64)
    with torch.no_grad(), pytest.raises(ValueError, match="not for 'cpu'"):
        gated_delta(q, q, q, gates, gates, backend="cpu", steady=True)
    with torch.no_grad(), pytest.raises(ValueError, match="leave segment_ids out"):
        gated_delta(q, q, q, gates, gates, None, torch.zeros(1, 2, dtype=torch.int32), steady=True)
    with pytest.raises(ValueError, match="steady has no gradient"):
        gated_delta(q, q, q, gates, gates, steady=True)


@pytest.mark.parametrize("dtype", DTYPES)
@torch.no_grad()
def test_steady_rows_are_those_of_pytorch_and_of_their_numbers_alone(dtype) -> None:
    x = 20 * _random(2, 3, 9, 33, dtype=dtype).transpose(1, 2)
    for steady, plain in ((sigmoid, torch.sigmoid), (log_sigmoid, F.logsigmoid)):
        whole = steady(x, True)
        torch.testing.assert_close(whole.double(), plain(x.double()), rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])
        assert torch.equal(steady(x[1:, 3:4, :, 5:7], True), whole[1:, 3:4, :, 5:7])
        assert torch.equal(steady(x, False), plain(x))
    below = -x.abs()
    whole = expm1(below, True)
    torch.testing.assert_close(whole.double(), below.double().expm1(), rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])
    assert torch.equal(expm1(below[1:, 3:4, :, 5:7], True), whole[1:, 3:4, :, 5:7])
    expected = F.normalize(x.double(), dim=-1)
    torch.testing.assert_close(unit(x, True).double(), expected, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])
    assert torch.equal(unit(x[1:, 3:4, 2:], True), unit(x, True)[1:, 3:4, 2:])
    assert torch.equal(unit(x, False), F.normalize(x, dim=-1))
    assert torch.equal(unit(torch.zeros(1, 1, 2, 3, dtype=dtype), True).double(), torch.zeros(1, 1, 2, 3).double())
    opening = _random(2, 3, 9 * 33, dtype=dtype)
    assert torch.equal(gate_heads(x, opening, False), x.transpose(1, 2).flatten(2) * torch.sigmoid(opening))
    for special in (float("nan"), float("inf"), float("-inf")):
        given = torch.tensor([special], dtype=dtype)
        for steady in (expm1, sigmoid, log_sigmoid):
            torch.testing.assert_close(steady(given, True), steady(given, False), equal_nan=True)


def test_rows_have_their_gradients_where_these_are_recorded() -> None:
    x, opening = _random(1, 2, 3, 4).requires_grad_(), _random(1, 3, 8, seed=1).requires_grad_()
    for operation in (unit, expm1, sigmoid, log_sigmoid):
        assert torch.autograd.gradcheck(lambda x, one=operation: one(x, True), (x,))
    assert torch.autograd.gradcheck(lambda x, opening: gate_heads(x, opening, True), (x, opening))


@pytest.mark.parametrize("dtype", DTYPES)
@torch.no_grad()
def test_operations_in_token_order_can_be_recorded_and_replayed(dtype) -> None:
    attended, projected, memory = _memory(dtype, tokens=1)
    (start, constants), retention = (memory.clone(), (3.9, 0.5, -0.01, 2.0**-23)), _random(4, seed=9).to(memory.dtype)
    with Recorder([*attended, *projected, memory]) as recorder:
        read = _in_turn(attended, projected, memory, constants, retention)
    program, first, held = recorder.program(), read.clone(), memory.clone()
    attended[0].copy_(attended[0].flip(0))
    memory.copy_(start)
    program.replay()
    assert torch.equal(memory, held)
    again = _in_turn(attended, projected, start, constants, retention)
    assert torch.equal(read, again)
    assert not torch.equal(read, first)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("channels", [64, 80, 101])
@pytest.mark.parametrize("kind", ["square", "silu", "gelu"])
@torch.no_grad()
def test_norms_gates_and_convolutions_are_the_same_bits_in_any_cut_and_beside_any_rows(channels, dtype, kind) -> None:
    x, taps = _random(3, 60, 3 * channels, dtype=dtype), _random(channels, 4, seed=1, dtype=dtype)
    weight, tail = _random(3 * channels, seed=2, dtype=dtype), _random(3, 3, channels, seed=3, dtype=dtype)
    normed, even = rms_norm(x, weight, 3 * channels, 1e-6), x[..., : 2 * channels]
    opened, gated = gated_mlp(even, kind), gated_conv(x, taps)
    u = x[..., :channels]
    convolved = causal_conv(u, taps, tail)
    assert torch.equal(gated_conv(x[1:2, :7], taps), gated[1:2, :7])
    held, at = tail[1:2], 0
    for count in (1, 1, 2, 33, 23):
        part = (slice(1, 2), slice(at, at + count))
        assert torch.equal(rms_norm(x[part], weight, 3 * channels, 1e-6), normed[part])
        assert torch.equal(gated_mlp(even[part], kind), opened[part])
        assert torch.equal(causal_conv(u[part], taps, held), convolved[part])
        held, at = torch.cat([held, u[part]], 1)[:, -3:], at + count


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("width", [1, 31, 32, 33, 257, 1000])
@torch.no_grad()
def test_numbers_whose_bit_is_not_set_are_forbidden_in_the_rows_that_have_them(width, dtype) -> None:
    x = torch.randn(4, width + 3, dtype=dtype)[:, :width]
    allowed = np.random.default_rng(width).random((2, width)) < 0.5
    packed = np.packbits(allowed, axis=1, bitorder="little")
    bits = np.zeros((2, -(-width // 32) * 4), np.uint8)
    bits[:, : packed.shape[1]] = packed
    expected = x.clone()
    expected[[3, 1]] = expected[[3, 1]].masked_fill(torch.from_numpy(~allowed), -torch.inf)
    held = [(3, bits[0].view(np.uint32)), (1, bits[1].view(np.uint32))]
    plain = x.clone()
    forbid(x, held)
    with use_backend("cpu"):
        forbid(plain, held)
    assert torch.equal(x, expected) and torch.equal(plain, expected)
