"""Linear layers on few rows, the RMS norm and the MLP's gate: the compiled pass against plain PyTorch."""

import math

import pytest
import torch
import torch.nn.functional as F

from atma.ops import use_backend
from atma.ops.dense import cpu, gated, linear, newton_schulz, rms_norm
from tests.ops.backends import NATIVE

ERRORS = {torch.float64: 1e-13, torch.float32: 1e-5, torch.bfloat16: 2**-7}
pytestmark = pytest.mark.parametrize("backend", [NATIVE])


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def close(found: torch.Tensor, exact: torch.Tensor) -> None:
    assert (found.double() - exact).abs().max() <= ERRORS[found.dtype] * exact.abs().max()


@pytest.mark.parametrize("dtype", ERRORS)
@pytest.mark.parametrize(
    ("rows", "inputs", "outputs"),
    [(1, 1, 1), (1, 128, 5), (1, 600, 1030), (2, 600, 131), (3, 70, 66), (8, 257, 1030), (16, 513, 1030)],
)
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
def test_a_row_has_the_same_bits_whatever_rows_and_threads_there_are(backend, dtype):
    x, weight = draw(5, 600, dtype=dtype), draw(131, 600, seed=1, dtype=dtype)
    threads = torch.get_num_threads()
    with use_backend(backend), torch.inference_mode():
        found = [linear(x[:rows], weight, None)[0] for rows in (1, 2, 3, 4, 5)]
        try:
            torch.set_num_threads(3)
            found.append(linear(x[:1], weight, None)[0])
        finally:
            torch.set_num_threads(threads)
    assert all(torch.equal(one, found[0]) for one in found)


@pytest.mark.parametrize("own", [True, False])
@pytest.mark.parametrize("rows", [20, 33, 70])
def test_many_rows_of_bfloat16_are_rounded_once_whatever_the_processor_multiplies(backend, monkeypatch, own, rows):
    monkeypatch.setattr(cpu, "_multiplies_bfloat16", lambda: own)
    x, weight, bias = (draw(*s, seed=i, dtype=torch.bfloat16) for i, s in enumerate([(rows, 96), (40, 96), (40,)]))
    for chosen in (backend, "cpu"):
        with use_backend(chosen), torch.inference_mode():
            found = linear(x, weight, bias)
        assert found.dtype == torch.bfloat16
        close(found, F.linear(x.double(), weight.double(), bias.double()))


@pytest.mark.parametrize("dtype", ERRORS)
@pytest.mark.parametrize("width", [1, 16, 70])
def test_the_norm_is_the_rms_norm(backend, dtype, width):
    x, weight = draw(2, 3, width, dtype=dtype), draw(width, seed=1, dtype=dtype)
    for given in (weight, None):
        exact = F.rms_norm(x.double(), (width,), None if given is None else given.double(), 1e-6)
        with use_backend(backend), torch.inference_mode():
            close(rms_norm(x, given, width, 1e-6), exact)


@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize("dtype", ERRORS)
@pytest.mark.parametrize(("rows", "width"), [(1, 1), (3, 16), (300, 70)])
def test_the_norm_and_its_gradients_are_those_of_the_formula(backend, dtype, rows, width, weighted):
    inputs = [draw(rows, width, dtype=dtype), *([draw(width, seed=1)] if weighted else [])]
    grad = draw(rows, width, seed=2, dtype=dtype)
    exact = [x.double().requires_grad_() for x in inputs]
    wanted = F.rms_norm(exact[0], (width,), exact[1] if weighted else None, 1e-6)
    given = [x.clone().requires_grad_() for x in inputs]
    with use_backend(backend):
        found = rms_norm(given[0], given[1] if weighted else None, width, 1e-6)
    close(found.detach(), wanted.detach())
    slopes = torch.autograd.grad(wanted, exact, grad.double())
    for slope, right in zip(torch.autograd.grad(found, given, grad), slopes, strict=True):
        error = ERRORS[dtype] * grad.double().abs().max() * 50  # at width 1 the gradient of x is a difference of equals
        assert (slope.double() - right).abs().max() <= max(error, ERRORS[dtype] * right.abs().max())


