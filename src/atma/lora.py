"""Low-rank adapters: train a small addition to each projection of a model whose own weights stay as they are.

    attached = attach(model, LoraConfig(rank=8))   # freezes the model; prints nothing, `attached.lines()` tells
    …                                              # train whatever `requires_grad`
    save_adapters("adapters", model, attached)     # a few MB; `load_adapters(model, "adapters")` reads them back
    merge(model)                                   # an ordinary model again

An adapted layer computes x Wᵀ + b + (α/r) (x Aᵀ) Bᵀ with A (r, inputs) and B (outputs, r), B at zero, so that it starts
as the layer it was (Hu et al. 2021, arXiv 2106.09685, section 4.1). It is the same object with the same W under the
same name, and its `weight`, to whoever reads it, is W + (α/r) B A: a head, whose weight the loss reads, is adapted like
any projection, and what packs weights packs the right ones.
"""

import contextlib
import hashlib
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from atma.folders import json_writer, read_json, verify_folder, write_folder
from atma.layers import Linear
from atma.loading import ADAPTERS
from atma.lora_config import LoraConfig
from atma.model import Model
from atma.names import Part, matches, table, unmatched
from atma.narrow import require_floats
from atma.ops.dense import linear
from atma.strict import from_dict, to_dict
from atma.weights import TensorWriter, load_tensors

FORMAT = "atma-adapters-1"
RECORD, TENSORS = ADAPTERS, "adapters.safetensors"
FACTORS = ("lora_a", "lora_b")


class Adapted(Linear):
    """A linear layer with an adapter. Made of a layer that there is, by `attach`."""

    lora_a: nn.Parameter
    lora_b: nn.Parameter
    scale: float
    """α/r."""
    plain: type[nn.Linear]
    """The class of the layer without the adapter."""

    @property
    def base(self) -> Tensor:
        """W (outputs, inputs), without the adapter; a buffer in a few mixers."""
        held = self._parameters.get("weight")
        return cast(Tensor, self._buffers["weight"] if held is None else held)

    @property
    def weight(self) -> Tensor:  # pyright: ignore[reportIncompatibleVariableOverride]
        """W + (α/r) B A, in W's dtype."""
        work = torch.promote_types(self.base.dtype, self.lora_a.dtype)
        added = self.scale * (self.lora_b.to(work) @ self.lora_a.to(work))
        return (self.base.to(work) + added).to(self.base.dtype)

    def forward(self, x: Tensor) -> Tensor:
        """x (…, inputs) to (…, outputs)."""
        given = x if torch.is_autocast_enabled(x.device.type) else x.to(self.lora_a.dtype)
        added = linear(linear(given, self.lora_a, None), self.lora_b, None)
        y = linear(x, self.base, self.bias)
        return y + self.scale * added.to(y.dtype)


class Attached(NamedTuple):
    """What `attach` did to a model."""

    config: LoraConfig
    """What was asked for."""
    adapted: tuple[Part, ...]
    """Every layer with an adapter: its name, W's shape, the numbers that the adapter adds."""
    trained: tuple[Part, ...]
    """Every parameter that is trained itself."""
    left: dict[str, str]
    """Layers that the patterns hit and that got no adapter, and why."""
    total: int
    """Numbers of the model without adapters."""

    @property
    def trainable(self) -> int:
        """Numbers that are trained."""
        return sum(part.numbers for part in (*self.adapted, *self.trained))

    def lines(self) -> list[str]:
        """A table for people: what is adapted, what is trained itself, and how much it is."""
        rows = [*table("adapter", self.adapted), *table("trained", self.trained)]
        reasons = sorted(set(self.left.values()))
        rows += [
            f"left out  {', '.join(name for name, why in self.left.items() if why == one)}: {one}" for one in reasons
        ]
        share = 100 * self.trainable / self.total
        return [*rows, f"trainable {self.trainable:,} numbers, {share:.2f}% of the model's {self.total:,}"]


