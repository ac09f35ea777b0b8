"""Reading a config.json of transformers: every setting is either understood, harmless, or refused by its name."""

import math
from collections.abc import Mapping
from typing import Any

# fmt: off
HARMLESS = frozenset((
    "architectures", "attention_dropout", "attn_implementation", "auto_map", "block_dim", "block_mlp_init_scale",
    "block_norm_eps", "block_out_init_scale", "block_use_swiglu", "block_use_xavier_init", "cache_implementation",
    "chunk_size_feed_forward", "conv_dim", "conv_dim_out", "conv_use_xavier_init", "dtype", "eos_token_id",
    "full_attn_idxs", "hidden_dropout", "id2label", "initializer_range", "is_llama_config", "label2id",
    "mamba_ssm_dtype", "language",
    "max_position_embeddings", "max_window_layers", "model_type", "mtp_num_hidden_layers",
    "mtp_use_dedicated_embeddings", "num_heads", "num_labels", "output_attentions", "output_hidden_states",
    "pretraining_tp", "problem_type", "resid_pdrop", "return_dict", "rope_interleaved", "sliding_window",
    "sliding_window_pattern", "theta", "tokenizer_class", "torch_dtype", "torchscript", "transformers.js_config",
    "transformers_version", "unsloth_fixed", "unsloth_version", "use_bfloat16", "use_cache", "use_pos_enc",
    "use_sliding_window",
))
# fmt: on
"""Settings of training, of generation and of files, which change no logits; those with a value of their own meaning
are read before this is looked at."""
REFUSED = {
    "quantization_config": "quantised weights; give the checkpoint as it was before",
    "compression_config": "quantised weights; give the checkpoint as it was before",
    "num_experts": "a mixture of experts",
    "num_local_experts": "a mixture of experts",
    "n_routed_experts": "a mixture of experts",
    "moe_intermediate_size": "a mixture of experts",
    "attn_logit_softcapping": "a cap on attention's scores",
    "final_logit_softcapping": "a tanh cap on the logits",
    "attention_sinks": "attention sinks",
    "vision_config": "a model of images; give its language model alone",
    "use_bidirectional_attention": "attention that looks ahead",
}
"""What we lack, by the setting that asks for it."""
NEEDED = {"is_causal": "attention that looks ahead", "attn_output_gate": "attention without its gate"}
"""What we lack, by the setting that asks for it when it is false."""


class Settings:
    """The settings of a config.json over an architecture's defaults, and which of them were read."""

    def __init__(self, values: Mapping[str, Any], defaults: Mapping[str, Any]) -> None:
        self.values = {**defaults, **values}
        self._read: set[str] = set()

    def any(self, name: str, default: Any = None) -> Any:
        """A setting as it stands."""
        self._read.add(name)
        return self.values.get(name, default)

    def count(self, name: str, default: int | None = None) -> int:
        """A whole number of at least 1; the default where it is null or left out."""
        found = self.any(name)
        found = default if found is None else found
        if type(found) is not int or found < 1:
            raise ValueError(f"config.json: '{name}' must be a whole number of at least 1, not {found!r}")
        return found

    def number(self, name: str, default: float | None = None) -> float:
        """A positive number; the default where it is null or left out."""
        found = self.any(name)
        found = default if found is None else found
        if isinstance(found, bool) or not isinstance(found, int | float) or not 0 < found < math.inf:
            raise ValueError(f"config.json: '{name}' must be a positive number, not {found!r}")
        return float(found)

    def flag(self, name: str, default: bool = False) -> bool:
        """True or false."""
        found = self.any(name)
        found = default if found is None else found
        if not isinstance(found, bool):
            raise ValueError(f"config.json: '{name}' must be true or false, not {found!r}")
        return found

    def one_of(self, name: str, known: Mapping[str, str]) -> str:
        """What a named choice is called by us."""
        found = self.any(name)
        if found not in known:
            told = " or ".join(repr(one) for one in known)
            raise ValueError(f"config.json: '{name}' is {found!r}, which atma does not have; it has {told}")
        return known[found]

    def kinds(self, name: str, known: tuple[str, ...], count: int) -> list[str] | None:
        """The kind of each layer, None where it is left out."""
        found = self.any(name)
        if found is None:
            return None
        if not isinstance(found, list) or len(found) != count:
            raise ValueError(f"config.json: '{name}' must name each of {count} layers, not {found!r}")
        for kind in found:
            if kind not in known:
                raise ValueError(f"config.json: '{name}' has '{kind}', which atma does not have; it has {known}")
        return found

    def check_rest(self) -> None:
        """ValueError names a setting that nothing has read and that may change what the model computes."""
        for name, value in self.values.items():
            if name in self._read or name.startswith("_") or name.endswith("_token_id"):
                continue
            if value is None or value in ([], {}) or (value is False and name not in NEEDED):
                continue
            if name in NEEDED and value is True:
                continue
            if lacked := {**REFUSED, **NEEDED}.get(name):
                raise ValueError(f"config.json: '{name}' is {value!r}: {lacked}, which atma does not have")
            if name not in HARMLESS:
                raise ValueError(
                    f"config.json: '{name}' is {value!r}, a setting that atma does not know for this architecture: "
                    "remove it if it changes nothing that the model computes"
                )


