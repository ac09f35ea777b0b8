"""The Triton convolution against the band-matrix oracle: on a GPU where there is one, else interpreted."""

import pytest
import torch

from tests.ops.on_gpu import DEVICE, LENGTHS, draw, error, is_real, placed, results  # isort: skip (before Triton)

from atma.ops.conv import gpu, reference


def case(kind, length, channels=6, taps=4):
    x, weight = draw(2, length, channels), draw(channels, taps)
    if kind == "tail":
        return [x, weight, draw(2, taps - 1, channels), None]
    cuts = torch.tensor([[length // 3, length // 2], [length // 5, length - 1]])
    ids = (torch.arange(length)[None, :, None] >= cuts[:, None, :]).sum(-1) if kind == "packed" else None
    return [x, weight, None, ids]


KINDS = ["plain", "tail", "packed"]


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("kind", KINDS)
def test_outputs_and_gradients_equal_the_oracle(kind, length):
    arguments = case(kind, length)
    exact = results(reference.causal_conv, placed(arguments, device="cpu"))
    found = results(gpu.causal_conv, placed(arguments, torch.float32))
    assert max(error(found, exact)) <= 1e-6


@pytest.mark.parametrize("taps", [1, 2, 3, 8])
@pytest.mark.parametrize("kind", KINDS)
def test_every_number_of_taps_and_channels_beyond_one_block(kind, taps):
    arguments = case(kind, 5, channels=70, taps=taps)
    exact = results(reference.causal_conv, placed(arguments, device="cpu"))
    found = results(gpu.causal_conv, placed(arguments, torch.float32))
    assert max(error(found[:3], exact[:3])) <= 1e-6
    if taps > 1:
        assert max(error(found, exact)) <= 1e-6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", KINDS)
def test_low_precision_is_within_twice_the_error_of_plain_low_precision(kind, dtype):
    low = [x.to(dtype) if is_real(x) else x for x in case(kind, 65)]
    exact = results(reference.causal_conv, placed([x.double() if is_real(x) else x for x in low], device="cpu"))
    plain = results(reference.causal_conv, placed(low, device="cpu"))
    found = results(gpu.causal_conv, placed(low))
    assert all(x.dtype == dtype for x in found)
    for ours, theirs in zip(error(found, exact), error(plain, exact), strict=True):
        assert ours <= 2 * theirs


def test_a_document_sees_nothing_of_the_one_before_it():
    """Bit-identical outputs and input gradients when the first document's inputs and output gradients change."""
    x, weight = draw(1, 70, 6, dtype=torch.float32), draw(6, 4, dtype=torch.float32)
    ids = (torch.arange(70) >= 41).long()[None]
    seen = []
    for old in (x[:, :41], draw(1, 41, 6, seed=5, dtype=torch.float32) * 100):
        inputs = torch.cat([old, x[:, 41:]], 1).to(DEVICE).requires_grad_()
        y = gpu.causal_conv(inputs, weight.to(DEVICE), None, ids.to(DEVICE))
        given = torch.cat([old, x[:, 41:]], 1).to(DEVICE)
        seen.append((y[:, 41:].detach(), torch.autograd.grad(y, inputs, given)[0][:, 41:]))
    assert all(torch.equal(a, b) for a, b in zip(*seen, strict=True))


def test_without_gradient_the_same_bits_come_from_the_body_alone():
    arguments = placed(case("tail", 9), torch.float32)
    recorded = gpu.causal_conv(*arguments)
    with torch.no_grad():
        assert torch.equal(gpu.causal_conv(*arguments), recorded)


def test_the_gradient_has_the_same_bits_every_time():
    first, second = (results(gpu.causal_conv, placed(case("packed", 130), torch.float32)) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_strides_do_not_matter():
    x = draw(2, 6, 9, dtype=torch.float32).to(DEVICE).mT
    weight = draw(4, 6, dtype=torch.float32).to(DEVICE).mT
    found = gpu.causal_conv(x, weight, None, None)
    assert torch.equal(found, gpu.causal_conv(x.contiguous(), weight.contiguous(), None, None))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_the_custom_operator_keeps_its_contract(kind):
    torch.library.opcheck(torch.ops.atma.causal_conv_gpu.default, tuple(placed(case(kind, 5), torch.float32)))


def test_it_compiles_without_a_graph_break():
    arguments = placed(case("tail", 9), torch.float32)
    compiled = torch.compile(gpu.causal_conv, fullgraph=True, backend="aot_eager")
    for a, b in zip(results(compiled, arguments), results(gpu.causal_conv, arguments), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("x", "weight", "message"),
    [
        (draw(1, 4, 3), draw(3, 4), "float16, bfloat16 and float32, not torch.float64"),
        (draw(1, 4, 3, dtype=torch.float32), draw(3, 9, dtype=torch.float32), "at most 8 taps, not 9"),
    ],
)
def test_what_it_does_not_take_is_refused_by_name(x, weight, message):
    with pytest.raises(ValueError, match=message):
        gpu.causal_conv(x, weight, None, None)


def test_an_id_that_comes_back_is_another_document():
    x, weight, _, _ = placed(case("plain", 9), torch.float32)
    returning, counted = (
        torch.tensor([ids] * 2).to(DEVICE) for ids in ([4, 4, 1, 4, 4, 1, 1, 2, 4], [0, 0, 1, 2, 2, 3, 3, 4, 5])
    )
    found = [results(lambda *z, ids=ids: gpu.causal_conv(*z, None, ids), [x, weight]) for ids in (returning, counted)]
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
