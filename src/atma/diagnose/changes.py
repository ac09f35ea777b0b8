"""Every change to the model that a plan asks for, by what it is called: masks, caps, moved heads, factors and paths."""

import math
import re
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import Any, NamedTuple

from atma.diagnose.interpolation import check_movable, interpolated, movable_heads
from atma.diagnose.interventions import can_be_capped, capped, masked, scaled
from atma.diagnose.parts import (
    Head,
    Part,
    by_heads,
    channel_masks,
    channels,
    head_masks,
    held_by,
    mixers,
    named_heads,
    parse_heads,
)
from atma.diagnose.paths import BRANCHES, Path, paths, weighed
from atma.diagnose.plan import Plan
from atma.diagnose.retention import longest_held
from atma.model import Model

Row = dict[str, Any]


class Change(NamedTuple):
    """One change to the model: how it is made, the heads and parts that it concerns, and the cap, if it is one."""

    make: Callable[[], AbstractContextManager[None]]
    heads: list[str]
    parts: list[str]
    cap: float | None = None
    more: Row = {}  # noqa: RUF012 (never written to)
    """What else its rows tell, the words of its sentence (`subject`) among it."""

    @property
    def about(self) -> Row:
        """What its rows tell of it."""
        return {"heads": self.heads, "parts": self.parts, "cap": self.cap} | self.more


def check(plan: Plan, model: Model) -> None:
    """ValueError for what the plan names and the model has not."""
    heads = parse_heads(plan.heads, model)
    if isinstance(heads, list) and plan.heads != "all" and (fixed := set(heads) - set(can_be_capped(model))):
        names = ", ".join(map(str, sorted(fixed)))
        raise ValueError(f"--heads: what forgets in {names} does not take its decays from its log_decay; name others")
    moved(plan, model)
    factors(plan, model)
    if plan.choose_heads and not movable_heads(model):
        raise ValueError("--choose-heads: no head of this model has a map of weights that could be moved")


def masks(plan: Plan, model: Model) -> dict[str, Change]:
    """Each channel, or each channel and head, taken away."""
    parts = {} if plan.mask == "none" else channel_masks(model)
    if plan.mask == "heads":
        parts |= head_masks(model)
    return {
        name: Change(partial(masked, model, part), part.heads(model), part.parts(model)) for name, part in parts.items()
    }


def caps(plan: Plan, model: Model, cap: float, rows: Sequence[Row]) -> dict[str, Change]:
    """Each chosen head capped alone, and all of them together; none where "worst" finds none beyond the cap."""
    chosen, reached = parse_heads(plan.heads, model), set(can_be_capped(model))
    if isinstance(chosen, int):
        held = [row for row in rows if row["kind"] == "retention" and Head(row["layer"], row["head"]) in reached]
        chosen = longest_held(held, cap, chosen)
    chosen = [head for head in chosen if head in reached]
    groups: dict[str, list[Head]] = {f"head {head} capped at {cap:g}": [head] for head in chosen}
    if len(chosen) > 1:
        groups[f"heads {_listed(chosen)} capped at {cap:g}"] = chosen
    made = {}
    for name, heads in groups.items():
        parts = [part for head in heads for part in held_by(head, model)]
        made[name] = Change(partial(capped, model, heads, cap), list(map(str, heads)), parts, cap)
    return made


def moved(plan: Plan, model: Model) -> dict[str, Change]:
    """Heads whose maps are moved to the identity. ValueError for what is not HEADS=STRENGTH, or not there."""
    made = {}
    for given in plan.interpolate:
        name, strength = _assigned("interpolate", given, "2.0,2.1=0.5 or all=1")
        heads = movable_heads(model) if name == "all" else named_heads(name)
        check_movable(heads, model)
        if not heads or not 0 <= strength <= 1:
            raise ValueError(f"--interpolate {given}: name heads with maps of weights, and a strength from 0 to 1")
        words = f"{'head' if len(heads) == 1 else 'heads'} {_listed(heads)}"
        more = {"subject": f"Moving {words} by {strength:g} to the identity", "strength": strength}
        change = partial(interpolated, model, heads, strength)
        names = list(map(str, heads))
        made[f"{words} moved {strength:g} to the identity"] = Change(
            change, names, [f"{head} map" for head in names], None, more
        )
    return made


