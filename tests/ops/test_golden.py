"""The operations reproduce the golden vectors: values and every gradient to 1e-9 relative in float64."""

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from atma.ops import gated_delta, polar_attention, recurrence
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


LINEAR = ("add_none", "add_fixed", "add_scalar", "add_channel", "delta_none", "delta_scalar", "delta_channel")
LINEAR += ("strong_add", "strong_delta", "packed")


@pytest.mark.parametrize("backend", ALL)
@pytest.mark.parametrize("name", LINEAR)
def test_linear_recurrences_match_the_golden_vectors(golden_mixers, name, backend):
    path = golden_mixers / f"linear_{name}.safetensors"
    with safe_open(path, "pt") as file:
        about = json.loads(file.metadata()["about"])
    vectors = load_file(path)
    names = [each for each in about["inputs"] if each != "segment_ids"]

    def function(*inputs):
        at = dict(zip(names, inputs, strict=True)) | {"segment_ids": vectors.get("segment_ids")}
        arguments = [at.get(each) for each in (*DELTA, "segment_ids")]
        return recurrence(*arguments, rule=about["config"]["rule"], backend=backend)

    assert_matches(function, names, about["outputs"], vectors)


@pytest.mark.parametrize("backend", ALL)
def test_a_decay_of_each_head_has_the_gradient_of_all_its_tokens(golden_mixers, backend):
    vectors = load_file(golden_mixers / "linear_add_fixed.safetensors")
    given = [vectors[name] for name in ("q", "k", "v", "log_decay", "memory_in")]
    assert torch.equal(given[3], given[3][:1, :, :1].expand_as(given[3]))
    q, k, v, decay, memory = [*given[:3], given[3][0, :, 0].clone().requires_grad_(), given[4]]
    found = recurrence(q, k, v, decay, None, memory, backend=backend)
    [gradient] = torch.autograd.grad(found, decay, [vectors["out_grad.out"], vectors["out_grad.memory_out"]])
    torch.testing.assert_close(gradient, vectors["grad.log_decay"].sum((0, 2)), rtol=1e-9, atol=0)


@pytest.mark.parametrize("backend", ALL)
def test_the_two_recurrences_of_slots_match_the_golden_vectors(golden_mixers, backend):
    """Keys and values held in slots: what decays is the value axis of the one and the key axis of the other."""
    vectors = load_file(golden_mixers / "raven_slots.safetensors")

    def function(q, k, v, decay, keys, values):
        written = -decay.expm1()
        scores, keys = recurrence(q, k, written, decay, None, keys.mT, None, "add", "value", backend)
        out, values = recurrence(scores.softmax(-1), written, v, decay, None, values.mT, backend=backend)
        return out, keys.mT, values.mT

    names = ("q", "k", "v", "log_decay", "keys_in", "values_in")
    assert_matches(function, names, ("out", "keys_out", "values_out"), vectors)
