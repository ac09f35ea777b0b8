"""Linear layers on few rows, the RMS norm and the MLP's gate: the compiled pass against plain PyTorch."""

import pytest
import torch
import torch.nn.functional as F

from atma.ops import use_backend
from atma.ops.dense import gated_square, linear, rms_norm
from tests.ops.backends import NATIVE

ERRORS = {torch.float64: 1e-13, torch.float32: 1e-5, torch.bfloat16: 2**-7}
pytestmark = pytest.mark.parametrize("backend", [NATIVE])


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def close(found: torch.Tensor, exact: torch.Tensor) -> None:
    assert (found.double() - exact).abs().max() <= ERRORS[found.dtype] * exact.abs().max()


@pytest.mark.parametrize("dtype", ERRORS)
@pytest.mark.parametrize(("rows", "inputs", "outputs"), [(1, 1, 1), (1, 128, 5), (3, 70, 66), (8, 257, 1030)])
def test_a_product_of_few_rows_is_the_linear_layer(backend, dtype, rows, inputs, outputs):
    x, weight, bias = (
        draw(*s, seed=i, dtype=dtype) for i, s in enumerate([(rows, inputs), (outputs, inputs), (outputs,)])
    )
    for given in (bias, None):
        exact = F.linear(x.double(), weight.double(), None if given is None else given.double())
        with use_backend(backend), torch.inference_mode():
            close(linear(x, weight, given), exact)
            close(linear(x.repeat(1, 2)[:, :inputs], weight, given), exact)


@pytest.mark.parametrize("dtype", ERRORS)
@pytest.mark.parametrize("width", [1, 16, 70])
def test_the_norm_is_the_rms_norm(backend, dtype, width):
    x, weight = draw(2, 3, width, dtype=dtype), draw(width, seed=1, dtype=dtype)
    for given in (weight, None):
        exact = F.rms_norm(x.double(), (width,), None if given is None else given.double(), 1e-6)
        with use_backend(backend), torch.inference_mode():
            close(rms_norm(x, given, width, 1e-6), exact)


@pytest.mark.parametrize("dtype", ERRORS)
def test_the_gate_and_its_gradient_are_those_of_the_formula(backend, dtype):
    h, grad = draw(2, 5, 70, dtype=dtype), draw(2, 5, 35, seed=1, dtype=dtype)
    wide = h.double().requires_grad_()
    exact = wide[..., 35:] * wide[..., :35].relu().square()
    [slope] = torch.autograd.grad(exact, wide, grad.double())
    low = h.clone().requires_grad_()
    with use_backend(backend):
        found = gated_square(low)
    close(found.detach(), exact.detach())
    close(torch.autograd.grad(found, low, grad)[0], slope)


def test_large_numbers_round_to_the_nearest_bfloat16_and_nan_stays(backend):
    x = torch.tensor([[1.00390625, 1.01171875, float("nan"), float("inf")]])
    with use_backend(backend), torch.inference_mode():
        found = linear(torch.ones(1, 1).bfloat16(), x.T.bfloat16(), None)
    assert found[0, :2].tolist() == x[0, :2].bfloat16().tolist()
    assert found[0, 2].isnan() and found[0, 3].isinf()


def test_the_gate_does_not_hide_nan(backend):
    h = torch.tensor([[float("nan"), 1.0, 1.0, float("nan")]])
    with use_backend(backend):
        assert gated_square(h).isnan().all()


def test_strided_weights_and_other_dtypes_are_read_as_what_they_are(backend):
    x, weight, bias = draw(2, 40, dtype=torch.float32), draw(40, 64, dtype=torch.float32).T, draw(64)
    with use_backend(backend), torch.inference_mode():
        close(linear(x, weight, bias), F.linear(x.double(), weight.double(), bias))
        close(rms_norm(x, draw(40), 40, 1e-6), F.rms_norm(x.double(), (40,), draw(40), 1e-6))
