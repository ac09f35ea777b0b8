"""The model's own code over the modules of whoever holds them.

transformers, PEFT and accelerate replace modules of a model where they find them, so embedding, blocks, norm and head
are attributes of the classes of transformers, and a `Core` is those of the moment. It is what `atma.model.Model` reads
of itself, and computes with its methods: there is one model code.
"""

import types
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from torch import Tensor, nn

from atma.mixers import Call
from atma.model import Model
from atma.state import ModelState

BlockCall = Callable[..., tuple[Tensor, Any]]
Checkpoint = Callable[..., Any]


class Core(NamedTuple):
    """What the methods of `atma.model.Model` read of a model."""

    config: Any
    embed: Callable[[Tensor], Tensor]
    blocks: Iterable[BlockCall]
    norm: Callable[[Tensor], Tensor]
    head: nn.Module | None = None

    def read(
        self, inputs: Tensor, state: ModelState | None, segment_ids: Tensor | None = None
    ) -> tuple[Tensor, ModelState | None]:
        """`Model.forward` of tokens (B, T) int64, or of embeddings (B, T, D)."""
        core = self if inputs.ndim == 2 else self._replace(embed=lambda given: given)
        return core.unchecked(inputs, state, segment_ids)

    def __getattr__(self, name: str) -> Any:
        """A method of `Model`, of these modules."""
        return types.MethodType(getattr(Model, name), self)


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
    return [block if i % every else _Checkpointed(block, checkpoint) for i, block in enumerate(blocks)]


class _Checkpointed(NamedTuple):
    block: BlockCall
    checkpoint: Checkpoint

    def __call__(
        self, x: Tensor, state: None = None, *, segment_ids: Tensor | None = None, call: Call | None = None
    ) -> tuple[Tensor, None]:
        """A block without a state. What it reads of the call is as it was then, whenever it is computed."""
        left = {} if call is None else dict(call.left)

        def compute(x: Tensor, embedding: Tensor | None) -> Tensor:
            own = None if call is None or embedding is None else Call(embedding, dict(left), call.noise)
            y, _ = self.block(x, None, segment_ids=segment_ids, call=own)
            if own is not None and call is not None:
                call.left.update(own.left)
            return y

        return self.checkpoint(compute, x, None if call is None else call.embedding), None


__all__ = ["Core", "checkpointed", "watched"]
