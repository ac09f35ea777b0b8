"""Neural memories reproduce the golden vectors of mixers.md, section 4, and refuse what that section does not offer."""

import json
import math

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from atma.ops import use_backend
from atma.ops.fast_weights import (
    Gates,
    Kernel,
    Memory,
    MemoryState,
    Rule,
    empty,
    empty_kernel,
    fast_weights,
    kernel_memory,
    newton_schulz,
)
from atma.ops.fast_weights.kernel import unfolded
from tests.ops.memories import BACKENDS, assert_same, kernel_text, text

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
    by_channel = "keep" in inputs and inputs["keep"].ndim == 4
    gates = "channel" if by_channel else "head" if inputs["step"].ndim == 3 else "matrix"
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
    return {"out": out, "written": unfolded(state).written}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", MEMORIES.split())
def test_memories_match_the_golden_vectors(golden_mixers, name, backend):
    with use_backend(backend):
        assert_matches(golden_mixers, f"memory_{name}", golden_memory)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["deep_transformer", "swdt", "dot", "dot_window"])
def test_kernel_memories_match_the_golden_vectors(golden_mixers, name, backend):
    with use_backend(backend):
        assert_matches(golden_mixers, f"kernel_{name}", golden_kernel)


def test_newton_schulz_matches_the_golden_vectors(golden_mixers):
    def function(inputs, _):
        return {f"out.{s}.{one}": newton_schulz(x, s) for one, x in inputs.items() for s in ("muon", "lact")}

    assert_matches(golden_mixers, "newton_schulz", function)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"network": "deep"}, "'network' must be one of matrix, mlp, gated, not 'deep'"),
        ({"chunk": 0}, "'chunk' must be at least 1, not 0"),
        ({"window": 0}, "'window' must be at least 1, not 0"),
        ({"q": math.inf}, "'q' must be at least 1 and finite, not inf"),
        ({"bias": "lp", "p": 0.5}, "'p' must be at least 1 and finite, not 0.5"),
        (
            {"bias": "huber", "window": 2},
            "'window' must be 1 for bias = 'huber', whose δ is the current token's, not 2",
        ),
        ({"bias": "huber_coordinate", "window": 4}, "'window' must be 1"),
        ({"bias": "huber_switch", "window": 4}, "'window' must be 1"),
        ({"retention": "kl", "gates": "channel"}, '\'gates\' must be "head" for retention = "kl"'),
        ({"retention": "kl", "anchor": "hidden"}, "'anchor' must be \"all\" for retention = 'kl', not 'hidden'"),
        ({"retention": "lq", "anchor": "hidden"}, "'anchor' must be \"all\" for retention = 'lq', not 'hidden'"),
        ({"average": True, "anchor": "hidden"}, "'anchor' must be \"all\" where average = true, not 'hidden'"),
        ({"average": True, "optimiser": "muon"}, "'optimiser' must be \"gd\" where average = true, not 'muon'"),
        ({"average": True, "retention": "kl"}, "'retention' must be \"l2\" where average = true, not 'kl'"),
        ({"retention": "renorm"}, "'granularity' must be \"chunk\" for retention = 'renorm', not 'token'"),
        ({"retention": "renorm_after_read"}, "'granularity' must be \"chunk\""),
        ({"gates": "matrix"}, '\'gates\' must be "head" or "channel" without granularity = "chunk"'),
        ({"granularity": "chunk", "retention": "lq"}, "'retention' must be \"l2\", \"renorm\" or .*, not 'lq'"),
        ({"granularity": "chunk", "retention": "kl"}, "'retention' must be \"l2\", \"renorm\" or .*, not 'kl'"),
        ({"granularity": "chunk", "average": True}, "'average' must be false for granularity = \"chunk\""),
        ({"granularity": "chunk", "anchor": "hidden"}, '\'anchor\' must be "all" for granularity = "chunk"'),
    ],
)
def test_what_goes_not_together_is_refused_by_name(options, message):
    with pytest.raises(ValueError, match=message):
        Rule(**options)


def gates(**changes):
    return lambda given: given._replace(gates=given.gates._replace(**changes))


def slow(**changes):
    return lambda given: given._replace(memory=given.memory._replace(**changes))


