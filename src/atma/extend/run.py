"""An extension from a trained model to a longer one: a run folder like that of a training, resumed to the same bits."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch

from atma.checkpoint import model_files, require_replaceable
from atma.config import DataConfig, Recipe, TrainConfig, to_dict
from atma.extend.distil import Distiller
from atma.extend.settings import ExtendConfig
from atma.extend.ways import Way, WindowMemory, way_of
from atma.folders import MANIFEST, file_hash, read_json, text_writer, write_folder
from atma.loading import Loaded, is_adapters
from atma.lora import LoraConfig, attach, merge
from atma.model import Model
from atma.narrow import require_floats
from atma.strict import plain
from atma.talk import talk_of
from atma.train.checks import check_fit
from atma.train.folder import claimed
from atma.train.optim import Optimisers
from atma.train.parallel import Ranks, join
from atma.train.progress import Progress, Silent
from atma.train.record import NAME, Record
from atma.train.run import Run
from atma.train.source import Source, open_source
from atma.train.start import require_same, weights_hash_of
from atma.train.step import generator

SETTINGS = "extend.json"


def recipe_for(loaded: Loaded, settings: ExtendConfig, data: DataConfig, train: TrainConfig, name: str) -> Recipe:
    """The recipe of the student: the teacher's shape by the way that is chosen."""
    way = way_of(settings, train.length, train.seed)
    return Recipe(name=name, model=way.student(loaded.model.config), data=data, train=train)


def own_training(loaded: Loaded) -> dict[str, Any]:
    """The recipe of a model's own training, as tables, where its folder tells it."""
    extra = loaded.info.get("extra", {})
    known = extra.get("recipe", {}) if isinstance(extra, dict) else {}
    return known if isinstance(known, dict) else {}


def rates_of(loaded: Loaded, factor: float) -> dict[str, float]:
    """The rates of a training: those that the model was trained with, or the usual ones, times a factor."""
    known = own_training(loaded).get("train", {})
    names = ("muon_rate", "embedding_rate", "head_rate", "vector_rate")
    return {name: factor * float(known.get(name, getattr(TrainConfig(), name))) for name in names}


class Extension(NamedTuple):
    """A model, what its student is trained by, and the way."""

    loaded: Loaded
    recipe: Recipe
    settings: ExtendConfig


def extend(
    extension: Extension,
    out: Path,
    resume: bool = False,
    progress: Progress | None = None,
    device: torch.device | None = None,
    stop: Callable[[], bool] | None = None,
) -> Path:
    """Train the student beside its teacher into the run folder `out`; returns its `final`, a model folder.

    resume, progress and stop as for a training. ValueError as for a training, and when `out` was begun with other
    settings or another teacher.
    """
    device = device or torch.device("cpu")
    source = open_source(extension.recipe, join(device))
    return fit(extension, out, source, resume, progress, device, stop)


def fit(
    extension: Extension,
    out: Path,
    source: Source,
    resume: bool = False,
    progress: Progress | None = None,
    device: torch.device | None = None,
    stop: Callable[[], bool] | None = None,
) -> Path:
    """`extend` on batches from any `source`."""
    device = device or torch.device("cpu")
    ranks, recipe = join(device), extension.recipe
    check_fit(recipe, source, ranks)
    require_same(extension.loaded.tokenizer, source.tokenizer, recipe.data.path, extension.loaded.base)
    with claimed(recipe, out, resume, ranks) as notes:
        teacher = _hash_of(extension.loaded.path)
        _settle(out / SETTINGS, {"settings": plain(to_dict(extension.settings)), "teacher": teacher})
        run = ExtendRun(extension, out, source, device, ranks)
        notes += run.restore() if resume else []
        with Record(out / NAME if ranks.rank == 0 else Path(os.devnull)) as record:
            if run.state.step == 0:
                record.write("event", 0, run.told())
            return run.go(record, progress or Silent(), notes, stop)


