"""Training checkpoints: a model folder with the optimiser's state beside it, from which a run goes on bit for bit.

`checkpoints/step-00000200/` is a model folder (so it loads like any model), or, where adapters are trained, a folder
of adapters, plus `optimizer.safetensors` and `state.json`. Of processes that share the weights each writes a part of
the tensors, of what it moves; any number of processes goes on from such a folder, as from any other. There is no
generator state in it, because there is none to keep: every draw of a run comes from a generator seeded by (seed, step,
purpose), and a batch is a pure function of its step. atma.train.saving writes it.
"""

import re
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from atma.config import TrainConfig
from atma.folders import Writer, json_writer, read_json, verify_folder
from atma.ops import native
from atma.replacing import recover_folder
from atma.strict import from_dict
from atma.train.optim import Optimisers
from atma.train.parallel import Ranks
from atma.train.trained import Parts, Trained
from atma.weights import TensorWriter, load_tensors, part_name

FOLDER = "checkpoints"
_NAME = re.compile(r"step-(\d{8})")


@dataclass
class RunState:
    """What a run carries from step to step beside weights and optimiser. `step` counts the steps done."""

    recipe: str
    """Identity of the recipe, to be looked up; what a resumed one may change of the run folder's is in `folder`."""
    data: str
    """Hash of the token set."""
    compute: str = "float32"
    """What the run computes in; it keeps it, even where "auto" would now choose otherwise."""
    world: int = 1
    """Processes that share the batch."""
    threads: int = 0
    """That computed: PyTorch adds in parts, a part a thread, so the bits depend on them. 0: not recorded."""
    kernels: str = ""
    """What computed (`atma.ops.native.name`), and whether in compiled blocks, for the same reason. "": not recorded."""
    step: int = 0
    skipped: int = 0
    """Steps left out because a loss or gradient was not finite."""
    streak: int = 0
    """How many of them just now, one after the other."""
    unvalidated: bool = False
    """Told to stop before the validation of this step was made."""
    best_loss: float | None = None
    """The lowest validation loss so far, None before the first."""
    best_step: int = 0
    """The step it was measured after."""
    waited: int = 0
    """Validations since then."""
    evaluation_tokens: int = 0
    """What they were measured on, as the recipe has it; 0: not recorded."""

    def here(self, device: torch.device, world: int = 1, compiled: bool = False, offload: bool = False) -> list[str]:
        """Take note of what computes from now on; what to tell where it is not what has computed so far."""
        before = f"{self.threads} threads", self.kernels, f"{self.world} process{'' if self.world == 1 else 'es'}"
        known = self.threads > 0, self.kernels != "", True
        self.threads, self.kernels, self.world = torch.get_num_threads(), native.name(device), world
        self.kernels += " in compiled blocks" if compiled else ""
        self.kernels += ", moved by the processor" if offload and device.type != "cpu" else ""
        now = f"{self.threads} threads", self.kernels, f"{world} process{'' if world == 1 else 'es'}"
        return [
            f"made with {old}, goes on with {new}: equal up to rounding, not to the bit"
            for old, new, told in zip(before, now, known, strict=True)
            if told and old != new
        ]

    def judge(self, loss: float) -> bool:
        """Take note of a validation loss; whether it is the lowest so far."""
        better = self.best_loss is None or loss < self.best_loss
        self.waited = 0 if better else self.waited + 1
        if better:
            self.best_loss, self.best_step = loss, self.step
        return better

    def rejudge(self, train: TrainConfig, best: Path) -> list[str]:
        """Forget the lowest loss where it is not of this recipe's validations, or its model is to be kept in `best` and
        is not there. Returns what to tell of it."""
        before, self.evaluation_tokens = self.evaluation_tokens, train.evaluation_tokens
        if self.best_loss is None:
            return []
        if before not in (0, train.evaluation_tokens):
            told = f"it was of {before:,} evaluation tokens, now they are {train.evaluation_tokens:,}"
        elif train.keep_best and kept_step(best) != self.best_step:
            told = f"its model, of step {self.best_step}, is not in {best}"
        else:
            return []
        self.best_loss, self.best_step, self.waited = None, 0, 0
        return [f"the lowest validation loss is found anew: {told}"]


