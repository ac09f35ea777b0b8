"""Decays of linear recurrences at their edges."""

import torch

from atma.config import ModelConfig
from atma.model import Model


def test_a_floor_under_an_open_gate_never_decays_upwards():
    model = Model(ModelConfig(16, width=16, depth=4, pattern=("hgrn2",), key_width=8))
    generator = torch.Generator().manual_seed(0)
    gates = [block.mixer.gates for block in model.blocks]
    with torch.no_grad():
        gates[0].decay.table.copy_(torch.randn(gates[0].decay.table.shape, generator=generator))
        for gate in gates:
            gate.decay.forget_proj.weight.fill_(8.0)
        rates = [gate(torch.rand(2, 500, 16, generator=generator) * 4)[0] for gate in gates]
    assert all(float(one.max()) <= 0 for one in rates) and any(float(one.max()) == 0 for one in rates)
