"""Weights and optimiser state in the processor's memory. Here that is where everything is: the way is the same."""

import itertools
import json
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from tiny_run import tiny_model, tiny_recipe, tiny_source

from atma.checkpoint import save_model
from atma.lora_config import LoraConfig
from atma.model import Model
from atma.train import optim, parallel
from atma.train.loop import Stopped, fit
from atma.train.optim import Muon, Optimisers
from atma.train.parallel import Ranks, any_of, join, sum_over, where
from atma.train.shards import shard
from atma.train.start import resolved
from atma.weights import load_weights

CPU = torch.device("cpu")


@pytest.fixture
def alone():
    """One process, which makes a group of its own to move weights by."""
    yield join(CPU, offload=True)
    dist.destroy_process_group()


def same(one, other) -> bool:
    first, second = load_weights(one), load_weights(other)
    return first.keys() == second.keys() and all(torch.equal(value, second[name]) for name, value in first.items())


def test_a_run_can_change_between_both_and_ends_with_the_same_bits(alone, tmp_path):
    whole = fit(tiny_recipe(), tmp_path / "whole", tiny_source())
    assert alone == Ranks(offload=True) and alone.in_parts
    assert same(fit(tiny_recipe(offload=True), tmp_path / "all", tiny_source(), ranks=alone), whole)
    changed, done = tmp_path / "changed", iter([False] * 5 + [True])
    with pytest.raises(Stopped):
        fit(tiny_recipe(offload=True), changed, tiny_source(), ranks=alone, stop=lambda: next(done))
    done = iter([False] * 3 + [True])
    with pytest.raises(Stopped):
        fit(tiny_recipe(), changed, tiny_source(), resume=True, stop=lambda: next(done))
    assert same(fit(tiny_recipe(offload=True), changed, tiny_source(), resume=True, ranks=alone), whole)


def test_adapters_go_on_from_a_validation_to_the_same_bits(alone, tmp_path):
    """The first thing that reads the weights is then no step, and the adapters have learned something by then."""
    model = Model(tiny_model(), torch.Generator().manual_seed(5))
    torch.nn.init.normal_(model.head.weight, std=0.1, generator=torch.Generator().manual_seed(6))
    save_model(tmp_path / "base", model, None)

    def recipe(**changes):
        start = tiny_recipe(init_from=str(tmp_path / "base"), lora_rate=0.01, keep_best=True, **changes)
        return resolved(replace(start, lora=LoraConfig(rank=2, targets=("blocks.*.mixer.*",))))

    whole = fit(recipe(), tmp_path / "whole", tiny_source())
    rows = [json.loads(line) for line in (tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()]
    assert rows[0]["kind"] == "validation" or any(row["kind"] == "validation" for row in rows)
    parted, asked = tmp_path / "parted", itertools.count()
    with pytest.raises(Stopped):
        fit(recipe(offload=True), parted, tiny_source(), ranks=alone, stop=lambda: next(asked) >= 4)
    assert same(fit(recipe(offload=True), parted, tiny_source(), resume=True, ranks=alone), whole)


def test_one_process_holds_its_weights_once(alone):
    model = Model(tiny_model())
    optimisers = Optimisers(model, tiny_recipe().train, alone)
    shard(model, optimisers, alone, CPU, 60, torch.float32)
    owners = optimisers.owners
    assert owners is not None
    for name, parameter in model.named_parameters():
        assert owners.named[name].data_ptr() == parameter.to_local().data_ptr()


def test_matrices_are_orthogonalised_where_the_model_computes_and_lie_where_they_lay(monkeypatch):
    seen = []

    def orthogonalise_all(matrices):
        seen.extend(matrix.device.type for matrix in matrices)
        return [torch.ones(matrix.shape) for matrix in matrices]

    monkeypatch.setattr(optim, "orthogonalise_all", orthogonalise_all)
    parameter = torch.nn.Parameter(torch.zeros(4, 3))
    parameter.grad = torch.ones(4, 3)
    muon = Muon([{"params": [parameter]}], lr=1.0, weight_decay=0.0, momentum=0.9)
    muon.place = torch.device("meta")
    muon.step()
    assert seen == ["meta"] and torch.equal(parameter.detach(), torch.full((4, 3), -((4 / 3) ** 0.5)))
    assert muon.state[parameter]["momentum_buffer"].device == CPU


def test_what_lies_in_either_memory_is_sent(monkeypatch):
    assert parallel._backend(torch.device("cuda"), True) == "cpu:gloo,cuda:nccl"
    assert parallel._backend(torch.device("cuda"), False) == "nccl" and parallel._backend(CPU, True) == "gloo"
    monkeypatch.setattr(parallel, "_backend", lambda device, offload: "cpu:gloo,cuda:gloo")
    ranks = join(CPU, offload=True)
    try:
        assert where() == CPU and torch.equal(sum_over(ranks, torch.ones(2)), torch.ones(2)) and any_of(ranks, True)
    finally:
        dist.destroy_process_group()


def test_what_cannot_be_done_is_told(alone, tmp_path):
    with pytest.raises(ValueError, match=r"'distractor_weight' reads weights outside .* \('offload' true\); leave one"):
        fit(tiny_recipe(offload=True, distractor_weight=0.1), tmp_path / "run", tiny_source(), ranks=alone)
    with pytest.raises(ValueError, match="'offload' true: processes share in `atma train` alone; leave it out here"):
        fit(tiny_recipe(offload=True), tmp_path / "run", tiny_source())
    assert not (tmp_path / "run").exists()
