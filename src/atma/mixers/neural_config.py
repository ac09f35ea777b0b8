"""The options of a neural memory: a system and what is set otherwise, what goes together, and its sizes.

What does not go together, what does not fit the stream and steps that diverge are refused (mixers.md, section 4).
"""

import math
from dataclasses import dataclass, field

from atma.mixers.base import Place
from atma.mixers.features import WIDEST
from atma.mixers.neural_systems import (
    KERNEL,
    SYSTEMS,
    ActivationName,
    Anchor,
    BiasName,
    DecayTo,
    FeatureName,
    GateAxis,
    Granularity,
    KernelRule,
    NetworkName,
    OptimiserName,
    RetentionName,
    Schedule,
    StepName,
    System,
    SystemName,
)
from atma.mixers.recurrent_decays import Sizes
from atma.mixers.recurrent_surround import ConvName, GateName, StartName
from atma.ops.fast_weights import Rule
from atma.ops.fast_weights.rule import RENORMS
from atma.strict import OWN, check_fields, require

RADIUS = 4.0
"""Of networks whose errors feed back. Random tokens at the largest steps move them 1.7 times as far as they start."""


@dataclass(frozen=True)
class NeuralConfig:
    """A system and what is set otherwise. None is what the system has; sizes are counts."""

    system: SystemName = "atma_memory"
    """The published system, which gives every option below that is left out. A name of the table fixes it."""
    query_heads: int = 8
    """The model's query heads, H where `heads` is none."""
    heads: int | None = None
    """H."""
    key_width: int | None = None
    """K, before the feature map: D/H, or 16 for products of coordinates."""
    value_width: int | None = None
    """V, D/H."""
    hidden_width: int | None = None
    """E of a network: 4K, or 4V for products of coordinates."""
    network: NetworkName | None = None
    """"matrix", "mlp" and "gated" have fast weights; "kernel" keeps every key with a written value."""
    activation: ActivationName | None = None
    """Of the hidden layer."""
    residual: bool | None = None
    """J: keys and queries are added to what the network gives, by a learned matrix where they are not as wide."""
    layer_norm: bool | None = None
    """N, behind the network."""
    feature: FeatureName | None = None
    """φ of queries and keys (mixers.md, section 2.1)."""
    degree: int = 2
    """Of the feature map "poly"."""
    bias: BiasName | None = None
    """Of the inner loss."""
    loss_power: float = 3.0
    """p of the bias "lp"."""
    retention: RetentionName | None = None
    """What holds the weights back (mixers.md, section 4.6)."""
    norm_power: float = 4.0
    """q of the retention "lq"."""
    decay_to: DecayTo | None = None
    """Forgetting leads to zero weights, or to those that the memory starts with."""
    forgets: bool | None = None
    """Whether there is a γ; else it is 1."""
    optimiser: OptimiserName | None = None
    """How a step is made of gradients."""
    schedule: Schedule | None = None
    """Coefficients of muon's rounds."""
    anchor: Anchor | None = None
    """Which weights' gradients are taken as they were at the last boundary: all, or all but the output's."""
    normalised: bool | None = None
    """A network's inner gradients are divided by max(1, ‖h‖²), so that no W₂ makes steps too large."""
    average: bool | None = None
    """Read the mean of the chunk's steps."""
    granularity: Granularity | None = None
    """What is read changes with every token, or at the end of each chunk."""
    memory_chunk: int | None = None
    """C, tokens from one renewal of the anchor to the next."""
    memory_window: int | None = None
    """c, tokens whose losses a step descends, or of a kernel at whose keys it writes."""
    gate_axis: GateAxis | None = None
    """γ, η and θ: a number for each head or channel; "matrix": a θ for each matrix of fast weights."""
    step_form: StepName | None = None
    """θ: "bounded" by `step_most`, TTT's, or a softplus that begins at 10⁻³ (LaCT)."""
    step_most: float | None = None
    """θ_max, or the base of "ttt"."""
    radius: float | None = None
    """Most that fast weights may have moved at a boundary, as a share of where they started; inf for no bound."""
    kernel_rule: KernelRule | None = None
    """A kernel writes the value, or what the memory does not say yet ("delta")."""
    normalise: bool | None = None
    """Divide what is read from a kernel by the sum of its weights."""
    conv: ConvName | None = None
    """Of q, k and v: "canon" is z + conv(z), "silu" is silu(conv(z))."""
    out_gate: GateName | None = None
    """What is read is multiplied by this function of a projection of the input."""
    start: StartName = "published"
    """Initial values: as published, or ready to find what followed a token before (`StartName`)."""
    max_half_life: float = field(default=math.inf, metadata=OWN)
    """Upper bound, in tokens, of the half-life of γ; inf is the published form. It is set in a table of the mixer's
    own, so that a preset's bound, which is its own training length, is never that of another system."""

    def __post_init__(self) -> None:
        check_fields(self)
        if self.network == "matrix" and self.normalised is None:
            object.__setattr__(self, "normalised", False)  # there is no hidden layer
        for name, value in SYSTEMS[self.system]._asdict().items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, value)
        sizes = ("query_heads", "heads", "key_width", "value_width", "hidden_width", "degree")
        for name in (*sizes, "memory_chunk", "memory_window"):
            value = getattr(self, name)
            require(value is None or value >= 1, name, value, "at least 1")
        require(self.max_half_life > 0, "max_half_life", self.max_half_life, "positive")
        most = self.step_most
        require(most is None or 0 < most < math.inf, "step_most", most, "positive and finite")
        _check_together(self)
        if self.radius is None and self.network != "kernel":
            object.__setattr__(self, "radius", RADIUS if _feeds_back(self) else math.inf)
        if self.network != "kernel":
            rule_of(self, True)
            if self.step_form == "bounded":
                check_steps(self, 1)

    @property
    def most(self) -> float:
        """θ_max (section 4.9), or the base of "ttt"."""
        if self.step_most is not None:
            return self.step_most
        assert self.memory_chunk is not None
        if self.step_form == "ttt":
            return 1.0 if self.network == "matrix" else 0.1
        if self.retention == "kl":
            return 2.0
        if self.bias == "lp":
            return 1 / 32
        if self.optimiser == "muon":
            return 0.5 if self.granularity == "chunk" else 0.06
        if self.network == "matrix" and self.anchor == "hidden":
            return 1.0
        return min(1.0, 2 / math.sqrt(self.memory_chunk), stable(self))


