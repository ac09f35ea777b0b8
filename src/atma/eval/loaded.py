"""A model of ours as `atma.load` returns it."""

from pathlib import Path
from typing import Protocol

from atma.model import Model
from atma.tokenizer import Tokenizer


class Loaded(Protocol):
    """A model, its tokenizer and the folder it came from."""

    @property
    def model(self) -> Model: ...

    @property
    def tokenizer(self) -> Tokenizer | None: ...

    @property
    def path(self) -> Path | None: ...


def tokenizer_of(loaded: Loaded) -> Tokenizer:
    """The tokenizer; ValueError if the model came without one."""
    if loaded.tokenizer is None:
        raise ValueError(f"{loaded.path}: the model has no tokenizer; put its tokenizer.json into its folder")
    return loaded.tokenizer
