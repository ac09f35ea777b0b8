"""The model's own code over the modules of whoever holds them.

transformers, PEFT and accelerate replace modules of a model where they find them, so embedding, blocks, norm and head
are attributes of the classes of transformers, and a `Core` is those of the moment. It is what `atma.model.Model` reads
of itself, and computes with its methods: there is one model code.
"""

from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor, nn

from atma.mixers import Call
from atma.model import Model
from atma.state import ModelState

BlockCall = Callable[..., tuple[Tensor, Any]]
Checkpoint = Callable[..., Any]


class Core:
    """What the methods of `atma.model.Model` read of a model, and these methods."""

    checkpointing = 0  # it is `checkpointed` blocks that transformers asks for

    def __init__(
        self,
        config: Any,
        embed: Callable[[Tensor], Tensor],
        blocks: Iterable[BlockCall],
        norm: Callable[[Tensor], Tensor],
        head: nn.Module | None = None,
    ) -> None:
        self.config, self.embed, self.blocks, self.norm, self.head = config, embed, blocks, norm, head

    def read(
        self, inputs: Tensor, state: ModelState | None, segment_ids: Tensor | None = None
    ) -> tuple[Tensor, ModelState | None]:
        """`Model.forward` of tokens (B, T) int64, or of embeddings (B, T, D)."""
        core = self if inputs.ndim == 2 else Core(self.config, _as_given, self.blocks, self.norm)
        return core.unchecked(inputs, state, segment_ids)

    enter: Any = Model.enter
    unchecked: Any = Model.unchecked
    logits: Any = Model.logits
    loss: Any = Model.loss
    init_state: Any = Model.init_state
    init_weights: Any = Model.init_weights


def _as_given(embedded: Tensor) -> Tensor:
    return embedded


def watched(blocks: Iterable[BlockCall], seen: list[Tensor]) -> Iterable[BlockCall]:
    """The same blocks, each of which also leaves what it reads in `seen`."""

    def watch(block: BlockCall) -> BlockCall:
        def call(x: Tensor, *rest: Any, **named: Any) -> tuple[Tensor, Any]:
            seen.append(x)
            return block(x, *rest, **named)

        return call

    return [watch(block) for block in blocks]


def checkpointed(blocks: Iterable[BlockCall], checkpoint: Checkpoint, every: int = 1) -> Iterable[BlockCall]:
    """The same blocks, each `every`-th of them computed again in the backward pass, keeping nothing of it before."""
    return [block if i % every else _checkpointed(block, checkpoint) for i, block in enumerate(blocks)]


def _checkpointed(block: BlockCall, checkpoint: Checkpoint) -> BlockCall:
    """A block without a state. What it reads of the call is as it was then, whenever it is computed."""

    def run(
        x: Tensor, state: None = None, *, segment_ids: Tensor | None = None, call: Call | None = None
    ) -> tuple[Tensor, None]:
        left = {} if call is None else dict(call.left)

        def compute(x: Tensor, embedding: Tensor | None) -> Tensor:
            own = None if call is None or embedding is None else Call(embedding, dict(left), call.noise)
            y, _ = block(x, None, segment_ids=segment_ids, call=own)
            if own is not None and call is not None:
                call.left.update(own.left)
            return y

        return checkpoint(compute, x, None if call is None else call.embedding), None

    return run


__all__ = ["Core", "checkpointed", "watched"]
