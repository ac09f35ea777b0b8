"""Products of weights in 8 and 4 bits: the compiled kernels beside plain PyTorch, and what a row's bits depend on."""

import itertools

import pytest
import torch

from atma.ops import native
from atma.ops.narrow import WIDTHS, Codes, pack, product, quantised, row_of, unpack, widened

pytestmark = pytest.mark.skipif(not native.available(torch.float32), reason="needs the compiled kernels")
SHAPES = [(1, 1), (7, 3), (64, 257), (130, 64), (33, 65)]
"""Inputs and outputs."""
FLOATS = [torch.float32, torch.bfloat16]


def _random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _weight(outputs, inputs, width):
    codes = quantised(_random(outputs, inputs, seed=1), width)
    packed = pack(codes)
    assert packed is not None
    return codes, packed


@pytest.mark.parametrize(("inputs", "outputs"), SHAPES)
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("with_bias", [False, True])
def test_a_product_in_8_bits_has_the_bits_of_plain_pytorch(inputs, outputs, dtype, with_bias) -> None:
    codes, packed = _weight(outputs, inputs, "int8")
    x, bias = _random(53, inputs).to(dtype), _random(outputs, seed=2) if with_bias else None
    assert torch.equal(product(x, packed, bias), product(x, codes, bias))


@pytest.mark.parametrize(("inputs", "outputs"), SHAPES)
@pytest.mark.parametrize("with_bias", [False, True])
def test_a_product_in_4_bits_is_that_of_plain_pytorch(inputs, outputs, with_bias) -> None:
    codes, packed = _weight(outputs, inputs, "int4")
    x, bias = _random(53, inputs), _random(outputs, seed=2) if with_bias else None
    expected = product(x, codes, bias)
    scale = float(expected.abs().max())
    torch.testing.assert_close(product(x, packed, bias), expected, rtol=0, atol=1e-6 * scale)
    rounded = product(x.bfloat16(), packed, bias)
    assert rounded.dtype == torch.bfloat16
    torch.testing.assert_close(rounded.float(), product(x.bfloat16().float(), packed, bias), rtol=2**-7, atol=2**-7)


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize(("inputs", "outputs"), [(130, 64), (1024, 513), (900, 20)])
def test_a_row_has_the_same_bits_in_any_call_and_with_any_number_of_threads(inputs, outputs, width) -> None:
    _, packed = _weight(outputs, inputs, width)
    x, bias, before = _random(101, inputs), _random(outputs, seed=2), torch.get_num_threads()
    whole = product(x, packed, bias)
    for rows, first in itertools.product((1, 2, 5, 6, 7, 8, 48, 49), (0, 20)):
        assert torch.equal(product(x[first : first + rows], packed, bias), whole[first : first + rows])
    try:
        for threads, rows in itertools.product((1, 2, 3, 5), (1, 2, 49, 64, 101)):
            torch.set_num_threads(threads)
            assert torch.equal(product(x[:rows], packed, bias), whole[:rows])
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("dtype", FLOATS)
def test_what_is_not_finite_stays_in_its_row(width, dtype) -> None:
    codes, packed = _weight(65, 100, width)
    x = _random(9, 100).to(dtype)
    for held in (codes, packed):
        clean, dirty = product(x, held, None), x.clone()
        dirty[2, 50], dirty[4, 0], dirty[8, 99] = torch.nan, torch.inf, -torch.inf
        found, touched = product(dirty, held, None), [2, 4, 8]
        assert found[touched].isnan().all()
        others = [row for row in range(9) if row not in touched]
        assert torch.equal(found[others], clean[others])


@pytest.mark.parametrize("width", WIDTHS)
def test_rows_of_zeros_and_of_numbers_next_to_nothing_give_the_bias(width) -> None:
    codes, packed = _weight(40, 64, width)
    x, bias = torch.stack([torch.zeros(64), torch.full((64,), 1e-38)]), _random(40, seed=2)
    assert torch.equal(product(x, packed, bias), bias.expand(2, -1))
    assert torch.equal(product(x, codes, bias), bias.expand(2, -1))


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize(("inputs", "outputs"), SHAPES)
def test_packing_keeps_every_number(inputs, outputs, width) -> None:
    codes, packed = _weight(outputs, inputs, width)
    again = unpack(packed)
    assert torch.equal(again.codes, codes.codes)
    assert torch.equal(again.scale, codes.scale)
    index = torch.randint(0, outputs, (3, 4), generator=torch.Generator().manual_seed(3)).t()
    for dtype in FLOATS:
        assert torch.equal(row_of(index, packed, dtype), widened(codes)[index].to(dtype))
        assert torch.equal(row_of(index, codes, dtype), widened(codes)[index].to(dtype))


def test_products_of_the_largest_numbers_are_exact() -> None:
    inputs = 4096
    ones = Codes("int8", inputs, torch.full((17, inputs), 127, dtype=torch.int8), torch.ones(17))
    packed = pack(ones)
    assert packed is not None
    x = torch.full((2, inputs), 127.0)
    x[1] *= -1
    assert torch.equal(product(x, packed, None), (x.double() @ ones.codes.double().T).float())
    fifteen = Codes("int4", 64, torch.full((9, 32), 0xFF, dtype=torch.uint8), torch.ones(9, 2, dtype=torch.bfloat16))
    packed = pack(fifteen)
    assert packed is not None
    assert torch.equal(product(x[:, :64], packed, None), (7 * 64 * x[:, :1]).expand(-1, 9))


@pytest.mark.parametrize(("width", "most"), [("int8", 0.5 / 127), ("int4", 0.6 / 8)])
def test_a_weight_is_as_near_as_its_width_allows(width, most) -> None:
    weight = _random(40, 96)
    weight[3] = 0
    codes = quantised(weight, width)
    group = weight.unflatten(1, (-1, 96 if width == "int8" else 32))
    largest = group.abs().amax(2, keepdim=True).expand_as(group).flatten(1)
    error = (widened(codes) - weight).abs()
    assert bool((error <= largest * (most if width == "int8" else 2.5 * most)).all())  # int4 may cut the largest off
    assert float(error.square().mean() / weight.square().mean()) < (1e-4 if width == "int8" else 1e-2)
    assert torch.equal(widened(codes)[3], weight[3])


def test_bad_input_is_told() -> None:
    codes, packed = _weight(4, 8, "int8")
    for held in (codes, packed):
        with pytest.raises(ValueError, match="multiply float32 and bfloat16 on the CPU, not float64"):
            product(torch.zeros(1, 8, dtype=torch.float64), held, None)
        with pytest.raises(ValueError, match="have no gradients"):
            product(torch.zeros(1, 8, requires_grad=True), held, None)
    with pytest.raises(ValueError, match="not finite"):
        quantised(torch.full((2, 2), torch.nan), "int4")
    with pytest.raises(ValueError, match="too wide for int8"):
        quantised(torch.zeros(1, (1 << 17) + 1), "int8")
