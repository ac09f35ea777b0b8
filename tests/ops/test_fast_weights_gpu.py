"""The scan of neural memories in Triton against the definition: on a GPU where there is one, else interpreted."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.ops.on_gpu import DEVICE, ON_GPU, error  # isort: skip (before Triton)

from atma import state as states
from atma.ops.fast_weights import at_once, empty, fast_weights, gpu_call, kernel_memory
from tests.ops.memories import LIFTED, MLP, PRESETS, TTT, kernel_text, text

TITANS = PRESETS["titans, held"]
RULES = {
    "matrix, dot": {"bias": "dot"},
    "matrix, l2 to W⁰, wider keys, momentum": {"residual": "skip", "decay_to": "initial", "optimiser": "momentum"},
    "matrix, dot under a layer norm, a window": {"bias": "dot", "norm": True, "window": 3, "optimiser": "momentum"},
    "matrix, huber": {"bias": "huber", "residual": "identity"},
    "matrix, mean of steps": TTT,
    "mlp, dot, silu": {"network": "mlp", "bias": "dot", "activation": "silu"},
    "mlp, mean of steps, drawn back": TTT | {"network": "mlp", "radius": 0.02},
    "mlp, momentum, drawn back": TITANS,
    "mlp, normalised under a layer norm": PRESETS["titans, normalised"] | {"bias": "huber_switch"},
    "mlp, a window, lifted": LIFTED | {"window": 3, "norm": True},
    "mlp, per coordinate": MLP | {"bias": "huber_coordinate", "optimiser": "momentum"},
}
"""What the kernels compute: each option of them at least once."""
FEW = ("matrix, huber", "matrix, mean of steps", "mlp, normalised under a layer norm", "mlp, mean of steps, drawn back")
BIASES = ("dot", "l2", "huber", "huber_coordinate", "huber_switch")


def low(given, gradients=True):
    """A record of tensors in float32, on the device, real ones with a gradient to come."""
    if isinstance(given, torch.Tensor):
        real = given.is_floating_point()
        made = given.detach().to(DEVICE, torch.float32 if real else given.dtype, copy=True)
        return made.requires_grad_(real and gradients)
    if not isinstance(given, tuple):
        return given
    parts = [low(part, gradients) for part in given]
    return type(given)(*parts) if hasattr(given, "_fields") else tuple(parts)


def double(given):
    """Numbers of float32 in float64, on the CPU, with a gradient to come."""
    if isinstance(given, torch.Tensor):
        made = given.detach().cpu()
        return made.double().requires_grad_() if made.is_floating_point() else made
    if not isinstance(given, tuple):
        return given
    parts = [double(part) for part in given]
    return type(given)(*parts) if hasattr(given, "_fields") else tuple(parts)


def leaves(given):
    """Every tensor of records in records that wants a gradient."""
    if isinstance(given, torch.Tensor):
        return [given] if given.requires_grad else []
    return [x for part in given for x in leaves(part)] if isinstance(given, tuple) else []


def started(given, phase):
    """The first row stands at this place of the grid, the second at its beginning."""
    state = empty(given.memory, 2)
    if not phase:
        return state
    ahead = given.part(slice(phase)).run(state)[1]
    return states.stack([states.rows(ahead, [0]), states.rows(state, [1])])


def results(given, state, ids, backend):
    """Reads, the state behind, and the gradient of everything."""
    read, after = fast_weights(*given, state, ids, backend=backend)
    out = [x for x in (read, *states.tensors(after)) if x.is_floating_point()]
    loss = sum((x * torch.arange(x.numel(), device=x.device).view_as(x).double().cos().to(x.dtype)).sum() for x in out)
    gradients = torch.autograd.grad(loss, leaves(given) + leaves(state), materialize_grads=True)
    return [x.detach().cpu() for x in (*out, *gradients)]


def assert_its_steps(given, state=None, ids=None):
    """Within float32 of the steps in float64; where those lose digits, within what PyTorch's scan loses of them."""
    given, state = low(given), None if state is None else low(state)
    exact = results(double(given), None if state is None else double(state), ids, "reference")
    ids = None if ids is None else ids.to(DEVICE)
    ours, theirs = (error(results(given, state, ids, backend), exact) for backend in ("gpu", "cpu"))
    for one, other in zip(ours, theirs, strict=True):
        assert one < 1e-4 + 4 * other


