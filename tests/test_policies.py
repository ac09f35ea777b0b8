"""The published policies: all of a text where everything is chosen, plans for one model, what grows and what not."""

import dataclasses
import json

import pytest
import torch

from atma import state as trees
from atma.diagnose.planning import plan
from atma.mixers.observing import layers_of
from atma.mixers.policies import echo, hylra
from atma.mixers.table import POLICIES
from atma.model import Model
from atma.selection import mixers_of, select
from tests.conftest import tiny
from tests.laws.conftest import randomise
from tests.laws.test_laws import TOLERANCE

CORES = ("polar", "nope", "rope")


def made(core="polar", layers=2, seed=0):
    torch.manual_seed(0)
    config = dataclasses.replace(tiny(core, False), depth=layers, pattern=("global",) * layers)
    return randomise(Model(config), seed)


def text(length, seed=0, rows=1):
    return torch.randint(0, 23, (rows, length), generator=torch.Generator().manual_seed(seed))


EVERYTHING = [
    "hip k=60 block=2 sinks=4 window=6 dense=0",
    "hip k=4 sinks=0 window=70",
    "longheads chunk=10 budget=70",
    "evict budget=70 window=6 block=8",
    "hylra sources=0/0/2 page=4 least=60 window=3",
    "hylra sources=0/1/2",
    "echo sources=0/1/2",
]


@pytest.mark.parametrize("core", CORES)
@pytest.mark.parametrize("policy", EVERYTHING)
@torch.no_grad()
def test_with_everything_chosen_it_is_full_attention(policy, core):
    model, x = made(core, 3), text(60, rows=2)
    whole, _ = model(x)
    torch.testing.assert_close(select(model, policy)(x)[0], whole, **TOLERANCE)


@torch.no_grad()
def test_the_first_layers_of_hip_read_everything_but_never_more_than_a_quarter():
    model = made(layers=8)
    select(model, "hip dense=3")
    assert [mixer.policy.reads_all for mixer in mixers_of(model)] == [True, True] + [False] * 6
    select(model, "hip dense=1")
    assert sum(mixer.policy.reads_all for mixer in mixers_of(model)) == 1
    select(made(layers=2), "hip")
    small = select(made(layers=2), "hip k=4 window=3 sinks=0")
    assert not torch.equal(small(text(60))[0], select(small, None)(text(60))[0])


@torch.no_grad()
def test_what_evict_holds_does_not_grow_with_the_text():
    model = select(made(), "evict budget=16 window=6 block=8")
    sizes = []
    for length in (10, 100):
        _, state = model(text(length), model.init_state(1, length))
        sizes.append(trees.nbytes(state))
        kept = [mixer.cache.place for mixer in state.blocks]
    assert sizes[0] == sizes[1] and trees.capacity(state) == 0
    for place in kept:
        assert (place >= 0).sum() == 16 + 100 % 8 and place.max() == 99


@torch.no_grad()
def test_followers_of_echo_hold_values_alone_and_look_where_their_leader_looks():
    model, x = made(layers=3), text(40)
    select(model, "echo sources=0/0/2")
    assert ["keys" in block.cache._fields for block in model.init_state(1, 8).blocks] == [True, False, True]
    # A follower whose own queries and keys change reads the same; its leader's matter.
    before, follower = model(x)[0], model.blocks[1].mixer
    follower.k_proj.weight.normal_()
    torch.testing.assert_close(model(x)[0], before, rtol=0, atol=0)
    model.blocks[0].mixer.k_proj.weight.normal_()
    assert not torch.allclose(model(x)[0], before)


