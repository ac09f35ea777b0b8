"""Blocks compiled in steps: the same losses and gradients in all that training can do; one line where it cannot be."""

import dataclasses
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from moving import moved
from test_loop import losses, same, weights
from tiny_run import rows, tiny_model, tiny_recipe, tiny_source

from atma.config import ModelConfig, preset
from atma.mixers.table import names, small
from atma.model import Model
from atma.train import compiled
from atma.train.checks import check_fit
from atma.train.compiled import compile_blocks, compiling, require_compiler
from atma.train.loop import fit
from atma.train.parallel import Ranks
from atma.train.record import read_record
from atma.train.run import Stopped
from atma.train.step import generator
from atma.weights import load_tensors
from tests.harness.processes import group

HERE = Path(__file__).parent
TRACED = "aot_eager_decomp_partition"
NANO = dataclasses.replace(preset("nano-test"), depth=4, pattern=("local", "global"))


@pytest.fixture(autouse=True)
def traced(monkeypatch):
    """Blocks are traced and taken apart as for inductor, both passes, but no code is made, which takes a minute.

    The simpler aot_eager is none to test with: it expects of PyTorch's own softplus_backward another order in memory.
    """
    monkeypatch.setattr(compiled, "BACKEND", TRACED)
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def learned(config: ModelConfig) -> Model:
    """A model that is not at its start, in float64."""
    model = Model(config, generator(1)).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator(2), dtype=torch.float64))
    return model


def gradients(model: Model, step: int) -> list[torch.Tensor]:
    batch = rows(step)
    model.zero_grad(set_to_none=True)
    hidden, _ = model(batch.tokens, segment_ids=batch.segment_ids, noise=step)
    loss = model.loss(hidden, batch.targets).sum()
    loss.backward()
    found = [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in model.parameters()]
    return [loss.detach(), *found]


def assert_as_it_was(model: Model, steps: int = 2) -> None:
    before = [gradients(model, step) for step in range(steps)]
    compile_blocks(model)
    with compiling(len(model.blocks)):
        after = [gradients(model, step) for step in range(steps)]
    torch.testing.assert_close(after, before, rtol=1e-10, atol=1e-10)


def graphs() -> int:
    from torch._dynamo.utils import counters

    return counters["stats"]["unique_graphs"]


@pytest.mark.parametrize("checkpointing", [0, pytest.param(1, marks=pytest.mark.slow), 2])
def test_blocks_of_one_structure_share_what_is_compiled_and_give_the_same_gradients(checkpointing):
    model = learned(NANO)
    model.checkpointing = checkpointing
    before = graphs()
    assert_as_it_was(model, 3)
    assert graphs() - before == len(set(model.config.layers)) == 2


@pytest.mark.slow
@pytest.mark.parametrize("kind", names())
def test_every_mixer_gives_the_same_gradients(kind):
    assert_as_it_was(learned(ModelConfig(32, width=16, depth=2, pattern=(kind,), **small(kind)[0])))


@pytest.mark.slow
def test_code_that_is_made_gives_the_same_gradients(monkeypatch):
    monkeypatch.setattr(compiled, "BACKEND", "inductor")
    assert_as_it_was(learned(NANO))


def test_a_state_and_what_has_no_gradient_run_as_they_are():
    model, before = learned(NANO), graphs()
    names_before = list(model.state_dict())
    compile_blocks(model)
    tokens = rows(0).tokens
    hidden, _ = model(tokens, model.init_state(4, 16))
    with torch.no_grad():
        torch.testing.assert_close(model(tokens)[0], hidden)
    assert graphs() == before and list(model.state_dict()) == names_before


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({}, marks=pytest.mark.slow),
        {"accumulation": 2, "checkpointing": True, "checkpointing_every": 2},
        {"regulariser": "weak"},
    ],
    ids=["plain", "parts", "regulariser"],
)
def test_a_run_has_the_losses_and_validations_of_one_that_is_not_compiled(tmp_path, changes, capfd):
    plain, fast = tmp_path / "plain", tmp_path / "fast"
    fit(tiny_recipe(**changes), plain, tiny_source())
    final = fit(tiny_recipe(compile=True, **changes), fast, tiny_source())
    for kind in ("train", "validation"):
        assert losses(fast, kind) == pytest.approx(losses(plain, kind), rel=1e-4)
    assert weights(final).keys() == weights(plain / "final").keys()
    assert capfd.readouterr().err == ""