ONE, FOUR = torch.ones(2, 2, 5), torch.ones(2, 2, 5, 4)
HUBER = {"network": "mlp", "bias": "huber"}
REFUSED = [
    ({}, lambda x: x._replace(q=x.q[0]), r"q \(2, 5, 4\), .* must be \(B, H, T, K\)"),
    ({}, lambda x: x._replace(q=x.q.long()), "q must be a Tensor of float32"),
    ({}, lambda x: x._replace(v=x.v[:, :, :4]), "do not fit together"),
    ({}, lambda x: x._replace(k=x.k[..., :3]), "do not fit together"),
    ({}, lambda x: x._replace(k=x.k.repeat(1, 2, 1, 1)), "do not fit together"),
    ({}, lambda x: x._replace(v=x.v[..., :0]), "none of them 0"),
    ({}, gates(step=FOUR), r"step must be \(2, 2, 5\), for head gates, not \(2, 2, 5, 4\)"),
    ({"gates": "channel"}, gates(step=ONE), r"step must be \(2, 2, 5, 4\), for channel gates, not \(2, 2, 5\)"),
    ({}, gates(step=None), r"step must be \(2, 2, 5\), for head gates, not None"),
    ({}, gates(keep=FOUR), r"keep must be \(2, 2, 5\)"),
    ({}, gates(keep=1.5 * ONE), "keep must be from 0 to 1, found 1.5"),
    ({}, gates(keep=ONE - 2), "keep must be from 0 to 1, found -1"),
    ({"network": "mlp", "average": True}, gates(keep=ONE), "keep must be None, .* None with average"),
    ({}, gates(momentum=ONE), "momentum must be None, for optimiser = 'gd'"),
    ({"optimiser": "muon"}, gates(momentum=None), r"momentum must be \(2, 2, 5\), for optimiser = 'muon'"),
    ({}, gates(delta=ONE), "delta must be None, for bias = 'l2'"),
    (HUBER, gates(delta=FOUR), r"delta must be \(2, 2, 5\), for bias = 'huber', not \(2, 2, 5, 4\)"),
    (HUBER, gates(delta=None), r"delta must be \(2, 2, 5\)"),
    ({}, gates(omega=ONE[..., None]), "omega must be None, for window = 1"),
    ({"window": 3}, gates(omega=FOUR), r"omega must be \(2, 2, 5, 3\), for window = 3"),
    ({"network": "mlp"}, slow(initial=(ONE,)), "initial must be 2 matrices for network = 'mlp', not 1"),
    ({}, slow(initial=(ONE[:, :, :4],)), r"initial\[0\] must be \(2, 4, 4\), .* not \(2, 2, 4\)"),
    ({"norm": True}, slow(gain=None), r"gain must be \(2, 4\), given where norm = true, else None, not None"),
    ({}, slow(shift=ONE[0, :, :4]), "shift must be None, given where norm = true"),
    ({"residual": "skip"}, slow(skip=None), r"skip must be \(2, 4, 6\), given for residual = \"skip\""),
    (
        {"residual": "skip"},
        slow(rule=Rule(residual="identity"), skip=None),
        "'identity' needs keys as wide as values, not 6",
    ),
    ({"residual": "skip", "gates": "channel"}, lambda x: x, "gates = 'channel' needs keys as wide as values, not 6"),
    ({"retention": "lq"}, slow(initial=(torch.zeros(2, 4, 4),)), "must have no head of zeros for retention = 'lq'"),
    (
        {"retention": "renorm", "granularity": "chunk"},
        slow(initial=(torch.eye(4)[:3].repeat(2, 2, 1)[:, :4] * torch.tensor([1, 1, 1, 0.0])[:, None],)),
        "must have no row of zeros",
    ),
]


@pytest.mark.parametrize(("options", "spoil", "message"), REFUSED)
def test_what_does_not_fit_is_refused_with_its_shape(options, spoil, message):
    with pytest.raises(ValueError, match=message):
        spoil(text(tokens=5, **options)).run()


def test_states_of_another_memory_and_of_packed_documents_are_refused():
    given = text(tokens=5, window=3)
    state = empty(given.memory, 2)
    with pytest.raises(ValueError, match=r"state.k_tail must be \[\(2, 2, 2, 4\)\] for this rule, not None"):
        given.run(state._replace(k_tail=None))
    with pytest.raises(ValueError, match=r"state.momentum must be None for this rule, not \[\(2, 2, 4, 4\)\]"):
        given.run(state._replace(momentum=state.weights))
    with pytest.raises(ValueError, match=r"state.length must be \[\(2,\)\] for this rule, not \[\(1,\)\]"):
        given.run(state._replace(length=state.length[:1]))
    with pytest.raises(ValueError, match=r"state\.length must be integers"):
        given.run(state._replace(length=state.length.double()))
    with pytest.raises(ValueError, match="a call with a state continues one document"):
        given.run(state, torch.zeros(2, 5, dtype=torch.long))
    with pytest.raises(ValueError, match=r"segment_ids must be \(2, 5\), not \(2, 4\)"):
        given.run(None, torch.zeros(2, 4, dtype=torch.long))


def test_kernel_memories_refuse_what_does_not_fit():
    given = kernel_text("swdt", tokens=5)
    cases = [
        (given._replace(omega=given.omega[..., :2]), r"omega must be \(2, 2, 5, 3\), one for each token of the window"),
        (given._replace(memory=given.memory._replace(rule="sum")), "rule must be 'add' or 'delta', not 'sum'"),
        (given._replace(memory=given.memory._replace(window=0)), "window must be at least 1, not 0"),
        (given._replace(memory=given.memory._replace(sharpness=torch.ones(3))), r"sharpness must be \(2,\)"),
    ]
    for spoiled, message in cases:
        with pytest.raises(ValueError, match=message):
            spoiled.run()
    state = empty_kernel(given.memory, 2, 4, (4, 5))
    with pytest.raises(ValueError, match="5 tokens behind 0 do not fit a state with room for 4; grow it first"):
        given.run(state)
    with pytest.raises(ValueError, match=r"state.v_tail must be \(2, 2, 2, 5\), as the memory has it, not None"):
        given.run(state._replace(v_tail=None))


def test_auto_takes_the_kernels_and_no_other_backend_is_taken_for_one_that_is_not_there():
    given = text(tokens=5)
    assert_same(given.run(), fast_weights(*given, backend="native"), 0)
    with pytest.raises(ValueError, match="fast_weights has no backend 'fla'; it has reference, cpu, native, gpu"):
        fast_weights(*given, backend="fla")
    with use_backend("reference"):
        assert_same(given.run(), fast_weights(*given, backend="reference"), 0)


def test_newton_schulz_has_two_schedules():
    with pytest.raises(ValueError, match="schedule must be one of muon, lact, not 'adam'"):
        newton_schulz(torch.ones(2, 2), "adam")
