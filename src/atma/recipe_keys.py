"""The keys of a recipe, for `--set` and for what is said of one that does not exist.

`WORDS` says how other frameworks call what our keys mean; `near` finds what a slip of the pen was meant to be, in
whichever table it is.
"""

import difflib
from collections.abc import Collection
from typing import Any

from atma.config import LoraConfig, Recipe
from atma.strict import NEAR, UnknownKey, mend, to_dict

RATES = ("train.muon_rate", "train.embedding_rate", "train.head_rate", "train.vector_rate", "train.adamw_rate")
SIZES = ("train.tokens", "train.batch_tokens")
WORDS: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("lr", "learning_rate", "max_lr", "base_lr", "peak_lr", "rate"), (*RATES, "train.lora_rate")),
    **dict.fromkeys(("lora_lr", "lora_learning_rate"), ("train.lora_rate",)),
    **dict.fromkeys(("bs", "batch", "batch_size", "global_batch_size", "train_batch_size"), ("train.batch_tokens",)),
    **dict.fromkeys(("per_device_train_batch_size", "micro_batch_size"), ("train.batch_tokens", "train.accumulation")),
    **dict.fromkeys(("gradient_accumulation_steps", "grad_accum", "accum", "acc_steps"), ("train.accumulation",)),
    **dict.fromkeys(("epoch", "num_epochs", "num_train_epochs", "n_epochs"), ("train.epochs",)),
    **dict.fromkeys(("steps", "max_steps", "num_steps", "iters", "max_iters", "num_iterations"), SIZES),
    **dict.fromkeys(("ctx", "context", "context_length", "ctx_len", "n_ctx", "block_size"), ("train.length",)),
    **dict.fromkeys(("seq_len", "seq_length", "sequence_length", "max_seq_len", "max_seq_length"), ("train.length",)),
    **dict.fromkeys(("max_length", "max_position_embeddings", "n_positions"), ("train.length",)),
    **dict.fromkeys(("hidden_size", "dim", "d_model", "n_embd", "n_embed", "model_dim", "embed_dim"), ("model.width",)),
    **dict.fromkeys(("n_layers", "n_layer", "num_layers", "layers", "num_hidden_layers"), ("model.depth",)),
    **dict.fromkeys(("n_heads", "n_head", "num_heads", "heads", "num_attention_heads"), ("model.query_heads",)),
    **dict.fromkeys(("n_kv_heads", "num_kv_heads", "kv_heads", "num_key_value_heads"), ("model.key_value_heads",)),
    **dict.fromkeys(("head_dim", "head_size", "d_head"), ("model.head_width",)),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "d_ff", "mlp_dim", "hidden_dim"), ("model.mlp_width",)),
    **dict.fromkeys(("mlp_ratio", "ffn_multiplier", "expansion"), ("model.mlp_multiple",)),
    **dict.fromkeys(("hidden_act", "activation", "act"), ("model.mlp_gate",)),
    **dict.fromkeys(("vocabulary", "vocab", "n_vocab", "vocabulary_size"), ("model.vocab_size",)),
    **dict.fromkeys(("tie_word_embeddings", "tie_weights", "weight_tying"), ("model.tied_head",)),
    **dict.fromkeys(("rms_norm_eps", "norm_eps", "layer_norm_eps"), ("model.norm_epsilon",)),
    **dict.fromkeys(("sliding_window", "window_size"), ("model.window",)),
    **dict.fromkeys(
        ("warmup", "warmup_steps", "warmup_ratio", "warmup_iters", "num_warmup_steps"), ("train.warmup_share",)
    ),
    **dict.fromkeys(("decay_steps", "cooldown", "lr_decay_iters", "stable_ratio"), ("train.constant_share",)),
    **dict.fromkeys(("wd", "decay", "l2"), ("train.weight_decay",)),
    **dict.fromkeys(("grad_clip", "gradient_clip", "max_grad_norm", "clip_grad"), ("train.clip",)),
    **dict.fromkeys(("adam_beta1", "b1"), ("train.beta1",)),
    **dict.fromkeys(("adam_beta2", "b2"), ("train.beta2",)),
    **dict.fromkeys(("eps", "adam_epsilon", "adam_eps"), ("train.epsilon",)),
    **dict.fromkeys(("optimizer", "optim", "opt"), ("train.optimiser",)),
    **dict.fromkeys(("regularizer", "regularizer_weight"), ("train.regulariser", "train.regulariser_weight")),
    **dict.fromkeys(("dtype", "bf16", "fp16", "mixed_precision", "torch_dtype"), ("train.precision",)),
    **dict.fromkeys(("random_seed", "rng_seed"), ("train.seed",)),
    **dict.fromkeys(("save_every", "save_steps", "save_interval", "ckpt_interval"), ("train.checkpoint_every",)),
    **dict.fromkeys(("save_total_limit", "keep_last"), ("train.keep_checkpoints",)),
    **dict.fromkeys(("eval_every", "eval_steps", "eval_interval", "val_every"), ("train.evaluate_every",)),
    **dict.fromkeys(("eval_iters", "eval_tokens", "val_tokens"), ("train.evaluation_tokens",)),
    **dict.fromkeys(("patience", "early_stop", "early_stopping_patience"), ("train.early_stopping",)),
    **dict.fromkeys(("load_best_model_at_end", "save_best"), ("train.keep_best",)),
    **dict.fromkeys(("generate_every", "sample_interval", "sample_steps"), ("train.sample_every",)),
    **dict.fromkeys(("resume_from", "pretrained", "checkpoint", "base_model"), ("train.init_from",)),
    **dict.fromkeys(("train_tokens", "total_tokens", "max_tokens", "num_tokens"), ("train.tokens",)),
    **dict.fromkeys(("dataset", "data_path", "data_dir", "train_data"), ("data.path",)),
    **dict.fromkeys(("lora_r", "lora_rank", "r"), ("lora.rank",)),
    **dict.fromkeys(("lora_alpha",), ("lora.alpha",)),
    **dict.fromkeys(("target_modules", "lora_target_modules"), ("lora.targets",)),
    **dict.fromkeys(("eval_lengths", "context_lengths"), ("evaluation.lengths",)),
}
"""What others call it, and the keys here that decide it."""
SAME_TABLE = 0.15
"""How much nearer a key counts for being in the table that was written."""


