"""Mixers, attention cores, memories and selection policies by name, each a line; those of other packages join them.

An entry is the class, as MODULE:CLASS in this folder, and the options that it fixes: so a published system is a line.
Another package names its own by an entry point NAME = "package.module:Class" of the group that `GROUPS` tells. Nothing
is imported before it is asked for by its name.
"""

import difflib
import functools
import importlib
import importlib.metadata
import sys
from collections.abc import Mapping
from typing import Any, NamedTuple

from atma.mixers.base import Mixer

Entries = Mapping[str, tuple[str, Mapping[str, Any]]]

MIXERS: Entries = {
    "gated_conv": ("gated_conv:GatedConv", {}),
    "local": ("gated_conv:GatedConv", {}),
    "attention": ("attention:Attention", {}),
    "global": ("attention:Attention", {}),
    "atma": ("attention:Attention", {"core": "polar", "memory": True}),
    "polar": ("attention:Attention", {"core": "polar", "memory": False}),
    "polar_pages": ("polar_pages:PolarPages", {"core": "polar"}),
    "nope": ("attention:Attention", {"core": "nope", "memory": False}),
    "rope": ("attention:Attention", {"core": "rope", "memory": False}),
    "grouped_query": ("grouped_query:GroupedQueryAttention", {}),
    "linearised": ("linearised:LinearisedAttention", {}),
    "linearised_grouped_query": ("linearised:LinearisedGroupedQuery", {}),
    "linear": ("linear_recurrence:LinearRecurrence", {"system": "linear"}),
    "based": ("linear_recurrence:LinearRecurrence", {"system": "based"}),
    "hedgehog": ("linear_recurrence:LinearRecurrence", {"system": "hedgehog"}),
    "lightning": ("linear_recurrence:LinearRecurrence", {"system": "lightning"}),
    "retnet": ("linear_recurrence:LinearRecurrence", {"system": "retnet"}),
    "gla": ("linear_recurrence:LinearRecurrence", {"system": "gla"}),
    "hgrn2": ("linear_recurrence:LinearRecurrence", {"system": "hgrn2"}),
    "mamba2": ("linear_recurrence:LinearRecurrence", {"system": "mamba2"}),
    "deltanet": ("linear_recurrence:LinearRecurrence", {"system": "deltanet"}),
    "gated_deltanet": ("linear_recurrence:LinearRecurrence", {"system": "gated_deltanet"}),
    "kda": ("linear_recurrence:LinearRecurrence", {"system": "kda"}),
    "delta_memory": ("linear_recurrence:LinearRecurrence", {"system": "delta_memory"}),
    "poly_delta": ("linear_recurrence:LinearRecurrence", {"system": "poly_delta"}),
    "atma_memory": ("neural_memory:NeuralMemory", {"system": "atma_memory"}),
    "titans": ("neural_memory:NeuralMemory", {"system": "titans"}),
    "ttt_linear": ("neural_memory:NeuralMemory", {"system": "ttt_linear"}),
    "ttt_mlp": ("neural_memory:NeuralMemory", {"system": "ttt_mlp"}),
    "moneta": ("neural_memory:NeuralMemory", {"system": "moneta"}),
    "yaad": ("neural_memory:NeuralMemory", {"system": "yaad"}),
    "memora": ("neural_memory:NeuralMemory", {"system": "memora"}),
    "dla": ("neural_memory:NeuralMemory", {"system": "dla"}),
    "swla": ("neural_memory:NeuralMemory", {"system": "swla"}),
    "omeganet": ("neural_memory:NeuralMemory", {"system": "omeganet"}),
    "atlas": ("neural_memory:NeuralMemory", {"system": "atlas"}),
    "atlas_pp": ("neural_memory:NeuralMemory", {"system": "atlas_pp"}),
    "lact": ("neural_memory:NeuralMemory", {"system": "lact"}),
    "allmem": ("neural_memory:NeuralMemory", {"system": "allmem"}),
    "deep_transformer": ("neural_memory:NeuralMemory", {"system": "deep_transformer"}),
    "swdt": ("neural_memory:NeuralMemory", {"system": "swdt"}),
    "dot": ("neural_memory:NeuralMemory", {"system": "dot"}),
    "memory_beside_window": ("neural_wirings:BesideWindow", {}),
    "mag": ("neural_wirings:GatedWindow", {}),
    "mac": ("neural_segments:Segments", {}),
    "raven": ("raven:Raven", {}),
    "landmark": ("landmark:LandmarkAttention", {}),
    "superlinear": ("superlinear:Superlinear", {}),
    "orchid": ("orchid:Orchid", {}),
    "relative_attention": ("relative_attention:RelativeAttention", {}),
    "tensor_attention": ("tensor_attention:TensorAttention", {}),
    "glu": ("deconstructed:Glu", {}),
    "taylor2": ("deconstructed:Taylor2", {}),
    "gate_sum": ("deconstructed:GateSum", {}),
    "static_qk": ("plain_attention:StaticQK", {}),
    "position_qk": ("plain_attention:PositionQK", {}),
    "random_qk": ("random_attention:RandomQK", {}),
    "minimal": ("minimal:MinimalAttention", {}),
    "low_rank": ("low_rank:LowRankAttention", {}),
}
"""Mixers by name."""
CORES: Entries = {
    "polar": ("polar:PolarCore", {}),
    "nope": ("softmax:SoftmaxCore", {}),
    "rope": ("rope:RopeCore", {}),
    "rotary": ("rotary:RotaryCore", {}),
    "persistent": ("persistent:PersistentCore", {}),
    "rope_homotopy": ("homotopy:RopeHomotopy", {}),
    "rotary_homotopy": ("homotopy:RotaryHomotopy", {}),
}
"""Attention cores by name: how the queries of an attention mixer read keys."""
MEMORIES: Entries = {
    "delta": ("delta_memory:DeltaMemory", {}),
    "linear": ("recurrent_memory:RecurrentMemory", {"system": "linear"}),
    "based": ("recurrent_memory:RecurrentMemory", {"system": "based"}),
    "hedgehog": ("recurrent_memory:RecurrentMemory", {"system": "hedgehog"}),
    "lightning": ("recurrent_memory:RecurrentMemory", {"system": "lightning"}),
    "retnet": ("recurrent_memory:RecurrentMemory", {"system": "retnet"}),
    "gla": ("recurrent_memory:RecurrentMemory", {"system": "gla"}),
    "mamba2": ("recurrent_memory:RecurrentMemory", {"system": "mamba2"}),
    "deltanet": ("recurrent_memory:RecurrentMemory", {"system": "deltanet"}),
    "gated_deltanet": ("recurrent_memory:RecurrentMemory", {"system": "gated_deltanet"}),
    "kda": ("recurrent_memory:RecurrentMemory", {"system": "kda"}),
    "poly_delta": ("recurrent_memory:RecurrentMemory", {"system": "poly_delta"}),
    "atma_memory": ("neural_channel:NeuralChannel", {"system": "atma_memory"}),
    "titans": ("neural_channel:NeuralChannel", {"system": "titans"}),
    "ttt_linear": ("neural_channel:NeuralChannel", {"system": "ttt_linear"}),
    "ttt_mlp": ("neural_channel:NeuralChannel", {"system": "ttt_mlp"}),
    "moneta": ("neural_channel:NeuralChannel", {"system": "moneta"}),
    "yaad": ("neural_channel:NeuralChannel", {"system": "yaad"}),
    "memora": ("neural_channel:NeuralChannel", {"system": "memora"}),
    "dla": ("neural_channel:NeuralChannel", {"system": "dla"}),
    "swla": ("neural_channel:NeuralChannel", {"system": "swla"}),
    "omeganet": ("neural_channel:NeuralChannel", {"system": "omeganet"}),
    "atlas": ("neural_channel:NeuralChannel", {"system": "atlas"}),
    "atlas_pp": ("neural_channel:NeuralChannel", {"system": "atlas_pp"}),
    "lact": ("neural_channel:NeuralChannel", {"system": "lact"}),
    "allmem": ("neural_channel:NeuralChannel", {"system": "allmem"}),
}
"""Memories by name: the third channel of an attention mixer."""
POLICIES: Entries = {
    "top_pages": ("policies.top_pages:TopPages", {}),
    "pages": ("policies.pages:TrainedPages", {}),
    "longheads": ("policies.longheads:LongHeads", {}),
    "shadows": ("policies.shadows:CertifiedShadows", {}),
    "int8": ("policies.shadows:EightBits", {}),
    "hip": ("policies.hip:Hip", {}),
    "evict": ("policies.evict:Evict", {}),
    "hylra": ("policies.hylra:Hylra", {}),
    "echo": ("policies.echo:Echo", {}),
}
"""Selection policies by name: how a trained attention layer reads less of its keys, chosen at run time."""
GROUPS = {"mixer": "atma.mixers", "core": "atma.cores", "memory": "atma.memories", "policy": "atma.policies"}
_TABLES = {"mixer": MIXERS, "core": CORES, "memory": MEMORIES, "policy": POLICIES}