def test_bfloat16_is_compiled_too(tmp_path):
    changes = {"precision": "bfloat16", "tokens": 256}
    fit(tiny_recipe(**changes), tmp_path / "plain", tiny_source())
    fit(tiny_recipe(compile=True, **changes), tmp_path / "fast", tiny_source())
    assert losses(tmp_path / "fast") == pytest.approx(losses(tmp_path / "plain"), rel=2e-2)


@pytest.mark.parametrize("still", [True, False])
def test_a_resumed_run_has_the_same_bits_and_tells_another_choice(tmp_path, still):
    recipe, run = tiny_recipe(compile=True), tmp_path / "run"
    with pytest.raises(Stopped):
        fit(recipe, run, tiny_source(), stop=(run / "checkpoints" / "step-00000004").is_dir)
    wanted = dataclasses.replace(recipe, train=dataclasses.replace(recipe.train, compile=still))
    final = fit(wanted, run, tiny_source(), resume=True)
    told = [row["event"] for row in read_record(run) if row["kind"] == "event"]
    if still:
        assert same(weights(final), weights(fit(recipe, tmp_path / "whole", tiny_source())))
    assert any("in compiled blocks, goes on with" in line for line in told) is not still


@pytest.mark.slow
@pytest.mark.parametrize("shard", [1, 2])
def test_two_processes_make_the_steps_of_one(tmp_path, shard):
    group(2, ["moving.py", str(tmp_path), "1", str(shard), "float64", "1", "False", TRACED], HERE)
    found, whole = load_tensors(tmp_path / "0.safetensors"), moved(Ranks(), 1, dtype=torch.float64)
    for name in whole.keys() - {"state"}:
        torch.testing.assert_close(found[name], whole[name], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    ("ranks", "changes", "told"),
    [
        (Ranks(0, 2, 2), {"context_ranks": 2}, r"'compile' true: blocks hand states to other processes"),
        (Ranks(), {"distractor_weight": 0.1}, "'distractor_weight' listens inside blocks, and 'compile'"),
    ],
)
def test_what_cannot_be_compiled_is_told_before_a_run_begins(ranks, changes, told):
    with pytest.raises(ValueError, match=told) as error:
        check_fit(tiny_recipe(compile=True, **changes), tiny_source(), ranks)
    assert "\n" not in str(error.value)


def test_a_block_that_is_another_for_every_batch_ends_the_run_in_one_line():
    model = learned(tiny_model(depth=1))
    block: Any = model.blocks[0]
    plain = block.forward
    block.forward = lambda x, *rest, **named: plain(x + len(block.told), *rest, **named)
    compile_blocks(model)
    with (
        pytest.raises(ValueError, match="'compile' true: a block of this model has been compiled for 10 batches") as e,
        compiling(1),
    ):
        for turn in range(11):
            block.told = "a" * turn
            gradients(model, 0)
    assert "\n" not in str(e.value)


@pytest.mark.slow
def test_a_machine_without_a_compiler_is_told_in_one_line():
    script = "import torch, atma.train.compiled as c; c.require_compiler(torch.device('cpu'))"
    here = os.environ | {"CXX": "no-such-compiler", "TORCHINDUCTOR_FORCE_DISABLE_CACHES": "1"}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=here, check=False)
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("ValueError: 'compile' true: torch.compile makes no code on this machine: ")
    assert last.endswith("install a C++ compiler, such as g++, or leave it out: --set train.compile=false")


@pytest.mark.slow
def test_there_is_code_on_this_machine():
    require_compiler(torch.device("cpu"))
