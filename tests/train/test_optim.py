import pytest
import torch
from tiny_run import tiny_model
from torch import nn
from torch.optim._muon import _zeropower_via_newtonschulz

from atma.config import TrainConfig
from atma.lora import LoraConfig, attach
from atma.model import Model
from atma.train import optim
from atma.train.optim import Muon, Optimisers, orthogonalise, parameter_groups

SHAPES = [(1, 7), (2, 64), (64, 2), (33, 33), (16, 48), (48, 16)]
SETTINGS = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.05}
# Five rounds amplify a rounding error by at most 3.4445⁵ ≈ 485.
AMPLIFIED = 485 * 100 * torch.finfo(torch.float64).eps


class Headed(nn.Module):
    """Of a mixer: a matrix for each of its heads, one that is to be no matrix, and taps of a convolution."""

    vectors = ("bank", "gate.weight")

    def __init__(self):
        super().__init__()
        self.fast = nn.Parameter(torch.ones(3, 6, 4))
        self.bank = nn.Parameter(torch.ones(2, 4, 4))
        self.taps = nn.Parameter(torch.ones(8, 3))
        self.gate, self.out = nn.Linear(8, 2), nn.Linear(8, 8)


def headed_model():
    model = Model(tiny_model())
    model.blocks[0].mixer.added = Headed()
    return model


def move(parameters, steps=3):
    """Muon's steps on parameters, by gradients that depend on where they start."""
    mover, starts = Muon([{"params": parameters}], **SETTINGS), [parameter.detach().clone() for parameter in parameters]
    for step in range(1, steps + 1):
        for parameter, start in zip(parameters, starts, strict=True):
            parameter.grad = (step * start).sin()
        mover.step()
    return mover


@pytest.fixture
def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def test_every_parameter_is_in_one_group_and_matrices_are_the_linear_weights_of_blocks():
    model = Model(tiny_model())
    groups = parameter_groups(model)
    names = [name for group in groups.values() for name in group]
    assert sorted(names) == sorted(name for name, _ in model.named_parameters())
    assert set(groups["embedding"]) == {"embed.weight"}
    assert set(groups["head"]) == {"head.weight", "head.bias"}
    assert all(name.startswith("blocks.") and p.ndim == 2 for name, p in groups["matrix"].items())
    small = {name.rpartition(".")[2] for name in groups["vector"]}
    assert {"bias", "taps", "canon_q", "null_value", "length_gain"} <= small
    assert not any(name.endswith("proj.weight") for name in groups["vector"])


def test_a_tied_head_is_moved_once_as_an_embedding():
    groups = parameter_groups(Model(tiny_model(tied_head=True)))
    assert set(groups["embedding"]) == {"embed.weight"} and set(groups["head"]) == {"head.bias"}


def test_parameters_of_heads_are_matrices_unless_their_module_says_otherwise():
    groups = parameter_groups(headed_model())
    added = {kind: {name for name in group if ".added." in name} for kind, group in groups.items()}
    prefix = "blocks.0.mixer.added."
    assert added["matrix"] == {prefix + name for name in ("fast", "out.weight")}
    assert added["vector"] == {prefix + name for name in ("bank", "taps", "gate.weight", "gate.bias", "out.bias")}


@pytest.mark.parametrize("shape", SHAPES)
def test_orthogonalising_equals_the_plain_newton_schulz_rounds(shape, seeded):
    matrix = torch.randn(shape, generator=seeded, dtype=torch.float64)
    wide = matrix if shape[0] <= shape[1] else matrix.mT
    x = wide / wide.norm()
    for _ in range(5):
        gram = x @ x.mT
        x = 3.4445 * x - 4.7750 * gram @ x + 2.0315 * gram @ gram @ x
    expected = x if shape[0] <= shape[1] else x.mT
    torch.testing.assert_close(orthogonalise(matrix), expected, rtol=0, atol=AMPLIFIED)


def test_orthogonalising_a_zero_matrix_gives_zero():
    assert torch.equal(orthogonalise(torch.zeros(4, 8)), torch.zeros(4, 8))


@pytest.mark.parametrize("shape", SHAPES)
def test_a_low_rank_gradient_stays_accurate_in_float32(shape, seeded):
    exact = torch.randn(shape[0], 2, generator=seeded) @ torch.randn(2, shape[1], generator=seeded)
    exact += 1e-3 * torch.randn(shape, generator=seeded)
    wanted = orthogonalise(exact.double())
    # The Gram matrix holds singular values down to 1e-3 as 1e-6, against a rounding of 6e-8, and grows 12-fold a round.
    assert (orthogonalise(exact) - wanted).norm() / wanted.norm() < 1e-2


