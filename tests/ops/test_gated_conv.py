"""The convolution between two gates: one compiled pass against the same in single operations."""

import pytest
import torch

from atma.ops import causal_conv, gated_conv
from atma.ops.conv import LANES
from tests.ops.backends import NATIVE

pytestmark = pytest.mark.parametrize("backend", [NATIVE])
ERRORS = {torch.float64: 1e-13, torch.float32: 1e-5, torch.bfloat16: 2**-6}


def draw(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def composed(h, weight, segment_ids):
    b, c, u = h.chunk(3, -1)
    return c * causal_conv(b * u, weight, None, segment_ids, backend="reference")


def with_gradients(function, dtype, tensors, grad):
    given = [x.to(dtype).requires_grad_() for x in tensors]
    y = function(*given)
    return [y.detach(), *torch.autograd.grad(y, given, grad.to(dtype))]


@pytest.mark.parametrize("dtype", ERRORS)
@pytest.mark.parametrize("taps", [1, 2, 4, 7])
@pytest.mark.parametrize(("length", "channels"), [(1, 16), (2, 64), (63, 80), (65, 16), (130, 144)])
@pytest.mark.parametrize("packed", [False, True])
def test_values_and_gradients_are_those_of_single_operations(backend, dtype, taps, length, channels, packed):
    ids = None
    if packed:
        ids = (torch.rand(2, length, generator=torch.Generator().manual_seed(5)) < 0.2).cumsum(1) % 3
    tensors = [draw(2, length, 3 * channels, seed=1), draw(channels, taps, seed=2)]
    grad = draw(2, length, channels, seed=3)
    exact = with_gradients(
        lambda h, w: composed(h, w, ids), torch.float64, [x.to(dtype) for x in tensors], grad.to(dtype)
    )
    found = with_gradients(lambda h, w: gated_conv(h, w, ids, backend), dtype, tensors, grad)
    for got, right in zip(found, exact, strict=True):
        assert got.dtype == dtype
        assert (got.double() - right).abs().max() <= ERRORS[dtype] * right.abs().max()


def test_without_gradients_it_is_the_same(backend):
    h, weight = draw(1, 9, 3 * LANES, seed=1), draw(LANES, 3, seed=2)
    with torch.no_grad():
        found = gated_conv(h, weight, None, backend)
    assert torch.equal(found, gated_conv(h.clone().requires_grad_(), weight, None, backend).detach())


def test_channels_that_are_no_whole_vectors_are_taken_in_single_operations(backend):
    h, weight = draw(2, 9, 3 * 20, seed=1), draw(20, 3, seed=2)
    torch.testing.assert_close(gated_conv(h, weight, None, backend), composed(h, weight, None))


def test_the_operators_pass_opcheck(backend):
    h, weight = draw(2, 9, 3 * LANES, seed=1).requires_grad_(), draw(LANES, 3, seed=2).requires_grad_()
    ids = torch.tensor([[0] * 4 + [1] * 5, [2] * 9])
    torch.library.opcheck(torch.ops.atma.gated_conv_native.default, (h, weight, ids))
    grad = draw(2, 9, LANES, seed=3)
    torch.library.opcheck(torch.ops.atma.gated_conv_native_backward.default, (grad, h.detach(), weight.detach(), None))


def test_nan_in_one_channel_stays_in_it_and_after_it(backend):
    h, weight = draw(1, 9, 3 * LANES, seed=1), draw(LANES, 3, seed=2)
    h[0, 4, 3] = float("nan")
    y = gated_conv(h, weight, None, backend)
    assert y[0, 4:7, 3].isnan().all()
    assert y.isnan().sum() == 3


def test_what_does_not_fit_is_refused(backend):
    for channels, width in ((LANES + 1, 3 * LANES), (LANES, 3 * LANES + 1), (LANES, 0)):
        with pytest.raises(ValueError, match="must be"):
            gated_conv(draw(1, 9, width, seed=1), draw(channels, 3, seed=2), None, backend)
    with pytest.raises(ValueError, match="segment_ids"):
        gated_conv(draw(1, 9, 3 * LANES, seed=1), draw(LANES, 3, seed=2), torch.zeros(1, 8, dtype=torch.long), backend)