def kept_step(best: Path) -> int | None:
    """The step of the model that a run keeps as its best; None where there is none."""
    recover_folder(best)
    extra = read_json(best / "config.json").get("extra") if (best / "config.json").is_file() else None
    return extra.get("step") if isinstance(extra, dict) else None


def place_of(run: Path, step: int) -> Path:
    """The folder of the checkpoint of a step."""
    return run / FOLDER / f"step-{step:08d}"


def whole_files(state: RunState, trained: Trained, tensors: Mapping[str, Tensor]) -> dict[str, Writer]:
    """The writers of a checkpoint, with the `tensors` of all processes' optimisers."""
    files = trained.checkpoint_files({"recipe": state.recipe, "step": state.step})
    return files | {"optimizer.safetensors": TensorWriter(tensors), "state.json": json_writer(asdict(state))}


def part_files(state: RunState, trained: Trained, parts: Parts, ranks: Ranks) -> dict[str, Writer]:
    """Those of this process, of processes that share the weights: each writes what it moves. All of them call it."""
    files = trained.part_files(parts, ranks, {"recipe": state.recipe, "step": state.step})
    files[part_name("optimizer", ranks.rank, ranks.world)] = TensorWriter(parts.optimiser)
    return files | ({"state.json": json_writer(asdict(state))} if ranks.rank == 0 else {})


def drop_old(run: Path, keep: int) -> None:
    """Remove all checkpoints but the newest `keep`."""
    for _, old in _checkpoints(run)[keep:]:
        shutil.rmtree(old)


def has_checkpoint(run: Path) -> bool:
    """Whether there is any, good or damaged."""
    return bool(_checkpoints(run))


def newest_checkpoint(run: Path) -> tuple[Path | None, list[str]]:
    """The newest checkpoint whose files all match their hashes, and what was wrong with any newer one."""
    problems = []
    for _, folder in _checkpoints(run):
        try:
            verify_folder(folder)
            return folder, problems
        except ValueError as error:
            problems.append(str(error))
    return None, problems


def load_checkpoint(folder: Path, expected: RunState, trained: Trained, optimisers: Optimisers) -> RunState:
    """Restore model and optimisers in place and return the run's state.

    ValueError when the checkpoint is damaged, or belongs to another model, token set or number of processes.
    """
    try:
        state = from_dict(RunState, read_json(folder / "state.json"))
    except TypeError:
        raise ValueError(f"{folder / 'state.json'}: incomplete") from None
    if state.data != expected.data:
        found, wanted = state.data, expected.data
        raise ValueError(f"{folder}: made with data {found}, now it is {wanted}; resume with the data it began with")
    trained.fill(folder)
    for path in sorted(folder.glob("optimizer-*")) or [folder / "optimizer.safetensors"]:
        optimisers.load_tensors(load_tensors(path), path)
    return replace(state, recipe=expected.recipe)


def recorded_threads(run: Path) -> int:
    """The threads of the run's newest checkpoint; 0 where there is none, or it does not say."""
    for _, folder in _checkpoints(run):
        threads = read_json(folder / "state.json").get("threads", 0) if (folder / "state.json").is_file() else 0
        return threads if isinstance(threads, int) and threads > 0 else 0
    return 0


def _checkpoints(run: Path) -> list[tuple[int, Path]]:
    """Step and folder of every finished checkpoint, newest first."""
    found = [(match, folder) for folder in run.glob(f"{FOLDER}/step-*") if (match := _NAME.fullmatch(folder.name))]
    return sorted(((int(match[1]), folder) for match, folder in found), reverse=True)
