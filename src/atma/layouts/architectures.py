"""A checkpoint in our terms, by its config.json: the model's configuration, and the names of its tensors."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch

from atma.layouts.kinds import ARCHITECTURES, Kind
from atma.layouts.names import Part, same, within
from atma.layouts.settings import Settings, rotary

FULL, SLIDING, CONV, LINEAR = "full_attention", "sliding_attention", "conv", "linear_attention"
TAPS = 4
"""Of the convolutions before a recurrence."""
_GATES = {"silu": "silu", "swish": "silu", "gelu_pytorch_tanh": "gelu"}


class Layout(NamedTuple):
    """A checkpoint in our terms."""

    model: dict[str, Any]
    """The model's configuration, as `ModelConfig.from_table` takes it."""
    parts: list[Part]


def layout_of(values: Mapping[str, Any]) -> Layout:
    """The layout of a checkpoint by its config.json. ValueError names what we do not have."""
    name = values.get("model_type")
    if name not in ARCHITECTURES:
        known = ", ".join(ARCHITECTURES)
        raise ValueError(f"config.json: model_type {name!r} is no architecture that atma has; it has {known}")
    kind = ARCHITECTURES[name]
    settings = Settings(values, kind.defaults)
    heads = settings.count("num_attention_heads")
    width = settings.count("hidden_size")
    depth = settings.count("num_hidden_layers")
    names = _layers(name, settings, depth)
    common = {"query_heads": heads, "key_value_heads": settings.count("num_key_value_heads", heads)}
    common["head_width"] = settings.count("head_dim", width // heads)
    mixers = {one: _mixer(name, kind, settings, one, common) for one in dict.fromkeys(names)}
    model = {"vocab_size": settings.count("vocab_size"), "width": width, "depth": depth, "mixers": mixers}
    model["pattern"] = names if len(set(names)) > 1 else names[:1]
    model |= _surround(name, kind, settings)
    settings.check_rest()
    return Layout(model, _parts(name, kind, model, names))


def _surround(name: str, kind: Kind, settings: Settings) -> dict[str, Any]:
    """What belongs to no mixer."""
    after, before = "norm_mixed" in kind.norms, "norm_mixer" in kind.norms
    own: dict[str, Any] = {
        "mlp_gate": "silu",
        "mlp_bias": settings.flag("mlp_bias") if name in ("llama", "smollm3") else False,
        "logit_cap": 0.0,
        "tied_head": settings.flag("tie_word_embeddings"),
        "head_bias": False,
        "norms": "both" if after and before else "after" if after else "before",
    }
    if name == "lfm2":
        tied = settings.flag("tie_embedding", own["tied_head"])
        return own | {
            "mlp_width": _lfm2_inner(settings),
            "norm_epsilon": settings.number("norm_eps"),
            "tied_head": tied,
        }
    own["mlp_gate"] = settings.one_of("hidden_activation" if kind.gemma else "hidden_act", _GATES)
    own |= {"mlp_width": settings.count("intermediate_size"), "norm_epsilon": settings.number("rms_norm_eps")}
    if kind.gemma:
        root = torch.tensor(settings.count("hidden_size") ** 0.5, dtype=torch.float32)  # rounded as theirs is
        own["embedding_scale"] = float(root)
    return own | {"norm_plus_one": kind.plus_one}


def _lfm2_inner(settings: Settings) -> int:
    """Inner numbers of LFM2's MLP, which its settings tell by a rule."""
    inner = settings.count("block_ff_dim", settings.count("intermediate_size"))
    multiple, share = settings.count("block_multiple_of"), settings.any("block_ffn_dim_multiplier")
    if not settings.flag("block_auto_adjust_ff_dim"):
        return inner
    inner = int(2 * inner / 3)
    return inner if share is None else multiple * -(-int(share * inner) // multiple)


def _layers(name: str, settings: Settings, depth: int) -> list[str]:
    """The name of each layer's mixer."""
    if name == "lfm2":
        attending = settings.any("full_attn_idxs")
        attending = list(range(depth)) if attending is None else attending
        if not isinstance(attending, list) or not all(type(i) is int and 0 <= i < depth for i in attending):
            raise ValueError(
                f"config.json: 'full_attn_idxs' must be numbers of layers below {depth}, not {attending!r}"
            )
        return settings.kinds("layer_types", (FULL, CONV), depth) or [
            FULL if i in attending else CONV for i in range(depth)
        ]
    if name == "qwen3_5_text":
        every = settings.count("full_attention_interval")
        usual = [LINEAR if (i + 1) % every else FULL for i in range(depth)]
        return settings.kinds("layer_types", (FULL, LINEAR), depth) or usual
    if name == "mistral":
        return [SLIDING if settings.any("sliding_window") else FULL] * depth
    asked = settings.flag("use_sliding_window") if name in ("qwen2", "qwen3", "smollm3") else True
    window = settings.any("sliding_window") if asked else None
    kinds = settings.kinds("layer_types", (FULL, SLIDING), depth) if name != "llama" else None
    if name == "smollm3":
        every = settings.count("no_rope_layer_interval")
        turned = settings.any("no_rope_layers") or [int((i + 1) % every != 0) for i in range(depth)]
        if not isinstance(turned, list) or len(turned) != depth:
            raise ValueError(f"config.json: 'no_rope_layers' must tell of each of {depth} layers, not {turned!r}")
        kinds = kinds or [SLIDING if window and not turned[i] else FULL for i in range(depth)]
        return [kind if turned[i] else f"{kind}_without_positions" for i, kind in enumerate(kinds)]
    first, every = settings.any("max_window_layers"), settings.any("sliding_window_pattern") or 6
    usual = {
        "olmo3": [SLIDING if (i + 1) % 4 else FULL for i in range(depth)],
        "gemma3_text": [SLIDING if (i + 1) % every else FULL for i in range(depth)],
    }
    sliding = [SLIDING if window and name in ("qwen2", "qwen3") and i >= (first or 0) else FULL for i in range(depth)]
    return kinds or usual.get(name, sliding)


def _mixer(name: str, kind: Kind, settings: Settings, layer: str, heads: dict[str, int]) -> dict[str, Any]:
    """The table of one kind of layer."""
    if layer == CONV:
        if settings.flag("conv_bias"):
            raise ValueError("config.json: 'conv_bias' is True: a bias of the convolution, which atma does not have")
        taps = settings.count("conv_L_cache")
        return {"kind": "gated_conv", "local_taps": taps, "projection_bias": False}
    if layer == LINEAR:
        settings.one_of("hidden_act", {"silu": "silu"})  # of its convolution and gate too
        return _gated_delta(settings)
    table: dict[str, Any] = {"kind": "grouped_query", **heads, "query_key_norm": kind.query_key_norm}
    biased = settings.flag("attention_bias") if kind.biased == "qkvo" else False
    table |= {"input_bias": biased or kind.biased == "qkv", "output_bias": biased}
    if layer.startswith(SLIDING):
        table["window"] = settings.count("sliding_window")
    if "without_positions" in layer:
        return table | {"rotary_share": 0.0}
    share = settings.number("partial_rotary_factor") if name == "qwen3_5_text" else None
    table |= rotary(_windowed(kind, settings, layer), layer, _theta(kind, settings, layer), share)
    table["output_gate"] = name == "qwen3_5_text"
    if kind.gemma:
        table["score_scale"] = settings.number("query_pre_attn_scalar") ** -0.5
    return table


def _gated_delta(settings: Settings) -> dict[str, Any]:
    """Gated DeltaNet as Qwen has it."""
    taps = settings.count("linear_conv_kernel_dim")
    if taps != TAPS:
        raise ValueError(f"config.json: 'linear_conv_kernel_dim' is {taps}, but atma's convolutions there have {TAPS}")
    return {
        "kind": "gated_deltanet",
        "heads": settings.count("linear_num_value_heads"),
        "key_heads": settings.count("linear_num_key_heads"),
        "key_width": settings.count("linear_key_head_dim"),
        "value_width": settings.count("linear_value_head_dim"),
        "unit_epsilon": 1e-6,
        "read_epsilon": settings.number("rms_norm_eps"),
    }


def _windowed(kind: Kind, settings: Settings, layer: str) -> Settings:
    """The settings as a kind of layer takes them: the windows of Gemma and OLMo, in the older form, have their own base
    and are not stretched."""
    if layer == FULL or not kind.local_windows or settings.any("rope_parameters"):
        return settings
    return Settings({**settings.values, "rope_scaling": None, "rope_theta": None}, {})


def _theta(kind: Kind, settings: Settings, layer: str) -> float:
    """The base of a kind of layer where its parameters do not say it."""
    if not kind.gemma or layer == FULL:
        settings.any("rope_local_base_freq")
        return kind.theta
    return settings.number("rope_local_base_freq", 10_000.0)


def _parts(name: str, kind: Kind, model: Mapping[str, Any], names: list[str]) -> list[Part]:
    """Every tensor."""
    final = "embedding_norm" if name == "lfm2" else "norm"
    outer = same({"embed": "model.embed_tokens", "norm": f"model.{final}"})
    if not model["tied_head"]:
        outer += same({"head": "lm_head"})
    for i, layer in enumerate(names):
        table = model["mixers"][layer]
        inner = _conv() if layer == CONV else _delta(table) if layer == LINEAR else _attention(name, table)
        inner += _mlp(name, model["mlp_bias"]) + same(kind.norms)
        outer += within(f"blocks.{i}.", f"model.layers.{i}.", inner)
    return outer


def _attention(name: str, table: Mapping[str, Any]) -> list[Part]:
    lfm2 = name == "lfm2"
    names = {f"mixer.{one}_proj": f"self_attn.{one}_proj" for one in "qkv"}
    names["mixer.out_proj"] = "self_attn.out_proj" if lfm2 else "self_attn.o_proj"
    biased = [f"mixer.{one}_proj" for one in "qkv"] * table["input_bias"] + ["mixer.out_proj"] * table["output_bias"]
    norms = {}
    if table["query_key_norm"] != "none":
        norms = {f"mixer.{one}_norm": f"self_attn.{one}_{'layernorm' if lfm2 else 'norm'}" for one in "qk"}
    return same(names, biased) + same(norms)


def _conv() -> list[Part]:
    projections = {"mixer.in_proj": "conv.in_proj", "mixer.out_proj": "conv.out_proj"}
    return [*same(projections), Part(("mixer.taps",), ("conv.conv.weight",), taps=True)]


def _delta(table: Mapping[str, Any]) -> list[Part]:
    keys, values = table["key_heads"] * table["key_width"], table["heads"] * table["value_width"]
    projections = tuple(f"mixer.{one}_proj.weight" for one in "qkv")
    names = {
        "mixer.readout.gate_proj": "linear_attn.in_proj_z",
        "mixer.readout.out_proj": "linear_attn.out_proj",
        "mixer.gates.beta_proj": "linear_attn.in_proj_b",
        "mixer.gates.decay.step_proj": "linear_attn.in_proj_a",
    }
    return [
        Part(projections, ("linear_attn.in_proj_qkv.weight",), (keys, keys, values)),
        Part(("mixer.conv.taps",), ("linear_attn.conv1d.weight",), taps=True),
        Part(("mixer.readout.gain",), ("linear_attn.norm.weight",)),
        Part(("mixer.gates.decay.rate",), ("linear_attn.A_log",)),
        Part(("mixer.gates.decay.bias",), ("linear_attn.dt_bias",)),
        *same(names),
    ]


def _mlp(name: str, bias: bool) -> list[Part]:
    gate, up, down = (
        (f"feed_forward.w{i}" for i in (1, 3, 2))
        if name == "lfm2"
        else (f"mlp.{one}_proj" for one in ("gate", "up", "down"))
    )
    kinds = ("weight", "bias") if bias else ("weight",)
    parts = [Part((f"mlp.in_proj.{one}",), (f"{gate}.{one}", f"{up}.{one}")) for one in kinds]
    return parts + [Part((f"mlp.out_proj.{one}",), (f"{down}.{one}",)) for one in kinds]


__all__ = ["Layout", "layout_of"]
