"""The model of a run as it is kept: in checkpoints, and as model folders that anything loads.

Without adapters a checkpoint is a model folder. With adapters it is a folder of adapters (atma.lora): a few MB, which
say by a hash which base they belong to; the base is read again from `train.init_from`. Model folders (`final/`,
`best/`) are whole either way, adapters merged in.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from atma.checkpoint import (
    Writer,
    fill_model,
    json_writer,
    load_info,
    model_files,
    read_json,
    require_replaceable,
    text_writer,
    write_folder,
)
from atma.config import ModelConfig, Recipe, identity
from atma.loading import model_folder
from atma.lora import TENSORS, Attached, adapter_files, base_hash, fill_adapters, merged_tensors, save_adapters
from atma.model import Model
from atma.strict import from_dict
from atma.talk import TALK
from atma.tokenizer import Tokenizer
from atma.tokenizer_file import BEGINNING
from atma.train.start import EXTRA, carried
from atma.weights import WEIGHTS, load_tensors, tensor_writer

KEPT = "base"
"""The folder of a run that holds what is kept of the model it starts from."""
BEGUN = "beginning.json"
"""There, what its config.json says that a text begins with: data does not know that."""


@dataclass(frozen=True)
class Trained:
    """A model in training, its adapters if it has any, and what goes beside it."""

    model: Model
    recipe: Recipe
    out: Path
    """The run folder."""
    attached: Attached | None = None
    tokenizer: Tokenizer | None = None

    @cached_property
    def _base(self) -> str:
        """The hash of what is not trained, taken once."""
        return base_hash(self.model)

    @cached_property
    def _words(self) -> Tokenizer | None:
        """The data's tokenizer, which begins a text as that of the model does that the run starts from."""
        path = self.out / KEPT / BEGUN
        if self.tokenizer is None or not path.is_file():
            return self.tokenizer
        begun = read_json(path)[BEGINNING]
        return Tokenizer(self.tokenizer.backend, self.tokenizer.eot, begun[0] if begun else None, begun)

    def checkpoint_files(self, extra: Mapping[str, Any]) -> dict[str, Writer]:
        """The writers of what a run needs to go on from this model."""
        if self.attached is None:
            return model_files(self.model, self._words, extra)
        start = self.recipe.train.init_from
        return adapter_files(self.model, self.attached, start, self._base, extra)

    def fill(self, folder: Path) -> None:
        """Read the model back from a checkpoint. ValueError: it is of another model."""
        if self.attached is not None:
            fill_adapters(self.model, load_tensors(folder / TENSORS), folder / TENSORS)
            return
        config = from_dict(ModelConfig, read_json(folder / "config.json").get("model", {}))
        if identity(config) != identity(self.model.config):
            raise ValueError(f"{folder / 'config.json'}: another model than the recipe's")
        fill_model(self.model, load_tensors(folder / WEIGHTS), folder / WEIGHTS)

    def keep(self, template: str | None) -> None:
        """Copy what the final model takes over from the folder it starts from, which may go away, into the run folder.

        `template` is the chat template that the data was written with, if any.
        """
        if (self.out / KEPT).is_dir():
            return
        start = self.recipe.train.init_from
        files = {name: text_writer(text) for name, text in carried(self.recipe, template).items()}
        info = load_info(model_folder(start)) if start else {}
        if BEGINNING in info:
            files[BEGUN] = json_writer({BEGINNING: info[BEGINNING]})
        if files:
            write_folder(self.out / KEPT, files)

    def save(self, folder: Path, extra: Mapping[str, Any]) -> None:
        """Write a model folder, adapters merged, with what is kept of the base."""
        require_replaceable(folder)
        beside = {path.name: path.read_text(encoding="utf-8") for path in sorted((self.out / KEPT).glob("*"))}
        before = json.loads(beside.get(EXTRA, "{}"))
        files = model_files(self.model, self._words, {**before, **extra})
        if self.attached is not None:
            files[WEIGHTS] = tensor_writer(merged_tensors(self.model))
        write_folder(folder, files | {name: text_writer(beside[name]) for name in TALK if name in beside})

    def save_adapters(self, folder: Path, extra: Mapping[str, Any]) -> None:
        """Write the adapters alone, if there are any."""
        if self.attached is not None:
            save_adapters(folder, self.model, self.attached, self.recipe.train.init_from, extra)
