"""What a model and a run are, as frozen data: presets, TOML in and out, and the identity of a run.

A recipe is a TOML file with the tables `[model]`, `[data]`, `[train]` and `[evaluation]`, each a dataclass below. A key
left out takes its default; a key that does not exist is an error that names the nearest one. The canonical JSON of a
configuration (`canonical_json`) is its identity: equal text, equal run.
"""

import dataclasses
import hashlib
import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from atma.strict import from_dict, read_toml, to_dict, toml_value

Core = Literal["polar", "nope", "rope"]
CanonInit = Literal["uniform", "previous"]
Kind = Literal["local", "global"]
Regulariser = Literal["none", "weak", "strong", "discrete", "zipfian"]
Precision = Literal["auto", "float32", "bfloat16"]


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
    """Upper bound, in tokens, of every memory head's half-life; inf is the published unbounded form."""
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

    def __post_init__(self) -> None:
        sizes = ("vocab_size", "width", "depth", "query_heads", "key_value_heads", "head_width", "mlp_multiple")
        for name in (*sizes, "local_taps", "canon_taps"):
            _require(getattr(self, name) >= 1, name, getattr(self, name), "at least 1")
        for name in ("decay_bias", "beta_bias", "length_gain", "null_base", "null_slope", "magnitude_slope"):
            _require(math.isfinite(getattr(self, name)), name, getattr(self, name), "finite")
        for name in ("logit_cap", "norm_epsilon", "max_half_life"):
            _require(getattr(self, name) > 0, name, getattr(self, name), "positive")
        bounded = not self.learned_half_life or 1 <= self.max_half_life < math.inf
        _require(bounded, "max_half_life", self.max_half_life, "finite and at least 1 for learned_half_life")
        _require(len(self.pattern) > 0, "pattern", self.pattern, "at least one layer")
        for name in ("window", "count_limit"):
            value = getattr(self, name)
            _require(value is None or value >= 1, name, value, "at least 1, or left out")
        _require(0 <= self.sharpening < math.inf, "sharpening", self.sharpening, "a finite number of at least 0")
        radius = self.direction_radius
        _require(radius is None or radius > 0, "direction_radius", radius, "positive, or left out")
        divides = self.query_heads % self.key_value_heads == 0
        _require(divides, "key_value_heads", self.key_value_heads, f"a divisor of query_heads = {self.query_heads}")
        single = self.canon_taps == 1 and self.canon_init == "previous" and self.core != "rope"
        _require(not single, "canon_taps", 1, 'at least 2 for canon_init = "previous" ("uniform" takes one)')
        if self.core == "rope":
            _require(self.head_width % 4 == 0, "head_width", self.head_width, "a multiple of 4 for rotary positions")

    @property
    def layers(self) -> tuple[Kind, ...]:
        """The kind of each layer, first to last."""
        return tuple(self.pattern[i % len(self.pattern)] for i in range(self.depth))

    @property
    def radius(self) -> float:
        return math.sqrt(self.head_width) if self.direction_radius is None else self.direction_radius


@dataclass(frozen=True)
class DataConfig:
    """Where tokens come from. Shares are fractions of the rows of a batch."""

    path: str = "data/stdlib"
    """A folder made by `atma prepare`, or of .bin token shards."""
    recall_share: float = 0.0
    """Share of rows that are synthetic recall sequences: spans, keys and values to be repeated later."""
    recall_vocabulary: int = 0
    """The most token ids that one recall row draws its random tokens from; 0 is the whole vocabulary."""
    copy_warmup_tokens: int = 0
    """At the start, this many training tokens come from copy sequences over `copy_vocabulary` ids alone."""
    copy_vocabulary: int = 64

    def __post_init__(self) -> None:
        _require(0 <= self.recall_share <= 1, "recall_share", self.recall_share, "between 0 and 1")
        _require(self.recall_vocabulary >= 0, "recall_vocabulary", self.recall_vocabulary, "0 or more")
        _require(self.copy_warmup_tokens >= 0, "copy_warmup_tokens", self.copy_warmup_tokens, "0 or more")
        _require(self.copy_vocabulary >= 2, "copy_vocabulary", self.copy_vocabulary, "at least 2")


