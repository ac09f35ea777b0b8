"""Folders of adapters, read for a model that is to be served: those of our own training here, PEFT's in `peft_files`.

Ours say by a hash which model they were trained on, and another is refused.
"""

import functools
import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import cast

import torch
from torch import nn

from atma.layers import Linear
from atma.loading import ADAPTERS, load_floats
from atma.lora import FACTORS, TENSORS, adapter_record, base_hash
from atma.lora_config import LoraConfig
from atma.model import Model
from atma.narrow import NarrowLinear, width_in
from atma.ops.low_rank import Factors
from atma.serve.adapters import Adapter
from atma.serve.peft_files import SETTINGS, in_our_names, peft_layers
from atma.strict import from_dict
from atma.weights import load_tensors

MOST_RANK = 512
"""Of one layer: an adapter of a larger one is better merged."""
SERVED = (nn.Linear, Linear, NarrowLinear)
"""Layers that adapters may be on, and no others that come of them."""


class _Base:
    """The model that adapters are read for: `name` is what it was loaded as, `model` is it, not yet served."""

    def __init__(self, name: str | Path, model: Model) -> None:
        self.name, self.model = name, model
        layers = {n: cast(nn.Linear, one) for n, one in model.named_modules() if type(one) in SERVED}
        self.shapes = {n: (layer.out_features, layer.in_features) for n, layer in layers.items()}
        """Outputs and inputs of its linear layers."""

    @functools.cached_property
    def digest(self) -> str:
        """The hash of its weights as training has them, whatever they are served in."""
        plain = width_in(self.model) is None and self.model.embed.weight.dtype == torch.float32
        model = self.model if plain else load_floats(self.name).model
        return base_hash(model, whole=True)


def read_adapters(folders: Mapping[str, str | Path], name: str | Path, model: Model) -> tuple[Adapter, ...]:
    """The adapters of these folders, by their names, for a model that `name` was loaded as and that is not served yet.

    ValueError names the folder: there is none, it is damaged, of another model, or of a kind that is not served.
    """
    base = _Base(name, model)
    return tuple(_read(called, Path(folder), base) for called, folder in folders.items())


def _read(called: str, folder: Path, base: _Base) -> Adapter:
    if (folder / ADAPTERS).is_file():
        layers = _ours(folder, base)
    elif (folder / SETTINGS).is_file():
        layers = in_our_names(folder, peft_layers(folder), base.name, base.shapes)
    else:
        told = f"neither {ADAPTERS}, as `atma train` writes it, nor {SETTINGS}, as PEFT does"
        raise ValueError(f"{folder}: no adapters here: {told}")
    if not layers:
        raise ValueError(f"{folder}: adapters of no layer at all; name another folder")
    for layer, found in layers.items():
        _check(folder, layer, found, base.shapes)
    layers = {layer: Factors(*(x.float().contiguous() for x in layers[layer])) for layer in sorted(layers)}
    return Adapter(called, layers, _digest(layers))


def _check(folder: Path, name: str, found: Factors, shapes: Mapping[str, tuple[int, int]]) -> None:
    """ValueError: the model has no such layer, or the factors do not fit, or are not finite."""
    if name not in shapes:
        raise ValueError(f"{folder}: adapts '{name}', of which this model has no layer: adapters of another model")
    (outputs, inputs), a, b = shapes[name], tuple(found.a.shape), tuple(found.b.shape)
    if len(a) != 2 or len(b) != 2 or a[1] != inputs or b[0] != outputs or a[0] != b[1] or not a[0]:
        wanted = f"(r, {inputs}) and ({outputs}, r)"
        raise ValueError(f"{folder}: '{name}' has factors {a} and {b}, not {wanted}: adapters of another model")
    if a[0] > MOST_RANK:
        raise ValueError(f"{folder}: '{name}' has rank {a[0]}, at most {MOST_RANK} are served; merge it into the model")
    if not (found.a.isfinite().all() and found.b.isfinite().all()):
        raise ValueError(f"{folder}: the adapter of '{name}' is not finite; take an earlier checkpoint of its training")


def _digest(layers: Mapping[str, Factors]) -> str:
    digest = hashlib.sha256()
    for name, factors in layers.items():
        for x in factors:
            digest.update(f"{name} {tuple(x.shape)}\n".encode())
            digest.update(x.numpy().data)
    return digest.hexdigest()


def _ours(folder: Path, base: _Base) -> dict[str, Factors]:
    """Of a folder that `save_adapters` wrote. ValueError: its base is another model, or more than adapters is in it."""
    record, path = adapter_record(folder), folder / TENSORS
    config, tensors = from_dict(LoraConfig, record["lora"], "lora."), load_tensors(path)
    more = next((tensor for tensor in sorted(tensors) if tensor.rpartition(".")[2] not in FACTORS), None)
    if more is not None:
        mend = f"merge it: `atma merge BASE {folder} OUT`"
        raise ValueError(f"{folder}: '{more}' was trained itself (lora.train), which no request has alone; {mend}")
    if base.digest != record.get("base_sha256"):
        was = f" (it was {record['base']})" if record.get("base") else ""
        raise ValueError(f"{folder}: trained on another model than this one{was}; the weights differ by their hash")
    names = dict.fromkeys(tensor.rpartition(".")[0] for tensor in sorted(tensors))
    halved = next((name for name in names if not all(f"{name}.{factor}" in tensors for factor in FACTORS)), None)
    if halved is not None:
        raise ValueError(f"{path}: of '{halved}' one factor is missing; copy the folder again")
    scale, (a, b) = config.alpha / config.rank, FACTORS
    return {name: Factors(tensors[f"{name}.{a}"], tensors[f"{name}.{b}"] * scale) for name in names}
