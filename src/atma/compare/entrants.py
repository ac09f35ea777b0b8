"""Who is compared: a mixer in words over a base model, or the model of a recipe, all of one size.

A mixer takes the place of the layers "global" of the base model; what it has more or less of parameters than the first
entrant is made up for by the inner width of the MLPs, which is the same kind of layer in all of them. Models that learn
a recall task are made of an entrant's mixers likewise.
"""

from collections.abc import Sequence
from functools import cache
from itertools import cycle
from pathlib import Path
from typing import NamedTuple

import torch

from atma.config import ModelConfig, load_recipe
from atma.eval.recall.mixers import GLOBAL, mixer
from atma.eval.recall.tasks import Task
from atma.mixers.table import find
from atma.model import Model

LOCAL = "local"
"""A layer of a task's models that looks near."""


class Entrant(NamedTuple):
    """A model to be compared, and what it is called."""

    name: str
    model: ModelConfig
    parameters: int


def entrants(words: Sequence[str], base: ModelConfig, equal: bool) -> list[Entrant]:
    """The models of mixers in words, or of recipes where a word ends in .toml; with `equal`, all of the first's size.

    ValueError for what names no mixer, two of one name, or what cannot be made as large or as small as the first.
    """
    made = [_entrant(word, base) for word in words]
    names = [one.name for one in made]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"two entrants are called '{name}', as a recipe is by the name of its file; rename one")
    if not equal:
        return made
    wanted = made[0].parameters
    return [made[0], *(_as_large(one, wanted) for one in made[1:])]


@cache
def parameters(model: ModelConfig) -> int:
    """How many numbers a model learns; none of them is made. Seeds and tasks ask again for the same models."""
    with torch.device("meta"):
        return sum(p.numel() for p in Model(model, torch.Generator("cpu")).parameters())


def learner(found: Sequence[Entrant], one: Entrant, task: Task, equal: bool) -> ModelConfig:
    """The model by which an entrant learns a recall task; with `equal`, as large as that of the first."""
    mine, first = (of_task(entrant.model, task) for entrant in (one, found[0]))
    return _as_large(Entrant(one.name, mine, parameters(mine)), parameters(first)).model if equal else mine


def of_task(model: ModelConfig, task: Task) -> ModelConfig:
    """As many layers as the task's models have, near and far as those: a model's mixers in turn, each at least once.
    What has no gated convolutions has mixers that look far in all of them."""
    named, names = model.named(), list(dict.fromkeys(model.layers))
    far = [name for name in names if find(named[name].kind).cls is not find(LOCAL).cls] or names
    near = [name for name in names if name not in far]
    places = [bool(near) and layer == LOCAL for layer in task.layers]
    places += [False] * (len(far) - places.count(False))
    turns = {True: cycle(near), False: cycle(far)}
    pattern = tuple(next(turns[place]) for place in places)
    return model.changed({"pattern": pattern, "depth": len(pattern), "vocab_size": task.ids})


def _entrant(word: str, base: ModelConfig) -> Entrant:
    if word.endswith(".toml"):
        model = load_recipe(word).model.changed({"vocab_size": base.vocab_size})
        return Entrant(Path(word).stem, model, parameters(model))
    try:
        if GLOBAL not in base.layers:
            raise ValueError(f"the base model has no layer '{GLOBAL}' whose place it could take; make depth larger")
        model = mixer(word, base)
        return Entrant(word, model, parameters(model))
    except ValueError as error:
        raise ValueError(f"{word}: {error}") from None


def _as_large(one: Entrant, wanted: int) -> Entrant:
    """With the inner width of its MLPs that brings it nearest to so many parameters."""
    inner = one.model.mlp_multiple * one.model.width if one.model.mlp_width is None else one.model.mlp_width
    if one.parameters == wanted:
        return one
    if inner == 0:
        raise ValueError(
            f"{one.name} has {one.parameters:,} parameters, the first entrant {wanted:,}, and no MLPs that could make "
            "up for it; compare it with --parameters own"
        )
    each = one.model.depth * (3 * one.model.width + 2)
    chosen = inner + round((wanted - one.parameters) / each)
    if chosen < 1:
        over = one.parameters - inner * each
        raise ValueError(
            f"{one.name} has {over:,} parameters without its MLPs, and the first entrant {wanted:,} in all; "
            "compare it with --parameters own"
        )
    if chosen == inner:
        return one
    model = one.model.changed({"mlp_width": chosen})
    return Entrant(one.name, model, parameters(model))
