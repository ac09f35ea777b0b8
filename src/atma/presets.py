"""The named models: sizes of ATMA, as settings beside the defaults of a model."""

from typing import Any

from atma.model_config import ModelConfig


def preset(name: str) -> ModelConfig:
    """The named model configuration; ValueError names the known ones."""
    if not isinstance(name, str) or name not in PRESETS:
        raise ValueError(f"no preset {name!r}; known: {', '.join(PRESETS)}")
    return ModelConfig(**PRESETS[name])


PRESETS: dict[str, dict[str, Any]] = {
    "nano-test": {
        "vocab_size": 257,
        "width": 64,
        "depth": 4,
        "query_heads": 2,
        "key_value_heads": 1,
        "head_width": 16,
        "mlp_multiple": 2,
    },
    "nano": {
        "vocab_size": 1024,
        "width": 128,
        "depth": 8,
        "query_heads": 2,
        "key_value_heads": 1,
        "head_width": 64,
        "max_half_life": 256,
        "count_limit": 256,
    },
    "small": {
        "vocab_size": 16_384,
        "width": 512,
        "depth": 12,
        "query_heads": 8,
        "key_value_heads": 2,
        "head_width": 64,
        "max_half_life": 2048,
        "count_limit": 2048,
    },
    "base": {"max_half_life": 2048, "count_limit": 2048},
    "base-published": {"direction_radius": 1.0, "canon_init": "uniform", "share_query_key_init": False},
}
