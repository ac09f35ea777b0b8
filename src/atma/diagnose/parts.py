"""What of a model can be looked at and taken away: the channels of its global layers, and their heads.

Layers and heads count from zero, as in maths.md: head 2.5 is head 5 of layer 2.
"""

import re
from collections.abc import Sequence
from typing import NamedTuple, cast

from torch import nn

from atma.mixers import Attention, DeltaMemory
from atma.mixers.attention import PolarCore
from atma.model import Block, Model

CHANNELS = ("read", "count", "memory")


class Head(NamedTuple):
    """One head of one layer."""

    layer: int
    head: int

    def __str__(self) -> str:
        return f"{self.layer}.{self.head}"


class Part(NamedTuple):
    """What one mask takes away: channels of layers, of all heads or of one."""

    layers: tuple[int, ...]
    channels: tuple[str, ...]
    head: int | None = None

    def heads(self, model: Model) -> list[str]:
        """The heads that it concerns, as in 2.5."""
        chosen = range(model.config.query_heads) if self.head is None else [self.head]
        return [f"{layer}.{head}" for layer in self.layers for head in chosen]

    def parts(self, model: Model) -> list[str]:
        """The channels of heads that it takes away, as in "2.5 memory"."""
        return [f"{head} {channel}" for head in self.heads(model) for channel in self.channels]


def global_mixers(model: Model) -> dict[int, Attention]:
    """The global mixer of each global layer."""
    blocks = [cast(Block, block) for block in model.blocks]
    return {i: block.mixer for i, block in enumerate(blocks) if isinstance(block.mixer, Attention)}


def memories(model: Model) -> dict[int, DeltaMemory]:
    """The memory of each layer that has one."""
    return {i: mixer.memory for i, mixer in global_mixers(model).items() if mixer.memory is not None}


def projections(mixer: Attention) -> dict[str, nn.Linear]:
    """The projection by which each channel that the mixer has reaches the residual stream."""
    found: dict[str, nn.Linear] = {"read": mixer.out_proj}
    if isinstance(mixer.core, PolarCore):
        found["count"] = mixer.core.count_proj
    if mixer.memory is not None:
        found["memory"] = mixer.memory.out_proj
    return found


def channels(model: Model) -> tuple[str, ...]:
    """The channels that some layer has, in the order of `CHANNELS`."""
    had = {name for mixer in global_mixers(model).values() for name in projections(mixer)}
    return tuple(name for name in CHANNELS if name in had)


def channel_masks(model: Model) -> dict[str, Part]:
    """Each channel taken away in each layer, and in all of them where there are several; by what it is called."""
    layers = tuple(global_mixers(model))
    masks = {}
    for channel in channels(model):
        masks |= {f"without the {channel} of layer {layer}": Part((layer,), (channel,)) for layer in layers}
        if len(layers) > 1:
            masks[f"without any {channel}"] = Part(layers, (channel,))
    return masks


def head_masks(model: Model) -> dict[str, Part]:
    """Each head taken away with all its channels; by what it is called."""
    masks = {}
    for layer, mixer in global_mixers(model).items():
        had = tuple(projections(mixer))
        masks |= {f"without head {layer}.{head}": Part((layer,), had, head) for head in range(mixer.heads)}
    return masks


def memory_heads(model: Model) -> list[Head]:
    """All heads of all memories."""
    return [Head(layer, head) for layer in memories(model) for head in range(model.config.query_heads)]


def parse_heads(text: str, model: Model) -> list[Head] | int:
    """ "2.5,6.1" as heads, "all" as every head of a memory, "worst3" as the number 3.

    ValueError for anything else, for a layer without a memory, and for a head that it has not.
    """
    if text == "all":
        return memory_heads(model)
    if worst := re.fullmatch(r"worst *([1-9]\d*)", text):
        return int(worst[1])
    if not re.fullmatch(r"\d+\.\d+(,\d+\.\d+)*", text):
        raise ValueError(f"heads are named as in 2.5,6.1 (layer.head), or all, or worst3; not '{text}'")
    heads = [Head(*map(int, name.split("."))) for name in text.split(",")]
    check_heads(heads, model)
    return list(dict.fromkeys(heads))


def check_heads(heads: Sequence[Head], model: Model) -> None:
    """ValueError unless each is a head of a memory of the model."""
    known = memory_heads(model)
    for head in heads:
        if head not in known:
            layers = ", ".join(map(str, memories(model))) or "none"
            raise ValueError(
                f"there is no memory head {head}; layers with a memory: {layers}, heads 0 to "
                f"{model.config.query_heads - 1}"
            )
