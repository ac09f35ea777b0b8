"""What a layer does in one call: the middle steps of its mixer, seen from outside while the model runs.

Nothing is computed differently, and nothing is returned by the mixers for it: hooks copy what passes.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple, cast

from torch import Tensor, nn

from atma.diagnose.parts import observable
from atma.mixers import Mixer
from atma.model import Block, Model
from atma.state import branch


class Seen(NamedTuple):
    """Of one layer and call of T tokens."""

    start: Tensor
    """Tokens of each row before the call (B,)."""
    residual: Tensor
    """The stream (B, T, D) that the block was given."""
    x: Tensor
    """What the mixer was given: the same, normalised."""
    before: Any
    """The state at the call; what grows in it is that of `after`."""
    after: Any
    branches: dict[str, Tensor]
    """What each channel adds to the stream (B, T, D), in the mixer's order; they sum to its output."""
    inputs: dict[str, Tensor]
    """What each channel's projection was given."""
    figures: dict[str, Tensor]
    """What its memory tells of itself before the call, each (B, H), by name."""


@contextmanager
def observed(model: Model) -> Iterator[dict[int, Seen]]:
    """Inside, one call of the model with a state; afterwards the result holds what each layer did in it."""
    layers = observable(model)
    notes: dict[int, dict[str, Any]] = {layer: {"inputs": {}, "branches": {}, "figures": {}} for layer in layers}
    seen: dict[int, Seen] = {}
    with ExitStack() as stack:
        whole: dict[str, Any] = {}
        stack.callback(model.register_forward_pre_hook(_start(whole)).remove)
        for layer, mixer in layers.items():
            for handle in _hooks(cast(Block, model.blocks[layer]), mixer, notes[layer]):
                stack.callback(handle.remove)
        yield seen
    for layer, note in notes.items():
        if unused := set(layers[layer].channels()) - set(note["inputs"]):
            told = f"layer {layer} names channels that its forward does not call: {', '.join(sorted(unused))}"
            raise ValueError(f"{told}; project with the module of `channels`, not with its weight")
        for name in ("inputs", "branches"):  # in the order of the channels, in whichever they were computed
            note[name] = {channel: note[name][channel] for channel in layers[layer].channels()}
        seen[layer] = Seen(**whole, **note)


def _start(note: dict[str, Any]) -> Callable[..., None]:
    def before(_module: nn.Module, given: tuple[Any, ...]) -> None:
        note["start"] = given[1].length.clone()

    return before


def _hooks(block: Block, mixer: Mixer, note: dict[str, Any]) -> list[Any]:
    def residual(_module: nn.Module, given: tuple[Any, ...]) -> None:
        note["residual"] = given[0]

    def before(_module: nn.Module, given: tuple[Any, ...]) -> None:
        note["x"], note["before"] = given[0], branch(given[1])

    def after(_module: nn.Module, _given: tuple[Any, ...], result: tuple[Tensor, Any]) -> None:
        note["after"] = result[1]

    handles = [block.register_forward_pre_hook(residual), mixer.register_forward_pre_hook(before)]
    handles.append(mixer.register_forward_hook(after))
    for module in mixer.modules():
        if hasattr(module, "figures"):
            handles.append(module.register_forward_pre_hook(_figures(note)))
    for channel, projection in mixer.channels().items():
        handles.append(projection.register_forward_hook(_branch(channel, note)))
    return handles


def _figures(note: dict[str, Any]) -> Callable[..., None]:
    def before(module: nn.Module, given: tuple[Any, ...]) -> None:
        x, qkv, log_keep, state = given[:4]
        note["figures"] = cast(Any, module).figures(x, qkv, log_keep, state)

    return before


def _branch(channel: str, note: dict[str, Any]) -> Callable[..., None]:
    def keep(_module: nn.Module, given: tuple[Tensor, ...], result: Tensor) -> None:
        note["inputs"][channel], note["branches"][channel] = given[0], result

    return keep