def rotary(settings: Settings, kind: str, theta: float, share: float | None = None) -> dict[str, Any]:
    """The options of a rotary core from either form of a config.json: rope_parameters, or rope_theta and rope_scaling.

    kind: the kind of layer, where each has parameters of its own. theta: the architecture's default. share: its share
    of turned numbers, if it has such a setting.
    """
    table = _rope_table(settings, kind)
    scaling = table.pop("rope_type", None) or table.pop("type", None) or "default"
    table.pop("type", None)
    base = table.pop("rope_theta", None)
    options: dict[str, Any] = {"rotary_theta": _number("rope_theta", theta if base is None else base)}
    if share is not None or table.get("partial_rotary_factor") == 1:
        options["rotary_share"] = _number("partial_rotary_factor", table.pop("partial_rotary_factor", share))
    for name in _OF_IMAGES:
        table.pop(name, None)
    return options | _scaling(scaling, table, settings)


def _rope_table(settings: Settings, kind: str) -> dict[str, Any]:
    """The parameters of a kind of layer, in the newer names. ValueError: they are said in both forms, or not for it."""
    given, older = settings.any("rope_parameters") or {}, settings.any("rope_scaling") or {}
    base = settings.any("rope_theta")
    for name, table in (("rope_parameters", given), ("rope_scaling", older)):
        if not isinstance(table, dict):
            raise ValueError(f"config.json: '{name}' must be a table, not {table!r}")
    if given and older and older != given:
        raise ValueError("config.json: both 'rope_parameters' and 'rope_scaling' are set; leave one out")
    nested = any(isinstance(one, dict) for one in given.values())
    if nested and not isinstance(given.get(kind), dict):
        raise ValueError(f"config.json: 'rope_parameters' says nothing of '{kind}'")
    table = dict(given[kind] if nested else given or older)
    if base is not None:
        table.setdefault("rope_theta", base)
    return {name: value for name, value in table.items() if value is not None or name == "truncate"}


_OF_IMAGES = ("mrope_section", "mrope_interleaved")
"""How an image's positions are spread over the pairs; a text's are one number."""


def _scaling(scaling: str, table: dict[str, Any], settings: Settings) -> dict[str, Any]:
    """How positions are stretched. It empties the table of what it knows, and refuses the rest."""
    longest = settings.count("max_position_embeddings")
    trained = table.pop("original_max_position_embeddings", None)
    factor = None if scaling == "default" else table.pop("factor", None)
    options: dict[str, Any] = {}
    if scaling == "linear":
        options = {"rotary_scaling": "linear"}
    elif scaling == "llama3":
        slow, fast = table.pop("low_freq_factor", None), table.pop("high_freq_factor", None)
        options = {"rotary_scaling": "llama3", "rotary_slow": slow, "rotary_fast": fast, "rotary_trained": trained}
    elif scaling == "yarn":
        trained = trained or longest
        factor = factor if factor is not None else longest / _number("original_max_position_embeddings", trained)
        options = {"rotary_scaling": "yarn", "rotary_trained": trained, **_yarn(table, factor)}
    elif scaling != "default":
        raise ValueError(f"config.json: rotary positions of the kind '{scaling}', which atma does not have")
    if table := {name: value for name, value in table.items() if value is not None}:
        name, value = next(iter(table.items()))
        raise ValueError(f"config.json: rope parameter '{name}' is {value!r}, which atma does not know for '{scaling}'")
    if scaling != "default":
        options["rotary_factor"] = _number("factor", factor)
    for name, value in options.items():
        if value is None:
            raise ValueError(f"config.json: the rope parameters of '{scaling}' do not say '{name}'")
    return options


def _yarn(table: dict[str, Any], factor: float) -> dict[str, Any]:
    gain, scale, every = (table.pop(name, None) for name in ("attention_factor", "mscale", "mscale_all_dim"))
    if gain is None and scale and every:
        log = math.log(factor) if factor > 1 else 0.0
        gain = (0.1 * scale * log + 1) / (0.1 * every * log + 1)
    options = {
        "rotary_fast": float(table.pop("beta_fast", None) or 32),
        "rotary_slow": float(table.pop("beta_slow", None) or 1),
        "rotary_truncate": bool(table.pop("truncate", True)),
    }
    return options if gain is None else options | {"rotary_gain": float(gain)}


def _number(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise ValueError(f"config.json: '{name}' must be a positive number, not {value!r}")
    return float(value)
