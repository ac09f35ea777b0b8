"""The cache of a model of transformers by either of its names.

transformers 5 began with `past_key_values` and renames it to `cache`, as an argument and in what a model returns. Which
of the two a model takes is read off its signature, so that no version is asked for and no call is a deprecated one.
"""

import inspect
from typing import Any

NAMES = ("cache", "past_key_values")
"""The newer first: a version that knows both warns of the older."""


def cache_argument(model: Any) -> str | None:
    """The name by which the model takes a cache to go on from; None where it takes none."""
    taken = inspect.signature(model.forward).parameters
    return next((name for name in NAMES if name in taken), None)


def cache_of(out: Any) -> Any:
    """The cache in what a model returned; None where there is none."""
    held = dict(out.items())
    return next((held[name] for name in NAMES if name in held), None)
