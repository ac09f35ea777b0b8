"""The subjects of the laws: every mixer and the whole model, on every backend, as `y, state = f(x, state)`."""

import dataclasses
import itertools
from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn

from atma.config import ModelConfig
from atma.mixers import Attention, GatedConv
from atma.model import Model
from atma.ops import use_backend
from tests.conftest import tiny
from tests.ops.backends import ALL

CORES = list(itertools.product(("polar", "nope", "rope", "rope+canon"), (False, True), (None, 7)))


class Subject(NamedTuple):
    """Something that obeys the laws, with inputs of its kind."""

    name: str
    function: nn.Module
    config: ModelConfig

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


def make(name: str) -> Subject:
    kind, *options = name.split("-")
    if kind == "conv":
        config = tiny()
        mixer = GatedConv(config)
        mixer.init_weights(config, None)
        return Subject(name, randomise(mixer), config)
    core, memory, window = options[0], "memory" in options, 7 if "window" in options else None
    config = dataclasses.replace(tiny(core, memory, window), learned_half_life="learned" in options)
    if "tap" in options:
        config = dataclasses.replace(config, local_taps=1, canon_taps=1, canon_init="uniform")
    if kind == "model":
        return Subject(name, randomise(Model(config)), config)
    mixer = Attention(config)
    mixer.init_weights(config, None)
    return Subject(name, randomise(mixer), config)


def _names() -> list[str]:
    parts = ["-".join([core, *["memory"] * memory, *["window"] * bool(window)]) for core, memory, window in CORES]
    models = [
        "model-polar-memory",
        "model-nope",
        "model-rope-memory-window",
        "model-rope+canon-memory",
        "model-polar-tap",
    ]
    return ["conv", *(f"attention-{part}" for part in parts), "attention-polar-memory-learned", *models]


@pytest.fixture(params=_names())
def subject(request) -> Subject:
    """Every mixer and the whole model, in float64."""
    torch.manual_seed(0)
    return make(request.param)


@pytest.fixture(params=ALL, autouse=True)
def backend(request):
    with use_backend(request.param):
        yield request.param
