"""Where a run's batches come from: training batches by step, and the same validation batches every time."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Protocol

from torch import Tensor

from atma.config import Recipe, TrainConfig
from atma.train.parallel import Ranks

if TYPE_CHECKING:
    from atma.tokenizer import Tokenizer


class Batch(Protocol):
    """Tokens (B, T) int64, targets (B, T) int64 with −100 where not scored, segment_ids (B, T) int32."""

    @property
    def tokens(self) -> Tensor: ...
    @property
    def targets(self) -> Tensor: ...
    @property
    def segment_ids(self) -> Tensor: ...


@dataclass(frozen=True)
class Source:
    """Batches as pure functions: `train(step)`, and `validation(i)` for i below `validation_batches`."""

    train: Callable[[int], Batch]
    validation: Callable[[int], Batch]
    validation_batches: int
    hash: str
    """Of the token set, kept in checkpoints: a run goes on only with the data it began with."""
    vocab_size: int
    tokenizer: "Tokenizer | None" = None


def open_source(recipe: Recipe, ranks: Ranks) -> Source:
    """Batches of the recipe's token set. Validation rows are plain text: no recall, no copies.

    ValueError when the data is missing or damaged, or the processes cannot share a batch equally.
    """
    from atma.data.batches import Batches
    from atma.data.dataset import TokenSet

    tokens = TokenSet.open(recipe.data.path)
    training = Batches(tokens, recipe.data, recipe.train, ranks.rank, ranks.world).batch
    validation, count = training, 0
    if recipe.train.evaluate_every:
        held_out = TokenSet.open(recipe.data.path, split="validation")
        plain = replace(recipe.data, recall_share=0.0, copy_warmup_tokens=0)
        settings, count = validation_plan(recipe.train, ranks.world)
        validation = Batches(held_out, plain, settings, ranks.rank, ranks.world).batch
    return Source(training, validation, count, tokens.hash, tokens.vocab_size, tokens.tokenizer)


def validation_plan(train: TrainConfig, world: int) -> tuple[TrainConfig, int]:
    """Settings of the validation batches, a micro-batch each whatever the seed, and how many cover the tokens asked."""
    unit = train.length * world
    size = max(unit, min(train.batch_tokens // train.accumulation, train.evaluation_tokens) // unit * unit)
    return replace(train, batch_tokens=size, accumulation=1, seed=0), max(1, -(-train.evaluation_tokens // size))
