"""Plans: which layer each layer follows, measured once on texts of a model and then read from a file.

A plan is JSON: the policy, the hash of the model (`atma.hashes.model_hash`), and `sources`, for each attention layer
the one that it follows, itself if none; what else it holds tells what was measured. Any other model refuses it.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from atma.mixers.base import Call
from atma.mixers.heads import Attending
from atma.mixers.policies.base import New, Seat
from atma.strict import check_fields


class Layer(NamedTuple):
    """An attention layer that reads one text whole, without a policy."""

    mixer: Attending
    new: New
    """q, k and v of all tokens of the text, one row."""
    gate: Tensor | None

    def written(self, read: Tensor, added: Tensor | None) -> Tensor:
        """What the layer's attention adds to the stream (1, T, D) when it has read (1, H, T, K)."""
        mixer: Any = self.mixer
        y = mixer.out_proj(mixer.gated(read, self.gate))
        return y if added is None else y + added


@dataclass(frozen=True)
class PlannedConfig:
    """Where the plan is to be found: in a file, or written out."""

    plan: str = ""
    """A file of JSON that `atma.diagnose.planning.plan` has made for this very model."""
    sources: str = ""
    """In place of a file: for each attention layer the one it follows, from 0, such as 0/0/2/2."""

    def __post_init__(self) -> None:
        check_fields(self)
        if not self.plan and not self.sources:
            raise ValueError(
                "a plan is needed: plan=FILE, or sources=0/0/2/2, for each attention layer the one it follows"
            )
        if self.plan:
            told = "/".join(map(str, _read(self.plan)["sources"]))
            if self.sources not in ("", told):
                raise ValueError(f"plan {self.plan} says sources={told}, not {self.sources}; leave one of them out")
            object.__setattr__(self, "sources", told)


def sources_of(config: PlannedConfig, policy: str, seat: Seat) -> list[int]:
    """The source of each layer. ValueError: the plan is of another policy or model, or not of as many layers."""
    if config.plan:
        plan = _read(config.plan)
        if plan["policy"] != policy:
            raise ValueError(f"plan {config.plan} is for the policy {plan['policy']}, not {policy}")
        if plan["model"] != seat.model():
            told = f"{str(plan['model'])[:12]}…, and this one is {seat.model()[:12]}…"
            raise ValueError(f"plan {config.plan} was made for the model {told}; make one for this model")
    try:
        sources = [int(one) for one in config.sources.split("/")]
    except ValueError:
        raise ValueError(f"sources must be layers such as 0/0/2/2, not '{config.sources}'") from None
    if len(sources) != seat.count:
        raise ValueError(f"sources {config.sources} are of {len(sources)} layers, and this model has {seat.count}")
    for layer, source in enumerate(sources):
        if not 0 <= source <= layer or sources[source] != source:
            raise ValueError(f"sources {config.sources}: layer {layer} cannot follow {source}, which follows another")
    return sources


def left(call: Call | None, name: str, layer: int) -> Any:
    """What an earlier layer has left in the record of this call. ValueError: there is no record, or nothing in it."""
    found = None if call is None else call.left.get(f"{name} {layer}")
    if found is None:
        raise ValueError(f"policy '{name}': layer {layer} has left nothing in this call; run the whole model")
    return found


def leave(call: Call | None, name: str, layer: int, what: Any) -> None:
    """Leave something for later layers in the record of this call."""
    if call is not None:
        call.left[f"{name} {layer}"] = what


def plan(policy: str, model: str, sources: Sequence[int], measured: dict[str, Any]) -> dict[str, Any]:
    """A plan as JSON has it."""
    return {"policy": policy, "model": model, "sources": list(sources)} | measured


def rounded(x: Tensor) -> Any:
    """Numbers of a measurement as a plan tells them."""
    return torch.round(x.double(), decimals=6).tolist()


def _read(path: str) -> dict[str, Any]:
    try:
        found = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"plan {path} cannot be read: {error}") from None
    known = isinstance(found, dict) and {"policy", "model", "sources"} <= found.keys()
    if not known or not isinstance(found["sources"], list):
        raise ValueError(f"plan {path} is none: it has no policy, model and list of sources")
    return found


__all__ = ["Layer", "PlannedConfig", "leave", "left", "plan", "rounded", "sources_of"]
