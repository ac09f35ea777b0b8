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
from typing import TYPE_CHECKING, Any

from atma.checkpoint import (
    Writer,
    fill_model,
    load_tensors,
    model_files,
    read_json,
    tensor_writer,
    text_writer,
    write_folder,
)
from atma.config import ModelConfig, Recipe, identity
from atma.lora import TENSORS, Attached, adapter_files, base_hash, fill_adapters, merged_tensors, save_adapters
from atma.model import Model
from atma.strict import from_dict
from atma.talk import TALK, require_rewritable
from atma.train.start import EXTRA, carried
from atma.weights import WEIGHTS

if TYPE_CHECKING:
    from atma.tokenizer import Tokenizer

KEPT = "base"
"""The folder of a run that holds what is kept of the model it starts from."""


@dataclass(frozen=True)
class Trained:
    """A model in training, its adapters if it has any, and what goes beside it."""

    model: Model
    recipe: Recipe
    out: Path
    """The run folder."""
    attached: Attached | None = None
    tokenizer: "Tokenizer | None" = None

    @cached_property
    def _base(self) -> str:
        """The hash of what is not trained, taken once."""
        return base_hash(self.model)

    def checkpoint_files(self, extra: Mapping[str, Any]) -> dict[str, Writer]:
        """The writers of what a run needs to go on from this model."""
        if self.attached is None:
            return model_files(self.model, self.tokenizer, extra)
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
        if not (self.out / KEPT).is_dir() and (texts := carried(self.recipe, template)):
            write_folder(self.out / KEPT, {name: text_writer(text) for name, text in texts.items()})

    def save(self, folder: Path, extra: Mapping[str, Any]) -> None:
        """Write a model folder, adapters merged, with what is kept of the base."""
        require_rewritable(folder)
        beside = {path.name: path.read_text(encoding="utf-8") for path in sorted((self.out / KEPT).glob("*"))}
        before = json.loads(beside.get(EXTRA, "{}"))
        files = model_files(self.model, self.tokenizer, {**before, **extra})
        if self.attached is not None:
            files[WEIGHTS] = tensor_writer(merged_tensors(self.model))
        write_folder(folder, files | {name: text_writer(beside[name]) for name in TALK if name in beside})

    def save_adapters(self, folder: Path, extra: Mapping[str, Any]) -> None:
        """Write the adapters alone, if there are any."""
        if self.attached is not None:
            save_adapters(folder, self.model, self.attached, self.recipe.train.init_from, extra)
