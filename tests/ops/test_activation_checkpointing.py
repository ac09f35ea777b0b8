"""Gradients where autograd keeps something else than the tensors that an operation saved.

Activation checkpointing computes them again and lets each be read once; hooks hand over copies. Both must give the
gradients, to the bit, of a plain backward pass.
"""

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from atma.model import Model
from atma.ops import (
    causal_conv,
    gated_conv,
    gated_delta,
    polar_attention,
    recurrence,
    softcap_loss,
    softmax_attention,
    use_backend,
)
from atma.ops.dense import gated, linear, rms_norm
from atma.ops.recurrent import Axis, Rule
from tests.conftest import tiny
from tests.laws.conftest import randomise
from tests.ops.backends import ALL

B, T, C, H, K = 2, 70, 16, 2, 8
SEGMENTS = (torch.arange(T) >= 40).int().expand(B, T)


def random(*shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(*shape, generator=generator, dtype=torch.float64).requires_grad_()


def delta(q: Tensor, k: Tensor, v: Tensor, decay: Tensor, beta: Tensor, *memory: Tensor, segment_ids=None) -> Tensor:
    unit_q, unit_k = F.normalize(q, dim=-1), F.normalize(k, dim=-1)
    out, after = gated_delta(unit_q, unit_k, v, F.logsigmoid(decay), beta.sigmoid(), *memory, segment_ids=segment_ids)
    return out.sum() + after.square().sum()


def linear_recurrence(
    q: Tensor, k: Tensor, v: Tensor, decay: Tensor, *memory: Tensor, rule: Rule = "add", axis: Axis = "key"
) -> Tensor:
    unit_k, ids = F.normalize(k, dim=-1), None if memory else SEGMENTS
    out, after = recurrence(q, unit_k, v, F.logsigmoid(decay), None, *(memory or (None,)), ids, rule, axis)
    return out.sum() + after.square().sum()


def polar(*inputs: Tensor) -> Tensor:
    direction, magnitude = polar_attention(*inputs, segment_ids=SEGMENTS, window=9)
    return direction.square().sum(-1) + magnitude


HEADS = (random(B, H, T, K), random(B, 1, T, K), random(B, 1, T, K))
GATES = (random(B, H, T), random(B, H, T))
TARGETS = torch.randint(0, 31, (B, T), generator=torch.Generator().manual_seed(0))
CALLS: dict[str, tuple[Callable[..., Tensor], tuple[Tensor, ...]]] = {
    "conv": (partial(causal_conv, segment_ids=SEGMENTS), (random(B, T, C), random(C, 3))),
    "conv with a tail": (causal_conv, (random(B, T, C), random(C, 3), random(B, 2, C))),
    "gated conv": (partial(gated_conv, segment_ids=SEGMENTS), (random(B, T, 3 * C), random(C, 3))),
    "polar": (polar, (*HEADS, *(random(H) for _ in range(4)), random(H, K))),
    "softmax": (partial(softmax_attention, scale=0.3, segment_ids=SEGMENTS), HEADS),
    "delta": (partial(delta, segment_ids=SEGMENTS), (*HEADS, *GATES)),
    "delta with a memory": (delta, (*HEADS, *GATES, random(B, H, K, K))),
    "delta by channel": (partial(linear_recurrence, rule="delta"), (*HEADS, random(B, H, T, K))),
    "add by value": (partial(linear_recurrence, axis="value"), (*HEADS, random(B, H, T, K), random(B, H, K, K))),
    "loss": (
        lambda hidden, weight, bias: softcap_loss(hidden, weight, bias, TARGETS, 15.0),
        (random(B, T, C), random(31, C), random(31)),
    ),
    "norm": (lambda x, weight: rms_norm(x, weight, C, 1e-6), (random(B, T, C), random(C))),
    "gate": (gated, (random(B, T, 2 * C),)),
    "linear": (linear, (random(B, T, C), random(C, C), random(C))),
}
WAYS: dict[str, Callable[..., Tensor]] = {
    "reentrant": partial(checkpoint, use_reentrant=True),
    "not reentrant": partial(checkpoint, use_reentrant=False),
    "copies": lambda function, *inputs: _copied(function, *inputs),
}


def _copied(function: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
    with saved_tensors_hooks(lambda x: x.detach().clone(), lambda x: x.clone()):
        return function(*inputs)


def gradients(y: Tensor, inputs: tuple[Tensor, ...], retain: bool = False) -> tuple[Tensor, ...]:
    weights = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)
    for x in inputs:
        x.grad = None
    (y * weights).sum().backward(retain_graph=retain)
    return tuple(x.grad.clone() for x in inputs if x.grad is not None)


def assert_equal(found: tuple[Tensor, ...], expected: tuple[Tensor, ...], tolerance: float = 0.0) -> None:
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("backend", ALL)
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", CALLS)
def test_an_operation_has_its_gradients_whatever_autograd_keeps(name, way, backend):
    function, inputs = CALLS[name]
    with use_backend(backend):
        expected = gradients(function(*inputs), inputs)
        assert_equal(gradients(WAYS[way](function, *inputs), inputs), expected)


@pytest.mark.parametrize("backend", ALL)
@pytest.mark.parametrize("name", CALLS)
def test_a_second_backward_pass_gives_the_same_gradients(name, backend):
    function, inputs = CALLS[name]
    with use_backend(backend):
        y = function(*inputs)
        assert_equal(gradients(y, inputs, retain=True), gradients(y, inputs))


@pytest.mark.parametrize("backend", ALL)
@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("core", ["polar", "nope", "rope"])
def test_a_model_of_checkpointed_blocks_has_the_gradients_of_a_plain_one(core, reentrant, backend):
    model = randomise(Model(tiny(core)))
    tokens = torch.randint(0, 23, (2, 70), generator=torch.Generator().manual_seed(1))

    def through(wrap: Callable[..., Tensor]) -> tuple[Tensor, ...]:
        model.zero_grad()
        x = model.embed(tokens)
        for block in model.blocks:
            x = wrap(lambda x, block=block: block(x, segment_ids=(tokens == 0).cumsum(1))[0], x)
        model.loss(model.norm(x), tokens).sum().backward()
        return tuple(p.grad.clone() for p in model.parameters() if p.grad is not None)

    with use_backend(backend):
        plain = through(lambda function, x: function(x))
        # The reentrant form first computes without gradients, where products round differently.
        assert_equal(through(partial(checkpoint, use_reentrant=reentrant)), plain, 1e-10 if reentrant else 0.0)
