"""Neural memories do what mixers.md, section 4 says: golden vectors, its identities, and any cut of a text."""

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from atma.ops.fast_weights import (
    Gates,
    Kernel,
    Memory,
    MemoryState,
    Rule,
    fast_weights,
    kernel_memory,
    newton_schulz,
)

LOOSE = ("memory_yaad_switch", "memory_moneta", "newton_schulz")
MEMORIES = (
    "allmem atlas atlas_gated dla hidden_to_initial lact lact_muon matrix_c1 matrix_hidden matrix_momentum memora"
)
MEMORIES += " mlp_hidden moneta omega_to_initial omega_wide omeganet swla titans titans_lifted titans_to_initial"
MEMORIES += " ttt_linear ttt_mlp yaad yaad_channel yaad_switch"
PARTS = ("anchor", "weights", "momentum", "pending")


def assert_matches(folder, name, function):
    """Every output of `function`, of named inputs, and the gradient of every input."""
    vectors = load_file(folder / f"{name}.safetensors")
    with safe_open(folder / f"{name}.safetensors", "pt") as file:
        about = json.loads(file.metadata()["about"])
    inputs = {one: vectors[one].clone() for one in about["inputs"]}
    floating = {one: x.requires_grad_() for one, x in inputs.items() if x.is_floating_point()}
    found = function(inputs, about["config"])
    assert set(found) == set(about["outputs"])
    loss = sum((found[one] * vectors[f"out_grad.{one}"]).sum() for one in found if found[one].is_floating_point())
    gradients = torch.autograd.grad(loss, list(floating.values()), materialize_grads=True)
    found |= {f"grad.{one}": gradient for one, gradient in zip(floating, gradients, strict=True)}
    for one, value in found.items():
        error = (value - vectors[one]).abs().max() / vectors[one].abs().max().clamp(min=1e-300)
        assert error < (1e-8 if name in LOOSE else 1e-9), f"{one}: relative error {error:.1e}"


def parts(inputs, prefix):
    """The matrices prefix.0, prefix.1, …, or None."""
    return tuple(inputs[f"{prefix}.{i}"] for i in range(3) if f"{prefix}.{i}" in inputs) or None


def rule_of(inputs, config):
    """The rule of a file's config, whose gates have the axes that its inputs show."""
    told = {one: config[one] for one in config if one not in ("net", "residual")}
    residual = "none" if not config["residual"] else "skip" if "skip" in inputs else "identity"
    gates = "head" if inputs["step"].ndim == 3 else "channel" if inputs["step"].shape[-1] == 4 else "matrix"
    return Rule(network=config["net"], residual=residual, gates=gates, **told)


def golden_memory(inputs, config):
    gates = Gates(*(inputs.get(one) for one in Gates._fields))
    slow = (inputs.get(one) for one in ("gain", "shift", "skip"))
    memory = Memory(rule_of(inputs, config), parts(inputs, "initial"), *slow)
    one = {name: f"state_in.{name}" for name in MemoryState._fields}
    held = {name: parts(inputs, at) if name in PARTS else inputs.get(at) for name, at in one.items()}
    out, state = fast_weights(inputs["q"], inputs["k"], inputs["v"], gates, memory, MemoryState(**held))
    found = {"out": out}
    for name, value in state._asdict().items():
        several = enumerate(value) if isinstance(value, tuple) else []
        found |= {f"state_out.{name}.{i}": x for i, x in several}
        found |= {} if value is None or several else {f"state_out.{name}": value}
    return found


def golden_kernel(inputs, config):
    memory = Kernel(inputs["sharpness"], config["rule"], config["window"], config["normalise"])
    out, state = kernel_memory(*(inputs[one] for one in ("q", "k", "v", "omega")), memory)
    return {"out": out, "written": state.written}


@pytest.mark.parametrize("name", MEMORIES.split())
def test_memories_match_the_golden_vectors(golden_mixers, name):
    assert_matches(golden_mixers, f"memory_{name}", golden_memory)


@pytest.mark.parametrize("name", ["deep_transformer", "swdt", "dot", "dot_window"])
def test_kernel_memories_match_the_golden_vectors(golden_mixers, name):
    assert_matches(golden_mixers, f"kernel_{name}", golden_kernel)


def test_newton_schulz_matches_the_golden_vectors(golden_mixers):
    def function(inputs, _):
        return {f"out.{s}.{one}": newton_schulz(x, s) for one, x in inputs.items() for s in ("muon", "lact")}

    assert_matches(golden_mixers, "newton_schulz", function)
