"""The scan of neural memories in Triton against the definition: on a GPU where there is one, else interpreted."""

import math

import pytest
import torch

from tests.ops.on_gpu import DEVICE  # isort: skip (before Triton)

from atma import state as states
from atma.ops.fast_weights import empty, fast_weights, gpu
from atma.ops.fast_weights import scan as plain
from tests.ops.memories import LIFTED, MLP, PRESETS, TTT, text

RULES = {
    "matrix, dot": {"bias": "dot"},
    "matrix, l2 to W⁰, wider keys, momentum": {"residual": "skip", "decay_to": "initial", "optimiser": "momentum"},
    "matrix, dot under a layer norm, a window": {"bias": "dot", "norm": True, "window": 3, "optimiser": "momentum"},
    "matrix, huber": {"bias": "huber", "residual": "identity"},
    "matrix, mean of steps": TTT,
    "mlp, dot, silu": {"network": "mlp", "bias": "dot", "activation": "silu"},
    "mlp, mean of steps": TTT | {"network": "mlp", "radius": 0.02},
    "mlp, titans": PRESETS["titans, held"],
    "mlp, normalised under a layer norm": PRESETS["titans, normalised"] | {"bias": "huber_switch"},
    "mlp, a window, lifted": LIFTED | {"window": 3, "norm": True},
    "mlp, per coordinate": MLP | {"bias": "huber_coordinate", "optimiser": "momentum"},
}


def low(given):
    """In float32, on the device."""
    if isinstance(given, torch.Tensor):
        return given.to(DEVICE, torch.float32 if given.is_floating_point() else given.dtype)
    if not isinstance(given, tuple):
        return given
    parts = [low(part) for part in given]
    return type(given)(*parts) if hasattr(given, "_fields") else tuple(parts)


def started(given, phase):
    """The first row stands at this place of the grid, the second at its beginning."""
    state = empty(given.memory, 2)
    if not phase:
        return state
    ahead = given.part(slice(phase)).run(state)[1]
    return states.stack([states.rows(ahead, [0]), states.rows(state, [1])])

def far(found, wanted):
    pairs = zip(states.tensors(found), states.tensors(wanted), strict=True)
    return max(float((a.cpu().double() - b).abs().max() / b.abs().max().clamp(min=1e-9)) for a, b in pairs)

@pytest.mark.parametrize("phase", [0, 3])
@pytest.mark.parametrize("name", RULES)
def test_a_scan_is_its_steps(name, phase):
    given = text(tokens=13, **RULES[name])
    state = started(given, phase)
    with torch.no_grad():
        wanted = fast_weights(*given, states.transform(state, lambda _, x: x.clone()), backend="reference")
        found = fast_weights(*low(given), low(state), backend="gpu")
    assert far(found, wanted) < 2e-5
