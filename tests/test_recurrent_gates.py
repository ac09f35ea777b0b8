"""Decays of linear recurrences at their edges."""

import torch

from atma.config import ModelConfig
from atma.model import Model


def test_a_floor_under_an_open_gate_never_decays_upwards():
    config = ModelConfig(16, width=16, depth=4, pattern=("hgrn2",), mixers={}, key_width=8)
    model = Model(config)
    gates = [block.mixer.gates for block in model.blocks]
    with torch.no_grad():
        for gate in gates:
            gate.decay.forget_proj.weight.fill_(8.0)
        rates = [gate(torch.rand(2, 500, 16) * 4)[0] for gate in gates]
    assert all(float(one.max()) <= 0 for one in rates) and any(float(one.max()) == 0 for one in rates)