@torch.no_grad()
def test_a_layer_that_reuses_reads_the_pages_its_source_found():
    model, x = made("nope", 2), text(60)
    policy = "page=4 share=4 least=8 most=16 window=5"
    whole = select(model, None)(x)[0]
    alike = [model.blocks[i].mixer for i in range(2)]
    with torch.no_grad():
        some = select(model, f"hylra sources=0/0 {policy}")(x)[0]
    assert not torch.allclose(some, whole)
    layers = layers_of(mixers_of(model), lambda: select(model, None)(x))
    chosen = hylra.heaviest_pages(layers[0].new.q, layers[0].new.k, layers[0].new.last, alike_reach())
    own = layers[1].new
    keys, values = own.k[0, 0], own.v[0, 0]
    for h, i in [(0, 59), (1, 33)]:
        tokens = [s for page in chosen[0, h, i].tolist() if page >= 0 for s in range(page * 4, page * 4 + 4) if s <= i]
        weights = (own.q[0, h, i] @ keys[tokens].mT * 8**-0.5).softmax(-1)
        expected = weights @ values[tokens]
        read, _ = hylra.read_pages(alike[1].core, own, (own.k, own.v), (chosen, 4))
        torch.testing.assert_close(read[0, h, i], expected, rtol=1e-10, atol=1e-10)


def alike_reach():
    return hylra.Reach(4, 0, 0, 5, 4, 8, 16)


@pytest.mark.parametrize("name", ["hylra", "echo"])
@torch.no_grad()
def test_a_plan_is_for_its_model_its_policy_and_its_layers(name, tmp_path):
    model, file = made(layers=3), tmp_path / "plan.json"
    found = plan(model, name, [text(40)[0], text(30, 1)[0]])
    assert found["policy"] == name and len(found["sources"]) == 3
    file.write_text(json.dumps(found))
    select(model, f"{name} plan={file}")
    assert "sources=" + "/".join(map(str, found["sources"])) in str(model.selection)
    select(model, model.selection)
    with pytest.raises(ValueError, match="was made for the model"):
        select(made(layers=3, seed=1), f"{name} plan={file}")
    other = {"hylra": "echo", "echo": "hylra"}[name]
    with pytest.raises(ValueError, match=f"is for the policy {name}, not {other}"):
        select(select(model, None), f"{other} plan={file}")
    with pytest.raises(ValueError, match="a plan is made of a model that reads everything"):
        plan(select(model, "hip"), name, [text(40)[0]])
    with pytest.raises(ValueError, match="needs no plan; these do: hylra, echo"):
        plan(select(model, None), "hip", [text(40)[0]])


@pytest.mark.parametrize(
    ("policy", "told"),
    [
        ("hylra", "a plan is needed"),
        ("echo plan=nowhere.json", "plan nowhere.json cannot be read"),
        ("echo sources=0/0", "are of 2 layers, and this model has 3"),
        ("echo sources=0/0/1", "layer 2 cannot follow 1, which follows another"),
        ("hylra sources=0/2/2", "layer 1 cannot follow 2"),
        ("hylra sources=0/x/2", "sources must be layers such as 0/0/2/2"),
        ("hylra sources=0/0/2 page=0", "'page' must be at least 1"),
        ("hip k=5", "'k' must be a multiple of block = 2"),
        ("hip sinks=3", "'sinks' must be a multiple of block = 2"),
        ("evict budget=100", "'budget' must be more than window = 128"),
        ("evict anchors=2.0", "'anchors' must be from 0 to 1"),
    ],
)
def test_what_no_layer_can_do_is_told(policy, told):
    model = made(layers=3)
    with pytest.raises(ValueError, match=told):
        select(model, policy)
    assert model.selection is None


