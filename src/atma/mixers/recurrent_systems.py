"""The published linear recurrences by name, and the options that make one out of another (mixers.md, section 3.3).

A system is a line of `SYSTEMS`: what an option is that is left out. Every one can be set, and what does not go together
is refused.
"""

import math
from dataclasses import dataclass, field
from typing import Literal, NamedTuple, get_args

from atma.mixers.base import Place
from atma.mixers.features import FEATURES, WIDEST, FeatureName
from atma.mixers.recurrent_decays import DecayName, Sizes
from atma.mixers.recurrent_gates import WriteName
from atma.mixers.recurrent_surround import ConvName, GateName, NormName, StartName
from atma.ops.recurrent import Rule
from atma.strict import OWN, UNSAID, check_fields, require

SystemName = Literal[
    "linear",
    "based",
    "hedgehog",
    "lightning",
    "retnet",
    "gla",
    "hgrn2",
    "mamba2",
    "deltanet",
    "gated_deltanet",
    "kda",
    "delta_memory",
    "poly_delta",
]


class System(NamedTuple):
    """What a system is where nothing else is asked for."""

    feature: FeatureName
    decay: DecayName
    rule: Rule
    write: WriteName
    conv: ConvName
    norm: NormName
    out_gate: GateName
    normaliser: bool = False
    scaled: bool = False
    """q/√K."""
    least: float = 1.0
    """Of U in A = log U(least, 16)."""
    start: StartName = "published"


SYSTEMS: dict[str, System] = {
    "linear": System("elu1", "none", "add", "none", "none", "plain", "sigmoid", normaliser=True),
    "based": System("taylor", "none", "add", "none", "none", "none", "none", normaliser=True),
    "hedgehog": System("hedgehog", "none", "add", "none", "none", "none", "none", normaliser=True),
    "lightning": System("identity", "lightning", "add", "none", "none", "whole_plain", "sigmoid"),
    "retnet": System("identity", "retnet", "add", "none", "none", "head", "silu", scaled=True),
    "gla": System("identity", "low_rank", "add", "none", "none", "head", "silu", scaled=True),
    "hgrn2": System("identity", "floor", "add", "none", "none", "whole", "none", scaled=True),
    "mamba2": System("identity", "step", "add", "step", "silu", "whole", "silu"),
    "deltanet": System("unit", "none", "delta", "sigmoid", "silu", "head", "none", scaled=True),
    "gated_deltanet": System("unit", "step", "delta", "sigmoid", "silu", "head", "silu", scaled=True, least=0.0),
    "kda": System("unit", "channel_step", "delta", "sigmoid", "silu", "head", "sigmoid", scaled=True),
    "delta_memory": System("unit", "sigmoid", "delta", "biased", "canon", "plain", "sigmoid"),
    "poly_delta": System("poly", "sigmoid", "delta", "biased", "canon", "plain", "sigmoid", start="recall"),
}
assert tuple(SYSTEMS) == get_args(SystemName)


@dataclass(frozen=True)
class RecurrenceConfig:
    """A system and what is set otherwise. None is what the system has; sizes are counts."""

    system: SystemName = "linear"
    """The published system, which gives every option below that is left out. A name of the table fixes it."""
    query_heads: int = 8
    """The model's query heads: H of the systems that have no number of their own."""
    heads: int | None = None
    """H."""
    key_width: int | None = None
    """K, before the feature map."""
    value_width: int | None = None
    """V."""
    feature: FeatureName | None = None
    """φ of queries and keys (mixers.md, section 2.1)."""
    degree: int = 2
    """Of the feature map "poly"."""
    normaliser: bool | None = None
    """Divide what is read by the sum of its weights."""
    decay: DecayName | None = None
    """How memory forgets; its names are in mixers.md, section 3.3."""
    rule: Rule | None = None
    """Writing adds the value, or corrects what the memory holds at the key ("delta")."""
    write: WriteName | None = None
    """β: "sigmoid" of x, "biased" with a bias, the "step" Δ of the decay, or "none" for 1."""
    negative: bool = False
    """β up to 2, so that M (I − β k kᵀ) can have negative eigenvalues."""
    conv: ConvName | None = None
    """Of q, k and v: "canon" is z + conv(z), "silu" is silu(conv(z))."""
    norm: NormName | None = None
    """Of what is read: of each "head" or of all heads as a "whole" with learned gains, "plain" and "whole_plain"
    without."""
    out_gate: GateName | None = None
    """What is read is multiplied by this function of a projection of the input."""
    start: StartName | None = None
    """Initial values: as published, or ready to find what followed a token before (`StartName`)."""
    key_heads: int | None = field(default=None, metadata=UNSAID)
    """Heads of queries and keys, each for as many value heads side by side; H where it is left out."""
    unit_epsilon: float = field(default=0.0, metadata=UNSAID)
    """Added to |x|² where the feature "unit" divides by its root; 0 divides by max(|x|, 1e-12)."""
    read_epsilon: float | None = field(default=None, metadata=UNSAID)
    """Of the norm of what is read, where it is not the system's own."""
    max_half_life: float = field(default=math.inf, metadata=OWN)
    """Upper bound, in tokens, of the half-life of every learned decay; inf is the published form. It is set in a table
    of the mixer's own, so that a preset's bound, which is its own training length, is never that of another system."""

    def __post_init__(self) -> None:
        check_fields(self)
        for name, value in SYSTEMS[self.system]._asdict().items():
            if name in _OPTIONS and getattr(self, name) is None:
                object.__setattr__(self, name, value)
        for name in ("query_heads", "heads", "key_heads", "key_width", "value_width", "degree"):
            value = getattr(self, name)
            require(value is None or value >= 1, name, value, "at least 1")
        for name in ("max_half_life", "read_epsilon"):
            value = getattr(self, name)
            require(value is None or value > 0, name, value, "positive")
        units = self.feature == "unit" or self.unit_epsilon == 0
        require(self.unit_epsilon >= 0 and units, "unit_epsilon", self.unit_epsilon, '0, or positive for "unit"')
        grouped = self.key_heads is None or (self.decay in ("none", "sigmoid", "step") and self.system != "mamba2")
        require(grouped, "key_heads", self.key_heads, "left out for decays of each key channel, and for mamba2")
        _check_together(self)


