"""Where a run starts from: new weights, or those of a model folder, with adapters where the recipe asks for them.

`[train] init_from` names the folder. Its configuration is the run's model; keys of `[model]` change it where the
weights still fit (a window, a bound). `init_hash`, of the weights, is found once and kept in the recipe: this hash is
part of the run's identity, and the place is not.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from atma.chat.template import PLAIN, find_template
from atma.checkpoint import fill_model, load_config, load_info
from atma.config import ModelConfig, Recipe, load_values, recipe_of, with_words
from atma.folders import file_hash
from atma.hub_files import TEMPLATE, TOKENIZER_CONFIG
from atma.loading import model_folder
from atma.lora import Attached, attach
from atma.model import Model
from atma.talk import talk_of
from atma.tokenizer import Tokenizer, load_tokenizer
from atma.train.step import generator
from atma.weights import load_weights, weight_files

EXTRA = "extra.json"
"""What the base's config.json says besides the model."""


def load_run_recipe(path: str | Path, assignments: Sequence[str] = ()) -> Recipe:
    """`load_recipe`, the model of `train.init_from` filled in where the recipe starts from one. ValueError."""
    values = load_values(path, assignments)
    try:
        return recipe_of(filled(values))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def filled(values: dict[str, Any]) -> dict[str, Any]:
    """The tables of a recipe with the model of the folder it starts from, and the hash of its weights."""
    train = values.get("train", {})
    start = train.get("init_from") if isinstance(train, dict) else None
    if not isinstance(start, str) or not start or train.get("init_hash"):
        return values
    own = values.get("model", {})
    if isinstance(own, dict) and "preset" in own:
        raise ValueError(
            f"'model.preset' {own['preset']!r}: the model is that of train.init_from {start!r}; leave it out"
        )
    folder = model_folder(start)
    model = with_words(lambda: load_config(folder).changed(own, "model."))
    return values | {"model": model.to_table(), "train": train | {"init_hash": weights_hash_of(folder)}}


def resolved(recipe: Recipe) -> Recipe:
    """The same for a recipe made in Python: a model left at its default is the folder's."""
    train = recipe.train
    if not train.init_from or train.init_hash:
        return recipe
    folder = model_folder(train.init_from)
    model = load_config(folder) if recipe.model == ModelConfig() else recipe.model
    return replace(recipe, model=model, train=replace(train, init_hash=weights_hash_of(folder)))


def weights_hash_of(folder: Path) -> str:
    """SHA-256 of a model folder's weights; of several files, of their hashes. ValueError: it has none."""
    files = weight_files(folder)
    missing = next((path for path in files if not path.is_file()), None)
    if missing is not None:
        raise ValueError(f"{missing}: missing")
    hashes = [file_hash(path) for path in files]
    return hashes[0] if len(hashes) == 1 else hashlib.sha256(" ".join(hashes).encode()).hexdigest()


def begun(recipe: Recipe, weights: bool = True) -> Model:
    """The model that a run starts with. Without `weights` those of `init_from` are not read: a checkpoint has all.

    ValueError: the folder's weights are others than the run began with, or do not fit the recipe's model.
    """
    model = Model(recipe.model, generator(2, recipe.train.seed))
    if not recipe.train.init_from or not weights:
        return model
    folder = model_folder(recipe.train.init_from)
    if weights_hash_of(folder) != recipe.train.init_hash:
        raise ValueError(
            f"{folder}: not the weights that this run starts from (train.init_hash {recipe.train.init_hash[:16]}…); "
            "name their place: --set train.init_from=FOLDER"
        )
    try:
        fill_model(model, load_weights(folder), weight_files(folder)[0])
    except ValueError as error:
        changed = _changed(load_config(folder).to_table(), recipe.model.to_table())
        told = f"; [model] changes {', '.join(changed)}, and only what leaves the weights as they are may be changed"
        raise ValueError(f"{error}{told if changed else ''}") from None
    return model


def adapters(recipe: Recipe, model: Model) -> Attached | None:
    """The adapters of the recipe, attached; None where all weights are trained."""
    if recipe.lora is None:
        return None
    return attach(model, recipe.lora, generator(4, recipe.train.seed))


def check_tokenizer(recipe: Recipe, tokenizer: Tokenizer | None) -> None:
    """ValueError where the data was written with another tokenizer than that of the model the run starts from."""
    if recipe.train.init_from:
        folder = model_folder(recipe.train.init_from)
        path = folder / "tokenizer.json"
        require_same(load_tokenizer(path) if path.is_file() else None, tokenizer, recipe.data.path, folder)


def require_same(own: Tokenizer | None, written: Tokenizer | None, data: str, folder: Path) -> None:
    """ValueError where data was written with another tokenizer than the model in `folder` has, if both are known."""
    if own is not None and written is not None and own.hash() != written.hash():
        raise ValueError(f"{data}: written with another tokenizer than {folder} has; prepare it with --model {folder}")


def carried(recipe: Recipe, template: str | None) -> dict[str, str]:
    """The texts of files that the final model takes over: how the folder that it starts from is talked to, and what its
    config.json says besides, such as which checkpoint it was.

    template: the chat template that its data was written with, which takes the place of the folder's; "" leaves that
    out, None keeps it.
    """
    found = {}
    if recipe.train.init_from:
        folder = model_folder(recipe.train.init_from)
        found = talk_of(folder) | {EXTRA: json.dumps(load_info(folder).get("extra", {}))}
    if template is None:
        return found
    found.pop(TEMPLATE, None)
    settings = json.loads(found.get(TOKENIZER_CONFIG, "{}"))
    if "chat_template" in settings:
        kept = {key: value for key, value in settings.items() if key != "chat_template"}
        found[TOKENIZER_CONFIG] = json.dumps(kept, indent=1) + "\n"
    return found | ({TEMPLATE: template} if template else {})


def start_told(recipe: Recipe, template: str | None) -> list[str]:
    """What there is to tell of the folder that a run starts from, if there is one; `template` as in `carried`."""
    start = recipe.train.init_from
    if not start:
        return []
    lines, before = [f"starts from {start}"], find_template(model_folder(start))
    if template is not None and before.source != PLAIN and before.text != template:
        now = "with another" if template else "without one"
        lines.append(f"the chat template of {start} is not kept, for the data was written {now}")
    return lines


def _changed(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    return [key for key in now if now[key] != before.get(key)]
