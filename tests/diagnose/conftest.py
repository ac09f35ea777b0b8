"""Small random models in float64 of every core, and a text with a record at its start."""

from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch

from atma.config import ModelConfig
from atma.diagnose.texts import lay
from atma.eval.likelihood.prefixes import Documents
from atma.model import Model
from atma.tokenizer import Tokenizer, byte_tokenizer

CORES = [("polar", True, None), ("polar", False, 24), ("nope", True, None), ("nope", False, 24), ("rope", False, None)]


class Loaded(NamedTuple):
    model: Model
    tokenizer: Tokenizer | None
    path: Path = Path("tiny")


def made(core="polar", memory=True, window=None) -> Model:
    """Four layers, the second and the last global, two heads of width 8; every parameter is random."""
    config = ModelConfig(
        vocab_size=257,
        width=16,
        depth=4,
        pattern=("local", "global"),
        query_heads=2,
        key_value_heads=1,
        head_width=8,
        mlp_multiple=2,
        core=core,
        memory=memory,
        window=window,
        count_limit=40 if core == "polar" else None,
        max_half_life=300,
    )
    generator = torch.Generator().manual_seed(5)
    model = Model(config, generator).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return model


@pytest.fixture(params=CORES, ids=lambda given: f"{given[0]}{'-memory' if given[1] else ''}-{given[2]}")
def any_model(request) -> Model:
    return made(*request.param)


@pytest.fixture
def model() -> Model:
    return made()


@pytest.fixture
def documents() -> Documents:
    return Documents(np.random.default_rng(1).integers(97, 123, (3, 400)), 256)


@pytest.fixture
def text(documents):
    return lay(byte_tokenizer(), documents, 300, 1, 7)[0]
