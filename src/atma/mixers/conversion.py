"""What an attention layer of a trained model becomes when it is given length, and how weights move (mixers.md, 7).

A way (`toward_polar`, …) takes the options of a layer and gives those of the layer that is trained in its place. At the
end `settled` gives the options and the weights of an ordinary layer of the table that computes the same.
"""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

from torch import Tensor

from atma.mixers.attention import Attention
from atma.mixers.table import MIXERS, Found, find

Options = dict[str, Any]
Weights = dict[str, Tensor]
TOWARD_POLAR = {"rope": "rope_homotopy", "rotary": "rotary_homotopy"}
"""The softmax cores that have positions, and those that take them to polar attention."""
CANON = {"rope_homotopy": "rope_canon", "rotary_homotopy": "rotary_canon"}
"""The option of a core by which its layer has Canon."""
LINEAR = {"attention": "linearised", "grouped_query": "linearised_grouped_query"}
"""The kinds of softmax layers, and those that make them linear."""


class Layer(NamedTuple):
    """A mixer as a configuration has it: what its name stands for, and every option."""

    found: Found
    options: Mapping[str, Any]

    @property
    def softmax(self) -> bool:
        """Whether it is softmax attention with positions, which can be given length."""
        return issubclass(self.found.cls, Attention) and self.options.get("core") in TOWARD_POLAR

    @property
    def kind(self) -> str:
        """The name of the table that is this mixer with nothing fixed."""
        return next(name for name, (_, fixed) in MIXERS.items() if not fixed and find(name).cls is self.found.cls)


def toward_polar(layer: Layer, memory: str | bool, bounds: Options) -> Options:
    """Options of the layer between softmax and polar attention (mixers.md, section 7.2), with Canon.

    bounds: count_limit, sharpening, and max_half_life of the memory.
    """
    core = TOWARD_POLAR[layer.options["core"]]
    wanted = {**layer.options, "core": core, CANON[core]: True, "memory": memory, **bounds}
    return _taken(layer.kind, wanted)


def settled_polar(layer: Layer, faded: bool) -> Options:
    """Options of the layer that computes what one of `toward_polar` does at its end: the ordinary polar layer, or, with
    its rotation kept, the same at λ = 1."""
    if not faded:
        return _taken(layer.kind, {**layer.options, "start_mix": 1.0})
    return _taken(layer.kind, {**layer.options, "core": "polar"})


def fold_polar(weights: Weights, score_scale: float) -> Weights:
    """Weights of one layer, names within its mixer, as the polar core has them: the scale of scores goes into Canon of
    the queries, the radius of each head into its columns of the output projection."""
    weights = dict(weights)
    radius, width = weights.pop("core.log_radius").exp(), weights["core.null_value"].shape[1]
    for name in ("core.mix", "core.fade"):
        weights.pop(name)
    scale = score_scale * math.sqrt(width)
    taps = weights["canon_q"] * scale
    taps[:, -1] += scale - 1
    out = weights["out_proj.weight"]
    factor = (radius / math.sqrt(width)).repeat_interleave(out.shape[1] // len(radius))
    return weights | {"canon_q": taps, "out_proj.weight": out * factor}


def beside_window(layer: Layer, memory: str, window: int, sinks: int) -> Options:
    """Options of the layer with a window, attention sinks and a scaled memory (mixers.md, section 7.1)."""
    wanted = {**layer.options, "window": window, "window_sinks": sinks, "memory": memory, "memory_scale": True}
    return _taken(layer.kind, wanted)


def settled_window(layer: Layer) -> Options:
    """Options of the layer whose memory's output projection has α in it."""
    return _taken(layer.kind, {**layer.options, "memory_scale": False})


def fold_scale(weights: Weights) -> Weights:
    """Weights of one layer with α in the rows of the memory's output projection."""
    weights = dict(weights)
    alpha = weights.pop("alpha")
    for name, value in weights.items():
        if name.startswith("memory.") and name.endswith(("out_proj.weight", "out_proj.bias")):
            weights[name] = value * (alpha[:, None] if value.ndim == 2 else alpha)
    return weights


def linearised(layer: Layer, window: int) -> Options:
    """Options of the layer made linear, with an exact window (mixers.md, section 7.3)."""
    if layer.kind not in LINEAR:
        raise ValueError(f"attention of the kind '{layer.kind}' has no linear form here; {' and '.join(LINEAR)} have")
    return _taken(LINEAR[layer.kind], {**layer.options, "window": window, "memory": False})


def _taken(kind: str, wanted: Options) -> Options:
    """The options that a layer of these has, its kind beside them."""
    own = find(kind).cls.takes(wanted)
    return {"kind": kind} | {key: value for key, value in wanted.items() if key in own}
