"""Where a run's batches come from: training batches by step, and the same validation batches every time."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Protocol

from torch import Tensor

from atma.config import Recipe, TrainConfig
from atma.train.parallel import Ranks

if TYPE_CHECKING:
    from atma.data.dataset import TokenSet
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
    epoch_rows: int = 0
    """Rows that show all the data once; 0: there is no such number."""
    told: str = ""
    """What there is to tell of the rows."""
    template: str | None = None
    """The chat template of the data, for the final model; "" for none, None where the data are texts."""


def open_source(recipe: Recipe, ranks: Ranks) -> Source:
    """Batches of the recipe's token set. Validation rows are plain text: no recall, no copies.

    ValueError when the data is missing or damaged, or the processes cannot share a batch equally.
    """
    from atma.data.dataset import TokenSet

    tokens = TokenSet.open(recipe.data.path)
    if tokens.masks:
        return _conversations(recipe, tokens, ranks)
    from atma.data.batches import Batches

    training = Batches(tokens, recipe.data, recipe.train, ranks.replica, ranks.replicas)
    validation, count = training.batch, 0
    if recipe.train.evaluate_every:
        held_out = TokenSet.open(recipe.data.path, split="validation")
        plain = replace(recipe.data, recall_share=0.0, copy_warmup_tokens=0)
        settings, count = validation_plan(recipe.train, ranks.replicas)
        validation = Batches(held_out, plain, settings, ranks.replica, ranks.replicas).batch
    rows = training.epoch_rows
    return Source(training.batch, validation, count, tokens.hash, tokens.vocab_size, tokens.tokenizer, rows)


def _conversations(recipe: Recipe, tokens: "TokenSet", ranks: Ranks) -> Source:
    """Batches of conversations; validation shows each held-out one at most once."""
    from atma.data.dataset import TokenSet
    from atma.data.packing import Conversations

    training = Conversations(tokens, recipe.data, recipe.train, ranks.replica, ranks.replicas)
    validation, count = training.batch, 0
    if recipe.train.evaluate_every:
        held_out = TokenSet.open(recipe.data.path, split="validation")
        settings, most = validation_plan(recipe.train, ranks.replicas)
        held = Conversations(held_out, recipe.data, settings, ranks.replica, ranks.replicas, once=True)
        validation, count = held.batch, min(most, -(-len(held.rows) * settings.length // settings.batch_tokens))
    return Source(
        training.batch,
        validation,
        count,
        tokens.hash,
        tokens.vocab_size,
        tokens.tokenizer,
        len(training.rows),
        training.told(),
        tokens.template,
    )


def in_epochs(recipe: Recipe, source: Source) -> tuple[Recipe, list[str]]:
    """The recipe with the `tokens` that its epochs are, and how many steps an epoch is. ValueError: none is known."""
    train = recipe.train
    if train.epochs and not source.epoch_rows:
        raise ValueError(f"'epochs' {train.epochs}: the data has no epochs; say train.tokens instead")
    notes = [source.told] if source.told else []
    if train.epochs:
        rows = max(1, math.ceil(train.epochs * source.epoch_rows))
        recipe = replace(recipe, train=replace(train, tokens=rows * train.length))
        steps, done = recipe.train.steps, f"{train.epochs:g} epoch{'' if train.epochs == 1 else 's'}"
        notes.append(f"{done} = {steps:,} steps of {train.batch_tokens:,} tokens")
    elif source.told:
        each = source.epoch_rows * train.length / train.batch_tokens
        notes.append(f"{train.steps:,} steps = {train.steps / each:.3g} epochs, an epoch being {each:,.1f} steps")
    return recipe, notes


def validation_plan(train: TrainConfig, world: int) -> tuple[TrainConfig, int]:
    """Settings of the validation batches, a micro-batch each whatever the seed, and how many cover the tokens asked."""
    unit = train.length * world
    size = max(unit, min(train.batch_tokens // train.accumulation, train.evaluation_tokens) // unit * unit)
    return replace(train, batch_tokens=size, accumulation=1, seed=0), max(1, -(-train.evaluation_tokens // size))
