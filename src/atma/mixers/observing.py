"""Attention layers while a model reads a text whole: what plans of selection policies are measured on."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from atma.mixers.base import Mixer
from atma.mixers.heads import Attending
from atma.mixers.policies.base import New
from atma.mixers.policies.plans import Layer


def layers_of(mixers: Sequence[Mixer], reading: Callable[[], object]) -> list[Layer]:
    """What each of a model's attention layers is given, and projects, while `reading` has the model read one text."""
    given: dict[int, Tensor] = {}
    hooks = [mixer.register_forward_pre_hook(_noting(given, i)) for i, mixer in enumerate(mixers)]
    try:
        reading()
    finally:
        for hook in hooks:
            hook.remove()
    return [_layer(mixer, given[i]) for i, mixer in enumerate(mixers)]


def _noting(given: dict[int, Tensor], layer: int) -> Callable[..., None]:
    def note(_: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        given[layer] = arguments[0]

    return note


def _layer(mixer: Any, x: Tensor) -> Layer:
    assert isinstance(mixer, Attending)
    projected = mixer.project(x)
    q, k = mixer.core.turn(projected.q, projected.k, None, None)
    start = torch.zeros(1, dtype=torch.int32, device=x.device)
    return Layer(mixer, New(q, k, projected.v, projected.q, projected.k, start), projected.gate)