@dataclass(frozen=True)
class TrainConfig:
    """One training run. Lengths and batches are tokens, rates are per step. Source: maths.md, section 6."""

    length: int = 256
    batch_tokens: int = 8192
    """Tokens per optimiser step, all ranks and micro-batches together; a multiple of length × accumulation × ranks."""
    tokens: int = 2_000_000
    accumulation: int = 1
    muon_rate: float = 0.01
    embedding_rate: float = 0.006
    head_rate: float = 0.006
    vector_rate: float = 0.006
    momentum: float = 0.95
    weight_decay: float = 0.01
    beta1: float = 0.8
    beta2: float = 0.95
    epsilon: float = 1e-10
    warmup_share: float = 0.02
    constant_share: float = 0.3
    """Share of steps, warm-up included, before the rate falls linearly to zero."""
    clip: float = 1.0
    seed: int = 0
    precision: Precision = "auto"
    regulariser: Regulariser = "none"
    regulariser_weight: float = 0.01
    distractor_weight: float = 0.0
    checkpoint_every: int = 200
    keep_checkpoints: int = 2
    evaluate_every: int = 100
    evaluation_tokens: int = 65_536

    def __post_init__(self) -> None:
        sizes = ("length", "batch_tokens", "tokens", "accumulation", "checkpoint_every", "keep_checkpoints")
        for name in (*sizes, "evaluation_tokens"):
            _require(getattr(self, name) >= 1, name, getattr(self, name), "at least 1")
        _require(self.evaluate_every >= 0, "evaluate_every", self.evaluate_every, "0 (never) or more")
        _require(0 <= self.seed < 2**63, "seed", self.seed, "0 or more, below 2^63")
        whole = self.batch_tokens % (self.length * self.accumulation) == 0
        unit = self.length * self.accumulation
        _require(whole, "batch_tokens", self.batch_tokens, f"a multiple of length × accumulation = {unit}")
        for name in ("muon_rate", "embedding_rate", "head_rate", "vector_rate", "weight_decay", "distractor_weight"):
            _require(0 <= getattr(self, name) < math.inf, name, getattr(self, name), "0 or more, and finite")
        for name in ("warmup_share", "constant_share", "regulariser_weight"):
            _require(0 <= getattr(self, name) <= 1, name, getattr(self, name), "between 0 and 1")
        for name in ("momentum", "beta1", "beta2"):
            _require(0 <= getattr(self, name) < 1, name, getattr(self, name), "in [0, 1)")
        for name in ("clip", "epsilon"):
            _require(getattr(self, name) > 0, name, getattr(self, name), "positive")

    @property
    def steps(self) -> int:
        """Optimiser steps that consume at least `tokens`."""
        return -(-self.tokens // self.batch_tokens)


@dataclass(frozen=True)
class EvaluationConfig:
    """Length evaluation of a trained model. Lengths are context tokens."""

    lengths: tuple[int, ...] = (256, 512, 1024, 2048, 4096, 8192, 16_384)
    """Context lengths in tokens, increasing."""
    documents: int = 8
    """Documents to measure the losses on."""
    target_tokens: int = 128
    """Tokens scored per document where only the context before them grows ("fixed targets")."""
    needle_trials: int = 32
    """Needles hidden per length; 0 leaves them out."""
    needle_tokens: int | None = None
    """The most tokens to read for needles at one length: long lengths then have fewer trials, one at least."""
    junk: bool = True
    """Also measure the stream of all documents, whose contexts are mostly other documents."""
    seed: int = 1234
    """Chooses documents and needles."""

    def __post_init__(self) -> None:
        _require(len(self.lengths) > 0 and min(self.lengths) >= 1, "lengths", self.lengths, "one or more, each ≥ 1")
        _require(list(self.lengths) == sorted(set(self.lengths)), "lengths", self.lengths, "strictly increasing")
        for name in ("documents", "target_tokens"):
            _require(getattr(self, name) >= 1, name, getattr(self, name), "at least 1")
        for name in ("needle_trials", "seed"):
            _require(getattr(self, name) >= 0, name, getattr(self, name), "0 or more")
        bounded = self.needle_tokens is None or self.needle_tokens >= 1
        _require(bounded, "needle_tokens", self.needle_tokens, "at least 1")

    def trials(self, length: int) -> int:
        """Needles at this length; each is read twice, the second time without its needle."""
        within = self.needle_trials if self.needle_tokens is None else self.needle_tokens // (2 * length)
        return min(self.needle_trials, max(1, within))


@dataclass(frozen=True)
class Recipe:
    """Everything that defines a run."""

    name: str = "unnamed"
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)

    def __post_init__(self) -> None:
        plain = self.name not in ("", ".", "..") and not set(self.name) & set("/\\\0")
        _require(plain, "name", self.name, "the name of a folder, without slashes")


def preset(name: str) -> ModelConfig:
    """The named model configuration; ValueError names the known ones."""
    if not isinstance(name, str) or name not in PRESETS:
        raise ValueError(f"no preset {name!r}; known: {', '.join(PRESETS)}")
    return PRESETS[name]


def load_recipe(path: str | Path) -> Recipe:
    """Read a TOML recipe. `[model] preset = "nano"` starts from a preset. ValueError says which file and key."""
    path = Path(path)
    values = read_toml(path, "recipe")
    try:
        return recipe_of({"name": path.stem} | values)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def recipe_of(values: dict[str, Any]) -> Recipe:
    """The recipe of the tables of a recipe file, its preset filled in. ValueError says which key."""
    model = values.get("model", {})
    if isinstance(model, dict) and "preset" in model:
        values = values | {
            "model": to_dict(preset(model["preset"])) | {k: v for k, v in model.items() if k != "preset"}
        }
    return from_dict(Recipe, values)


def canonical_json(config: Any) -> str:
    """One text per configuration: sorted keys, no spaces. Equal text means an equal run."""
    return json.dumps(to_dict(config), sort_keys=True, separators=(",", ":"))


def identity(config: Any) -> str:
    """First 16 hexadecimal digits of the SHA-256 of the canonical JSON."""
    return hashlib.sha256(canonical_json(config).encode()).hexdigest()[:16]


def dump_toml(recipe: Recipe) -> str:
    """The recipe as TOML that `load_recipe` reads back to an equal recipe."""
    lines = [f"name = {toml_value(recipe.name)}"]
    for table in ("model", "data", "train", "evaluation"):
        lines.append(f"\n[{table}]")
        items = dataclasses.asdict(getattr(recipe, table)).items()
        lines += [f"{key} = {toml_value(value)}" for key, value in items if value is not None]
    return "\n".join(lines) + "\n"


def _require(holds: bool, name: str, value: Any, rule: str) -> None:
    if not holds:
        raise ValueError(f"'{name}' must be {rule}, not {value!r}")


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
