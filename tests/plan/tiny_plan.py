"""Tiny recipes to plan, and a pace that is said and not measured."""

from functools import cache
from typing import NamedTuple

import torch

from atma.config import LoraConfig, ModelConfig, Recipe, TrainConfig
from atma.plan import Costs, costs_of
from atma.plan.meshes import Sent

SIZES = {"vocab_size": 96, "width": 32, "depth": 4, "query_heads": 4, "key_value_heads": 2, "head_width": 8}


def tiny(pattern: tuple[str, ...] = ("local", "rope"), lora: LoraConfig | None = None, **train) -> Recipe:
    """Eight rows of 64 tokens a step, unless `train` says otherwise."""
    own = {key: train.pop(key) for key in list(train) if key in ("depth", "tied_head", "window")}
    model = ModelConfig(**(SIZES | {"pattern": pattern, "mlp_multiple": 2} | own))
    settings = {"length": 64, "batch_tokens": 512, "tokens": 5120} | train
    return Recipe("tiny", model, train=TrainConfig(**settings), lora=lora)


@cache
def costs(compute: torch.dtype = torch.float32, **train) -> Costs:
    return costs_of(tiny(**train), compute)


class Said(NamedTuple):
    """A microsecond a token, and half as much again with checkpointing; a second for a GB."""

    room: float = 1e9
    program: float = 0.0
    apart: bool = False

    def compute(self, tokens: float, length: int, checkpointing: bool) -> float:
        return 1e-6 * tokens * (1.5 if checkpointing else 1)

    def update(self, share: float) -> float:
        return 1e-6 * share

    def send(self, message: Sent) -> float:
        return message.bytes / 1e9

    def assumptions(self) -> list[str]:
        return ["it is said"]
