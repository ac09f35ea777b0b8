"""What of a model can be looked at and taken away: the channels of its layers, their heads, and what forgets.

Layers and heads count from zero, as in maths.md: head 2.5 is head 5 of layer 2.
"""

import math
import re
from collections.abc import Sequence
from typing import Any, NamedTuple, TypeGuard, cast

import torch
from torch import Tensor, nn

from atma.mixers import Mixer
from atma.mixers.heads import Attending, Core
from atma.model import Block, Model
from atma.state import leaves


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
        had = mixers(model)
        chosen = {i: range(had[i].heads) if self.head is None else [self.head] for i in self.layers}
        return [f"{layer}.{head}" for layer, heads in chosen.items() for head in heads]

    def parts(self, model: Model) -> list[str]:
        """The channels of heads that it takes away, as in "2.5 memory"."""
        return [f"{head} {channel}" for head in self.heads(model) for channel in self.channels]


def mixers(model: Model) -> dict[int, Mixer]:
    """The mixer of each layer."""
    return {i: cast(Block, block).mixer for i, block in enumerate(model.blocks)}


def attends(mixer: Mixer) -> TypeGuard[Attending]:
    """Whether its queries read keys, by scores that its core tells of."""
    return isinstance(mixer, Attending) and type(mixer.core).scale_and_null is not Core.scale_and_null


def attending(model: Model) -> dict[int, Attending]:
    """The mixers that attend, by layer."""
    return {i: mixer for i, mixer in mixers(model).items() if attends(mixer)}


def forgetting(model: Model) -> dict[int, nn.Module]:
    """What forgets in each layer where something does: a memory, or the mixer itself."""
    found = {i: mixer.retention() for i, mixer in mixers(model).items()}
    return {i: module for i, module in found.items() if module is not None}


def bound_of(module: nn.Module, head: int) -> float:
    """The longest half-life, in tokens, that a head of what forgets can have; inf where it tells of no bound."""
    return float(cast(Any, module).bound(head)) if hasattr(module, "bound") else math.inf


@torch.inference_mode()
def zero_input(model: Model) -> dict[Head, float]:
    """log γ of each head that forgets for an input of zeros. What forgets may have other heads than the channels."""
    found, zeros = {}, model.embed.weight.new_zeros(1, 1, model.config.width)
    for layer, module in forgetting(model).items():
        values = cast(Any, module).log_decay(zeros)[0, :, 0].double().tolist()
        found |= {Head(layer, head): value for head, value in enumerate(values)}
    return found


def observable(model: Model) -> dict[int, Mixer]:
    """The mixers that are looked at while they run, by layer: those that tell of a channel, attend or forget."""
    found = {*attending(model), *forgetting(model)}
    return {i: mixer for i, mixer in mixers(model).items() if i in found or mixer.channels()}


def channels(model: Model) -> tuple[str, ...]:
    """The channels that some layer has, as they appear over the layers."""
    return tuple(dict.fromkeys(name for mixer in mixers(model).values() for name in mixer.channels()))


def channel_masks(model: Model) -> dict[str, Part]:
    """Each channel taken away in each layer, and in all of them where there are several; by what it is called."""
    masks = {}
    for channel in channels(model):
        layers = tuple(i for i, mixer in mixers(model).items() if channel in mixer.channels())
        masks |= {f"without the {channel} of layer {layer}": Part((layer,), (channel,)) for layer in layers}
        if len(layers) > 1:
            masks[f"without any {channel}"] = Part(layers, (channel,))
    return masks


def head_masks(model: Model) -> dict[str, Part]:
    """Each head taken away with all its channels; by what it is called."""
    masks = {}
    for layer, mixer in mixers(model).items():
        if had := by_heads(mixer):
            masks |= {f"without head {layer}.{head}": Part((layer,), had, head) for head in range(mixer.heads)}
    return masks


def by_heads(mixer: Mixer) -> tuple[str, ...]:
    """The channels whose inputs are the heads side by side, each of one width."""
    return tuple(name for name, layer in mixer.channels().items() if layer.in_features % mixer.heads == 0)


def held_by(head: Head, model: Model) -> list[str]:
    """The channels of a head by which what forgets reaches the stream, as in "2.5 memory"."""
    inside = set(forgetting(model)[head.layer].modules())
    found = [name for name, projection in mixers(model)[head.layer].channels().items() if projection in inside]
    return [f"{head} {name}" for name in found or ["memory"]]


def memory_of(mixer: Mixer, state: object) -> Tensor | None:
    """What each head of a layer remembers, as (B, H, …, …); None where it remembers nothing, or in another form."""
    whole = mixer.retention() is mixer
    kept = [leaf for leaf in leaves(state) if leaf.carried and leaf.slides is None]
    held = [leaf.tensor for leaf in kept if whole or "memory" in leaf.path]
    found = [x for x in held if x.ndim == 4 and x.shape[1] == mixer.heads and torch.is_floating_point(x)]
    return found[0] if len(found) == 1 else None


def memory_heads(model: Model) -> list[Head]:
    """All heads that forget."""
    return list(zero_input(model))


def parse_heads(text: str, model: Model) -> list[Head] | int:
    """ "2.5,6.1" as heads, "all" as every head of a memory, "worst3" as the number 3.

    ValueError for anything else, for a layer without a memory, and for a head that it has not.
    """
    if text == "all":
        return memory_heads(model)
    if worst := re.fullmatch(r"worst *([1-9]\d*)", text):
        return int(worst[1])
    heads = named_heads(text, ", or all, or worst3")
    check_heads(heads, model)
    return heads


def named_heads(text: str, others: str = ", or all") -> list[Head]:
    """ "2.5,6.1" as heads. ValueError for anything else, told with what `others` might be written."""
    if not re.fullmatch(r"\d+\.\d+(,\d+\.\d+)*", text):
        raise ValueError(f"heads are named as in 2.5,6.1 (layer.head){others}; not '{text}'")
    return list(dict.fromkeys(Head(*map(int, name.split("."))) for name in text.split(",")))


def check_heads(heads: Sequence[Head], model: Model) -> None:
    """ValueError unless each is a head of a memory of the model."""
    known = memory_heads(model)
    for head in heads:
        if head not in known:
            raise ValueError(f"there is no memory head {head}; layers with a memory: {_listed(known)}")


def _listed(heads: Sequence[Head]) -> str:
    """Layers with as many heads together: "1, 3, heads 0 to 1"."""
    last = {head.layer: head.head for head in heads}
    layers = {most: [layer for layer in last if last[layer] == most] for most in last.values()}
    return "; ".join(f"{', '.join(map(str, some))}, heads 0 to {most}" for most, some in layers.items()) or "none"
