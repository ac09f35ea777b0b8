"""What a global layer does in one call: the middle steps of its mixer, seen from outside while the model runs.

Nothing is computed differently, and nothing is returned by the mixers for it: hooks copy what passes.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple, cast

from torch import Tensor, nn

from atma.diagnose.parts import global_mixers, projections
from atma.mixers import Attention
from atma.model import Block, Model
from atma.state import GlobalState

SEEN = ("residual", "x", "before", "after", "branches")


class Seen(NamedTuple):
    """Of one layer and call of T tokens."""

    residual: Tensor
    """The stream (B, T, D) that the block was given."""
    x: Tensor
    """What the mixer was given: the same, normalised."""
    before: GlobalState
    """The state at the call, as far as it concerns projections: its keys are those of `after`."""
    after: GlobalState
    branches: dict[str, Tensor]
    """What each channel adds to the stream (B, T, D); they sum to the mixer's output."""
    magnitude: Tensor | None
    """μ (B, T, H) of a polar layer."""


@contextmanager
def observed(model: Model) -> Iterator[dict[int, Seen]]:
    """Inside, one call of the model with a state; afterwards the result holds what each global layer did in it."""
    notes: dict[int, dict[str, Any]] = {layer: {"branches": {}} for layer in global_mixers(model)}
    seen: dict[int, Seen] = {}
    with ExitStack() as stack:
        for layer, mixer in global_mixers(model).items():
            for handle in _hooks(cast(Block, model.blocks[layer]), mixer, notes[layer]):
                stack.callback(handle.remove)
        yield seen
    for layer, note in notes.items():
        residual, x, before, after, branches = (note[name] for name in SEEN)
        seen[layer] = Seen(residual, x, before, after, branches, note.get("magnitude"))


def _hooks(block: Block, mixer: Attention, note: dict[str, Any]) -> list[Any]:
    def residual(_module: nn.Module, given: tuple[Any, ...]) -> None:
        note["residual"] = given[0]

    def before(_module: nn.Module, given: tuple[Any, ...]) -> None:
        state = cast(GlobalState, given[1])
        q, k, v = (None if tail is None else tail.clone() for tail in (state.q_tail, state.k_tail, state.v_tail))
        note["x"] = given[0]
        note["before"] = GlobalState(state.length.clone(), state.keys, state.values, q, k, v, None)

    def after(_module: nn.Module, _given: tuple[Any, ...], result: tuple[Tensor, GlobalState]) -> None:
        note["after"] = result[1]

    handles = [block.register_forward_pre_hook(residual), mixer.register_forward_pre_hook(before)]
    handles.append(mixer.register_forward_hook(after))
    for channel, projection in projections(mixer).items():
        handles.append(projection.register_forward_hook(_branch(channel, note)))
    return handles


def _branch(channel: str, note: dict[str, Any]) -> Callable[..., None]:
    def keep(_module: nn.Module, given: tuple[Tensor, ...], result: Tensor) -> None:
        note["branches"][channel] = result
        if channel == "count":
            note["magnitude"] = given[0]

    return keep
