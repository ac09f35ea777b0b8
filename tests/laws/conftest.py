"""The subjects of the laws: every mixer over its own tiny options, installed ones too, and the whole model."""

import dataclasses
from collections.abc import Iterator
from itertools import product
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from atma.config import ModelConfig
from atma.mixers import MIXERS, Call, Mixer, find, names, small
from atma.model import Model
from atma.ops import use_backend
from tests.conftest import tiny
from tests.ops.backends import ALL, FAST

OFTEN = ("gated_conv", "attention")
MODELS = ("polar-memory", "nope", "rope-memory-window", "rope+canon-memory", "polar-tap")
EXAMPLES = ("based-0", "mamba2-0", "kda-0")
"""Of the systems of one class, those that every backend computes: a normaliser, keys that heads share, channels that
decay under the delta rule."""


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


def _systems() -> list[str]:
    """Every name of a class of which each name fixes options, once for each of its tiny options."""
    whole = {find(name).cls for name in names() if not find(name).fixed}
    return [f"{name}-{i}" for name in names() if find(name).cls not in whole for i in range(len(small(name)))]


def _cases() -> Iterator[tuple[str, Any, bool]]:
    """Subjects, their backends, and whether that is for the slow suite.

    All fast backends have what the packaged models are made of. All backends at once have mixers of other packages, an
    example of each kind of recurrence and the whole model. Every other has one of the fast ones in turn. The rest is in
    the slow suite.
    """
    mine = [name for name in _mixers() if name.rpartition("-")[0] in OFTEN or name.rpartition("-")[0] not in MIXERS]
    often = [*mine, *EXAMPLES, *(f"model-{parts}" for parts in MODELS)]
    for name, (n, backend) in product(often, enumerate(ALL)):
        yield name, backend, n >= len(FAST) and name.rpartition("-")[0] in OFTEN
    for i, name in enumerate(name for name in (*_mixers(), *_systems()) if name not in often):
        yield from ((name, backend, n != i % len(FAST)) for n, backend in enumerate(ALL))


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Each law over the subjects and their backends; what has no subject over the backends alone."""
    if "subject" in metafunc.fixturenames:
        metafunc.parametrize(("subject", "backend"), [_case(*case) for case in _cases()], indirect=True)
    else:
        metafunc.parametrize("backend", ALL, indirect=True)


def _case(name: str, backend: Any, slow: bool) -> Any:
    """A parameter, which is left out where its backend is."""
    values, marks = getattr(backend, "values", (backend,)), getattr(backend, "marks", ())
    marks = (*marks, pytest.mark.slow) if slow else marks
    return pytest.param(name, *values, marks=marks, id=f"{name}-{values[0]}")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Neural memories go chunk by chunk, of four tokens here: texts of a hundred and more are for the slow suite."""
    for item in items:
        told = getattr(item, "callspec", None)
        place, _ = MIXERS.get(str(told and told.params.get("subject")).rpartition("-")[0], ("", {}))
        if told and place.startswith("neural") and told.params.get("length", 0) > 100:
            item.add_marker(pytest.mark.slow)


@pytest.fixture
def subject(request, backend) -> Subject:
    """Every mixer and the whole model, in float64."""
    torch.manual_seed(0)
    return make(request.param)


@pytest.fixture(autouse=True)
def backend(request):
    with use_backend(request.param):
        yield request.param
