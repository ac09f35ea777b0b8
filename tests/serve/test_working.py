"""What a step computes with is found before memory is shared out."""

import dataclasses

import torch

from atma.serve.carry import Carrier
from atma.serve.exact import Served
from atma.serve.working import Meter, working_bytes
from tests.serve.conftest import SMALL


def test_a_meter_counts_what_lives_at_once_and_each_memory_once() -> None:
    given = torch.ones(1000)
    with Meter() as meter:
        for _ in range(3):
            first = given + 1
            second = first.view(10, 100) * 2
            del first, second
        given.add_(1)
    assert meter.most == 8000


def test_more_tokens_in_a_step_take_more_memory_and_never_less_than_their_widest_layer(model) -> None:
    served, carrier = Served(model), Carrier(model)
    few, many = (working_bytes(served, carrier, dataclasses.replace(SMALL, step_tokens=tokens)) for tokens in (64, 512))
    widest = 2 * model.config.mlp_multiple * model.config.width * 4
    assert few >= 64 * widest and many >= 512 * widest
    assert 4 * few < many < 16 * few