def attach(model: Model, config: LoraConfig | None = None, generator: torch.Generator | None = None) -> Attached:
    """Freeze a model and give the layers that `config` names adapters, which `generator` draws (None: the global one).

    From then on what `requires_grad` is the adapters and what `config.train` names. ValueError: a pattern that hits
    nothing, with the nearest that would; a model that has adapters, or narrow weights; a head that is the embedding.
    """
    require_floats(model, "an adapter")
    config = config or LoraConfig()
    if adapted_layers(model):
        raise ValueError("the model has adapters already; merge them first, or load a fresh model")
    trained = _trained(model, config)
    layers, left = _chosen(model, config, trained)
    total = sum(parameter.numel() for parameter in model.parameters())
    model.requires_grad_(False)
    for parameter in trained.values():
        parameter.requires_grad_(True)
    added = tuple(Part(name, tuple(layer.weight.shape), _adapt(layer, config, generator)) for name, layer in layers)
    return Attached(config, added, tuple(Part(n, tuple(p.shape), p.numel()) for n, p in trained.items()), left, total)


def adapted_layers(model: nn.Module) -> dict[str, Adapted]:
    """The layers with adapters, by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, Adapted)}


@contextlib.contextmanager
def as_plain(model: nn.Module) -> Iterator[None]:
    """Inside, layers with adapters are what they were: `weight` is W alone, for who looks weights up by their names."""
    layers = adapted_layers(model).values()
    for layer in layers:
        cast(nn.Module, layer).__class__ = layer.plain
    try:
        yield
    finally:
        for layer in layers:
            cast(nn.Module, layer).__class__ = Adapted


def adapter_tensors(model: nn.Module) -> dict[str, nn.Parameter]:
    """Everything that is trained: factors of adapters and parameters trained themselves, by name."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


@torch.no_grad()
def merge(model: nn.Module) -> None:
    """Add every adapter to its weights. The model is then an ordinary one, all of it trainable; outputs stay the same
    up to rounding."""
    for layer in adapted_layers(model).values():
        layer.base.copy_(layer.weight)
        cast(nn.Module, layer).__class__ = layer.plain
        for name in FACTORS:
            del layer._parameters[name]
        del layer.scale, layer.plain
    model.requires_grad_(True)


@torch.no_grad()
def merged_tensors(model: nn.Module) -> dict[str, Tensor]:
    """The tensors of the model as `merge` would leave it, which stays as it is; what is tied once."""
    merged = {f"{name}.weight": layer.weight for name, layer in adapted_layers(model).items()}
    return {name: merged.get(name, value.detach()) for name, value in _own(model)}


def base_hash(model: nn.Module, whole: bool = False) -> str:
    """SHA-256, in hexadecimal, of what is not trained, or with `whole` of all, in float32: adapters' base."""
    digest = hashlib.sha256()
    for name, value in sorted(_own(model)):
        if whole or not value.requires_grad:
            digest.update(f"{name} {tuple(value.shape)}\n".encode())
            digest.update(value.detach().float().cpu().contiguous().numpy().data)
    return digest.hexdigest()


