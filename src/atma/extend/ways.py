"""The ways to give a model length, each of which says what the student is, where it stands at a step, and its end."""

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any, Protocol, cast

import numpy as np
import torch
from torch import Tensor

from atma.config import ModelConfig
from atma.extend.settings import ExtendConfig
from atma.mixers import conversion
from atma.mixers.conversion import Layer, Weights
from atma.model import Block, Model

LINEAR_WINDOW = 64
"""Keys that a linearised layer sees exactly, where nothing else is said (LoLCATs)."""
PREFIX = "extended_"
"""Of the names of layers that were given length."""


class Way(Protocol):
    """One of the three ways."""

    def student(self, teacher: ModelConfig) -> ModelConfig:
        """What is trained in the teacher's place. ValueError: it has no layer that can be given length."""
        ...

    def begin(self, student: Model, teacher: Model, tokens: Tensor) -> None:
        """Set what a student, that has its teacher's weights, adds to them; tokens (B, T) of text to measure on."""
        ...

    def at(self, student: Model, step: int, steps: int) -> None:
        """Put the student where it stands at a 0-based step of so many."""
        ...

    def settled(self, student: Model) -> Model:
        """An ordinary model of the table that computes what the student does at the end."""
        ...


@dataclass(frozen=True)
class Polar:
    """Softmax attention becomes polar attention by a homotopy, and loses its rotation (mixers.md, section 7.2)."""

    settings: ExtendConfig
    trained_length: int

    def student(self, teacher: ModelConfig) -> ModelConfig:
        """`Way.student`."""
        own, length = self.settings, self.trained_length
        bounds = {"count_limit": length, "sharpening": own.sharpening, "max_half_life": float(length)}
        memory = False if self.settings.memory == "none" else self.settings.memory
        return with_layers(teacher, lambda layer: conversion.toward_polar(layer, memory, bounds))

    @torch.no_grad()
    def begin(self, student: Model, teacher: Model, tokens: Tensor) -> None:
        """`Way.begin`: the radius of each head is the mean length of what the teacher's reads."""
        sizes: dict[int, Tensor] = {}

        def listen(layer: int) -> Callable[..., None]:
            def note(_module: object, _inputs: object, output: tuple[Tensor, Any]) -> None:
                sizes[layer] = torch.linalg.vector_norm(output[0].float(), dim=-1).mean((0, 2))

            return note

        cores = cores_of(student, "log_radius")
        hooks = [core.register_forward_hook(listen(layer)) for layer, core in cores.items()]
        try:
            self.at(student, 0, 1)
            student(tokens)
        finally:
            for hook in hooks:
                hook.remove()
        for layer, core in cores.items():
            core.log_radius.copy_(sizes[layer].clamp(min=1e-6).log())

    def at(self, student: Model, step: int, steps: int) -> None:
        """`Way.at`: λ rises first, then the rotation fades; both are done before the last step."""
        mixing, fading = self.settings.mix_share * steps, self.settings.fade_share * steps
        mix = 1.0 if step >= mixing else step / mixing
        faded = self.fades and mix == 1 and step >= min(mixing + fading, steps - 1)
        fade = 1.0 if faded else max(0.0, step - mixing) / max(fading, 1.0) if self.fades else 0.0
        for core in cores_of(student, "log_radius").values():
            core.mix.fill_(mix)
            core.fade.fill_(fade)

    @property
    def fades(self) -> bool:
        """Whether the rotation is taken away."""
        return self.settings.fade_share > 0

    def settled(self, student: Model) -> Model:
        """`Way.settled`."""
        self.at(student, 1, 1)
        change = {f"blocks.{i}.mixer.": core.scale for i, core in cores_of(student, "log_radius").items()}
        fold = (lambda prefix, own: conversion.fold_polar(own, change[prefix])) if self.fades else _same
        config = with_layers(student.config, lambda layer: conversion.settled_polar(layer, self.fades), _between)
        return refilled(student, config, list(change), fold)


