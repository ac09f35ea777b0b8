"""The operations reproduce the published implementation: values and every gradient to 1e-9 relative in float64."""

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from atma.ops import gated_delta, polar_attention
from tests.ops.backends import ALL

POLAR = ("q", "k", "v", "length_gain", "null_base", "null_slope", "magnitude_slope", "null_value")
DELTA = ("q", "k", "v", "log_decay", "beta", "memory_in")


def assert_matches(function, names, outputs, vectors):
    inputs = [vectors[name].clone().requires_grad_() for name in names]
    found = function(*inputs)
    gradients = torch.autograd.grad(found, inputs, [vectors[f"out_grad.{name}"] for name in outputs])
    pairs = [*zip(outputs, found, strict=True), *zip((f"grad.{name}" for name in names), gradients, strict=True)]
    for name, value in pairs:
        error = (value - vectors[name]).abs().max() / vectors[name].abs().max()
        assert error < 1e-9, f"{name}: relative error {error:.1e}"


@pytest.mark.parametrize("backend", ALL)
@pytest.mark.parametrize("name", ["polar_full", "polar_window"])
def test_polar_attention_matches_the_golden_vectors(golden, name, backend):
    path = golden / f"{name}.safetensors"
    with safe_open(path, "pt") as file:
        window = int(file.metadata()["window"]) or None

    def function(*inputs):
        return polar_attention(*inputs, window=window, backend=backend)

    assert_matches(function, POLAR, ("direction", "magnitude"), load_file(path))


@pytest.mark.parametrize("backend", ALL)
def test_gated_delta_matches_the_golden_vectors(golden, backend):
    def function(*inputs):
        return gated_delta(*inputs, backend=backend)

    assert_matches(function, DELTA, ("out", "memory_out"), load_file(golden / "gated_delta.safetensors"))