def adapter_files(
    model: nn.Module, attached: Attached, base: str = "", digest: str = "", extra: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """The writers of the files of a folder of adapters, for `write_folder`.

    `base` says where the base lies, `digest` is its `base_hash` where that is known.
    """
    digest = digest or base_hash(model)
    record = {"format": FORMAT, "lora": to_dict(attached.config), "base": base, "base_sha256": digest}
    files = {RECORD: json_writer(record | {"extra": dict(extra or {})})}
    return files | {TENSORS: TensorWriter(adapter_tensors(model))}


def save_adapters(
    folder: str | Path, model: nn.Module, attached: Attached, base: str = "", extra: Mapping[str, Any] | None = None
) -> None:
    """Write a folder of adapters, replacing an older one at once. ValueError where it holds something else."""
    folder = Path(folder)
    if folder.is_file() or (folder.is_dir() and any(folder.iterdir()) and not (folder / RECORD).is_file()):
        raise ValueError(f"{folder}: holds something other than adapters; name a new folder")
    write_folder(folder, adapter_files(model, attached, base, extra=extra))


def adapter_record(folder: str | Path) -> dict[str, Any]:
    """What a folder of adapters says of itself, checked against its manifest. ValueError: it is none, or damaged."""
    path = Path(folder) / RECORD
    if not path.is_file():
        raise ValueError(f"{folder}: no adapters here: no {RECORD}")
    verify_folder(Path(folder))
    record = read_json(path)
    if record.get("format") != FORMAT or not isinstance(record.get("lora"), dict):
        raise ValueError(f"{path}: format {record.get('format')!r}, not '{FORMAT}'")
    return record


def load_adapters(model: Model, folder: str | Path) -> Attached:
    """Attach the adapters of a folder to the model that they were trained on. ValueError: they belong to another."""
    record = adapter_record(folder)
    attached = attach(model, from_dict(LoraConfig, record["lora"], "lora."))
    if base_hash(model) != record.get("base_sha256"):
        merge(model)  # which adds nothing yet
        was = f" (it was {record['base']})" if record.get("base") else ""
        raise ValueError(f"{folder}: trained on another model than this one{was}; the weights differ by their hash")
    fill_adapters(model, load_tensors(Path(folder) / TENSORS), Path(folder) / TENSORS)
    return attached


@torch.no_grad()
def fill_adapters(model: nn.Module, tensors: Mapping[str, Tensor], path: Path) -> None:
    """Copy tensors, read from `path`, into what is trained. ValueError when a name or shape differs."""
    own = adapter_tensors(model)
    for name in sorted(own.keys() ^ tensors.keys()):
        what = "missing" if name in own else "unexpected"
        raise ValueError(f"{path}: tensor '{name}' is {what}: adapters of another model or of other patterns")
    for name, parameter in own.items():
        if tensors[name].shape != parameter.shape:
            found, wanted = tuple(tensors[name].shape), tuple(parameter.shape)
            raise ValueError(f"{path}: tensor '{name}' is {found}, the model has {wanted}: adapters of another model")
        parameter.copy_(tensors[name])


def _trained(model: Model, config: LoraConfig) -> dict[str, nn.Parameter]:
    """The parameters that the patterns of `train` name. ValueError for a pattern that names none."""
    named = dict(model.named_parameters())
    for pattern in config.train:
        if not any(matches(name, pattern) for name in named):
            raise ValueError(unmatched("lora.train", pattern, named, "parameter"))
    return {name: p for name, p in named.items() if any(matches(name, pattern) for pattern in config.train)}


def _chosen(
    model: Model, config: LoraConfig, trained: Mapping[str, nn.Parameter]
) -> tuple[list[tuple[str, nn.Linear]], dict[str, str]]:
    """The layers that get an adapter, and those that the patterns name and get none."""
    layers = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    holders = list(_holders(model))
    chosen, left = dict[str, nn.Linear](), dict[str, str]()
    for pattern in config.targets:
        hit = [name for name in layers if matches(name, pattern)]
        if not hit:
            raise ValueError(unmatched("lora.targets", pattern, layers, "linear layer"))
        for name in hit:
            layer = layers[name]
            if f"{name}.weight" in trained:
                left[name] = "trained itself"
            elif holders.count(id(layer.weight)) > 1:
                left[name] = "its weight is also another layer's"
            elif type(layer) not in (nn.Linear, Linear):
                left[name] = f"a layer of a kind of its own, {type(layer).__name__}"
            else:
                chosen[name] = layer
    if "head" in left and holders.count(id(model.head.weight)) > 1:
        raise ValueError("'lora.targets' names the head, which is the embedding (tied_head); leave 'head' out")
    return [(name, layer) for name, layer in layers.items() if name in chosen], left


def _adapt(layer: nn.Linear, config: LoraConfig, generator: torch.Generator | None) -> int:
    """Give a layer its adapter; how many numbers that adds. A uniform in ±1/√inputs, B zero."""
    outputs, inputs = layer.weight.shape
    rank = min(config.rank, outputs, inputs)
    like = layer.weight.detach().new_empty(0, dtype=torch.promote_types(layer.weight.dtype, torch.float32))
    bound = 1 / math.sqrt(inputs)
    drawn = torch.empty(rank, inputs).uniform_(-bound, bound, generator=generator)
    plain = type(layer)
    layer.register_parameter("lora_a", nn.Parameter(drawn.to(like)))
    layer.register_parameter("lora_b", nn.Parameter(like.new_zeros(outputs, rank)))
    layer.__class__ = Adapted
    made = cast(Adapted, layer)
    made.scale, made.plain = config.alpha / config.rank, plain
    return rank * (inputs + outputs)


def _own(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """A model's tensors without adapters, one that has several names by its first."""
    seen = set[int]()
    for name, value in model.state_dict(keep_vars=True).items():
        if name.rpartition(".")[2] not in FACTORS and id(value) not in seen:
            seen.add(id(value))
            yield name, value


def _holders(model: nn.Module) -> Iterator[int]:
    """Of every module and every tensor that it holds itself, which tensor."""
    for module in model.modules():
        for held in (*module._parameters.values(), *module._buffers.values()):
            if held is not None:
                yield id(held)