class Found(NamedTuple):
    """A class of the table, the options that its entry fixes, and the package that it comes from ("" for this one)."""

    cls: Any
    fixed: Mapping[str, Any]
    package: str = ""


def names(what: str = "mixer") -> list[str]:
    """Every name there is, of this package and of others."""
    return [*_TABLES[what], *sorted({point.name for point in _points(what)} - set(_TABLES[what]))]


@functools.cache
def find(name: str, what: str = "mixer", package: str = "") -> Found:
    """What a name stands for. `package`: from which it came when it was written down.

    ValueError: nothing of that name is here (the nearest is told, or the package to install), two things are, or it
    cannot be imported.
    """
    points = [point for point in _points(what) if point.name == name]
    holders = ["atma-lm"] * (name in _TABLES[what]) + [_package(point) for point in points]
    if len(holders) > 1:
        raise ValueError(f"two packages have a {what} '{name}': {' and '.join(holders)}; uninstall one of them")
    if not holders:
        raise ValueError(_unknown(name, what, package))
    if points:
        return _imported(points[0], what)
    place, fixed = _TABLES[what][name]
    module, _, cls = place.partition(":")
    return Found(getattr(importlib.import_module(f"atma.mixers.{module}"), cls), fixed)


def package_of(name: str, what: str = "mixer") -> str:
    """The installed package that has a name, with its version; "" for this one. Nothing is imported."""
    return " and ".join(_package(point) for point in _points(what) if point.name == name)


