"""A rope model of ours whose positions are stretched while it is evaluated: interpolation or YaRN, at run time.

The weights stay as they are. By default a text of L tokens is read with the positions of a model stretched
max(1, L / trained length) times, each length by its own factor; a fixed factor is that of one model for every length.
"""

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from torch import Tensor

from atma.eval.language_model import OwnModel, Scored
from atma.eval.loaded import Loaded
from atma.eval.stream import DEFAULT, Advance, Streaming
from atma.model import Model
from atma.state import ModelState
from atma.tokenizer import Tokenizer

Kind = Literal["linear", "yarn"]
Scaling = Literal["none", "linear", "yarn"]


class Stretch(NamedTuple):
    """How positions are stretched: `kind`, from what `trained` length, by what `factor`; None: as each text needs."""

    kind: Kind
    trained: int
    factor: float | None = None


class _Own(NamedTuple):
    """`Loaded`, with modules of its own around the same weights."""

    model: Model
    tokenizer: Tokenizer | None
    path: Path | None


class Stretched(OwnModel):
    """`OwnModel`, with stretched positions. ValueError: a model without positions, or lengths that make no sense.

    The loaded model stays as it is; its weights are shared.
    """

    def __init__(self, loaded: Loaded, stretch: Stretch, streaming: Streaming = DEFAULT) -> None:
        shared = {id(x): x for x in (*loaded.model.parameters(), *loaded.model.buffers())}
        super().__init__(_Own(copy.deepcopy(loaded.model, shared), loaded.tokenizer, loaded.path), streaming)
        self.stretch, self.by_length = stretch, stretch.factor is None
        self._fit(stretch.trained)

    def score(self, tokens: Tensor, last: int | None = None, progress: Advance | None = None) -> np.ndarray:
        """`LanguageModel.score`."""
        self._fit(tokens.shape[1] - 1)
        return super().score(tokens, last, progress)

    def predict(self, tokens: Tensor, last: int, progress: Advance | None = None) -> Scored:
        """`LanguageModel.predict`."""
        self._fit(tokens.shape[1] - 1)
        return super().predict(tokens, last, progress)

    def read(self, tokens: Sequence[int], room: int, progress: Advance | None = None) -> ModelState:
        """`OwnModel.read`; what is written into the room is counted as text."""
        self._fit(len(tokens) + room)
        return super().read(tokens, room, progress)

    def provenance(self) -> dict[str, Any]:
        """`LanguageModel.provenance`."""
        kind, trained, factor = self.stretch
        return super().provenance() | {"rope_scaling": kind, "rope_trained": trained, "rope_factor": factor or "length"}

    def _fit(self, length: int) -> None:
        kind, trained, factor = self.stretch
        for module in stretchable(self.loaded.model):
            module.stretch(kind, trained, factor or max(1.0, length / max(1, trained)))


def stretchable(model: Model) -> list[Any]:
    """The modules of a model whose positions can be stretched: those with `stretch(kind, trained, factor)`."""
    return [module for module in model.modules() if hasattr(module, "stretch")]


def trained_length(loaded: Any) -> int | None:
    """What the model's folder says that it was trained at; None where it does not say."""
    extra = loaded.info.get("extra", {})
    train = extra.get("recipe", {}).get("train", {}) if isinstance(extra, dict) else {}
    return train.get("length")


def stretch_of(loaded: Any, kind: Scaling, trained: int | None, factor: float | None) -> Stretch | None:
    """The stretching that options mean; None for "none". ValueError names the option that is missing or too much."""
    if kind == "none":
        given = {"--rope-trained": trained, "--rope-factor": factor}
        if wrong := [f"{name} {value}" for name, value in given.items() if value is not None]:
            raise ValueError(f"{wrong[0]}: stretches nothing; choose --rope-scaling linear or yarn with it")
        return None
    if not stretchable(loaded.model):
        raise ValueError(f"--rope-scaling {kind}: {loaded.path} has no rope layer, whose positions could be stretched")
    trained = trained_length(loaded) if trained is None else trained
    if trained is None:
        raise ValueError(f"--rope-scaling {kind}: {loaded.path} does not say its trained length; give --rope-trained")
    return Stretch(kind, trained, factor)
