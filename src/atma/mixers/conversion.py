"""What an attention layer of a trained model becomes when it is given length, and how weights move (mixers.md, 7).

A way (`toward_polar`, …) takes the options of a layer and gives those of the layer that is trained in its place. At the
end `settled` gives the options and the weights of an ordinary layer of the table that computes the same.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from atma.mixers.attention import Attention
from atma.mixers.table import MIXERS, Found, find

Options = dict[str, Any]
Weights = dict[str, Tensor]
TOWARD_POLAR = {"rope": "rope_homotopy"}
"""The softmax cores that have positions, and those that take them to polar attention."""
CANON = {"rope_homotopy": "rope_canon"}
"""The option of a core by which its layer has Canon."""
POSITIONS = ("rope_canon", "rope_scaling", "rope_factor", "rope_trained", "start_mix", "start_fade")
"""Options that a polar core does not have."""


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
        kinds = [name for name, (_, fixed) in MIXERS.items() if not fixed and find(name).cls is self.found.cls]
        return kinds[-1] if "attention" not in kinds else "attention"


def toward_polar(layer: Layer, memory: str | bool, bounds: Options) -> Options:
    """Options of the layer between softmax and polar attention (mixers.md, section 7.2), with Canon.

    bounds: count_limit, sharpening, and max_half_life of the memory.
    """
    core = TOWARD_POLAR[layer.options["core"]]
    wanted = {**layer.options, "core": core, CANON[core]: True, "memory": memory, **bounds}
    return _taken(layer, wanted)


def settled_polar(layer: Layer) -> Options:
    """Options of the ordinary polar layer that computes what one of `toward_polar` does at its end."""
    return _taken(layer, {key: value for key, value in layer.options.items() if key not in POSITIONS} | {"core": "polar"})


def fold_polar(weights: Weights, score_scale: float) -> Weights:
    """Weights of one layer, names within its mixer, as the polar core has them: the scale of scores goes into Canon of
    the queries, the radius of each head into its columns of the output projection."""
    weights = dict(weights)
    radius, slope = weights.pop("core.log_radius").exp(), weights["core.null_value"].shape[1]
    for name in ("core.mix", "core.fade"):
        weights.pop(name)
    scale = score_scale * math.sqrt(slope)
    taps = weights["canon_q"] * scale
    taps[:, -1] += scale - 1
    weights["canon_q"] = taps
    out = weights["out_proj.weight"]
    factor = (radius / math.sqrt(slope)).repeat_interleave(out.shape[1] // len(radius))
    weights["out_proj.weight"] = out * factor
    return weights


def _taken(layer: Layer, wanted: Options) -> Options:
    """The options that a layer of these has, its kind beside them."""
    found = find(layer.kind)
    own = found.cls.takes(wanted)
    return {"kind": layer.kind} | {key: value for key, value in wanted.items() if key in own}