def _feeds_back(config: NeuralConfig) -> bool:
    """Whether steps from one anchor can add up to more than the error that they began with, and so without end."""
    network = config.network in ("mlp", "gated") and config.granularity == "token" and config.retention == "l2"
    return network and config.bias != "dot" and config.optimiser != "muon"


_NETWORK_ONLY = tuple(name for name in System._fields[1:-4] if name not in ("feature", "memory_window"))
"""Options that a kernel has no use for."""


def _check_together(config: NeuralConfig) -> None:
    """ValueError for options that are each known and together none."""
    kernel = config.network == "kernel"
    for name in _NETWORK_ONLY if kernel else ("kernel_rule", "normalise"):
        own = getattr(KERNEL, name)
        told = f'{own!r} for network = "kernel", which has no fast weights'
        told = told if kernel else f'{own!r} without network = "kernel"'
        require(getattr(config, name) == own, name, getattr(config, name), told)
    for name in ("hidden_width", "step_most", "radius"):
        known = not kernel or getattr(config, name) is None
        require(known, name, getattr(config, name), 'left out for network = "kernel"')
    require(not kernel or config.feature == "unit", "feature", config.feature, '"unit" for network = "kernel"')
    hidden = config.network != "matrix" or config.hidden_width is None
    require(hidden, "hidden_width", config.hidden_width, 'left out for network = "matrix"')
    alike = config.gate_axis != "channel" or config.feature == "unit"
    require(alike, "feature", config.feature, '"unit" for gate_axis = "channel", which needs keys as wide as values')
    require(not (config.average and config.forgets), "forgets", True, "false for average = true")
    sure = config.step_form != "softplus" or config.retention in RENORMS or config.bias == "dot" or kernel
    told = '"bounded" without renormalised weights or the bias "dot": a step without bounds diverges'
    require(sure, "step_form", "softplus", told)
    held = config.forgets or not math.isfinite(config.max_half_life)
    require(held, "max_half_life", config.max_half_life, "left out where nothing is forgotten")
    shifted = config.start == "published" or config.conv != "none"
    require(shifted, "start", "recall", '"published" without a convolution of keys')
    free = config.step_form != "softplus" or config.step_most is None
    require(free, "step_most", config.step_most, 'left out for step_form = "softplus"')


