"""Checkpoints in the published ATMA layout become model folders: same numbers, our names.

The published layout is a folder with `config.json` and the weights, either `weights.pt` holding `{"model": tensors}` or
`model.safetensors`. Its form of the model is ours with `direction_radius` 1 and no bound on half-life (maths.md,
sections 4 and 5), so an imported model computes what it computed before.
"""

from collections.abc import Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import Any
from zipfile import BadZipFile, ZipFile, is_zipfile

import torch
from torch import Tensor

from atma.checkpoint import fill_model, require_replaceable, save_model
from atma.config import ModelConfig
from atma.folders import read_json
from atma.mixers import CORES
from atma.model import Model
from atma.tokenizer import load_tokenizer
from atma.weights import load_tensors

_WRAPPERS = ("_orig_mod.", "module.")
_REGULAR: tuple[str, ...] = ("local", "local", "global", "local")
_ROTARY = "rotary.angular_freq"

_OUTER = {
    "embed.weight": "embed.weight",
    "norm.weight": "norm.weight",
    "head.weight": "proj.weight",
    "head.bias": "proj.bias",
}
_BLOCK = {"norm_mixer.weight": "norm1.weight", "norm_mlp.weight": "norm2.weight"}
_BLOCK_LINEAR = {"mlp.in_proj": "mlp.fc", "mlp.out_proj": "mlp.proj"}
_LOCAL = {"mixer.taps": "attn.conv.weight"}
_LOCAL_LINEAR = {"mixer.in_proj": "attn.in_proj", "mixer.out_proj": "attn.out_proj"}
_GLOBAL_LINEAR = {f"mixer.{name}_proj": f"attn.{name}" for name in "qkv"} | {"mixer.out_proj": "attn.proj"}
_CANON = {f"mixer.canon_{name}": f"attn.canon_{name}.weight" for name in "qkv"}
_POLAR = {
    "mixer.core.length_gain": "attn.len_gain_raw",
    "mixer.core.null_base": "attn.null_base",
    "mixer.core.null_slope": "attn.null_slope_raw",
    "mixer.core.magnitude_slope": "attn.mag_beta_raw",
    "mixer.core.null_value": "attn.v_null",
}
_POLAR_LINEAR = {"mixer.core.count_proj": "attn.mu_proj"}
_MEMORY_LINEAR = {
    "mixer.memory.decay_proj": "attn.mem.w_gamma",
    "mixer.memory.beta_proj": "attn.mem.w_beta",
    "mixer.memory.gate_proj": "attn.mem.gate",
    "mixer.memory.out_proj": "attn.mem.proj",
}


def import_model(
    source: str | Path, out: str | Path, tokenizer: str | Path | None = None, end: str | None = None
) -> Model:
    """Convert the published checkpoint in `source` and write the model folder `out`; returns the model.

    `tokenizer` is a tokenizer.json, by default the one in `source` if it has one; `end` names its end-of-text token
    where no file does. ValueError says what does not fit.
    """
    source = Path(source)
    if not source.is_dir():
        raise ValueError(f"{source}: no such folder; give the one with config.json and weights.pt or model.safetensors")
    if Path(out).resolve() == source.resolve():
        raise ValueError(f"{out}: is the source; name a new folder")
    require_replaceable(Path(out))
    published = read_json(source / "config.json")
    if "attn_type" not in published and "model_type" in published:
        raise ValueError(f"{source}: a checkpoint of transformers; write hf:{source}")
    weights = source / "weights.pt"
    tensors = _load_pt(weights) if weights.exists() else load_tensors(weights := source / "model.safetensors")
    try:
        config, ours = convert(tensors, published)
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from None
    model = Model(config)
    fill_model(model, ours, weights)
    beside = source / "tokenizer.json"
    words = load_tokenizer(tokenizer or beside, end) if tokenizer or beside.exists() else None
    if words is not None and words.vocab_size > config.vocab_size:
        raise ValueError(
            f"{tokenizer or beside}: {words.vocab_size} tokens, but the model has only {config.vocab_size}"
        )
    save_model(out, model, words, {"imported": published})
    return model


