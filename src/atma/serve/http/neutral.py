"""What clients send besides the fields that are honoured.

Fields of other servers and of OpenAI's API are known here by name, so that a client need not be told what to leave out.
Those that cannot change the text are left aside: ids, hints to schedulers and caches, and the tuning of methods whose
switch is refused when it is on. Those that would change it, and cannot be honoured, are accepted with the values that
ask for nothing; any other value, and any field that nobody knows, is refused by name, unless the server is lenient: an
answer is never other than what was asked for.
"""

import json
from contextvars import ContextVar
from typing import Any

ASIDE = {
    # OpenAI
    "user",
    "metadata",
    "service_tier",
    "safety_identifier",
    "prompt_cache_key",
    "prompt_cache_retention",
    "cache_control",
    "inference_geo",
    "parallel_tool_calls",
    # ids, priorities and labels of vLLM, SGLang, llama.cpp, OpenRouter and LM Studio
    "request_id",
    "rid",
    "priority",
    "custom_labels",
    "provider",
    "route",
    "usage",
    "ttl",
    "keep_alive",
    "id_slot",
    "slot_id",
    # how reasoning is told apart, where there is none
    "include_reasoning",
    "separate_reasoning",
    "stream_reasoning",
    "reasoning_format",
    # the tuning of samplers of llama.cpp that are off
    "dynatemp_exponent",
    "xtc_threshold",
    "dry_base",
    "dry_allowed_length",
    "dry_penalty_last_n",
    "dry_sequence_breakers",
    "mirostat_tau",
    "mirostat_eta",
    "repeat_last_n",
    "min_keep",
    "n_cache_reuse",
}
NEUTRAL: dict[str, list[Any]] = {
    # OpenAI
    "tools": [[]],
    "tool_choice": ["none", "auto"],
    "functions": [[]],
    "function_call": ["none", "auto"],
    "modalities": [["text"]],
    "store": [False],
    "suffix": [""],
    "best_of": [1],
    "audio": [{}],
    "prediction": [{}],
    "web_search_options": [],
    "reasoning_effort": ["none"],
    "verbosity": ["medium"],
    # vLLM
    "use_beam_search": [False],
    "length_penalty": [1],
    "early_stopping": [False],
    "truncate_prompt_tokens": [],
    "prompt_logprobs": [],
    "prompt_embeds": [[]],
    "allowed_token_ids": [[]],
    "bad_words": [[]],
    "logits_processors": [[]],
    "return_tokens_as_token_ids": [False],
    "documents": [[]],
    "chat_template": [""],
    "mm_processor_kwargs": [{}],
    "kv_transfer_params": [{}],
    "vllm_xargs": [{}],
    "thinking_token_budget": [],
    "max_repetition_pattern_size": [0],
    "min_repetition_pattern_size": [0],
    "repetition_min_count": [0],
    "guided_json": ["", {}],
    "guided_regex": [""],
    "guided_choice": [[]],
    "guided_grammar": [""],
    "guided_decoding_backend": [""],
    "guided_whitespace_pattern": [""],
    "structural_tag": [""],
    # SGLang
    "json_schema": ["", {}],
    "regex": [""],
    "ebnf": [""],
    "stop_regex": ["", []],
    "no_stop_trim": [False],
    "lora_path": ["", []],
    "session_params": [{}],
    "custom_params": [{}],
    "custom_logit_processor": ["", []],
    "extra_key": ["", []],
    "return_hidden_states": [False],
    "return_routed_experts": [False],
    "return_cached_tokens_details": [False],
    "data_parallel_rank": [],
    "bootstrap_host": [],
    "bootstrap_port": [],
    "bootstrap_room": [],
    # llama.cpp's server
    "n_predict": [-1],
    "n_keep": [0],
    "n_discard": [0],
    "n_indent": [0],
    "n_probs": [0],
    "repeat_penalty": [1],
    "typical_p": [1],
    "typ_p": [1],
    "tfs_z": [1],
    "dynatemp_range": [0],
    "xtc_probability": [0],
    "dry_multiplier": [0],
    "mirostat": [0],
    "mirostat_mode": [0],
    "top_n_sigma": [-1],
    "adaptive_target": [-1],
    "penalize_nl": [False],
    "grammar": ["", {}],
    "samplers": [[], ""],
    "lora": [[]],
    "image_data": [[]],
    "t_max_predict_ms": [0],
    "post_sampling_probs": [False],
    "return_tokens": [False],
    "return_progress": [False],
    "timings_per_token": [False],
    "thinking_forced_open": [False],
    "parse_tool_calls": [False],
    # Text Generation Inference and transformers
    "do_sample": [True],
    "details": [False],
    "decoder_input_details": [False],
    "return_full_text": [False],
    "top_n_tokens": [0],
    "watermark": [False],
    "truncate": [],
    "adapter_id": [""],
    "tool_prompt": [""],
    "num_beams": [1],
    "num_return_sequences": [1],
    "no_repeat_ngram_size": [0],
    "min_new_tokens": [0],
    "guidance_scale": [1],
    "negative_prompt": [""],
    "epsilon_cutoff": [0],
    "eta_cutoff": [0],
    "encoder_repetition_penalty": [1],
    "penalty_alpha": [0],
    "temperature_last": [False],
    # routers, and load testers
    "nvext": [{}],
    "return_logprob": [False],
    "extra_body": [{}],
    "transforms": [[]],
    "models": [[]],
    "plugins": [[]],
    "top_a": [0],
    "reasoning": [{}, {"enabled": False}, {"effort": "none"}],
    "thinking": [{}, {"type": "disabled"}, {"type": "adaptive"}],
    "output_config": [{}],
    "context_management": [{}],
    "mcp_servers": [[]],
    "container": [""],
    "speed": ["standard"],
    "enable_thinking": [False],
    "think": [False],
    "raw": [False],
    "options": [{}],
    "format": [""],
    "images": [[]],
}
MESSAGE_NEUTRAL = ("refusal", "annotations", "audio", "function_call", "reasoning_content", "reasoning")
MESSAGE_ASIDE = ("cache_control",)

