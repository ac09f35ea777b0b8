"""What a result was measured with: hashes of weights, tokenizer, data and code, and the settings that move figures."""

from typing import Any

import torch

import atma
from atma.config import ModelConfig
from atma.data.dataset import TokenSet
from atma.eval.loaded import Loaded, check_tokenizer, tokenizer_of
from atma.eval.stream import DEFAULT, Streaming
from atma.hashes import code_hash, config_hash, weights_hash
from atma.loading import called
from atma.mixers.flat import is_flat
from atma.narrow import numbers_in, width_in
from atma.ops import backend_for


def provenance(loaded: Loaded, token_set: TokenSet, seed: int, streaming: Streaming = DEFAULT) -> dict[str, Any]:
    """Plain JSON data for every result row. ValueError: the data is of another tokenizer than the model's."""
    tokenizer = tokenizer_of(loaded)
    check_tokenizer(token_set, tokenizer, loaded.path)
    if token_set.eot != tokenizer.eot:
        ids = f"id {token_set.eot}, the tokenizer's {tokenizer.eot}"
        raise ValueError(f"the data's end-of-text is {ids}; open the data with the tokenizer's")
    return model_provenance(loaded) | {"data_hash": token_set.hash, "seed": seed} | streaming._asdict()


def model_provenance(loaded: Loaded) -> dict[str, Any]:
    """What concerns the model alone, the code and the machine's arithmetic."""
    weight = next(loaded.model.parameters())
    return software() | {
        "weights_sha256": weights_hash(loaded.model, loaded.path),
        "model_config_sha256": config_hash(loaded.model),
        "tokenizer_sha256": tokenizer_of(loaded).hash(),
        "dtype": str(weight.dtype).removeprefix("torch."),
        "device": weight.device.type,
        "backend": backend_for(x=weight),
        "truncate": False,
        "model": called(loaded.path) if loaded.path else None,
        **_mixing(loaded.model.config),
        **({} if loaded.model.selection is None else {"selection": loaded.model.selection}),
        **({} if (width := width_in(loaded.model)) is None else {"weights": width}),
        "parameters": numbers_in(loaded.model),
    }


def _mixing(config: ModelConfig) -> dict[str, Any]:
    """The attention core and the memory, where the model has any, and its pattern where that is of other mixers."""
    told = {key: getattr(config, key) for key in ("core", "memory") if hasattr(config, key)}
    return told if is_flat(config.pattern, config.mixers) else told | {"pattern": list(config.pattern)}


def software() -> dict[str, Any]:
    """Versions, and the threads that computed."""
    return {
        "code_sha256": code_hash(),
        "version": atma.__version__,
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
    }