def stable(config: NeuralConfig) -> float:
    """The θ Σω ‖z‖² beyond which memories diverge (section 4.9's measurements); inf where none is known."""
    free = config.bias in ("dot", "lp") or config.optimiser == "muon" or config.retention != "l2"
    if free:
        return math.inf
    assert config.memory_chunk is not None
    chunk = 1 if config.average else config.memory_chunk
    if config.network == "matrix":
        return 2.0 if config.anchor == "hidden" else 2 / chunk
    anchored = 1 if config.feature == "poly" else 2  # products of coordinates: all keys have a part in common
    return min(2.0, (4 if config.anchor == "hidden" else anchored) / math.sqrt(chunk))


def check_steps(config: NeuralConfig, features: int) -> None:
    """ValueError unless steps stay within the bound; of "ttt" they are divided by the number of features."""
    most, bound = config.most, stable(config) * (features if config.step_form == "ttt" else 1)
    chunk, network = config.memory_chunk, config.network
    named = f"network = {network!r}, feature = {config.feature!r}, anchor = {config.anchor!r}"
    why = f"at most {bound:g} for {named} and memory_chunk = {chunk}"
    require(most <= bound, "step_most", most, why + ": more diverges on keys that come again")


def rule_of(config: NeuralConfig, alike: bool) -> Rule:
    """The rule of the operation; alike: keys are as wide as values behind the feature map."""
    assert config.network is not None and config.network != "kernel"
    given = {name: getattr(config, name) for name in _SAME}
    given |= {name: getattr(config, own) for name, own in _RENAMED.items()}
    try:
        return Rule(**given, residual=("identity" if alike else "skip") if config.residual else "none")
    except ValueError as error:
        _, name, rest = str(error).split("'", 2)
        raise ValueError(f"'{_RENAMED.get(name, name)}'{rest}") from None


_SAME = (
    "network",
    "activation",
    "bias",
    "retention",
    "decay_to",
    "optimiser",
    "schedule",
    "anchor",
    "normalised",
    "average",
    "granularity",
    "radius",
)
_RENAMED = {
    "norm": "layer_norm",
    "p": "loss_power",
    "q": "norm_power",
    "chunk": "memory_chunk",
    "window": "memory_window",
    "gates": "gate_axis",
}
"""Options of the rule whose names mean something else beside those of other mixers."""


def sizes(config: NeuralConfig, place: Place) -> Sizes:
    """H, K and V in a stream of width D. ValueError: what does not divide D, and how to mend it."""
    heads, key, value = config.heads or config.query_heads, config.key_width, config.value_width
    lifted = config.feature == "poly"
    share = None if (key or lifted) and value else _share(config, heads, place.width)
    return Sizes(place, heads, key or (WIDEST if lifted else share or 0), value or share or 0)


def _share(config: NeuralConfig, heads: int, width: int) -> int:
    """D/H. ValueError unless it is whole."""
    if width % heads:
        name = "heads" if config.heads else "query_heads"
        raise ValueError(
            f"'{name}' = {heads} must divide {width}, the model's width; or set heads, key_width and value_width"
        )
    return width // heads


def check_sizes(config: NeuralConfig, sizes: Sizes) -> int:
    """K′, the width of features. ValueError: too many of them, gates of channels that have none, or steps too large."""
    key, value = sizes.key_width, sizes.value_width
    made = math.comb(key + config.degree, config.degree) if config.feature == "poly" else key
    told = f"at most {WIDEST} for products of coordinates: {key} of degree {config.degree} make {made:,} features"
    require(config.feature != "poly" or key <= WIDEST, "key_width", key, told)
    alike = config.gate_axis != "channel" or key == value
    require(alike, "key_width", key, f'the value_width {value} for gate_axis = "channel"')
    if config.step_form == "ttt":
        check_steps(config, made)
    return made