class ExtendRun(Run):
    """`Run`, of a student that begins as its teacher."""

    def __init__(self, extension: Extension, out: Path, source: Source, device: torch.device, ranks: Ranks) -> None:
        loaded, recipe, settings = extension
        super().__init__(recipe, out, source, device, ranks)
        self.settings, self.loaded = settings, loaded
        self.way: Way = way_of(settings, recipe.train.length, recipe.train.seed)
        teacher = loaded.model.to(device).eval().requires_grad_(False)
        new = adopt(self.model, teacher)
        self.way.begin(self.model, teacher, source.train(0).tokens.to(device))
        choose(self.model, settings, new, recipe.train.seed)
        self.optimisers = Optimisers(self.model, recipe.train, ranks)
        self.stepper.optimisers, self.stepper.parameters = self.optimisers, list(self.model.parameters())
        self.stepper = Distiller(self.stepper, teacher, self.way, settings)

    def told(self) -> dict[str, Any]:
        """What is trained, for the record."""
        trained = sum(one.numel() for one in self.model.parameters() if one.requires_grad)
        total = sum(one.numel() for one in self.model.parameters())
        return {"event": f"trains {trained:,} of {total:,} parameters", "trained": trained, "parameters": total}

    def _validate(self, record: Record, progress: Progress) -> None:
        """With the finished window, not that of a step, which is drawn and in no checkpoint."""
        if isinstance(self.way, WindowMemory):
            self.way.at(self.model, self.recipe.train.steps, self.recipe.train.steps)
        super()._validate(record, progress)

    def _finish(self) -> Path:
        extra = {
            "name": self.recipe.name,
            "extended": to_dict(self.settings) | {"teacher": str(self.loaded.path)},
            "data": self.state.data,
            "step": self.state.step,
            "tokens": self._tokens(),
            "compute": self.state.compute,
            "recipe": to_dict(self.recipe),
        }
        final = self.out / "final"
        merge(self.model)
        require_replaceable(final)
        talk = {name: text_writer(text) for name, text in talk_of(self.loaded.base).items()}
        tokenizer = self.loaded.tokenizer or self.source.tokenizer
        write_folder(final, model_files(self.way.settled(self.model), tokenizer, extra) | talk)
        return final


@torch.no_grad()
def adopt(student: Model, teacher: Model) -> list[str]:
    """Give the student its teacher's weights. What it adds stays as it is, but Canon, which is made to change nothing;
    returns the names of the parameters that it adds.

    ValueError names a weight of the teacher's that the student lacks, or says that the teacher's are narrow.
    """
    require_floats(teacher, "extending")
    own = student.state_dict()
    for name, value in teacher.state_dict().items():
        if name not in own or own[name].shape != value.shape:
            raise ValueError(f"the model's weight '{name}' has no place in what it is to become")
        own[name].copy_(value)
    for name in own.keys() - teacher.state_dict().keys():
        if name.rpartition(".")[2] in ("canon_q", "canon_k", "canon_v"):
            own[name].zero_()
    known = teacher.state_dict().keys()
    return [name for name, _ in student.named_parameters() if name not in known]


def choose(student: Model, settings: ExtendConfig, new: list[str], seed: int) -> None:
    """Let require gradients what is to be trained, with low-rank adapters where they are asked for."""
    if settings.trains == "low-rank":
        config = LoraConfig(settings.rank, 2.0 * settings.rank, ("blocks",), tuple(new))
        attach(student, config, generator(5, seed))
    elif settings.trains == "new":
        for name, parameter in student.named_parameters():
            parameter.requires_grad_(name in set(new))


def _hash_of(teacher: Path) -> str:
    """SHA-256 of a model folder's weights; of adapters, of their manifest, which vouches for the hash of their base."""
    return file_hash(teacher / MANIFEST) if is_adapters(teacher) else weights_hash_of(teacher)


def _settle(path: Path, wanted: dict[str, Any]) -> None:
    """Write what an extension is, or see that it is what the folder says."""
    if not path.is_file():
        path.write_text(json.dumps(wanted, indent=1) + "\n", encoding="utf-8")
        return
    found = read_json(path)
    for key in ("teacher", "settings"):
        if found.get(key) != wanted[key]:
            raise ValueError(f"{path}: begun with another {key}; choose another folder, or what it was begun with")