def recipe_keys() -> dict[str, Any]:
    """Every key of a recipe, as `--set` takes it, and its default."""
    return dict(_flat(to_dict(Recipe(lora=LoraConfig()))))


def told(error: UnknownKey) -> str:
    """What is said of a key that a recipe does not have: the key that is meant, or those that there are."""
    path, known = f"{error.where}{error.key}", [*recipe_keys(), *(f"{error.where}{key}" for key in error.known)]
    meant = WORDS.get(error.key.lower().replace("-", "_"), ())
    if meant:
        names = [f"'{one}'" for one in sorted(meant, key=lambda one: not one.startswith(error.where))]
        return (
            f"unknown key '{path}'; did you mean {' or '.join([', '.join(names[:-1])] * bool(names[1:]) + names[-1:])}?"
        )
    found = near(path, known)
    said = f"did you mean '{found}'?" if found else mend(error.key, error.known, error.where)
    return f"unknown key '{path}'; {said}"


def near(path: str, known: Collection[str]) -> str | None:
    """The key that a path was meant to be, in any table, its own first; None where none is near."""
    table, _, key = path.rpartition(".")

    def likeness(other: str) -> float:
        others, _, own = other.rpartition(".")
        alike = difflib.SequenceMatcher(None, key, own).ratio()
        tables = SAME_TABLE if table == others else 0.0
        return max(alike, difflib.SequenceMatcher(None, path, other).ratio() if not others else 0.0) + tables

    best = max(known, key=likeness, default=None)
    return best if best is not None and likeness(best) >= NEAR + SAME_TABLE else None


def _flat(values: dict[str, Any], where: str = "") -> list[tuple[str, Any]]:
    found: list[tuple[str, Any]] = []
    for key, value in values.items():
        found += _flat(value, f"{where}{key}.") if isinstance(value, dict) and value else [(f"{where}{key}", value)]
    return found