@pytest.mark.parametrize("recorded", [True, False])
@pytest.mark.parametrize("chosen", ["cpu", "own"])
def test_under_autocast_the_norm_is_what_a_linear_layer_would_round_it_to(backend, chosen, recorded):
    x, weight = draw(5, 70, dtype=torch.float32).requires_grad_(), draw(70, dtype=torch.float32).requires_grad_()
    with use_backend(backend if chosen == "own" else chosen), torch.set_grad_enabled(recorded):
        exact = rms_norm(x, weight, 70, 1e-6)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found = rms_norm(x, weight, 70, 1e-6)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found, exact.bfloat16(), rtol=2**-7, atol=0)
    if recorded:
        slopes = torch.autograd.grad(found, (x, weight), torch.ones_like(found))
        for slope, wanted in zip(slopes, torch.autograd.grad(exact.sum(), (x, weight)), strict=True):
            torch.testing.assert_close(slope, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("weighted", [True, False])
def test_the_norm_keeps_the_contract_of_an_operator(backend, weighted):
    x, weight = draw(3, 40, dtype=torch.float32), draw(40, dtype=torch.float32) if weighted else None
    for lowered in (False, True):
        torch.library.opcheck(torch.ops.atma.rms_norm_native, (x.requires_grad_(), weight, 1e-6, lowered))
        grad = torch.ones(3, 40, dtype=torch.bfloat16 if lowered else torch.float32)
        torch.library.opcheck(torch.ops.atma.rms_norm_native_backward, (grad, x.detach(), weight, 1e-6, lowered))


def test_the_norm_does_not_hide_nan(backend):
    x = draw(2, 33, dtype=torch.float32)
    x[1, 32] = float("nan")
    with use_backend(backend):
        found = rms_norm(x.requires_grad_(), None, 33, 1e-6)
    [slope] = torch.autograd.grad(found.sum(), x)
    assert found[1].isnan().all() and slope[1].isnan().all()
    assert found[0].isfinite().all() and slope[0].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("size", [1, 6, 33, 49, 130])
@pytest.mark.parametrize("count", [None, 1, 5])
def test_newton_schulz_rounds_are_those_of_pytorch(backend, dtype, size, count):
    x = draw(*([] if count is None else [count]), size, 2 * size, dtype=dtype)
    x /= torch.linalg.matrix_norm(x, keepdim=True)
    coefficients = (3.4445, -4.7750, 2.0315)
    with use_backend("cpu"):
        exact = newton_schulz((x @ x.mT).double(), coefficients, 5)
    with use_backend(backend):
        found = newton_schulz(x @ x.mT, coefficients, 5)
    assert torch.equal(found, found.mT)
    # Five rounds amplify a rounding error by at most 3.4445⁵ ≈ 485, and the factor of a null direction is as large.
    assert (found.double() - exact).abs().max() <= 485 * ERRORS[dtype] * exact.abs().max()


def test_newton_schulz_does_not_hide_nan(backend):
    gram = torch.eye(20)
    gram[3, 3] = float("nan")
    with use_backend(backend):
        assert newton_schulz(gram, (3.4445, -4.7750, 2.0315), 5).isnan().any()


GATES = {
    "square": lambda a: a.relu().square(),
    "silu": lambda a: a * torch.sigmoid(a),
    "gelu": lambda a: 0.5 * a * (1 + torch.tanh((2 / math.pi) ** 0.5 * (a + 0.044715 * a**3))),
}


@pytest.mark.parametrize("kind", GATES)
@pytest.mark.parametrize("dtype", ERRORS)
@pytest.mark.parametrize("width", [1, 35, 64])
def test_the_gate_and_its_gradient_are_those_of_the_formula(backend, dtype, kind, width):
    h, grad = 3 * draw(2, 5, 2 * width, dtype=dtype), draw(2, 5, width, seed=1, dtype=dtype)
    wide = h.double().requires_grad_()
    exact = wide[..., width:] * GATES[kind](wide[..., :width])
    [slope] = torch.autograd.grad(exact, wide, grad.double())
    low = h.clone().requires_grad_()
    with use_backend(backend):
        found = gated(low, kind)
    close(found.detach(), exact.detach())
    close(torch.autograd.grad(found, low, grad)[0], slope)


@pytest.mark.parametrize("kind", GATES)
def test_the_gate_of_large_numbers_neither_over_nor_underflows(backend, kind):
    h = torch.tensor([[-1e4, -90.0, 0.0, 90.0, 1e4, 1.0, 1.0, 1.0, 1.0, 1.0]])
    with use_backend(backend):
        found = gated(h, kind)
    torch.testing.assert_close(found.double(), GATES[kind](h[:, :5].double()), atol=1e-30, rtol=1e-6)


def test_large_numbers_round_to_the_nearest_bfloat16_and_nan_stays(backend):
    x = torch.tensor([[1.00390625, 1.01171875, float("nan"), float("inf")]])
    with use_backend(backend), torch.inference_mode():
        found = linear(torch.ones(1, 1).bfloat16(), x.T.bfloat16(), None)
    assert found[0, :2].tolist() == x[0, :2].bfloat16().tolist()
    assert found[0, 2].isnan() and found[0, 3].isinf()


@pytest.mark.parametrize("kind", GATES)
def test_the_gate_does_not_hide_nan(backend, kind):
    h = torch.tensor([[float("nan"), 1.0, 1.0, float("nan")]])
    with use_backend(backend):
        assert gated(h, kind).isnan().all()


def test_strided_weights_and_other_dtypes_are_read_as_what_they_are(backend):
    x, weight, bias = draw(2, 40, dtype=torch.float32), draw(40, 64, dtype=torch.float32).T, draw(64)
    with use_backend(backend), torch.inference_mode():
        close(linear(x, weight, bias), F.linear(x.double(), weight.double(), bias))
        close(rms_norm(x, draw(40), 40, 1e-6), F.rms_norm(x.double(), (40,), draw(40), 1e-6))