@pytest.mark.parametrize("shape", SHAPES)
def test_muon_moves_as_torchs_muon_does_to_the_precision_of_bfloat16(shape, seeded):
    start = torch.randn(shape, generator=seeded)
    ours, theirs = (torch.nn.Parameter(start.clone()) for _ in range(2))
    movers = Muon([{"params": [ours]}], **SETTINGS), torch.optim.Muon([theirs], **SETTINGS)
    for _ in range(3):
        gradient = torch.randn(shape, generator=seeded)
        for parameter, mover in zip((ours, theirs), movers, strict=True):
            parameter.grad = gradient.clone()
            mover.step()
    moved = (theirs - start).norm()
    # Half a bfloat16 step is 2⁻⁹, met in each of 15 products.
    assert (ours - theirs).norm() / moved < 15 * 2**-9
    assert torch.equal(movers[0].state[ours]["momentum_buffer"], movers[1].state[theirs]["momentum_buffer"])


@pytest.mark.parametrize("shape", [(3, *shape) for shape in SHAPES] + [(1, 5, 5), (40, 2, 3)])
def test_the_matrices_of_heads_are_orthogonalised_each_on_its_own(shape, seeded):
    heads = torch.randn(shape, generator=seeded, dtype=torch.float64) * torch.arange(1, shape[0] + 1)[:, None, None]
    alone = torch.stack([orthogonalise(matrix) for matrix in heads])
    torch.testing.assert_close(orthogonalise(heads), alone, rtol=0, atol=AMPLIFIED)


def test_muon_moves_the_matrix_of_each_head_as_it_moves_that_matrix_alone(seeded):
    start = torch.randn(3, 12, 5, generator=seeded, dtype=torch.float64)
    heads, each = nn.Parameter(start.clone()), [nn.Parameter(matrix.clone()) for matrix in start]
    buffer = move([heads]).state[heads]["momentum_buffer"]
    mover = move(each)
    # Three steps by 0.1 · √(12/5) of an update are less than one.
    torch.testing.assert_close(heads.detach(), torch.stack([*map(torch.Tensor.detach, each)]), rtol=0, atol=AMPLIFIED)
    assert (heads - start).norm(dim=(1, 2)).min() > 0.1
    buffers = torch.stack([mover.state[matrix]["momentum_buffer"] for matrix in each])
    torch.testing.assert_close(buffer, buffers, rtol=0, atol=AMPLIFIED)


def test_matrices_move_to_the_bit_the_same_with_heads_beside_them_and_without(seeded):
    starts = [torch.randn(shape, generator=seeded) for shape in SHAPES]
    alone, beside = ([nn.Parameter(start.clone()) for start in starts] for _ in range(2))
    move(alone)
    move([*beside, nn.Parameter(torch.randn(3, 16, 48, generator=seeded))])
    assert all(torch.equal(one, other) for one, other in zip(alone, beside, strict=True))


def test_where_large_matrices_take_torchs_step_those_of_heads_take_ours(seeded, monkeypatch):
    monkeypatch.setattr(optim, "_is_large", lambda parameter: parameter.ndim == 2)
    starts = [torch.randn(shape, generator=seeded) for shape in ((16, 48), (3, 16, 48))]
    plain, heads, theirs, alone = (nn.Parameter(start.clone()) for start in (*starts, *starts))
    mover, reference = Muon([{"params": [plain, heads]}], **SETTINGS), torch.optim.Muon([theirs], **SETTINGS)
    for parameter in (plain, heads, theirs):
        parameter.grad = parameter.detach().sin()
    mover.step()
    reference.step()
    move([alone], steps=1)
    assert torch.equal(plain, theirs) and torch.equal(heads, alone)
    assert [len(group["params"]) for group in mover.param_groups] == [1, 1]


def test_a_step_returns_what_its_closure_does_and_moves_by_the_gradients_it_left():
    weight = nn.Parameter(torch.ones(2, 3))

    def closure():
        loss = weight.square().sum()
        loss.backward()
        return loss

    assert Muon([{"params": [weight]}], **SETTINGS).step(closure).item() == 6
    assert not torch.equal(weight, torch.ones(2, 3))


