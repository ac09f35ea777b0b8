"""The Triton loss against the oracle with all logits: on a GPU where there is one, else interpreted."""

import pytest
import torch

from tests.ops.on_gpu import DEVICE, LENGTHS, draw, error, is_real, placed, results  # isort: skip (before Triton)

from atma.ops.loss import gpu, reference

CAP = 15.0


def case(rows, words=300, width=40, biased=True):
    """Logits up to about 3 times the cap, a third of the targets ignored, the last word among the others."""
    targets = (torch.arange(rows) * 37 + words - 1) % words
    targets[2::3] = -100
    return [draw(rows, width) * 2, draw(words, width), draw(words) if biased else None, targets, CAP]


@pytest.fixture
def _narrow_slices(monkeypatch):
    """Small problems take several slices of the vocabulary, the last of them short, in both directions."""
    for name, value in (("FORWARD_SLICE", 128), ("SMALLEST_SLICE", 128), ("BACKWARD_LOGITS", 1)):
        monkeypatch.setattr(gpu, name, value)


@pytest.mark.parametrize("rows", LENGTHS)
@pytest.mark.parametrize("biased", [True, False])
def test_losses_and_gradients_equal_the_oracle(rows, biased):
    arguments = case(rows, biased=biased)
    exact = results(reference.losses, placed(arguments, device="cpu"))
    found = results(gpu.losses, placed(arguments, torch.float32))
    assert max(error(found, exact)) <= 2e-6


def test_without_a_cap_it_is_plain_cross_entropy():
    arguments = [*case(65)[:-1], 0.0]
    exact = results(reference.losses, placed(arguments, device="cpu"))
    assert max(error(results(gpu.losses, placed(arguments, torch.float32)), exact)) <= 2e-6


@pytest.mark.usefixtures("_narrow_slices")
@pytest.mark.parametrize("words", [1, 5, 128, 300])
def test_slices_of_the_vocabulary_join(words):
    arguments = case(65, words)
    exact = results(reference.losses, placed(arguments, device="cpu"))
    found = results(gpu.losses, placed(arguments, torch.float32))
    for a, b in zip(found, exact, strict=True):
        assert float((a - b).abs().max()) <= 2e-6 * max(1, float(b.abs().max()))


@pytest.mark.usefixtures("_narrow_slices")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_is_within_twice_the_error_of_plain_low_precision(dtype):
    """Plain: logits in the low precision, everything after in float32."""

    def plain(hidden, weight, bias, targets, cap):
        z = torch.nn.functional.linear(hidden, weight, bias).float()
        return torch.nn.functional.cross_entropy(cap * z / (z * z + cap * cap).sqrt(), targets, reduction="none")

    low = [x.to(dtype) if is_real(x) else x for x in case(65)]
    exact = results(reference.losses, placed([x.double() if is_real(x) else x for x in low], device="cpu"))
    usual = results(plain, placed(low, device="cpu"))
    found = results(gpu.losses, placed(low))
    assert [x.dtype for x in found] == [torch.float32, dtype, dtype, dtype]
    for ours, theirs in zip(error(found, exact), error(usual, exact), strict=True):
        assert ours <= 2 * theirs


def test_ignored_targets_have_no_loss_and_no_gradient_even_where_the_given_gradient_is_nan():
    hidden, weight, bias, targets, cap = placed(case(9), torch.float32)
    loss = gpu.losses(hidden, weight, bias, targets, cap)
    given = torch.where(targets < 0, torch.nan, 1.0)
    grad_hidden, grad_weight, grad_bias = torch.autograd.grad(loss, (hidden, weight, bias), given)
    assert not loss[targets < 0].any()
    assert not grad_hidden[targets < 0].any()
    assert grad_weight.isfinite().all()
    assert grad_bias.isfinite().all()


def test_only_ignored_targets_and_no_rows_at_all_are_fine():
    hidden, weight, _, targets, cap = placed(case(3), torch.float32)
    for rows in (3, 0):
        loss = gpu.losses(hidden[:rows], weight, None, torch.full_like(targets[:rows], -100), cap)
        gradients = torch.autograd.grad(loss.sum(), (hidden, weight))
        assert not any(x.any() for x in (loss, *gradients))


def test_large_logits_neither_overflow_nor_lose_the_cap():
    hidden, weight, _, targets, cap = placed(case(5), torch.float32)
    loss = gpu.losses(hidden.detach() * 1e4, weight, None, targets, cap)
    exact = reference.losses(hidden.detach().double().cpu() * 1e4, weight.double().cpu(), None, targets.cpu(), cap)
    assert error([loss.detach().cpu()], [exact.detach()])[0] <= 2e-6


@pytest.mark.usefixtures("_narrow_slices")
def test_the_gradient_has_the_same_bits_every_time():
    first, second = (results(gpu.losses, placed(case(130), torch.float32)) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_autocast_multiplies_in_its_own_precision():
    hidden, weight, bias, targets, cap = placed(case(9), torch.float32)
    low = gpu.losses(hidden.bfloat16(), weight.bfloat16(), bias, targets, cap)
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        assert torch.equal(gpu.losses(hidden, weight, bias, targets, cap), low)


@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_the_custom_operator_keeps_its_contract(biased):
    torch.library.opcheck(torch.ops.atma.softcap_loss_gpu.default, tuple(placed(case(5, 7, 3, biased), torch.float32)))


def test_it_compiles_without_a_graph_break():
    arguments = placed(case(5, 7, 3), torch.float32)
    compiled = torch.compile(gpu.losses, fullgraph=True, backend="aot_eager")
    for a, b in zip(results(compiled, arguments), results(gpu.losses, arguments), strict=True):
        assert torch.equal(a, b)


def test_what_it_does_not_take_is_refused_by_name():
    hidden, weight, bias, targets, cap = case(5)
    with pytest.raises(ValueError, match=r"bfloat16 or float32, not torch\.float64 and torch\.float64"):
        gpu.losses(hidden, weight, bias, targets, cap)
    with pytest.raises(ValueError, match=r"not torch\.float32 and torch\.bfloat16"):
        gpu.losses(hidden.float(), weight.bfloat16(), bias, targets, cap)
