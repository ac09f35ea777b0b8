"""A tiny model with weights that matter, a made-up split of documents, and a fake model that copies perfectly."""

from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from torch import nn

from atma.config import preset
from atma.model import Model
from atma.tokenizer import Tokenizer, byte_tokenizer

EOT = 256


class Loaded(NamedTuple):
    model: nn.Module
    tokenizer: Tokenizer | None
    path: Path | None = None


class Split:
    """A stand-in for TokenSet: documents of given lengths, each beginning with end-of-text as in published shards."""

    def __init__(self, sizes: list[int], tokenizer: Tokenizer | None = None) -> None:
        rng = np.random.default_rng(7)
        self.tokenizer, self.path = tokenizer, Path("split")
        self.texts = [np.concatenate([[EOT], rng.integers(97, 123, size)]) for size in sizes]
        self.stream = np.concatenate(self.texts)
        self.lengths = np.array([len(text) for text in self.texts])
        self.documents, self.tokens = len(sizes), len(self.stream)
        self.hash, self.eot, self.vocab_size = "0" * 64, EOT, 257

    def document(self, index: int) -> np.ndarray:
        return self.texts[index]

    def read(self, start: int, stop: int) -> np.ndarray:
        assert 0 <= start <= stop <= self.tokens
        return self.stream[start:stop]


class Copier(nn.Module):
    """Predicts the token that followed the longest earlier match of the last tokens; state: the tokens so far."""

    def __init__(self) -> None:
        super().__init__()
        self.anchor = nn.Parameter(torch.zeros(1))
        self.config = replace(preset("nano-test"), vocab_size=257)

    def init_state(self, batch: int, capacity: int) -> torch.Tensor:
        return torch.empty(batch, 0, dtype=torch.int64)

    def forward(self, tokens: torch.Tensor, state: torch.Tensor | None = None):
        seen = tokens if state is None else torch.cat([state, tokens], 1)
        first = seen.shape[1] - tokens.shape[1]
        hidden = torch.zeros(*tokens.shape, 257)
        for row, ids in enumerate(seen.tolist()):
            for t in range(tokens.shape[1]):
                hidden[row, t, guess(ids[: first + t + 1])] = 30.0
        return hidden, None if state is None else seen

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        return hidden

    def loss(self, hidden: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return nn.functional.cross_entropy(hidden.transpose(1, 2), targets, reduction="none")


def guess(ids: list[int]) -> int:
    best, at = -1, 0
    for j in range(1, len(ids)):
        size = 0
        while size < 12 and size < j and ids[j - 1 - size] == ids[-1 - size]:
            size += 1
        if size >= best:
            best, at = size, j
    return ids[at]


@pytest.fixture(scope="session")
def tiny() -> Loaded:
    """nano-test with every parameter random, so that losses vary and depend on context."""
    generator = torch.Generator().manual_seed(3)
    model = Model(preset("nano-test"), generator)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return Loaded(model, byte_tokenizer())


@pytest.fixture
def copier() -> Loaded:
    return Loaded(Copier(), byte_tokenizer())


@pytest.fixture
def split() -> Split:
    return Split([300, 20, 200, 150, 60, 400, 90])


@pytest.fixture
def make_split() -> type[Split]:
    return Split