_OPTIONS = {"feature", "normaliser", "decay", "rule", "write", "conv", "norm", "out_gate", "start"}


def _check_together(config: RecurrenceConfig) -> None:
    """ValueError for options that are each known and together none."""
    assert config.feature is not None
    feature, delta = FEATURES[config.feature], config.rule == "delta"
    normed = f"false for feature = {config.feature!r}, whose sums may be zero" if not feature.positive else ""
    require(not config.normaliser or feature.positive, "normaliser", True, normed)
    require(not (config.normaliser and delta), "normaliser", True, 'false for rule = "delta"')
    known = [name for name, one in FEATURES.items() if one.bounded]
    short = f'one of {", ".join(known)} for rule = "delta", which grows with longer keys'
    require(feature.bounded or not delta, "feature", config.feature, short)
    require(config.write != "step" or config.decay == "step", "write", "step", 'another for a decay without a "step"')
    sure = config.write != "step" or not delta
    require(sure, "write", "step", '"sigmoid" for rule = "delta", which is stable for β of at most 2')
    doubled = delta and config.write in ("sigmoid", "biased")
    require(not config.negative or doubled, "negative", True, 'false without rule = "delta" and a "sigmoid" write')
    shifted = config.conv != "none" and config.decay != "floor"
    told = '"published" without a convolution of keys; set it where the system begins otherwise'
    require(config.start == "published" or shifted, "start", "recall", told)
    forgets = config.decay != "floor" or config.feature == "identity"
    require(forgets, "feature", config.feature, '"identity" for decay = "floor", whose keys are 1 − a')
    placed = config.decay not in ("low_rank", "channel_step") or feature.keeps_width
    known = ", ".join(name for name, one in FEATURES.items() if one.keeps_width)
    require(placed, "feature", config.feature, f"one of {known} for decay = {config.decay!r}, one of each channel")
    turns = config.system != "retnet" or config.decay != "floor"
    require(turns, "decay", "floor", "another for retnet, which turns keys before their decays are known")


def sizes(config: RecurrenceConfig, place: Place) -> Sizes:
    """H, K and V in a stream of width D. ValueError: what must divide D and does not, and how to mend it."""
    heads, key, value = _numbers(config, place.width)
    require(config.system != "retnet" or key % 2 == 0, "key_width", key, "even for rotary positions")
    require(heads % (config.key_heads or 1) == 0, "key_heads", config.key_heads, f"a divisor of heads = {heads}")
    return Sizes(place, heads, key, value)


def _numbers(config: RecurrenceConfig, width: int) -> tuple[int, int, int]:
    system, heads, key, value = config.system, config.heads, config.key_width, config.value_width
    if system in ("hgrn2", "kda"):
        key = key or 128
        return heads or _share(width, key, "key_width"), key, value or key
    if system == "mamba2":
        value = value or 64
        return heads or _share(2 * width, value, "value_width"), key or 128, value
    if system == "gated_deltanet":
        key = key or 256
        return heads or max(1, int(0.75 * width / key + 0.5)), key, value or 2 * key
    told = "heads" if heads or system in _HEADS else "query_heads"
    heads = heads or _HEADS.get(system, config.query_heads)
    if value is None and system != "retnet":
        value = _share(width, heads, told)
    if system == "gla":
        key = key or _share(width, 2 * heads, "2 · heads")
    key = key or (WIDEST if system in ("based", "poly_delta") else _share(width, heads, told))
    return heads, key, value or 2 * key


_HEADS = {"retnet": 8, "gla": 4, "deltanet": 4}


def _share(width: int, parts: int, name: str) -> int:
    """width / parts. ValueError unless it is whole."""
    if width % parts:
        raise ValueError(
            f"'{name}' = {parts} must divide {width}, which the model's width makes of it; "
            "set heads, key_width and value_width"
        )
    return width // parts