def test_as_few_layers_as_can_be_read_everything():
    """Against every assignment, tried one by one."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(200):
        overlap = torch.rand(6, 6, generator=generator) * 0.4 + 0.6
        full = [True, *(torch.rand(5, generator=generator) < 0.3).tolist()]
        found = hylra.assigned(full, overlap)
        every = [(0,)]
        for layer in range(1, 6):
            every = [(*one, s) for one in every for s in (one[-1], layer) if s == layer or not full[layer]]
            every = [one for one in every if one[-1] == layer or overlap[one[-1], layer] >= hylra.OVERLAP]

        totals = [sum(float(overlap[s, j]) for j, s in enumerate(one) if s != j) for one in every]
        assert found == list(
            min(zip(every, totals, strict=True), key=lambda one: (len(set(one[0])), -one[1], one[0]))[0]
        )


def test_sensitive_layers_and_those_at_the_ends_read_everything():
    none = torch.zeros(8, dtype=torch.bool)
    assert hylra.forced(none) == [True, True, *[False] * 5, True]
    assert hylra.forced(none[:2]) == [True, False] and hylra.forced(none[:4]) == [True, False, False, True]
    one = none.clone()
    one[4] = True
    assert hylra.forced(one)[4]


def test_layers_join_the_group_before_them_while_they_look_alike():
    alike = torch.full((12, 12), 0.95)
    assert echo.grouped(alike) == [0, 1, 2, 2, 2, 2, 6, 6, 6, 6, 10, 11]
    alike[2, 4] = 0.5
    assert echo.grouped(alike) == [0, 1, 2, 2, 4, 4, 4, 4, 8, 8, 10, 11]
    assert echo.grouped(torch.ones(2, 2)) == [0, 0] and echo.grouped(torch.ones(1, 1)) == [0]
    assert echo.grouped(torch.zeros(5, 5)) == list(range(5))


@torch.no_grad()
def test_what_is_measured_for_a_plan_is_what_it_says():
    """Two layers with the same queries and keys share all of them, and one map."""
    model = made("nope", 2)
    second = model.blocks[1]
    second.load_state_dict(model.blocks[0].state_dict())
    for name, parameter in model.named_parameters():
        if "out_proj" in name:
            parameter.zero_()
    x = [text(50)[0], text(70, 1)[0]]
    assert plan(model, "echo", x)["cosines"] == [[1.0, 1.0], [1.0, 1.0]] and plan(model, "echo", x)["sources"] == [0, 0]
    found = plan(model, "hylra", x)
    assert found["overlap"] == [[0.0, 1.0], [0.0, 0.0]] and found["texts"] == 2


@torch.no_grad()
def test_the_overlap_and_the_change_are_those_of_the_best_keys():
    model = made("nope", 2)
    x = text(90)[0]
    layers = layers_of(mixers_of(model), lambda: model(x[None]))
    found, common, change = plan(model, "hylra", [x]), [], []
    best = []
    for layer in layers:
        scores = torch.einsum("htk,sk->hts", layer.new.q[0], layer.new.k[0, 0])
        best.append(
            [[set(scores[h, i, : i + 1].argsort(descending=True)[:64].tolist()) for i in range(90)] for h in (0, 1)]
        )
        weights = (scores * 8**-0.5).masked_fill(~torch.ones(90, 90, dtype=torch.bool).tril(), -torch.inf)
        kept = torch.tensor([[[s in best[-1][h][i] for s in range(90)] for i in range(90)] for h in (0, 1)])
        whole, some = (w.softmax(-1) @ layer.new.v[0, 0] for w in (weights, weights.masked_fill(~kept, -torch.inf)))
        y, z = (layer.written(read[None], None) for read in (whole, some))
        change.append(float((z - y).norm() / y.norm()))
    for i in range(90):
        common.append(min(len(best[0][h][i] & best[1][h][i]) / min(64, i + 1) for h in (0, 1)))
    torch.testing.assert_close(torch.tensor(found["overlap"][0][1]), torch.tensor(sum(common) / 90), rtol=0, atol=2e-6)
    torch.testing.assert_close(torch.tensor(found["sensitivity"]), torch.tensor(change), rtol=0, atol=2e-6)


def test_every_policy_is_told_of_here_or_beside():
    assert {"top_pages", "hip", "evict", "hylra", "echo"} <= set(POLICIES)
