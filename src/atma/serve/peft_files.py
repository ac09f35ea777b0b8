"""Adapters as PEFT writes them: `adapter_config.json`, and `adapter_model.safetensors` with A and B of each layer.

They say nothing of the weights they were trained on; their layers must be there, by name and shape. PEFT knows a model
of ours as transformers does, or, of one that was imported, the checkpoint it came from. Where several layers of that
are one of ours, so are their adapters: A one below the other, B along the diagonal; where one is several, B is cut.
"""

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from atma.checkpoint import load_info
from atma.folders import read_json
from atma.layouts import KEY, layout_of
from atma.layouts.names import Part
from atma.loading import base_folder
from atma.ops.low_rank import Factors
from atma.weights import load_tensors

SETTINGS, TENSORS = "adapter_config.json", "adapter_model.safetensors"
FACTORS = (".lora_A.weight", ".lora_B.weight")
WEIGHT, WRAPPED, OURS = ".weight", "base_model.model.", "model."
"""The end of a weight's name, and what PEFT, and transformers of a model of ours, put before a layer's."""
NOT_SERVED = (
    *("use_dora", "use_qalora", "use_bdlora", "lora_bias", "fan_in_fan_out", "modules_to_save", "layer_replication"),
    *("trainable_token_indices", "target_parameters", "alora_invocation_tokens", "arrow_config", "kasa_config"),
    *("velora_config", "monteclora_config"),
)
"""Settings that make more, or something else, of an adapter than A and B."""
OTHER_WEIGHTS = ("pissa", "olora", "corda", "loftq", "lora_ga")
"""Ways to begin that change the model's own weights, so that the adapter alone is not what was trained."""


def peft_layers(folder: Path) -> dict[str, Factors]:
    """The factors of a folder by PEFT's own names, B with its scale. ValueError: of a kind that is not served."""
    settings = read_json(folder / SETTINGS)
    _check_kind(folder, settings)
    path, layers = folder / TENSORS, dict[str, Factors]()
    tensors = load_tensors(path)
    for name in sorted(tensors):
        layer = next((name.removesuffix(end) for end in FACTORS if name.endswith(end)), None)
        if layer is None:
            raise ValueError(f"{path}: '{name}' is no factor of a linear layer's adapter; merge it with PEFT")
        a, b = (tensors.get(layer + end) for end in FACTORS)
        if a is None or b is None:
            raise ValueError(f"{path}: of '{layer}' one factor is missing; save the adapter again")
        layer = layer.removeprefix(WRAPPED)
        if a.ndim != 2 or b.ndim != 2 or a.shape[0] != b.shape[1] or not a.numel():
            raise ValueError(
                f"{path}: '{layer}' has factors {tuple(a.shape)} and {tuple(b.shape)}, not (r, I) and (O, r)"
            )
        layers[layer] = Factors(a.float(), b.float() * _scale(folder, settings, layer, len(a)))
    return layers


def in_our_names(
    folder: Path, layers: Mapping[str, Factors], name: str | Path, shapes: Mapping[str, tuple[int, int]]
) -> dict[str, Factors]:
    """The same by the names of our layers, which have `shapes` (outputs, inputs), for the model that `name` is."""
    own = {layer: layer.removeprefix(OURS) for layer in layers}
    if all(ours in shapes for ours in own.values()):
        return {own[layer]: factors for layer, factors in layers.items()}
    remembered = load_info(base_folder(name)).get("extra", {}).get(KEY)
    parts = layout_of(remembered["config"]).parts if isinstance(remembered, dict) else []
    return _joined(folder, layers, parts, shapes)


def _joined(
    folder: Path, layers: Mapping[str, Factors], parts: list[Part], shapes: Mapping[str, tuple[int, int]]
) -> dict[str, Factors]:
    """Layers of an imported model's checkpoint as ours."""
    known = {theirs.removesuffix(WEIGHT): part for part in parts if not part.taps for theirs in part.theirs}
    strange = next((layer for layer in layers if layer not in known or not _linear(known[layer], shapes)), None)
    if strange is not None:
        raise ValueError(f"{folder}: adapts '{strange}', of which this model has no layer: adapters of another model")
    found: dict[str, Factors] = {}
    for part in {part.theirs: part for part in map(known.__getitem__, layers)}.values():
        rows = [shapes[ours.removesuffix(WEIGHT)][0] for ours in part.ours]
        each = sum(rows) // len(part.theirs)
        some = [layers.get(theirs.removesuffix(WEIGHT)) for theirs in part.theirs]
        if any(one is not None and len(one.b) != each for one in some):
            raise ValueError(f"{folder}: '{part.theirs[0]}' has not {each} outputs: adapters of another model")
        there = [one for one in some if one is not None]
        blocks = [one.b if one is not None else there[0].b.new_zeros(each, 0) for one in some]
        whole = Factors(torch.cat([one.a for one in there]), torch.block_diag(*blocks))
        for ours, b in zip(part.ours, whole.b.split(rows), strict=True):
            found[ours.removesuffix(WEIGHT)] = Factors(whole.a, b.contiguous())
    return found


def _linear(part: Part, shapes: Mapping[str, tuple[int, int]]) -> bool:
    return all(ours.removesuffix(WEIGHT) in shapes for ours in part.ours)


def _check_kind(folder: Path, settings: Mapping[str, Any]) -> None:
    """ValueError: more, or something else, than A and B of linear layers."""
    kind, begun = settings.get("peft_type"), str(settings.get("init_lora_weights")).lower()
    wrong = [f"'{name}' is {settings[name]!r}" for name in NOT_SERVED if settings.get(name)]
    if kind != "LORA":
        wrong = [f"'peft_type' is {kind!r}, not 'LORA'"]
    if settings.get("bias", "none") != "none":
        wrong.append(f"'bias' is {settings['bias']!r}")
    if begun.startswith(OTHER_WEIGHTS):
        wrong.append(f"'init_lora_weights' is '{begun}', which changed the model's own weights")
    if wrong:
        raise ValueError(f"{folder / SETTINGS}: {wrong[0]}, which is not served beside others; merge it with PEFT")


def _scale(folder: Path, settings: Mapping[str, Any], layer: str, rank: int) -> float:
    """What an adapter counts."""
    patterns = settings.get("alpha_pattern") or {}
    try:
        found = next((key for key in patterns if re.match(rf"(.*\.)?({key})$", layer)), None)
        alpha = float(settings["lora_alpha"] if found is None else patterns[found])
    except (KeyError, TypeError, ValueError, re.error) as error:
        raise ValueError(f"{folder / SETTINGS}: 'lora_alpha' or 'alpha_pattern' is no number: {error}") from None
    return alpha / (math.sqrt(rank) if settings.get("use_rslora") else rank)


__all__ = ["SETTINGS", "in_our_names", "peft_layers"]
