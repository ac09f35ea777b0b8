"""Reading less: a selection policy set on a trained model at run time."""

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import cast

from atma.hashes import model_hash
from atma.mixers import Mixer, selecting
from atma.model import Block, Model


def select(model: Model, policy: str | None) -> Model:
    """The same model, whose layers that hold whole texts read as a policy says from here on; None: all of their keys.

    policy: "NAME KEY=VALUE …", such as "top_pages k=64" (docs/selection.md). States that were made before are not of
    it: make new ones. ValueError: no such policy or option, or a layer that cannot take it; nothing has changed then.
    """
    chosen = None if policy is None else selecting.read(policy)
    before, model.selection = model.selection, None
    try:
        selecting.place(mixers_of(model), chosen, functools.cache(lambda: model_hash(model)))
    except ValueError:
        model.selection = before
        raise
    model.selection = None if chosen is None else chosen.text
    return model


@contextmanager
def counting(model: Model) -> Iterator[selecting.Counts]:
    """Count what the policy of a model reads while this lasts, and, with `shadows`, the largest errors of its
    certificates. Steps of one token are then not recorded, and slower. Without a policy nothing is counted."""
    counts = selecting.Counts()
    selecting.count(mixers_of(model), counts)
    try:
        yield counts
    finally:
        selecting.count(mixers_of(model), None)


def mixers_of(model: Model) -> list[Mixer]:
    """Those of its layers, in order."""
    return [cast(Block, block).mixer for block in model.blocks]


__all__ = ["counting", "mixers_of", "select"]
