"""A trained model with a narrower cache: each key is held by its principal directions alone (mixers.md, section 5.7).

Calibration texts tell, for each layer and head, along which directions its keys vary and how much its queries look
there. The directions that the scores can spare are left out; a layer's cache is as wide as the head that needs most.
Layers with a window, whose cache is small, stay as they are, and so does what needs every direction.
"""

from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn

from atma.mixers import find
from atma.mixers.heads import Attending
from atma.model import Block, Model
from atma.model_config import KIND
from atma.narrow import require_floats

LOW_RANK = "low_rank"


class Moments(NamedTuple):
    """Of the keys and queries of a layer as they enter its scores, before rotation, by key head (G, K, K) float64."""

    keys: Tensor
    """Mean of k kᵀ."""
    queries: Tensor
    """Mean of q qᵀ over all the queries that read the head."""


class Directions(NamedTuple):
    """Of the keys of a layer."""

    basis: Tensor
    """(G, K, K) float64, a direction a column, the most important first."""
    ranks: tuple[int, ...]
    """How many each key head needs."""

    @property
    def rank(self) -> int:
        """How many the layer holds."""
        return max(self.ranks)


@torch.inference_mode()
def moments(model: Model, texts: Iterable[Sequence[int]]) -> dict[int, Moments]:
    """The moments of each layer that can be compressed, over texts of token ids.

    ValueError: there is no such layer, or no text.
    """
    sums: dict[int, list[Tensor]] = {layer: [] for layer in _compressible(model)}
    if not sums:
        raise ValueError("nothing to compress: no layer attends over a whole text with keys of full width")
    with ExitStack() as stack:
        for layer, mixer in _compressible(model).items():
            stack.callback(mixer.register_forward_pre_hook(_adding(sums[layer])).remove)
        for text in texts:
            model(torch.as_tensor(text, device=model.embed.weight.device)[None])
    if not all(sums.values()):
        raise ValueError("no text to calibrate on")
    return {layer: Moments(keys / tokens, queries / tokens) for layer, (keys, queries, tokens) in sums.items()}


def directions(found: Moments, tolerance: float) -> Directions:
    """Eigenvectors of the keys' moments, and for each head the least r with Σ_{i>r} σ_i² q̄_i² ≤ tolerance · Σ_i.

    ValueError: a moment is not finite.
    """
    if not all(bool(x.isfinite().all()) for x in found):
        raise ValueError("keys or queries of the calibration texts are not finite; check the model's weights")
    spread, basis = torch.linalg.eigh(found.keys)
    spread, basis = spread.flip(-1).clamp(min=0), basis.flip(-1)
    looked = torch.einsum("gki,gkl,gli->gi", basis, found.queries, basis)
    weight = spread * looked
    left = weight.flip(-1).cumsum(-1).flip(-1)  # by the directions from i on
    ranks = (left > tolerance * left[:, :1]).sum(-1).clamp(min=1)
    return Directions(basis, tuple(ranks.tolist()))


@torch.no_grad()
def compress(model: Model, found: dict[int, Moments], tolerance: float = 0.01) -> tuple[Model, dict[int, Directions]]:
    """The model whose caches hold so many numbers a key as the tolerance asks for, and what was kept of each layer.

    tolerance: the share of Σ σ_i² q̄_i² that may be lost. ValueError unless 0 ≤ tolerance < 1, or
    where its weights are narrow.
    """
    if not 0 <= tolerance < 1:
        raise ValueError(f"tolerance must be at least 0 and below 1, not {tolerance}")
    require_floats(model, "compressing")
    config, own, pattern, tables = model.config, model.state_dict(), list(model.config.layers), {}
    kept = {layer: directions(one, tolerance) for layer, one in found.items()}
    for layer, one in kept.items():
        if one.rank < one.basis.shape[-1]:
            options = config.named()[pattern[layer]].options
            pattern[layer] += f"_rank_{one.rank}"
            tables[pattern[layer]] = {KIND: LOW_RANK, **options, "qk_rank": one.rank, "directions": True}
            own[f"blocks.{layer}.mixer.core.directions"] = one.basis[..., : one.rank]
    made = Model(config.changed({"pattern": pattern, "mixers": tables})).to(model.embed.weight)
    names = {name: name if name in own else name.replace(".core.inner.", ".core.") for name in made.state_dict()}
    made.load_state_dict({name: own[source] for name, source in names.items()})
    return made.train(model.training), kept


def _compressible(model: Model) -> dict[int, Attending]:
    """The mixers by layer that attend over the whole text and could be of low rank."""
    low = find(LOW_RANK).cls
    mixers = {layer: cast(Block, block).mixer for layer, block in enumerate(model.blocks)}
    return {
        layer: mixer
        for layer, mixer in mixers.items()
        if isinstance(mixer, Attending)
        and issubclass(low, type(mixer))
        and type(mixer) is not low
        and mixer.core.window is None
    }


def _adding(sums: list[Tensor]):
    """A hook that adds what a mixer is given to the sums: Σ k kᵀ, Σ q qᵀ over a head's queries and their share, and
    tokens."""

    def hook(mixer: nn.Module, given: tuple[Tensor, ...]) -> None:
        made = cast(Attending, mixer).project(given[0])
        k, q = made.k.double(), made.q.double().unflatten(1, (made.k.shape[1], -1))
        new = [
            torch.einsum("bgtk,bgtl->gkl", k, k),
            torch.einsum("bghtk,bghtl->gkl", q, q) / q.shape[2],
            torch.tensor(float(k.shape[0] * k.shape[2]), dtype=torch.float64, device=k.device),
        ]
        sums[:] = [a + b for a, b in zip(sums, new, strict=True)] if sums else new

    return hook


__all__ = ["Directions", "Moments", "compress", "directions", "moments"]
