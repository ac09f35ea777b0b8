"""Blocks of which only the inputs are kept: the same bits, and less that is held."""

import pytest
import torch
from tiny_run import rows, tiny_model

from atma.config import ModelConfig, TrainConfig
from atma.mixers.table import names, small
from atma.model import Model, computed_again
from atma.train.step import generator


def gradients(model: Model, batch) -> list[torch.Tensor]:
    model.zero_grad(set_to_none=True)
    hidden, _ = model(batch.tokens, segment_ids=batch.segment_ids, noise=3)
    model.loss(hidden, batch.targets).sum().backward()
    return [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in model.parameters()]


EVERY = [
    pytest.param(kind, every, marks=() if (i + every) % 2 else pytest.mark.slow)
    for i, kind in enumerate(names())
    for every in (1, 2)
]


@pytest.mark.parametrize(("kind", "every"), EVERY)
def test_gradients_have_the_same_bits(kind, every):
    config = ModelConfig(32, width=16, depth=2 * every, pattern=(kind,), **small(kind)[0])
    model, batch = Model(config, generator(1)), rows(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator(2)))
    whole = gradients(model, batch)
    model.checkpointing = every
    for one, other in zip(whole, gradients(model, batch), strict=True):
        assert torch.equal(one, other)


def test_less_is_held_between_the_passes():
    model, batch, held = Model(tiny_model(), generator(1)), rows(0), []
    for model.checkpointing in (0, 1, 2):
        seen = {}

        def keep(x: torch.Tensor, seen: dict = seen) -> torch.Tensor:
            seen[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
            return x

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
            hidden, _ = model(batch.tokens, segment_ids=batch.segment_ids)
        held.append(sum(seen.values()))
        del hidden
    assert held[1] < 0.5 * held[0]
    assert held[2] == pytest.approx((held[0] + held[1]) / 2, rel=0.1)


def test_of_many_blocks_some_of_each_name_are_computed_again():
    names = ("local", "local", "global", "local") * 2
    assert computed_again(names, 2) == [2, 0, 3, 5] and computed_again(names, 4) == [2, 3]
    assert sorted(computed_again(names, 1)) == list(range(8))


def test_blocks_to_be_computed_again_are_one_of_one_or_more():
    with pytest.raises(ValueError, match="'checkpointing_every' must be at least 1, not 0"):
        TrainConfig(checkpointing_every=0)
