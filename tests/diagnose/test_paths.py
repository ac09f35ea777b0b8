"""A factor on a channel, a head or a path is that factor on its weights, or on its share of the last stream."""

import pytest
import torch

from atma.diagnose.changes import factors, pruned
from atma.diagnose.interventions import scaled
from atma.diagnose.parts import Part
from atma.diagnose.paths import Path, paths, weighed
from atma.diagnose.plan import Plan
from atma.model import Model
from tests.conftest import tiny
from tests.diagnose.conftest import made

TOKENS = torch.randint(0, 257, (2, 30), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def hidden(model):
    return model(TOKENS)[0]


def same(a, b):
    torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)


@torch.no_grad()
def test_a_factor_on_a_head_is_on_its_columns(model):
    before = hidden(model)
    with scaled(model, Part((3,), ("read", "count"), 1), 0.25):
        found = hidden(model)
    same(hidden(model), before)
    mixer = model.blocks[3].mixer
    mixer.out_proj.weight[:, 8:] *= 0.25
    mixer.core.count_proj.weight[:, 1:] *= 0.25
    same(found, hidden(model))
    assert (found - before).abs().max() > 1e-3


@torch.no_grad()
@pytest.mark.parametrize("layer", [0, 1])
def test_a_whole_path_is_all_that_its_branch_adds(model, layer):
    before = hidden(model)
    with weighed(model, Path(layer, "mlp"), 0.0):
        without_mlp = hidden(model)
    with weighed(model, Path(layer, "mixer"), 0.0):
        without_mixer = hidden(model)
    assert torch.equal(hidden(model), before)
    for branch in (model.blocks[layer].mlp,):
        branch.out_proj.weight.zero_()
        branch.out_proj.bias.zero_()
    same(without_mlp, hidden(model))
    assert (without_mixer - before).abs().max() > 1e-3 < (without_mlp - before).abs().max()


@torch.no_grad()
@pytest.mark.parametrize("factor", [0.0, 0.5])
def test_a_straight_path_is_weighed_in_the_last_stream_alone(model, factor):
    stream = {}
    handles = [
        model.norm.register_forward_pre_hook(lambda _, given: stream.update(last=given[0])),
        model.blocks[1].mixer.register_forward_hook(lambda _m, _given, result: stream.update(added=result[0])),
    ]
    hidden(model)
    for handle in handles:
        handle.remove()
    with weighed(model, Path(1, "mixer", "straight"), factor):
        found = hidden(model)
    same(found, model.norm(stream["last"] - (1 - factor) * stream["added"]))
    assert not model.norm._forward_pre_hooks and not model.blocks[1].mixer._forward_hooks


def test_every_path_is_pruned_by_its_name(model):
    assert pruned(Plan(), model) == {}
    names = list(pruned(Plan(paths="straight"), model))
    assert len(names) == len(paths(model, "straight")) == 8
    assert names[:2] == ["without the mixer of layer 0 at the head", "without the mlp of layer 0 at the head"]
    assert "without the mlp of layer 3" in pruned(Plan(paths="whole"), model)


@pytest.mark.parametrize(
    ("given", "name"),
    [
        ("3.read=0.5", "the read of layer 3 times 0.5"),
        ("3.1=0", "head 3.1 times 0"),
        ("3.1.memory=2", "the memory of head 3.1 times 2"),
        ("memory=0.5", "every memory times 0.5"),
        ("0.mlp=0", "the mlp of layer 0 times 0"),
        ("0.mixer=-1", "the mixer of layer 0 times -1"),
    ],
)
@torch.no_grad()
def test_what_is_to_be_scaled_is_named(model, given, name):
    made_of = factors(Plan(scale=(given,)), model)
    assert list(made_of) == [name]
    before = hidden(model)
    with made_of[name].make():
        assert not torch.equal(hidden(model), before)
    assert torch.equal(hidden(model), before)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("3.read", "--scale is written as in 2.read=0.5"),
        ("3.read=x", "not '3.read=x'"),
        ("9.read=1", "there is no layer 9; layers are 0 to 3"),
        ("3.wisdom=1", "layer 3 has read, count, memory"),
        ("wisdom=1", "no layer has this channel; there are read, count, memory"),
        ("3.7=1", "layer 3 has heads 0 to 1"),
        ("0.0=1", "layer 0 has no channels"),
        ("...=1", "name what is there"),
    ],
)
def test_what_is_not_there_is_refused(given, said):
    with pytest.raises(ValueError, match=said):
        factors(Plan(scale=(given,)), made())


def test_a_model_without_mlps_has_paths_of_mixers_alone():
    model = Model(tiny("rope", False).changed({"mlp_width": 0}))
    assert {path.branch for path in paths(model, "whole")} == {"mixer"}
    with (
        pytest.raises(ValueError, match="the mlp of layer 1: the model has no MLPs"),
        weighed(model, Path(1, "mlp"), 0.0),
    ):
        pass
    with pytest.raises(ValueError, match=r"--scale 1\.mlp: the model has no MLPs"):
        factors(Plan(scale=("1.mlp=0",)), model)