IGNORED: ContextVar[list[str] | None] = ContextVar("ignored", default=None)
"""The names of fields of the request under way that nobody knows and that were passed over; None: they are refused."""
MOST_IGNORED = 64
"""Fields of one request that a lenient server passes over."""


class Refused(ValueError):
    """A body as a whole is not served; `parameter` is the field at fault."""

    def __init__(self, message: str, parameter: str) -> None:
        super().__init__(message)
        self.parameter = parameter


def shown(value: object) -> str:
    """The beginning of a value in quotes, without characters that no answer can hold."""
    return ascii(str(value)[:40])


THEIRS = frozenset({"parameters", "input_schema", "schema", "input", "arguments"})
"""Fields that hold a client's own JSON, in which null is a value as any other."""


def without_nulls(value: Any) -> Any:
    """A value whose objects have no field that is null, but for those in `THEIRS`."""
    if isinstance(value, dict):
        return {k: v if k in THEIRS else without_nulls(v) for k, v in value.items() if v is not None}
    return [without_nulls(part) for part in value if part is not None] if isinstance(value, list) else value


def require_finite(value: Any) -> None:
    """ValueError: it holds a number that no answer can repeat, such as 1e999."""
    try:
        json.dumps(value, allow_nan=False)
    except ValueError:
        raise ValueError("holds a number that is not finite") from None


def asks_nothing(key: str, value: Any) -> bool:
    """Whether a known field has a value that asks for nothing. True is not 1 here."""
    value = without_nulls(value)
    return any(isinstance(value, bool) == isinstance(one, bool) and value == one for one in NEUTRAL.get(key, ()))
