"""The flat form of a configuration: every option of the layers "local" and "global" beside the model's own fields.

It is how model folders, recipes and sweeps wrote a model before mixers had names, and how they still do where a pattern
has these two layers alone; their identity is that of the text they always had. It tells every option of every part,
whether the pattern has the part or not.
"""

import dataclasses
from collections.abc import Collection, Iterable, Mapping
from typing import Any

from atma.mixers import attention, delta_memory, gated_conv, polar, rope
from atma.strict import from_dict, require

NAMES = ("local", "global")
OWNERS = (
    attention.AttentionConfig,
    gated_conv.ConvConfig,
    delta_memory.DeltaConfig,
    polar.PolarConfig,
    rope.RopeConfig,
)
FIELDS = {one.name: one for owner in OWNERS for one in dataclasses.fields(owner)}
"""The options, by name."""


def is_flat(pattern: Iterable[str], mixers: Collection[str]) -> bool:
    """Whether a model can be written so."""
    return not mixers and all(name in NAMES for name in pattern)


def whole(options: Mapping[str, Any]) -> dict[str, Any]:
    """Every option, where some are set; of a memory of another kind those that are."""
    return {key: one.default for key, one in FIELDS.items()} | dict(options)


def checked(key: str, value: Any) -> Any:
    """The value of an option that no mixer of the pattern has. ValueError: it is none, or asks for what cannot be."""
    owner = next(owner for owner in OWNERS if any(one.name == key for one in dataclasses.fields(owner)))
    value = getattr(from_dict(owner, {key: value}), key)
    require(key != "rope_scaling" or value == "none", key, value, "none where no layer is rope")
    return value