def convert(state_dict: Mapping[str, Tensor], published: Mapping[str, Any]) -> tuple[ModelConfig, dict[str, Tensor]]:
    """Our configuration and tensors, by our names, from published tensors and the data of their config.json.

    ValueError lists tensors that are missing or unexpected, and names a setting that does not fit.
    """
    tensors = {_unwrapped(name): tensor for name, tensor in state_dict.items()}
    config = convert_config(tensors, published)
    names = published_names(config)
    buffers = [name for name in tensors if config.core == "rope" and name.endswith(_ROTARY)]
    missing = sorted(set(names.values()) - tensors.keys())
    unexpected = sorted(tensors.keys() - set(names.values()) - set(buffers))
    if missing or unexpected:
        told = [
            f"{what}: {', '.join(some)}" for what, some in (("missing", missing), ("unexpected", unexpected)) if some
        ]
        raise ValueError(f"the tensors are not those of the configuration; {'; '.join(told)}")
    for name in buffers:
        _check_rotary(name, tensors[name], config.head_width)
    return config, {name: _plain(tensors[theirs]) for name, theirs in names.items()}


def convert_config(tensors: Mapping[str, Tensor], published: Mapping[str, Any]) -> ModelConfig:
    """Our configuration, from the data of a published config.json and, where that is silent, the tensors' shapes."""
    depth, width, head_width = (_setting(published, name) for name in ("num_hidden_layers", "hidden_size", "head_dim"))
    core = _setting(published, "attn_type", str)
    if core not in CORES:
        raise ValueError(f"config.json: attn_type '{core}' is none of {', '.join(CORES)}")
    if depth > len(tensors):
        raise ValueError(f"config.json: 'num_hidden_layers' is {depth}, but there are only {len(tensors)} tensors")
    kinds: tuple[str, ...] = tuple(
        "global" if f"blocks.{i}.attn.q.weight" in tensors else "local" for i in range(depth)
    )
    regular = all(kind == _REGULAR[i % 4] for i, kind in enumerate(kinds))
    first = f"blocks.{kinds.index('global')}." if "global" in kinds else ""
    return ModelConfig(
        vocab_size=_vocabulary(tensors, published),
        width=width,
        depth=depth,
        pattern=_REGULAR if regular else kinds,
        query_heads=_ratio(tensors, f"{first}attn.q.weight", 2 * head_width) if first else max(1, width // head_width),
        key_value_heads=_ratio(tensors, f"{first}attn.k.weight", head_width) if first else 1,
        head_width=head_width,
        core=core,
        memory=_optional(published, "mem_enabled", f"{first}attn.mem.gate.weight" in tensors),
        window=_optional(published, "attn_window", 0) or None,
        mlp_multiple=_ratio(tensors, "blocks.0.mlp.fc.weight", 2 * width),
        local_taps=_optional(published, "conv_kernel_size", 3),
        canon_taps=_optional(published, "attn_kernel_size", 4),
        norm_epsilon=_optional(published, "rms_norm_eps", 1e-6),
        direction_radius=1.0,
        canon_init="uniform",
        share_query_key_init=False,
        decay_bias=_optional(published, "mem_gamma_bias", 3.9),
        beta_bias=_optional(published, "mem_beta_bias", 0.0),
    )


def published_names(config: ModelConfig) -> dict[str, str]:
    """The published name of each of our tensors."""
    names = dict(_OUTER)
    for i, kind in enumerate(config.layers):
        block = (
            _BLOCK | _linear(_BLOCK_LINEAR) | (_global(config) if kind == "global" else _LOCAL | _linear(_LOCAL_LINEAR))
        )
        names |= {f"blocks.{i}.{ours}": f"blocks.{i}.{theirs}" for ours, theirs in block.items()}
    return names


def _global(config: ModelConfig) -> dict[str, str]:
    names = _linear(_GLOBAL_LINEAR)
    if config.core != "rope":
        names |= _CANON
    if config.core == "polar":
        names |= _POLAR | _linear(_POLAR_LINEAR)
    return names | _linear(_MEMORY_LINEAR) if config.memory else names


def _linear(layers: Mapping[str, str]) -> dict[str, str]:
    return {f"{ours}.{part}": f"{theirs}.{part}" for ours, theirs in layers.items() for part in ("weight", "bias")}


def _plain(tensor: Tensor) -> Tensor:
    """Depthwise convolution weights (C, 1, W) become (C, W); all is float32."""
    return (tensor.squeeze(1) if tensor.ndim == 3 else tensor).float()


def _unwrapped(name: str) -> str:
    while name.startswith(_WRAPPERS):
        name = name.removeprefix(_WRAPPERS[0]).removeprefix(_WRAPPERS[1])
    return name


def _setting(published: Mapping[str, Any], name: str, kind: type = int) -> Any:
    value: Any = published.get(name)
    if type(value) is not kind or (kind is int and value < 1):
        raise ValueError(
            f"config.json: '{name}' must be a {'positive number' if kind is int else 'text'}, not {value!r}"
        )
    return value


def _optional(published: Mapping[str, Any], name: str, default: Any) -> Any:
    """A setting of the default's type, or the default where it is absent or null."""
    value = published.get(name)
    if value is None:
        return default
    if type(default) is float and type(value) is int:
        return float(value)
    if type(value) is not type(default):
        raise ValueError(f"config.json: '{name}' must be of type {type(default).__name__}, not {value!r}")
    return value


def _vocabulary(tensors: Mapping[str, Tensor], published: Mapping[str, Any]) -> int:
    """Rows of the embedding: the vocabulary with its padding."""
    stated = _setting(published, "vocab_size")
    rows = tensors["embed.weight"].shape[0] if "embed.weight" in tensors else stated
    if rows < stated:
        raise ValueError(f"config.json: vocab_size is {stated}, but the embedding has only {rows} rows")
    return rows


def _ratio(tensors: Mapping[str, Tensor], name: str, unit: int) -> int:
    if name not in tensors:
        raise ValueError(f"the tensors are not those of the configuration; missing: {name}")
    rows = tensors[name].shape[0]
    if rows == 0 or rows % unit:
        raise ValueError(f"tensor '{name}' has {rows} rows, which the configuration says are a multiple of {unit}")
    return rows // unit


def _check_rotary(name: str, stored: Tensor, head_width: int) -> None:
    """A stored table of frequencies must be the one that every rope layer computes."""
    turning = (1 / 1024) ** torch.linspace(0, 1, head_width // 4, dtype=torch.float64)
    expected = torch.cat([turning, torch.zeros_like(turning)])
    if stored.shape != expected.shape or not torch.allclose(stored.double(), expected, rtol=1e-5, atol=1e-8):
        raise ValueError(
            f"buffer '{name}' holds other rotary frequencies than (1/1024)^linspace(0, 1, {head_width // 4})"
        )


def _load_pt(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise ValueError(f"{path}: not a file")
    try:
        _check_sums(path)
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, UnpicklingError, BadZipFile, EOFError, LookupError, TypeError, AttributeError):
        raise ValueError(f"{path}: not a readable PyTorch file of plain tensors, truncated or damaged") from None
    tensors = content.get("model") if isinstance(content, dict) else None
    if not isinstance(tensors, dict) or not all(isinstance(tensor, Tensor) for tensor in tensors.values()):
        raise ValueError(f"{path}: no table of tensors under 'model'")
    return tensors


def _check_sums(path: Path) -> None:
    """BadZipFile when a part of the archive differs from its checksum, which `torch.load` does not look at."""
    if not is_zipfile(path):
        return
    with ZipFile(path) as archive:
        if damaged := archive.testzip():
            raise BadZipFile(damaged)
