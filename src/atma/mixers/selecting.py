"""A policy by its name and options, and set on layers that can take it."""

import dataclasses
import tomllib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from torch import Tensor

from atma.mixers.base import Call, Mixer
from atma.mixers.heads import Attending, Heads
from atma.mixers.policies.base import Counts, Policy, Seat
from atma.mixers.table import Found, find
from atma.strict import from_dict, to_dict


class Chosen(NamedTuple):
    """A policy and its options, not yet of any layer."""

    name: str
    found: Found
    config: Any

    @property
    def text(self) -> str:
        """Every option, as `read` takes it."""
        return " ".join([self.name, *(f"{key}={_told(value)}" for key, value in to_dict(self.config).items())])


def read(text: str) -> Chosen:
    """A policy as "NAME KEY=VALUE …", with spaces or commas between. ValueError: there is none, or no such option."""
    name, *given = text.replace(",", " ").split() or [""]
    found = find(name, "policy")
    texts = {field.name for field in dataclasses.fields(found.cls.Config) if field.type is str}
    options = {}
    for one in given:
        key, equals, value = one.partition("=")
        if not equals:
            raise ValueError(f"a policy's options are KEY=VALUE, such as k=32, not '{one}' (in '{text}')")
        options[key] = value if key in texts else _value(value)
    return Chosen(name, found, from_dict(found.cls.Config, {**options, **found.fixed}, f"{name} "))


def place(mixers: Sequence[Mixer], chosen: Chosen | None, model: Callable[[], str]) -> None:
    """Set a policy on each of a model's mixers that it is for, and on no other; None: on none.

    ValueError: there is none, or one of them has a core that no policy can read for; nothing is set then.
    """
    able = [mixer for mixer in mixers if mixer.selects]
    if chosen is None:
        for mixer in able:
            mixer.select(None)
        return
    trained = chosen.found.cls.trained
    seats = [mixer for mixer in able if mixer.chooses == trained]
    if not seats:
        learned = "; it learned what to read: take the policy 'pages'" if able and not trained else ""
        kind = "chooses pages by what it has learned" if trained else "holds the keys of a whole text and reads all"
        raise ValueError(f"policy '{chosen.name}': no layer of this model {kind}{learned}")
    for mixer in able:
        mixer.select(None)
    made = [_made(mixer, chosen, (i, len(seats)), model) for i, mixer in enumerate(seats)]
    for mixer, policy in zip(seats, made, strict=True):
        mixer.select(policy, chosen.found.cls.reads_call)


def count(mixers: Sequence[Mixer], counts: Counts | None) -> None:
    """Let the policies of a model's mixers count what they read, from here on; None: no more."""
    for policy in (getattr(mixer, "policy", None) for mixer in mixers):
        if isinstance(policy, Policy):
            policy.counts = counts


def _made(mixer: Mixer, chosen: Chosen, which: tuple[int, int], model: Callable[[], str]) -> Policy:
    assert isinstance(mixer, Attending)
    core = type(mixer.core).__name__
    if not mixer.core.assembles:
        raise ValueError(f"policy '{chosen.name}': {core} cannot leave keys out; take a polar, nope or rope layer")
    heads: Heads = mixer.seat
    return chosen.found.cls(chosen.config, Seat(heads, mixer.core, *which, model))


def selected_afresh(
    mixer: Any, x: Tensor, state: Any, segment_ids: Tensor | None, call: Call | None
) -> tuple[Tensor, None]:
    """A call without a state of a layer that a policy is set on. ValueError: packed documents, or another's state."""
    if state is not None:
        raise ValueError(
            f"a policy is set, and this {type(state).__name__} is of a layer without one; make a new state"
        )
    if segment_ids is not None:
        raise ValueError("a selection policy reads one text a row: no packed documents (segment_ids)")
    y, _ = mixer(x, mixer.init_state(x.shape[0], x.shape[1]), call=call)
    return y, None


def _value(text: str) -> Any:
    """A number, true or false as it is written; anything else is a text."""
    try:
        return tomllib.loads(f"x = {text}")["x"]
    except tomllib.TOMLDecodeError:
        return text


def _told(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
