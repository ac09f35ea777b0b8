"""The model of a run as it is kept: in checkpoints, and as model folders that anything loads.

Without adapters a checkpoint is a model folder. With adapters it is a folder of adapters (atma.lora): a few MB, which
say by a hash which base they belong to; the base is read again from `train.init_from`. Model folders (`final/`,
`best/`) are whole either way, adapters merged in.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, cast

from torch import Tensor

from atma.checkpoint import fill_model, load_info, model_files, require_replaceable
from atma.config import ModelConfig, Recipe, identity
from atma.folders import Writer, json_writer, read_json, text_writer, write_folder
from atma.loading import model_folder
from atma.lora import TENSORS, Attached, adapter_files, base_hash, fill_adapters, merged_tensors, save_adapters
from atma.model import Model
from atma.strict import from_dict
from atma.talk import TALK
from atma.tokenizer import Tokenizer
from atma.tokenizer_file import BEGINNING
from atma.train.owners import collected
from atma.train.parallel import Ranks
from atma.train.start import EXTRA, adapters, begun, carried
from atma.weights import INDEX, WEIGHTS, TensorWriter, load_tensors, load_weights, part_name, weight_files

KEPT = "base"
"""The folder of a run that holds what is kept of the model it starts from."""
BEGUN = "beginning.json"
"""There, what its config.json says that a text begins with: data does not know that."""


class Parts(NamedTuple):
    """Of processes that share the weights: which of them has the whole of each trained parameter, and what this has."""

    places: Mapping[str, int]
    weights: Mapping[str, Tensor]
    optimiser: Mapping[str, Tensor]


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
    def base(self) -> str:
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
        return adapter_files(self.model, self.attached, start, self.base, extra)

    def part_files(self, parts: Parts, ranks: Ranks, extra: Mapping[str, Any]) -> dict[str, Writer]:
        """`checkpoint_files` that this process writes, of processes that share the weights. All of them call it."""
        if self.attached is not None:
            whole = collected(ranks, parts.weights)
            files = self.checkpoint_files(extra) if ranks.rank == 0 else {}
            return files | ({TENSORS: TensorWriter(whole)} if files else {})
        own, files = dict(parts.weights), dict[str, Writer]()
        if ranks.rank == 0:
            files = self.checkpoint_files(extra)
            del files[WEIGHTS]
            own |= self._buffers()
            places = {**dict.fromkeys(self._buffers(), 0), **parts.places}
            names = {name: part_name("model", rank, ranks.world) for name, rank in places.items()}
            files[INDEX] = json_writer({"weight_map": names})
        return files | {part_name("model", ranks.rank, ranks.world): TensorWriter(own)}

    def of_parts(self, parts: Parts, ranks: Ranks) -> "Trained | None":
        """The same with the whole of every weight, in the first process; None in others. All of them call it."""
        whole = collected(ranks, parts.weights)
        for name, parameter in self.model.named_parameters():
            if name not in parts.places:  # frozen
                value = cast(Any, parameter.detach()).full_tensor()
                if ranks.rank == 0:
                    whole[name] = value
        if ranks.rank != 0:
            return None
        model = begun(self.recipe, weights=False)  # built anew each time: a second model is not to be held for a run
        attached, held = adapters(self.recipe, model), model.state_dict()
        for name, value in (whole | self._buffers()).items():
            held[name].copy_(value)
        return replace(self, model=model, attached=attached)

    def _buffers(self) -> dict[str, Tensor]:
        """What a model folder holds besides parameters."""
        parameters = {name for name, _ in self.model.named_parameters(remove_duplicate=False)}
        return {name: value for name, value in self.model.state_dict().items() if name not in parameters}

    def fill(self, folder: Path) -> None:
        """Read the model back from a checkpoint. ValueError: it is of another model."""
        if self.attached is not None:
            fill_adapters(self.model, load_tensors(folder / TENSORS), folder / TENSORS)
            return
        config = from_dict(ModelConfig, read_json(folder / "config.json").get("model", {}))
        if identity(config) != identity(self.model.config):
            raise ValueError(f"{folder / 'config.json'}: another model than the recipe's")
        fill_model(self.model, load_weights(folder), weight_files(folder)[0])

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
            files[WEIGHTS] = TensorWriter(merged_tensors(self.model))
        write_folder(folder, files | {name: text_writer(beside[name]) for name in TALK if name in beside})

    def save_adapters(self, folder: Path, extra: Mapping[str, Any]) -> None:
        """Write the adapters alone, if there are any."""
        if self.attached is not None:
            save_adapters(folder, self.model, self.attached, self.recipe.train.init_from, extra)
