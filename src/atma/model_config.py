"""What a model is, as frozen data: its shape, its initial values, and the named ones (`PRESETS`)."""

import math
from dataclasses import dataclass, field
from typing import Literal

from atma.strict import LATER, check_fields, require

Core = Literal["polar", "nope", "rope"]
CanonInit = Literal["uniform", "previous"]
Kind = Literal["local", "global"]
RopeScaling = Literal["none", "linear", "yarn"]


@dataclass(frozen=True)
class ModelConfig:
    """Shape and initial values of a model. Sizes are counts, half-lives tokens. Source: maths.md, sections 1 to 6."""

    vocab_size: int = 50_304
    width: int = 1024
    depth: int = 16
    pattern: tuple[Kind, ...] = ("local", "local", "global", "local")
    query_heads: int = 8
    key_value_heads: int = 2
    head_width: int = 128
    core: Core = "polar"
    memory: bool = True
    window: int | None = None
    mlp_multiple: int = 4
    local_taps: int = 3
    canon_taps: int = 4
    logit_cap: float = 15.0
    norm_epsilon: float = 1e-6
    tied_head: bool = False
    max_half_life: float = math.inf
    """Upper bound, in tokens, of every memory head's half-life; inf is the published unbounded form. A recipe that
    starts from a preset with a bound, and sets none, has its own training length here, and in `count_limit`."""
    learned_half_life: bool = False
    """Each memory head learns its own bound, beginning at max_half_life: a further factor of its γ."""
    count_limit: int | None = None
    """Visible keys beyond which a polar layer's null floor stays and its temperature grows `sharpening` times as fast;
    None is the published form, both growing on. At the training length it changes nothing in training."""
    sharpening: float = 2.0
    """Growth of a polar layer's temperature with ln n beyond `count_limit`, relative to its growth before."""
    direction_radius: float | None = None
    """Length of the direction a polar layer hands on; None is sqrt(head_width), 1.0 is the published form."""
    decay_bias: float = 3.9
    beta_bias: float = 0.0
    length_gain: float = -1.0
    null_base: float = 2.0
    null_slope: float = 0.5
    magnitude_slope: float = -1.5
    canon_init: CanonInit = "previous"
    """"previous" starts the upper half of every key's channels as those of the token before; "uniform" is published."""
    share_query_key_init: bool = True
    """Start every query projection equal to that of its key head, so that equal tokens match from the first step.
    Cores with Canon only: without it every token would match itself. False is the published form."""
    zero_input_projections: bool = False
    """Also zero the local mixers' input projections, as the published training script does (they then never learn)."""
    rope_canon: bool = field(default=False, metadata=LATER)
    """Canon on q, k and v of rope layers too, before the rotation; `canon_init` and `share_query_key_init` then hold
    for them as for the other cores. False is the published form: a rope layer without Canon."""

    rope_scaling: RopeScaling = field(default="none", metadata=LATER)
    """How a rope layer's positions are stretched over longer texts: "linear" interpolation, or "yarn"."""
    rope_factor: float = field(default=1.0, metadata=LATER)
    """How many times as long as the trained length."""
    rope_trained: int | None = field(default=None, metadata=LATER)
    """The trained length in tokens, which "yarn" goes by."""

    def __post_init__(self) -> None:
        check_fields(self)
        sizes = ("vocab_size", "width", "depth", "query_heads", "key_value_heads", "head_width", "mlp_multiple")
        for name in (*sizes, "local_taps", "canon_taps"):
            require(getattr(self, name) >= 1, name, getattr(self, name), "at least 1")
        for name in ("decay_bias", "beta_bias", "length_gain", "null_base", "null_slope", "magnitude_slope"):
            require(math.isfinite(getattr(self, name)), name, getattr(self, name), "finite")
        for name in ("logit_cap", "norm_epsilon", "max_half_life"):
            require(getattr(self, name) > 0, name, getattr(self, name), "positive")
        bounded = not self.learned_half_life or 1 <= self.max_half_life < math.inf
        require(bounded, "max_half_life", self.max_half_life, "finite and at least 1 for learned_half_life")
        require(len(self.pattern) > 0, "pattern", self.pattern, "at least one layer")
        for name in ("window", "count_limit"):
            value = getattr(self, name)
            require(value is None or value >= 1, name, value, "at least 1, or left out")
        require(0 <= self.sharpening < math.inf, "sharpening", self.sharpening, "a finite number of at least 0")
        radius = self.direction_radius
        require(radius is None or radius > 0, "direction_radius", radius, "positive, or left out")
        divides = self.query_heads % self.key_value_heads == 0
        require(divides, "key_value_heads", self.key_value_heads, f"a divisor of query_heads = {self.query_heads}")
        single = self.canon_taps == 1 and self.canon_init == "previous" and self.has_canon
        require(not single, "canon_taps", 1, 'at least 2 for canon_init = "previous" ("uniform" takes one)')
        self._check_rope()

    def _check_rope(self) -> None:
        scaling, trained, factor = self.rope_scaling, self.rope_trained, self.rope_factor
        require(scaling == "none" or self.core == "rope", "rope_scaling", scaling, f"none for core {self.core}")
        require(scaling != "none" or factor == 1, "rope_factor", factor, "left out without rope_scaling")
        require(math.isfinite(factor) and factor >= 1, "rope_factor", factor, "a finite number of at least 1")
        known = trained is not None or scaling != "yarn"
        require(known and (trained is None or trained >= 1), "rope_trained", trained, "the trained length in tokens")
        if self.core == "rope":
            require(self.head_width % 4 == 0, "head_width", self.head_width, "a multiple of 4 for rotary positions")

    @property
    def layers(self) -> tuple[Kind, ...]:
        """The kind of each layer, first to last."""
        return tuple(self.pattern[i % len(self.pattern)] for i in range(self.depth))

    @property
    def has_canon(self) -> bool:
        """Whether global layers have Canon on q, k and v."""
        return self.core != "rope" or self.rope_canon

    @property
    def radius(self) -> float:
        return math.sqrt(self.head_width) if self.direction_radius is None else self.direction_radius


def preset(name: str) -> ModelConfig:
    """The named model configuration; ValueError names the known ones."""
    if not isinstance(name, str) or name not in PRESETS:
        raise ValueError(f"no preset {name!r}; known: {', '.join(PRESETS)}")
    return PRESETS[name]


PRESETS: dict[str, ModelConfig] = {
    "nano-test": ModelConfig(257, 64, depth=4, query_heads=2, key_value_heads=1, head_width=16, mlp_multiple=2),
    "nano": ModelConfig(
        1024, width=128, depth=8, query_heads=2, key_value_heads=1, head_width=64, max_half_life=256, count_limit=256
    ),
    "small": ModelConfig(
        16_384,
        width=512,
        depth=12,
        query_heads=8,
        key_value_heads=2,
        head_width=64,
        max_half_life=2048,
        count_limit=2048,
    ),
    "base": ModelConfig(max_half_life=2048, count_limit=2048),
    "base-published": ModelConfig(direction_radius=1.0, canon_init="uniform", share_query_key_init=False),
}
