"""The law of a mixer that knows its transition: the state after tokens is A · before + B, whatever was before, and what
they read of it is what `forward` reads. Rows that processes share rely on it (atma.mixers.stretches_prefix)."""

import pytest
import torch

from atma.mixers import Call, Mixer, find, names, small
from tests.laws.conftest import make

KNOWN = [name for name in names() if find(name).cls.transition is not Mixer.transition]


def apart(one: torch.Tensor, other: torch.Tensor) -> float:
    """The largest difference, in units of the largest number where that is above 1."""
    return float(((one - other).abs().max() / other.abs().max().clamp(min=1)).detach())


@pytest.mark.parametrize("begun", [True, False], ids=["begun", "new"])
@pytest.mark.parametrize("name", [f"{name}-{i}" for name in KNOWN for i in range(len(small(name)))])
def test_transition_what_tokens_do_to_a_state_and_read_of_it(name, begun):
    torch.manual_seed(0)
    subject = make(name)
    mixer: Mixer = getattr(subject.function, "mixer", subject.function)
    x, before = subject.inputs(2, 70), subject.inputs(2, 9, seed=1)
    more = {"call": Call(x)} if mixer.reads_call else {}
    with torch.enable_grad():  # a state is then never overwritten
        state = mixer.init_state(2, 79)
        if begun:
            _, state = mixer(before, state, **({"call": Call(before)} if mixer.reads_call else {}))
        made = mixer.transition(x, state, begun, **more)
        given = {field: torch.randn_like(getattr(state, field)).abs() for field in made.after} if begun else {}
        y, after = mixer(x, state._replace(**given), **more)
        read = made.finish(made.read, given)
    assert not begun or made.factors.keys() == made.after.keys()
    assert apart(read, y) <= 1e-10
    for field, written in made.after.items():
        found = made.moved(given[field], made.factors[field]) + written if begun else written
        assert apart(found, getattr(after, field)) <= 1e-10


def test_there_are_mixers_of_every_kind_that_know_theirs():
    assert {"gated_conv", "raven", "retnet", "gla", "hgrn2", "mamba2", "linear", "gated_deltanet", "kda"} <= set(KNOWN)
