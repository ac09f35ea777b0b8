"""A model of ours as `atma.load` returns it."""

from pathlib import Path
from typing import Protocol

from atma.data.dataset import TokenSet
from atma.model import Model
from atma.tokenizer import Tokenizer


class Loaded(Protocol):
    """A `model`, its `tokenizer` and the `path` of the folder that it came from, if there is one."""

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


def check_tokenizer(token_set: TokenSet, tokenizer: Tokenizer, model: Path | None) -> None:
    """ValueError, with the options that mend it, unless the data are of the model's tokenizer."""
    found = token_set.tokenizer
    if found is not None and found.hash() != tokenizer.hash():
        own = "the model's tokenizer.json" if model is None else model / "tokenizer.json"
        raise ValueError(
            f"{token_set.path}: made with another tokenizer ({found.name}) than the model's ({tokenizer.name}); leave "
            f"--data out, or name data made by `atma prepare SOURCE --out FOLDER --tokenizer {own}`"
        )