@dataclass(frozen=True)
class WindowMemory:
    """A window, the first tokens and a memory in place of attention to everything (mixers.md, section 7.1)."""

    settings: ExtendConfig
    length: int
    seed: int

    @property
    def window(self) -> int:
        """Of the finished model."""
        return self.settings.window or self.length

    def student(self, teacher: ModelConfig) -> ModelConfig:
        """`Way.student`."""
        own = self.settings
        if own.memory == "none":
            raise ValueError("memory: 'none' leaves nothing of what is outside the window; name a memory")
        return with_layers(teacher, lambda one: conversion.beside_window(one, own.memory, self.window, own.sinks))

    def begin(self, student: Model, teacher: Model, tokens: Tensor) -> None:
        """`Way.begin`: nothing, α is zero."""

    def at(self, student: Model, step: int, steps: int) -> None:
        """`Way.at`: a window and a number of sinks of each step's own, the finished ones at the end."""
        own, draw = self.settings, np.random.default_rng((7, self.seed, step))
        low, high = own.window_range or (max(1, self.length // 8), self.length)
        window, sinks = self.window, own.sinks
        if step < steps:
            window = round(low * (high / low) ** draw.random())
            sinks = int(draw.integers(own.sinks_most + 1))
        for mixer in mixers_of(student, "alpha").values():
            mixer.core.window, mixer.sinks = window, sinks

    def settled(self, student: Model) -> Model:
        """`Way.settled`: α goes into the memory's output projection."""
        prefixes = [f"blocks.{i}.mixer." for i in mixers_of(student, "alpha")]
        scaled = lambda layer: bool(layer.options.get("memory_scale"))  # noqa: E731
        config = with_layers(student.config, conversion.settled_window, scaled)
        return refilled(student, config, prefixes, lambda _, own: conversion.fold_scale(own))


@dataclass(frozen=True)
class Linear:
    """A recurrence over learned features, with an exact window, in place of softmax (mixers.md, section 7.3)."""

    settings: ExtendConfig

    def student(self, teacher: ModelConfig) -> ModelConfig:
        """`Way.student`."""
        return with_layers(teacher, lambda layer: conversion.linearised(layer, self.settings.window or LINEAR_WINDOW))

    def begin(self, student: Model, teacher: Model, tokens: Tensor) -> None:
        """`Way.begin`: the features begin as they are built."""

    def at(self, student: Model, step: int, steps: int) -> None:
        """`Way.at`: it is the same at every step."""

    def settled(self, student: Model) -> Model:
        """`Way.settled`: it is of the table."""
        return student.eval()


def refilled(
    student: Model, config: ModelConfig, prefixes: list[str], change: Callable[[str, Weights], Weights]
) -> Model:
    """A model of `config` with the student's weights, those below each prefix as `change(prefix, weights)` has them."""
    weights = {name: value.detach() for name, value in student.state_dict().items()}
    for prefix in prefixes:
        own = {name.removeprefix(prefix): weights.pop(name) for name in list(weights) if name.startswith(prefix)}
        weights |= {prefix + name: value for name, value in change(prefix, own).items()}
    model = Model(config).to(student.embed.weight)
    model.load_state_dict(weights)
    return model.eval()


def _same(_prefix: str, weights: Weights) -> Weights:
    return weights


def _between(layer: Layer) -> bool:
    """Whether a layer is one between softmax and polar attention."""
    return layer.options.get("core") in conversion.TOWARD_POLAR.values()


def with_layers(
    config: ModelConfig,
    change: Callable[[Layer], dict[str, Any]],
    chosen: Callable[[Layer], bool] = lambda layer: layer.softmax,
) -> ModelConfig:
    """A configuration with the chosen layers changed, each named by what it was. ValueError: none is chosen."""
    layers = {name: Layer(one.found, one.options) for name, one in config.named().items() if name in config.pattern}
    tables = {name: change(layer) for name, layer in layers.items() if chosen(layer)}
    if not tables:
        found = ", ".join(dict.fromkeys(config.layers))
        raise ValueError(f"no layer of softmax attention with positions to give length to: the model has {found}")
    names = {name: name if name.startswith(PREFIX) else PREFIX + name for name in tables}
    kept = {name: table for name, table in config.mixers.items() if name not in tables}
    made = {names[name]: table for name, table in tables.items()}
    pattern = tuple(names.get(name, name) for name in config.pattern)
    own = {one.name: getattr(config, one.name) for one in fields(config)}
    return ModelConfig(**own | {"pattern": pattern, "mixers": kept | made})


def mixers_of(model: Model, parameter: str) -> dict[int, Any]:
    """The mixers that have a parameter of that name, by layer."""
    mixers = {i: cast(Block, block).mixer for i, block in enumerate(model.blocks)}
    return {i: mixer for i, mixer in mixers.items() if getattr(mixer, parameter, None) is not None}


def cores_of(model: Model, parameter: str) -> dict[int, Any]:
    """The cores that have a parameter of that name, by layer."""
    cores = {i: mixer.core for i, mixer in mixers_of(model, "core").items()}
    return {i: core for i, core in cores.items() if getattr(core, parameter, None) is not None}


def way_of(settings: ExtendConfig, length: int, seed: int) -> Way:
    """The way that the settings name, for rows of `length` tokens."""
    if settings.way == "polar":
        return Polar(settings, length)
    return Linear(settings) if settings.way == "linear" else WindowMemory(settings, length, seed)
