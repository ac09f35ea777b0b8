"""Who is compared: a mixer in words over a base model, or the model of a recipe, all of one size.

A mixer takes the place of the layers "global" of the base model; what it has more or less of parameters than the first
entrant is made up for by the inner width of the MLPs, which is the same kind of layer in all of them.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from atma.config import ModelConfig, load_recipe
from atma.eval.recall.mixers import mixer
from atma.eval.recall.tasks import Task
from atma.model import Model

LOCAL = "local"
"""The layers of the base model that are the same in all entrants."""


class Entrant(NamedTuple):
    """A model to be compared, and what it is called."""

    name: str
    model: ModelConfig
    parameters: int


def entrants(words: Sequence[str], base: ModelConfig, equal: bool) -> list[Entrant]:
    """The models of mixers in words, or of recipes where a word ends in .toml; with `equal`, all of the first's size.

    ValueError for what names no mixer, or cannot be made as large or as small as the first.
    """
    made = [_entrant(word, base) for word in words]
    if not equal:
        return made
    wanted = made[0].parameters
    return [made[0], *(_as_large(one, wanted) for one in made[1:])]


def parameters(model: ModelConfig) -> int:
    """How many numbers a model learns; none of them is made."""
    with torch.device("meta"):
        return sum(p.numel() for p in Model(model, torch.Generator("cpu")).parameters())


def one_of_each(model: ModelConfig, task: Task) -> ModelConfig:
    """The model that learns a recall task: each mixer of the pattern once, in order, without local layers where the
    task's models have none, and again until there are as many other layers as those have."""
    pattern = list(dict.fromkeys(model.pattern))
    far = [name for name in pattern if name != LOCAL] or pattern
    pattern = pattern if LOCAL in task.layers else far
    pattern *= -(-sum(name != LOCAL for name in task.layers) // len(far))
    return model.changed({"pattern": pattern, "depth": len(pattern), "vocab_size": task.ids})


def _entrant(word: str, base: ModelConfig) -> Entrant:
    if word.endswith(".toml"):
        model = load_recipe(word).model.changed({"vocab_size": base.vocab_size})
        return Entrant(Path(word).stem, model, parameters(model))
    try:
        model = mixer(word, base)
        return Entrant(word, model, parameters(model))
    except ValueError as error:
        raise ValueError(f"{word}: {error}") from None


def _as_large(one: Entrant, wanted: int) -> Entrant:
    """With the inner width of its MLPs that brings it nearest to so many parameters."""
    inner = one.model.mlp_multiple * one.model.width if one.model.mlp_width is None else one.model.mlp_width
    if inner == 0:
        return one
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
