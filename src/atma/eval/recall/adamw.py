"""Training as MAD does it: AdamW over everything, no clipping, and rates that fall by a cosine.

Source: github.com/athms/mad-lab (mad/configs.py, mad/model/pl_model_wrapper.py). The rates fall by the step here and by
the epoch there; the model's initial values and its soft-capped logits are atma's own.
"""

import math
from dataclasses import replace

import torch

from atma.config import TrainConfig
from atma.model import Model
from atma.train.optim import Optimisers

RATE = 5e-4
"""MAD's grid is 1, 2 and 0.2 times it, each with a weight decay of 0 and of 0.1."""
LAST_RATE = 1e-6
ROWS = 128
"""Examples of a step, whatever their length."""
USUAL = TrainConfig(beta1=0.9, beta2=0.999, epsilon=1e-8, clip=math.inf, precision="float32")


def train_config(length: int, tokens: int, seed: int, rate: float, weight_decay: float) -> TrainConfig:
    """MAD's steps on examples of `length` tokens, at `rate` times RATE."""
    rates = dict.fromkeys(("muon_rate", "embedding_rate", "head_rate", "vector_rate"), rate * RATE)
    shape = {"length": length, "batch_tokens": ROWS * length, "tokens": tokens, "seed": seed}
    return replace(USUAL, weight_decay=weight_decay, **shape, **rates)


class AdamW(Optimisers):
    """AdamW over one model at `vector_rate`; weight decay on all that has two dimensions or more."""

    def __init__(self, model: Model, train: TrainConfig) -> None:
        self.names = {parameter: name for name, parameter in model.named_parameters()}
        self.rates = dict.fromkeys(("matrix", "vector"), train.vector_rate)
        groups = [
            {"params": [p for p in self.names if p.ndim > 1], "kind": "matrix", "weight_decay": train.weight_decay},
            {"params": [p for p in self.names if p.ndim < 2], "kind": "vector", "weight_decay": 0.0},
        ]
        betas = (train.beta1, train.beta2)
        self._both = {"adamw": torch.optim.AdamW(groups, train.vector_rate, betas, train.epsilon, fused=True)}


def cosine(step: int, train: TrainConfig) -> float:
    """Factor on the rate of the 0-based `step`, from 1 towards LAST_RATE over all steps."""
    floor = min(1.0, LAST_RATE / train.vector_rate)
    return floor + (1 - floor) * (1 + math.cos(math.pi * step / train.steps)) / 2
