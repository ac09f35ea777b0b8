"""The ways to give a model length, each of which says what the student is, where it stands at a step, and its end."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol, cast

import torch
from torch import Tensor

from atma.config import ModelConfig
from atma.extend.settings import ExtendConfig
from atma.mixers import conversion
from atma.mixers.conversion import Layer
from atma.model import Block, Model


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
        bounds = {"count_limit": self.trained_length, "sharpening": 2.0, "max_half_life": float(self.trained_length)}
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
        """`Way.at`: λ rises first, then the rotation fades; at the last step both are done."""
        mixing, fading = self.settings.mix_share * steps, self.settings.fade_share * steps
        mix = 1.0 if step >= mixing else step / mixing
        fade = 1.0 if step >= mixing + fading else max(0.0, (step - mixing) / max(fading, 1.0))
        for core in cores_of(student, "log_radius").values():
            core.mix.fill_(mix)
            core.fade.fill_(fade)

    def settled(self, student: Model) -> Model:
        """`Way.settled`."""
        self.at(student, 1, 1)
        weights = dict(student.state_dict())
        for layer, core in cores_of(student, "log_radius").items():
            prefix = f"blocks.{layer}.mixer."
            own = {name.removeprefix(prefix): weights.pop(name) for name in list(weights) if name.startswith(prefix)}
            weights |= {prefix + name: value for name, value in conversion.fold_polar(own, core.scale).items()}
        model = Model(with_layers(student.config, conversion.settled_polar, polar_ready))
        model.load_state_dict(weights)
        return model.eval()


def polar_ready(layer: Layer) -> bool:
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
    names = {name: f"extended_{name}".replace("extended_extended_", "extended_") for name in tables}
    kept = {name: table for name, table in config.mixers.items() if name not in tables}
    return config.changed(
        {
            "pattern": tuple(names.get(name, name) for name in config.pattern),
            "mixers": kept | {names[name]: table for name, table in tables.items()},
        }
    )


def cores_of(model: Model, parameter: str) -> dict[int, Any]:
    """The cores that have a parameter of that name, by layer."""
    mixers = {i: cast(Block, block).mixer for i, block in enumerate(model.blocks)}
    return {i: mixer.core for i, mixer in mixers.items() if hasattr(getattr(mixer, "core", None), parameter)}


def way_of(settings: ExtendConfig, trained_length: int) -> Way:
    """The way that the settings name."""
    return Polar(settings, trained_length)
