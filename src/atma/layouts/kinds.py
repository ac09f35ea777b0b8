"""What the public architectures are, by the `model_type` of transformers: their defaults, and how they differ.

They are all one model in our terms: attention (or LFM2's gated convolution, or a gated delta rule) and a gated MLP with
norms around them.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple


class Kind(NamedTuple):
    """How an architecture differs from the others."""

    defaults: Mapping[str, Any]
    """What a config.json that leaves a setting out means."""
    theta: float = 10_000.0
    query_key_norm: str = "none"
    biased: str = ""
    """Which of attention's projections have biases: "qkv", "qkvo" where `attention_bias` asks for it, or none."""
    norms: Mapping[str, str] = {"norm_mixer": "input_layernorm", "norm_mlp": "post_attention_layernorm"}
    plus_one: bool = False
    """Whether norms multiply by one plus their weight."""
    local_windows: bool = False
    """Whether layers with windows have positions of their own, which `rope_scaling` does not stretch."""
    gemma: bool = False
    """Scaled embeddings, GeGLU, and scores of a scale of their own."""


_LLAMA: dict[str, Any] = {
    "vocab_size": 32_000,
    "hidden_size": 4096,
    "intermediate_size": 11_008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 2048,
}
_QWEN = _LLAMA | {
    "vocab_size": 151_936,
    "intermediate_size": 22_016,
    "num_key_value_heads": 32,
    "max_position_embeddings": 32_768,
    "sliding_window": 4096,
    "max_window_layers": 28,
}
_OLMO = _LLAMA | {"vocab_size": 50_304, "rms_norm_eps": 1e-5}
_AFTER = {"norm_mixed": "post_attention_layernorm", "norm_mlp_out": "post_feedforward_layernorm"}
_AROUND = {"norm_mixer": "input_layernorm", "norm_mlp": "pre_feedforward_layernorm", **_AFTER}
_GEMMA3 = {
    "vocab_size": 262_208,
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 26,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": True,
    "hidden_activation": "gelu_pytorch_tanh",
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
    "max_position_embeddings": 131_072,
}
_SMOLLM3 = _LLAMA | {
    "vocab_size": 128_256,
    "hidden_size": 2048,
    "num_hidden_layers": 36,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "max_position_embeddings": 32_768,
    "no_rope_layer_interval": 4,
    "tie_word_embeddings": True,
}
_LFM2 = {
    "vocab_size": 65_536,
    "hidden_size": 2560,
    "intermediate_size": 12_288,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 128_000,
    "norm_eps": 1e-5,
    "conv_L_cache": 3,
    "block_multiple_of": 256,
    "block_ffn_dim_multiplier": 1.0,
    "block_auto_adjust_ff_dim": True,
    "tie_word_embeddings": True,
}
_QWEN3_5 = _LLAMA | {
    "vocab_size": 248_320,
    "intermediate_size": 12_288,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "max_position_embeddings": 32_768,
    "partial_rotary_factor": 0.25,
    "full_attention_interval": 4,
    "linear_conv_kernel_dim": 4,
    "linear_key_head_dim": 128,
    "linear_value_head_dim": 128,
    "linear_num_key_heads": 16,
    "linear_num_value_heads": 32,
}
_LFM2_NORMS = {"norm_mixer": "operator_norm", "norm_mlp": "ffn_norm"}

ARCHITECTURES: dict[str, Kind] = {
    "llama": Kind(_LLAMA, biased="qkvo"),
    "mistral": Kind(
        _LLAMA
        | {
            "intermediate_size": 14_336,
            "num_key_value_heads": 8,
            "sliding_window": 4096,
            "max_position_embeddings": 131_072,
        }
    ),
    "qwen2": Kind(_QWEN, biased="qkv"),
    "qwen3": Kind(_QWEN | {"head_dim": 128}, query_key_norm="head", biased="qkvo"),
    "qwen3_5_text": Kind(_QWEN3_5, query_key_norm="head", biased="qkvo", plus_one=True),
    "smollm3": Kind(_SMOLLM3, theta=2_000_000.0, biased="qkvo"),
    "olmo2": Kind(_OLMO, query_key_norm="all", biased="qkvo", norms=_AFTER),
    "olmo3": Kind(
        _OLMO | {"sliding_window": 4096},
        theta=500_000.0,
        query_key_norm="all",
        biased="qkvo",
        norms=_AFTER,
        local_windows=True,
    ),
    "gemma3_text": Kind(
        _GEMMA3,
        theta=1e6,
        query_key_norm="head",
        biased="qkvo",
        norms=_AROUND,
        plus_one=True,
        local_windows=True,
        gemma=True,
    ),
    "lfm2": Kind(_LFM2, theta=1e6, query_key_norm="head", norms=_LFM2_NORMS),
}

__all__ = ["ARCHITECTURES", "Kind"]