@pytest.fixture
def launches(monkeypatch):
    """The kernels that were launched."""
    made = []

    class Told:
        def __init__(self, name):
            self.name, self.kernel = name, getattr(gpu_call, name)

        def __getitem__(self, grid):
            made.append(self.name)
            return self.kernel[grid]

    for name in ("scan_kernel", "back_kernel"):
        monkeypatch.setattr(gpu_call, name, Told(name))
    return made


def some(names):
    """Of all rules these in every run of the tests, the others in the slow one."""
    return [pytest.param(name, marks=[] if name in names else pytest.mark.slow) for name in RULES]


@pytest.mark.parametrize("name", some(FEW))
def test_a_scan_is_its_steps_with_all_gradients_from_different_places_of_the_grid(name, launches):
    given = text(tokens=6, heads=1, **RULES[name])
    assert_its_steps(given, started(given, 3))
    assert launches == ["scan_kernel", "back_kernel"]


@pytest.mark.parametrize("name", some(["matrix, dot under a layer norm, a window", "mlp, momentum, drawn back"]))
def test_documents_begin_with_nothing_and_parts_go_on_from_one_another(name, launches, monkeypatch):
    for which in ("HELD", "HELD_ON_DEVICE"):
        monkeypatch.setattr(at_once, which, 1)  # every piece a part
    ids = (torch.arange(7) > torch.tensor([[5], [1]])).long()
    assert_its_steps(text(tokens=7, heads=1, **RULES[name]), None, ids)
    assert launches == 3 * ["scan_kernel"] + 3 * ["back_kernel"]


MANY = {"norm": True, "normalised": True, "chunk": 35, "decay_to": "initial", "residual": "skip"}


def test_matrices_of_many_tiles():
    given = text(tokens=37, batch=1, heads=1, wide=33, deep=34, **TITANS | MANY)
    with torch.no_grad():
        state = empty(given.memory, 1)
        found = fast_weights(*low(given, False), low(state, False), backend="gpu")
        wanted = fast_weights(*given, state, backend="reference")
    pairs = [[x for x in states.tensors(one) if x.is_floating_point()] for one in (found, wanted)]
    assert max(error([x.cpu() for x in pairs[0]], pairs[1])) < 5e-5


@pytest.mark.slow
@pytest.mark.parametrize("options", [TITANS | MANY, TTT | {"chunk": 35}, RULES["mlp, per coordinate"] | {"chunk": 35}])
def test_gradients_of_many_tiles(options):
    assert_its_steps(text(tokens=39, batch=1, heads=2, wide=33, deep=66, **options))


def test_a_low_precision_is_widened_and_a_state_of_the_caller_keeps_its_numbers():
    given = low(text(tokens=6, heads=1, **TITANS), False)
    short = given._replace(**{name: getattr(given, name).bfloat16() for name in "qkv"})
    state = empty(given.memory, 2)
    before = states.transform(state, lambda _, x: x.clone())
    with torch.no_grad():
        read, after = fast_weights(*short, state, backend="gpu")
        wanted, _ = fast_weights(*short, before, backend="reference")
    assert read.dtype == torch.bfloat16
    assert {x.dtype for x in (*after.weights, *after.anchor, *after.momentum)} == {torch.float32}
    torch.testing.assert_close(read, wanted, rtol=1e-2, atol=1e-3)
    assert all(map(torch.equal, states.tensors(state), states.tensors(before)))


def test_the_same_call_gives_the_same_bits_with_and_without_gradients():
    given = text(tokens=6, heads=1, **TITANS)
    with_gradients, _ = fast_weights(*low(given), backend="gpu")
    with torch.no_grad():
        without, _ = fast_weights(*low(given, False), backend="gpu")
    assert torch.equal(with_gradients.detach(), without)


@pytest.mark.parametrize("name", ["atma_memory", "atlas", "yaad", "memora", "moneta", "lact", "gated, normalised"])
def test_what_the_kernel_does_not_take_is_the_chunks_own(name, launches):
    given = low(text(tokens=6, heads=1, **PRESETS[name]), False)
    with torch.no_grad():
        found, wanted = (fast_weights(*given, backend=backend) for backend in ("gpu", "cpu"))
    assert all(map(torch.equal, states.tensors(found), states.tensors(wanted)))
    assert not launches


