"""The subjects of the laws: every mixer over its own tiny options, installed ones too, and the whole model."""

import dataclasses
from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn

from atma.config import ModelConfig
from atma.mixers import MIXERS, Call, Mixer, find, names, small
from atma.model import Model
from atma.ops import use_backend
from tests.conftest import tiny
from tests.ops.backends import ALL

MODELS = ("polar-memory", "nope", "rope-memory-window", "rope+canon-memory", "polar-tap")


class Subject(NamedTuple):
    """Something that obeys the laws, with inputs of its kind."""

    name: str
    function: nn.Module
    config: ModelConfig
    ours: bool = True
    """Whether it is of this package, whose operations also keep numbers that are none apart."""

    @property
    def is_model(self) -> bool:
        return isinstance(self.function, Model)

    def inputs(self, batch: int, length: int, seed: int = 0) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        if self.is_model:
            return torch.randint(0, self.config.vocab_size, (batch, length), generator=generator)
        return torch.randn(batch, length, self.config.width, generator=generator, dtype=torch.float64)


def randomise(module: nn.Module, seed: int = 0) -> nn.Module:
    """Every parameter away from its initial value: a zero output projection would hide what is behind it."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
            parameter.add_(noise * (0.3 if parameter.ndim == 1 else parameter.shape[-1] ** -0.5))
    return module.double()


class Called(nn.Module):
    """A mixer that reads the record of the model's call, of a model whose embedding is what the mixer is given."""

    def __init__(self, mixer: Mixer) -> None:
        super().__init__()
        self.mixer, self.init_state = mixer, mixer.init_state

    def forward(self, x: Tensor, state=None, *, segment_ids: Tensor | None = None):
        return self.mixer(x, state, segment_ids=segment_ids, call=Call(x))


def make(name: str) -> Subject:
    """A subject by its name: "model-" and what is in it, or a mixer's name and the number of its tiny options."""
    kind, *options = name.split("-")
    if kind == "model":
        config = tiny(options[0], "memory" in options, 7 if "window" in options else None)
        if "tap" in options:
            config = dataclasses.replace(config, local_taps=1, canon_taps=1, canon_init="uniform")
        return Subject(name, randomise(Model(config)), config)
    kind, _, number = name.rpartition("-")
    config = ModelConfig(16, width=16, depth=2, pattern=(kind,), **small(kind)[int(number)])
    mixer = config.mixer(1)
    mixer.init_weights(None)
    function = Called(mixer) if mixer.reads_call else mixer
    return Subject(name, randomise(function), config, kind in MIXERS)


def _mixers() -> list[str]:
    """Each class by the first of its names that fixes nothing, once for each of its tiny options."""
    first = {find(name).cls: name for name in reversed(names()) if not find(name).fixed}
    return [f"{name}-{i}" for name in reversed(first.values()) for i in range(len(small(name)))]


def _names() -> list[str]:
    return [*_mixers(), *(f"model-{parts}" for parts in MODELS)]


@pytest.fixture(params=_names())
def subject(request) -> Subject:
    """Every mixer and the whole model, in float64."""
    torch.manual_seed(0)
    return make(request.param)


@pytest.fixture(params=ALL, autouse=True)
def backend(request):
    with use_backend(request.param):
        yield request.param