def factors(plan: Plan, model: Model) -> dict[str, Change]:
    """What channels, heads and paths add, so many times. ValueError for what is not TARGET=FACTOR, or not there."""
    made = {}
    for given in plan.scale:
        name, factor = _assigned("scale", given, "2.read=0.5, 2.1=0, memory=0.5 or 3.mlp=0")
        words, target = _target(name, model)
        more = {"subject": f"Multiplying {words} by {factor:g}", "factor": factor}
        if isinstance(target, Path):
            heads, parts, change = [], [f"{target.layer} {target.branch}"], partial(weighed, model, target, factor)
        else:
            heads, parts = target.heads(model), target.parts(model)
            change = partial(scaled, model, target, factor)
        parts = [f"{part} times {factor:g}" for part in parts]
        made[f"{words} times {factor:g}"] = Change(change, heads, parts, None, more)
    return made


def pruned(plan: Plan, model: Model) -> dict[str, Change]:
    """Every path of the residual stream taken away."""
    found = [] if plan.paths == "none" else paths(model, plan.paths)
    return {
        f"without {path}": Change(partial(weighed, model, path, 0.0), [], [f"{path.layer} {path.branch}"])
        for path in found
    }


def _target(name: str, model: Model) -> tuple[str, Part | Path]:
    """Of "read", "2.read", "2.1", "2.1.read", "2.mixer" or "2.mlp": words for it, and what it is."""
    given = re.fullmatch(r"(?:(\d+)\.)?(?:(\d+)(?:\.|$))?([a-z]\w*)?", name)
    layer, head, channel = given.groups() if given else (None, None, None)
    if (head is None and channel is None) or (head is not None and layer is None):
        raise ValueError(f"--scale {name}: name what is there, as in 2.read, 2.1, 2.1.read, memory or 3.mlp")
    here = mixers(model)
    if layer is not None and int(layer) not in here:
        raise ValueError(f"--scale {name}: there is no layer {layer}; layers are 0 to {len(here) - 1}")
    if channel in BRANCHES and layer is not None and head is None and channel not in here[int(layer)].channels():
        path = Path(int(layer), channel)
        if path not in paths(model, "whole"):
            raise ValueError(f"--scale {name}: the model has no MLPs (mlp_width = 0)")
        return str(path), path
    if layer is None:
        held = tuple(i for i, mixer in here.items() if channel in mixer.channels())
        if not held or channel is None:
            raise ValueError(f"--scale {name}: no layer has this channel; there are {', '.join(channels(model))}")
        return f"every {channel}", Part(held, (channel,))
    mixer = here[int(layer)]
    wanted = (channel,) if channel else by_heads(mixer)
    if not wanted or not set(wanted) <= set(mixer.channels() if head is None else by_heads(mixer)):
        raise ValueError(f"--scale {name}: layer {layer} has {', '.join(mixer.channels()) or 'no channels'}")
    if head is not None and int(head) >= mixer.heads:
        raise ValueError(f"--scale {name}: layer {layer} has heads 0 to {mixer.heads - 1}")
    place = f"layer {layer}" if head is None else f"head {layer}.{head}"
    part = Part((int(layer),), wanted, None if head is None else int(head))
    return (f"the {channel} of {place}" if channel else place), part


def _assigned(option: str, given: str, examples: str) -> tuple[str, float]:
    """NAME=NUMBER."""
    name, _, value = given.partition("=")
    try:
        number = float(value)
    except ValueError:
        number = math.nan
    if not name or not math.isfinite(number):
        raise ValueError(f"--{option} is written as in {examples}; not '{given}'")
    return name, number


def _listed(heads: Sequence[Head]) -> str:
    return ", ".join(map(str, heads))


__all__ = ["Change", "caps", "check", "factors", "masks", "moved", "pruned"]