def test_float64_and_memories_of_all_keys_are_those_of_pytorch(launches):
    given = text(tokens=6, heads=1, **TITANS)
    kernel = kernel_text("dot_window", tokens=6)
    for function, arguments in ((fast_weights, given), (kernel_memory, kernel)):
        if not ON_GPU:  # on a GPU float64 is refused by name
            found, wanted = (function(*arguments, backend=backend) for backend in ("gpu", "cpu"))
            assert all(map(torch.equal, states.tensors(found), states.tensors(wanted)))
    assert not launches


def test_a_number_that_is_none_reaches_neither_back_nor_another_row():
    given = low(text(tokens=10, heads=1, **TITANS), False)
    spoilt = given._replace(v=given.v.clone())
    spoilt.v[0, :, 6] = torch.nan
    with torch.no_grad():
        (whole, _), (read, _) = (fast_weights(*each, backend="gpu") for each in (given, spoilt))
    torch.testing.assert_close(read[0, :, :6], whole[0, :, :6], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(read[1], whole[1], rtol=1e-4, atol=1e-5)
    assert not read[0, :, 6:].isfinite().any()


def test_one_token_and_what_is_steady_are_as_elsewhere(launches):
    given = low(text(tokens=1, heads=1, **TITANS), False)
    with torch.no_grad():
        found, wanted = (fast_weights(*given, backend=backend) for backend in ("gpu", "reference"))
        assert all(map(torch.equal, states.tensors(found), states.tensors(wanted)))
        with pytest.raises(ValueError, match="steady is for the native backend"):
            fast_weights(*given, backend="gpu", steady=True)
    assert not launches


def test_a_compiler_gets_one_graph_without_the_kernel(launches):
    given = low(text(tokens=6, heads=1, **PRESETS["swla"]), False)
    compiled = torch.compile(fast_weights, backend="eager", fullgraph=True)
    found, wanted = compiled(*given, backend="gpu"), fast_weights(*given, backend="cpu")
    for one, other in zip(states.tensors(found), states.tensors(wanted), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
    assert not launches


@pytest.mark.slow
def test_a_delta_for_each_value():
    given = text(tokens=6, heads=1, **RULES["mlp, per coordinate"])
    delta = given.gates.delta[..., None] * torch.tensor([0.1, 0.3, 1.0, 3.0])
    assert_its_steps(given._replace(gates=given.gates._replace(delta=delta)))


@pytest.mark.slow
@pytest.mark.parametrize("decay_to", ["zero", "initial"])
@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize(("bias", "window"), [*((bias, 1) for bias in BIASES), ("dot", 3), ("l2", 3)])
@pytest.mark.parametrize("optimiser", ["gd", "momentum"])
@pytest.mark.parametrize("network", ["matrix", "mlp"])
def test_every_rule_is_its_steps(network, optimiser, bias, window, norm, decay_to):
    phase = (BIASES.index(bias) + window // 3 + norm + 2 * (decay_to == "initial")) % 4
    options = {"optimiser": optimiser, "bias": bias, "norm": norm, "decay_to": decay_to, "window": window}
    options |= {"residual": ("none", "identity", "skip", "identity")[phase]}
    options |= {"radius": 0.5, "normalised": phase % 2 == 1} if network == "mlp" else {}
    given = text(tokens=7, heads=1, network=network, **options)
    assert_its_steps(given, started(given, phase))
    assert_its_steps(given, None, (torch.arange(7) > torch.tensor([[5], [phase]])).long())


@pytest.mark.slow
@pytest.mark.skipif(ON_GPU, reason="it is compiled by running it")
def test_it_is_compiled_ahead_for_an_h100():
    script = Path(__file__).parents[2] / "benchmarks" / "gpu_compile.py"
    command = [sys.executable, str(script), "--arch", "90", "--only", "memory"]
    environment = {"PATH": "/usr/bin:/bin", "PYTHONPATH": str(script.parents[1] / "src"), "HOME": str(Path.home())}
    told = subprocess.run(command, capture_output=True, text=True, env=environment, check=True).stdout
    assert told.count("scan_kernel") >= 4 and told.count("back_kernel") >= 4
