"""The compiled loss in several blocks of tokens and words: against the oracle in float64."""

import pytest
import torch

from atma.ops import softcap_loss
from atma.ops.loss import native as loss_native
from tests.ops.backends import NATIVE

ERRORS = {torch.float64: 1e-13, torch.float32: 1e-5, torch.bfloat16: 2**-6}
pytestmark = pytest.mark.parametrize("backend", [NATIVE])


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def arguments(tokens: int, words: int, width: int = 12) -> tuple[torch.Tensor, ...]:
    targets = torch.randint(0, words, (tokens,), generator=torch.Generator().manual_seed(4))
    targets[::5] = -100
    return 2 * draw(tokens, width), draw(words, width, seed=1), draw(words, seed=2), targets, draw(tokens, seed=3)


def results(backend, dtype, hidden, weight, bias, targets, grad, cap=15.0):
    """Losses and the gradients of hidden, weight and bias (None: there is none)."""
    hidden, weight, bias = (
        None if x is None else x.detach().to(dtype, copy=True).requires_grad_() for x in (hidden, weight, bias)
    )
    losses = softcap_loss(hidden, weight, bias, targets, cap, backend)
    given = [x for x in (hidden, weight, bias) if x is not None]
    return [losses.detach(), *torch.autograd.grad(losses, given, grad.to(losses.dtype))]


def compare(backend, dtype, hidden, weight, bias, *rest):
    rounded = (None if x is None else x.to(dtype) for x in (hidden, weight, bias))
    exact = results("reference", torch.float64, *rounded, *rest)
    for found, wanted in zip(results(backend, dtype, hidden, weight, bias, *rest), exact, strict=True):
        assert (found.double() - wanted).norm() <= ERRORS[dtype] * wanted.norm()


@pytest.mark.parametrize("dtype", ERRORS)
@pytest.mark.parametrize(("tokens", "words"), [(1, 1), (7, 300), (70, 1030)])
@pytest.mark.parametrize("biased", [True, False])
def test_losses_and_gradients_are_the_oracles(backend, dtype, tokens, words, biased):
    hidden, weight, bias, *rest = arguments(tokens, words)
    compare(backend, dtype, hidden, weight, bias if biased else None, *rest)


@pytest.mark.parametrize("dtype", ERRORS)
def test_blocks_join_exactly(backend, dtype, monkeypatch):
    monkeypatch.setattr(loss_native, "MOST_ROWS", 32)
    monkeypatch.setattr(loss_native, "BLOCK_LOGITS", 32 * 70)
    compare(backend, dtype, *arguments(70, 300))


@pytest.mark.parametrize("asked", [0, 3])
@pytest.mark.parametrize("other", [None, "cpu"])
def test_rows_without_a_target_are_never_read(backend, other, asked):
    hidden, weight, bias, targets, grad = arguments(70, 300)
    targets[:asked], targets[asked:] = torch.tensor([7, 0, 299])[:asked], -100
    wanted = results("reference", torch.float64, hidden, weight, bias, targets, grad)
    hidden[asked:], grad[asked:] = float("nan"), float("nan")
    found = results(other or backend, torch.float64, hidden, weight, bias, targets, grad)
    for ours, theirs in zip(found, wanted, strict=True):
        assert (ours - theirs).abs().max() <= 1e-12
    assert bool(wanted[2].any()) == bool(asked)


@pytest.mark.parametrize(("cap", "scale"), [(0.5, 1), (400.0, 30), (0.0, 30)])
def test_any_cap_or_none_neither_over_nor_underflows(backend, cap, scale):
    hidden, weight, bias, targets, grad = arguments(20, 50)
    compare(backend, torch.float32, scale * hidden, weight, bias, targets, grad, cap)


def test_nan_reaches_its_own_tokens_loss_and_every_word(backend):
    hidden, weight, bias, targets, grad = arguments(20, 50)
    hidden[3, 2] = float("nan")
    losses, grad_hidden, grad_weight, _ = results(backend, torch.float32, hidden, weight, bias, targets, grad)
    rows = torch.arange(20) == 3
    assert torch.equal(losses.isnan(), rows) and torch.equal(grad_hidden.isnan().any(1), rows)
    assert grad_weight.isnan().all()


def test_it_keeps_the_contract_of_an_operator(backend):
    hidden, weight, bias, targets, grad = (x.float() if x.is_floating_point() else x for x in arguments(9, 20))
    given = [x.requires_grad_() for x in (hidden, weight, bias)]
    torch.library.opcheck(torch.ops.atma.softcap_loss_native, (*given, targets, 15.0))
    slopes = (grad, hidden.detach(), weight.detach(), bias.detach(), targets, grad.abs() + 20, 15.0)
    torch.library.opcheck(torch.ops.atma.softcap_loss_native_backward, slopes)


def test_the_same_bits_with_any_number_of_threads(backend):
    found, threads = [], torch.get_num_threads()
    hidden, weight, bias, targets, grad = arguments(300, 1000)
    z = hidden.float() @ weight.float().T
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            slopes, sums = z.clone(), torch.zeros(1000)
            rows = [targets, torch.full((300,), 20.0), grad.float(), sums]
            loss_native._call("loss_backward", slopes, slice(0, 1000), bias.float(), rows, 15.0)
            found.append((slopes, sums))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other, strict=True))