def test_the_reference_the_docstring_compares_with_is_far_off_on_a_low_rank_gradient(seeded):
    matrix = torch.randn(128, 4, generator=seeded) @ torch.randn(4, 512, generator=seeded)
    matrix += 1e-3 * torch.randn(128, 512, generator=seeded)
    exact = orthogonalise(matrix.double())
    rough = _zeropower_via_newtonschulz(matrix, (3.4445, -4.7750, 2.0315), 5, 1e-7)
    assert (rough - exact).norm() / exact.norm() > 0.1 > (orthogonalise(matrix) - exact).norm() / exact.norm()


def test_each_kind_of_parameter_moves_at_its_own_rate_times_the_multiplier():
    model = Model(tiny_model())
    rates = {"muon_rate": 0.4, "embedding_rate": 0.3, "head_rate": 0.2, "vector_rate": 0.1, "weight_decay": 0.0}
    optimisers = Optimisers(model, TrainConfig(**rates))
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimisers.step(0.5)
    moved = {name: (before[name] - parameter).abs().max().item() for name, parameter in model.named_parameters()}
    # AdamW's first step is its rate whatever the gradient; float32 rounds the difference of numbers near 2.
    expected = {"embed.weight": 0.15, "head.bias": 0.1, "blocks.0.mixer.taps": 0.05, "norm.weight": 0.05}
    assert {name: moved[name] for name in expected} == pytest.approx(expected, abs=1e-6)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_optimiser_state_survives_a_round_trip_through_tensors():
    model = headed_model()
    optimisers = Optimisers(model, TrainConfig())
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimisers.step(1.0)
    saved = {name: value.clone() for name, value in optimisers.tensors().items()}
    assert "muon/blocks.0.mixer.in_proj.weight/momentum_buffer" in saved and "adamw/embed.weight/exp_avg" in saved
    assert saved["muon/blocks.0.mixer.added.fast/momentum_buffer"].shape == (3, 6, 4)
    fresh = Optimisers(model, TrainConfig())
    fresh.load_tensors(saved, "there")
    assert saved.keys() == fresh.tensors().keys()
    assert all(torch.equal(value, fresh.tensors()[name]) for name, value in saved.items())


def test_state_of_another_model_is_refused_by_name():
    optimisers = Optimisers(Model(tiny_model()), TrainConfig())
    with pytest.raises(ValueError, match=r"there: unexpected tensor 'adamw/nowhere/exp_avg': state of another model"):
        optimisers.load_tensors({"adamw/nowhere/exp_avg": torch.zeros(1)}, "there")
    with pytest.raises(ValueError, match=r"unexpected tensor 'adamw/blocks.0.mixer.in_proj.weight/exp_avg'"):
        optimisers.load_tensors({"adamw/blocks.0.mixer.in_proj.weight/exp_avg": torch.zeros(1)}, "there")
    with pytest.raises(ValueError, match=r"tensor 'adamw/embed.weight/exp_avg' is \(3,\), the model has \(32, 24\)"):
        optimisers.load_tensors({"adamw/embed.weight/exp_avg": torch.zeros(3)}, "there")


def test_adamw_for_everything_is_one_rate_with_decay_on_matrices_alone():
    model = Model(tiny_model())
    optimisers = Optimisers(model, TrainConfig(optimiser="adamw", adamw_rate=0.5, weight_decay=0.1))
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimisers.step(0.1)
    assert {key.split("/")[0] for key in optimisers.tensors()} == {"adamw"}
    assert {key.split("/")[1] for key in optimisers.tensors()} == {name for name, _ in model.named_parameters()}
    groups = optimisers._both["adamw"].param_groups
    assert {group["lr"] for group in groups} == {0.05}
    assert {group["kind"]: group["weight_decay"] for group in groups} == {
        "embedding": 0.0,
        "head": 0.0,
        "vector": 0.0,
        "matrix": 0.1,
    }


def test_adapters_go_to_adamw_at_their_rate_and_new_parts_beside_them_to_muon():
    model = Model(tiny_model())
    attach(model, LoraConfig(rank=2, train=("memory",)))
    groups = parameter_groups(model)
    assert groups["adapter"] and all(name.endswith(("lora_a", "lora_b")) for name in groups["adapter"])
    assert groups["matrix"] and all(".memory." in name for name in groups["matrix"])
    assert not groups["embedding"] and not groups["head"]
    optimisers = Optimisers(model, TrainConfig(lora_rate=0.5))
    assert set(optimisers._both) == {"muon", "adamw"} and optimisers.rates["adapter"] == 0.5


def test_a_model_of_which_nothing_is_trained_is_refused():
    model = Model(tiny_model())
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    with pytest.raises(ValueError, match="every parameter is frozen"):
        Optimisers(model, TrainConfig())
