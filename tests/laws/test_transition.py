"""The law of a mixer that knows its transition: the state after tokens is A · before + B, whatever was before, and what
they read of it is what `forward` reads. Rows that processes share rely on it (atma.mixers.stretches_prefix)."""

import re
import sys
import types

import pytest
import torch
from torch import Tensor

from atma.mixers import Call, Mixer, Place, find, names, small
from tests.documents.reading import ROOT
from tests.laws.conftest import make, randomise

KNOWN = [name for name in names() if find(name).cls.transition is not Mixer.transition]


def apart(one: Tensor, other: Tensor) -> float:
    """The largest difference, in units of the largest number where that is above 1."""
    return float(((one - other).abs().max() / other.abs().max().clamp(min=1)).detach())


def worst(mixer: Mixer, x: Tensor, earlier: Tensor | None) -> float:
    """How far a transition of x is from `forward`, behind earlier tokens or nothing, the linear fields at random."""
    begun, batch, length = earlier is not None, len(x), x.shape[1]
    call = {"call": Call(x)} if mixer.reads_call else {}
    state = mixer.init_state(batch, 2 * length)
    if earlier is not None:
        _, state = mixer(earlier, state, **({"call": Call(earlier)} if mixer.reads_call else {}))
    made = mixer.transition(x, state, begun, **call)
    assert not begun or made.factors.keys() == made.after.keys()
    before = {field: torch.randn_like(getattr(state, field)).abs() for field in made.after} if begun else {}
    y, after = mixer(x, state._replace(**before), **call)
    found = [apart(made.finish(made.read, before), y)]
    for field, written in made.after.items():
        moved = made.moved(before[field], made.factors[field]) + written if begun else written
        found.append(apart(moved, getattr(after, field)))
    return max(found)


@pytest.mark.parametrize("begun", [True, False], ids=["begun", "new"])
@pytest.mark.parametrize("name", [f"{name}-{i}" for name in KNOWN for i in range(len(small(name)))])
def test_transition_what_tokens_do_to_a_state_and_read_of_it(name, begun):
    torch.manual_seed(0)
    subject = make(name)
    mixer = getattr(subject.function, "mixer", subject.function)
    assert worst(mixer, subject.inputs(2, 70), subject.inputs(2, 9, seed=1) if begun else None) <= 1e-10


def test_there_are_mixers_of_every_kind_that_know_theirs():
    assert {"gated_conv", "raven", "retnet", "gla", "hgrn2", "mamba2", "linear", "gated_deltanet", "kda"} <= set(KNOWN)


@pytest.mark.parametrize("begun", [True, False], ids=["begun", "new"])
def test_transition_of_the_mixer_that_the_documentation_adds(begun, monkeypatch):
    """And one that is wrong is found."""
    page = (ROOT / "docs" / "adding-a-mixer.md").read_text(encoding="utf-8")
    whole, more = re.findall(r"^```python\n(.*?)^```$", page, re.M | re.S)[:2]
    module = types.ModuleType("atma_fade")
    monkeypatch.setitem(sys.modules, "atma_fade", module)
    exec(compile(f"{whole}\n{more}", "fade", "exec"), vars(module))
    mixer = randomise(module.SharedFade(module.FadeConfig(2), Place(16, 1e-6)))
    x, earlier = torch.randn(2, 3, 9, 16, dtype=torch.float64)[:, :2]
    assert worst(mixer, x, earlier if begun else None) <= 1e-10
    if begun:
        right = mixer.transition
        doubled = lambda made: made._replace(factors={"average": 2 * made.factors["average"]})  # noqa: E731
        monkeypatch.setattr(mixer, "transition", lambda *given: doubled(right(*given)))
        assert worst(mixer, x, earlier) > 1e-3
