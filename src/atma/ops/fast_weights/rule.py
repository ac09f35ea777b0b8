"""Which neural memory it is: the network, what it minimises, how it forgets and steps, and what goes together.

A memory is a small network whose weights are written by every token. `Rule` says which one, as mixers.md, section 4
does, and refuses what that section does not offer; `Memory` adds the slow weights, `Gates` is what each token brings.
"""

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple

from torch import Tensor

from atma.strict import check_fields, require

HUBERS = ("huber", "huber_coordinate", "huber_switch")
RENORMS = ("renorm", "renorm_after_read")


@dataclass(frozen=True)
class Rule:
    """Which memory it is (mixers.md, section 4); by default a matrix under the delta rule. ValueError: not offered."""

    network: Literal["matrix", "mlp", "gated"] = "matrix"
    """core(W; x) = W₁ x, W₁ act(W₂ x), or W₁ (act(W₂ x) ⊙ W₃ x)."""
    activation: Literal["gelu", "silu"] = "gelu"
    residual: Literal["none", "identity", "skip"] = "none"
    """J of f(W; x) = J x + N(core(W; x)); "skip" is a slow matrix, given."""
    norm: bool = False
    """N is a layer norm with slow gain and shift, else nothing."""
    bias: Literal["dot", "l2", "lp", "huber", "huber_coordinate", "huber_switch"] = "l2"
    """Of the inner loss between f and v."""
    p: float = 3.0
    """Of the bias lp."""
    retention: Literal["l2", "lq", "kl", "renorm", "renorm_after_read"] = "l2"
    """ρ, between what is written and the weights that are read."""
    q: float = 4.0
    """Of the retention lq."""
    decay_to: Literal["zero", "initial"] = "zero"
    optimiser: Literal["gd", "momentum", "muon"] = "gd"
    schedule: Literal["muon", "lact"] = "muon"
    """Coefficients of muon's Newton–Schulz rounds."""
    anchor: Literal["all", "hidden"] = "all"
    """Which matrices' inner gradients are taken at the last boundary: all, or all but W₁'s."""
    normalised: bool = False
    """A network's inner gradients are divided by max(1, ‖h‖²), so that no step of θ ≤ 1 goes beyond its error."""
    average: bool = False
    """Read the mean of the chunk's steps (TTT)."""
    granularity: Literal["token", "chunk"] = "token"
    """What is read changes with every token, or at the end of each chunk."""
    chunk: int = 1
    """C, tokens from one boundary of the absolute grid to the next."""
    window: int = 1
    """c, tokens whose losses a step descends."""
    radius: float = math.inf
    """At a boundary A is drawn back to W⁰ until ‖A − W⁰‖ ≤ radius ‖W⁰‖, each matrix by itself (section 4.9)."""
    gates: Literal["head", "channel", "matrix"] = "head"
    """γ, η and θ: a number for each head, or V numbers; "matrix": θ has one for each matrix, the others one."""

    def __post_init__(self) -> None:
        check_fields(self)
        for name in ("chunk", "window"):
            require(getattr(self, name) >= 1, name, getattr(self, name), "at least 1")
        for name in ("p", "q"):
            require(1 <= getattr(self, name) < math.inf, name, getattr(self, name), "at least 1 and finite")
        require(self.radius > 0, "radius", self.radius, "positive, or inf for no bound")
        _check_together(self)
        _check_bounds(self)
        _check_chunk_writes(self)

    @property
    def matrices(self) -> int:
        """How many fast weights a head has: W₁, W₂, W₃ in this order."""
        return {"matrix": 1, "mlp": 2, "gated": 3}[self.network]

    @property
    def step_at_end(self) -> bool:
        """Whether θ multiplies a chunk's step and not its gradients: NS has no scale (section 4.8)."""
        return self.granularity == "chunk" and self.optimiser == "muon" and self.retention == "l2"


def _check_together(rule: Rule) -> None:
    """ValueError for options that are each known and together none."""
    one = rule.window == 1 or rule.bias not in HUBERS
    require(one, "window", rule.window, f"1 for bias = {rule.bias!r}, whose δ is the current token's")
    head = rule.retention != "kl" or rule.gates != "channel"
    require(head, "gates", rule.gates, '"head" for retention = "kl", whose γ is equal along a row')
    anchored = rule.anchor == "all" or rule.retention not in ("kl", "lq")
    require(anchored, "anchor", rule.anchor, f'"all" for retention = {rule.retention!r}')
    require(rule.anchor == "all" or not rule.average, "anchor", rule.anchor, '"all" where average = true')
    plain = not rule.average or rule.optimiser == "gd"
    require(plain, "optimiser", rule.optimiser, '"gd" where average = true')
    plain = not rule.average or rule.retention == "l2"
    require(plain, "retention", rule.retention, '"l2" where average = true')


def _check_bounds(rule: Rule) -> None:
    """ValueError for bounds of steps and weights where they are of no use."""
    own = math.isinf(rule.radius) or (rule.retention == "l2" and rule.granularity == "token")
    require(own, "radius", rule.radius, 'left out without retention = "l2" and granularity = "token"')
    free = math.isinf(rule.radius) or rule.network != "matrix"
    deep = not rule.normalised or rule.network != "matrix"
    require(deep, "normalised", True, 'false for network = "matrix", whose keys have a length of their own')
    require(free, "radius", rule.radius, 'left out for network = "matrix", whose W⁰ may be zero')


def _check_chunk_writes(rule: Rule) -> None:
    """ValueError for what section 4.8 does not offer, or alone offers."""
    if rule.granularity == "token":
        weights = rule.retention not in RENORMS
        require(weights, "granularity", "token", f'"chunk" for retention = {rule.retention!r}')
        require(rule.gates != "matrix", "gates", "matrix", '"head" or "channel" without granularity = "chunk"')
        return
    known = rule.retention not in ("lq", "kl")
    require(known, "retention", rule.retention, '"l2", "renorm" or "renorm_after_read" for granularity = "chunk"')
    require(not rule.average, "average", True, 'false for granularity = "chunk"')
    require(rule.anchor == "all", "anchor", rule.anchor, '"all" for granularity = "chunk"')


class Gates(NamedTuple):
    """What each token brings beside its key and value. Of γ, η and θ see `Rule.gates` for the axis that "…" stands for:
    none, or V, or of θ the matrices."""

    step: Tensor
    """θ (B, H, T, …)."""
    keep: Tensor | None = None
    """γ (B, H, T, …) in (0, 1]; None for 1."""
    momentum: Tensor | None = None
    """η (B, H, T, …), with momentum and muon."""
    delta: Tensor | None = None
    """δ (B, H, T), of huber_coordinate also (B, H, T, V), with the three hubers."""
    omega: Tensor | None = None
    """ω (B, H, T, c), the token's own first, where c > 1."""


class Memory(NamedTuple):
    """Which memory it is, and its slow weights, which no token changes."""

    rule: Rule
    initial: tuple[Tensor, ...]
    """W⁰: (H, V, E or K′) and with a network (H, E, K′) once or twice; of kl the dual."""
    gain: Tensor | None = None
    """(H, V), of the layer norm."""
    shift: Tensor | None = None
    """(H, V), of the layer norm."""
    skip: Tensor | None = None
    """J (H, V, K′), of residual = "skip"."""
