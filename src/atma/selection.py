"""Reading less: a selection policy set on a trained model at run time."""

import functools

from atma.hashes import model_hash
from atma.mixers import selecting
from atma.model import Model


def select(model: Model, policy: str | None) -> Model:
    """The same model, whose layers that hold whole texts read as a policy says from here on; None: all of their keys.

    policy: "NAME KEY=VALUE …", such as "top_pages k=64" (docs/selection.md). States that were made before are not of
    it: make new ones. ValueError: no such policy or option, or a layer that cannot take it; nothing has changed then.
    """
    chosen = None if policy is None else selecting.read(policy)
    before, model.selection = model.selection, None
    try:
        selecting.place(model.mixers(), chosen, functools.cache(lambda: model_hash(model)))
    except ValueError:
        model.selection = before
        raise
    model.selection = None if chosen is None else chosen.text
    return model


__all__ = ["select"]