def small(name: str, what: str = "mixer") -> tuple[Mapping[str, Any], ...]:
    """The tiny options that a mixer or a policy is tested over, those that its entry contradicts left out."""
    found = find(name, what)
    every = getattr(sys.modules[found.cls.__module__], "SMALL", ({},))
    return tuple(some for some in every if _allows(found, some))


def _allows(found: Found, options: Mapping[str, Any]) -> bool:
    """Whether an entry leaves these options to be set so."""
    takes = getattr(found.cls, "takes", None)
    taken = {**options} if takes is None else takes({**options, **found.fixed})
    return all(key in taken and found.fixed.get(key, value) == value for key, value in options.items())


@functools.cache
def _points(what: str) -> tuple[importlib.metadata.EntryPoint, ...]:
    return tuple(importlib.metadata.entry_points(group=GROUPS[what]))


def _package(point: importlib.metadata.EntryPoint) -> str:
    return f"{point.dist.name} {point.dist.version}" if point.dist is not None else point.value


def _unknown(name: str, what: str, package: str) -> str:
    if package:
        return f"no {what} '{name}' is installed here: it came with {package}; install that package"
    known = names(what)
    near = difflib.get_close_matches(str(name), known, 1, 0.0)[0]
    return f"no {what} '{name}'; did you mean '{near}'? (there are {', '.join(known)})"


def _imported(point: importlib.metadata.EntryPoint, what: str) -> Found:
    package = _package(point)
    try:
        cls = point.load()
    except Exception as error:  # whatever another package does when it is imported
        problem = " ".join(str(error).split())
        told = f"{type(error).__name__}: {problem}"
        raise ValueError(f"the {what} '{point.name}' of {package} cannot be imported: {told}") from error
    if what == "mixer" and not (isinstance(cls, type) and issubclass(cls, Mixer)):
        raise ValueError(f"the mixer '{point.name}' of {package} is {point.value}, which is no atma.mixers.Mixer")
    return Found(cls, {}, package)


__all__ = ["CORES", "GROUPS", "MEMORIES", "MIXERS", "POLICIES", "Found", "find", "names", "package_of", "small"]
