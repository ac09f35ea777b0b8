"""A tiny run to train: a model of 20 thousand parameters on batches made from their step alone."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from atma.config import ModelConfig, Recipe, TrainConfig
from atma.train.source import Source

VOCABULARY = 31
LENGTH = 16


class Rows(NamedTuple):
    tokens: Tensor
    targets: Tensor
    segment_ids: Tensor


def rows(step: int, count: int = 4) -> Rows:
    """Counting sequences from a random start; the first three targets are not scored, a document ends half-way."""
    start = torch.randint(VOCABULARY, (count, 1), generator=torch.Generator().manual_seed(step))
    ids = (start + torch.arange(LENGTH + 1)) % VOCABULARY
    targets = ids[:, 1:].clone()
    targets[0, :3] = -100
    segments = (torch.arange(LENGTH) >= LENGTH // 2).int().expand(count, LENGTH)
    return Rows(ids[:, :-1], targets, segments)


def tiny_source(make: Callable[[int], Rows] = rows, data: str = "counting") -> Source:
    return Source(make, lambda i: rows(10_000 + i), 2, data, VOCABULARY)


def tiny_model(**changes) -> ModelConfig:
    sizes = {"vocab_size": 32, "width": 24, "depth": 4, "query_heads": 2, "key_value_heads": 1, "head_width": 8}
    return ModelConfig(**(sizes | {"mlp_multiple": 2} | changes))


def tiny_recipe(model: ModelConfig | None = None, **changes) -> Recipe:
    plan = {"length": LENGTH, "batch_tokens": 4 * LENGTH, "tokens": 48 * LENGTH, "checkpoint_every": 4}
    plan |= {"evaluate_every": 3, "evaluation_tokens": 8 * LENGTH}
    return Recipe("tiny", model or tiny_model(), train=TrainConfig(**(plan | changes)))
