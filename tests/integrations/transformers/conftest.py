"""Models of every mixer as models of transformers, with weights far from where training begins."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from atma.config import ModelConfig
from atma.mixers import MIXERS, small

pytest.importorskip("transformers", minversion="5.24")

from transformers.utils import logging

from atma.integrations.transformers import AtmaConfig, AtmaForCausalLM
from tests.laws.conftest import randomise

VOCABULARY = 23
EVERY = [(name, i) for name in MIXERS for i in range(len(small(name)))]
ONE_EACH = [(name, 0) for name in MIXERS]
NAMES = [f"{name}-{i}" for name, i in EVERY]


@pytest.fixture(autouse=True)
def _quiet():
    """No progress bars of files being read."""
    logging.disable_progress_bar()


def configuration(name: str, i: int = 0, depth: int = 2, **changes) -> ModelConfig:
    """A tiny model whose layers are all of one mixer, at one of its tiny options."""
    size = {"vocab_size": VOCABULARY, "width": 16, "depth": depth, "mlp_multiple": 2}
    table = {"pattern": ("own",), "mixers": {"own": {"kind": name, **small(name)[i]}}}
    shared = {"pattern": (name,), **small(name)[i]}
    return ModelConfig(**(size | (table if i else shared) | changes))


def wrapped(config: ModelConfig, seed: int = 0) -> AtmaForCausalLM:
    """A model of transformers of random weights, in float64, that is being evaluated."""
    model = AtmaForCausalLM(AtmaConfig.of(config))
    randomise(model, seed)
    return model.eval()


@pytest.fixture
def make() -> Callable[..., AtmaForCausalLM]:
    """Of a mixer's name and the number of its tiny options."""

    def of(name: str = "atma", i: int = 0, depth: int = 2, **changes) -> AtmaForCausalLM:
        return wrapped(configuration(name, i, depth, **changes))

    return of


def some_tokens(rows: int, length: int, seed: int = 0) -> Tensor:
    """Random tokens (rows, length)."""
    return torch.randint(0, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(seed))
