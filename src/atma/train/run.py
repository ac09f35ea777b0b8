"""A run in memory: steps, validation, checkpoints and samples, from where it stands to its final model.

Nothing here draws from a global generator or depends on how often the run was stopped, so a resumed run ends with the
same bits as an uninterrupted one on the same machine.
"""

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from atma.config import Recipe, identity
from atma.folders import Writer
from atma.strict import to_dict
from atma.train.folder import write_recipe
from atma.train.optim import Optimisers
from atma.train.owners import collected
from atma.train.parallel import Ranks, any_of, wait
from atma.train.precision import choose_precision
from atma.train.progress import Progress
from atma.train.record import Record, cut_record
from atma.train.resume import (
    RunState,
    drop_old,
    has_checkpoint,
    load_checkpoint,
    newest_checkpoint,
    part_files,
    place_of,
    whole_files,
)
from atma.train.samples import cut_samples, due, keep, written
from atma.train.saving import Saver
from atma.train.schedule import rate_multiplier
from atma.train.shards import release, shard
from atma.train.source import Batch, Source
from atma.train.start import adapters, begun, start_told
from atma.train.step import Outcome, Stepper, non_finite_names, validation_loss
from atma.train.trained import Parts, Trained

PATIENCE = 3
"""Non-finite steps in a row that end a run."""


class Stopped(Exception):
    """A run was asked to stop; it wrote a checkpoint first."""


class Run:
    """A run in memory: model, optimisers and where it stands."""

    def __init__(self, recipe: Recipe, out: Path, source: Source, device: torch.device, ranks: Ranks) -> None:
        self.recipe, self.out, self.source, self.ranks = recipe, out, source, ranks
        self.best, self.device = out / "best", device
        whole = recipe.lora is None and has_checkpoint(out)  # whose weights are then all of them
        place = torch.device("cpu") if ranks.in_parts else device  # until it is in parts, for it may not fit
        self.model = begun(recipe, weights=not whole).to(place)
        self.trained = Trained(self.model, recipe, out, adapters(recipe, self.model), source.tokenizer)
        self.optimisers = Optimisers(self.model, recipe.train, ranks)
        compute = choose_precision(recipe.train.precision, device, recipe.model.width)
        self.stepper = Stepper(self.model, self.optimisers, recipe.train, compute, ranks)
        self.state = RunState(identity(recipe), source.hash, str(compute).removeprefix("torch."), ranks.world)
        self.state.here(device, ranks.world, recipe.train.compile, ranks.offload)
        self.state.evaluation_tokens = recipe.train.evaluation_tokens
        self.state.unvalidated = bool(recipe.train.init_from and recipe.train.evaluate_every)  # what it starts with
        self.saver, self._saved = Saver(ranks, recipe.train.hang_seconds), 0
        self._stop: Callable[[], bool] | None = None
        self._ending = False
        """Whether it has said so."""

    def restore(self) -> list[str]:
        """Go back to the newest good checkpoint, cut the record to it and keep this recipe. Returns what to tell of it.

        Without any checkpoint the run begins again; ValueError when there are some and none is good.
        """
        folder, problems = newest_checkpoint(self.out)
        if folder is None and problems:
            raise ValueError(f"no good checkpoint to resume from: {problems[0]} (remove them to begin again)")
        if folder is not None:
            self.state = load_checkpoint(folder, self.state, self.trained, self.optimisers)
            self.stepper.compute = getattr(torch, self.state.compute)
            self._saved = self.state.step
        anew = [
            *self.state.here(self.device, self.ranks.world, self.recipe.train.compile, self.ranks.offload),
            *self.state.rejudge(self.recipe.train, self.best),
        ]
        if self.ranks.rank == 0:
            cut_record(self.out, self.state.step, self.state.unvalidated)
            cut_samples(self.out, self.state.step)
            write_recipe(self.recipe, self.out)
        wait(self.ranks)
        passed = [f"passed over a damaged checkpoint: {problem}" for problem in problems]
        return [*passed, f"resumed at step {self.state.step}", *(anew if folder is not None else [])]

    def share(self) -> None:
        """Keep a part of the weights alone, where processes share them, in the processor's memory if asked for."""
        if self.ranks.in_parts:
            if self.trained.attached is not None:
                _ = self.trained.base  # while it is whole
            patience = self.recipe.train.hang_seconds
            shard(self.model, self.optimisers, self.ranks, self.device, patience, self.stepper.compute)
            self.stepper.follow(self.device)

    def go(self, record: Record, progress: Progress, notes: list[str], stop: Callable[[], bool] | None = None) -> Path:
        """Make every step that is left, then write the final model folder; `stop` as in `train`."""
        steps, self._stop = self.recipe.train.steps, stop
        if (self.state.step == steps and not (self.state.unvalidated and self._judges)) or self._ended():
            return self._finish()
        progress.start(self.recipe.name, steps, self.state.step)
        try:
            with self.saver:
                for note in notes:
                    progress.show(record.write("event", self.state.step, {"event": note}))
                self._make(record, progress)
                self._tell_best(record, progress)
        finally:
            progress.stop()
        return self._finish()

    def _make(self, record: Record, progress: Progress) -> None:
        steps = self.recipe.train.steps
        if self.state.unvalidated:
            self._validate(record, progress)
            self._sample(progress)
        while self.state.step < steps and not self._ended():
            if not self.state.unvalidated:
                self._advance(record, progress)
            if self.state.step < steps and self._told():
                if self.state.step != self._saved:
                    self._checkpoint(record)
                self.saver.wait()
                raise Stopped(f"stopped at step {self.state.step} of {steps}")

    def _advance(self, record: Record, progress: Progress) -> None:
        self.saver.check()
        train, state = self.recipe.train, self.state
        began = time.perf_counter()
        batch = self.source.train(state.step)
        multiplier = rate_multiplier(state.step, train)
        outcome = self.stepper(state.step, batch, multiplier)
        seconds = time.perf_counter() - began
        state.step += 1
        self._count(outcome, batch, record)
        progress.show(record.write("train", state.step, self._row(outcome, multiplier, seconds)))
        last = state.step == train.steps
        if last:  # whatever happens to the validation, all steps are kept
            state.unvalidated = self._judges
            self._checkpoint(record)
        if train.evaluate_every and (last or state.step % train.evaluate_every == 0):
            self._validate(record, progress)
        self._sample(progress)
        if not last and state.step % train.checkpoint_every == 0:
            self._checkpoint(record)

    def _count(self, outcome: Outcome, batch: Batch, record: Record) -> None:
        """Keep count of skipped steps; end the run when there are too many in a row."""
        state = self.state
        state.streak = 0 if outcome.moved else state.streak + 1
        state.skipped += 0 if outcome.moved else 1
        if state.streak < PATIENCE:
            return
        names = non_finite_names(self.stepper, batch)
        message = f"step {state.step}: {PATIENCE} steps in a row were not finite; not finite are {names}"
        record.write("event", state.step, {"event": message})
        raise ValueError(f"{message}; lower the rates or look at the data")

    def _row(self, outcome: Outcome, multiplier: float, seconds: float) -> dict[str, Any]:
        speed = self.recipe.train.batch_tokens / seconds
        row = {"tokens": self._tokens(), "loss": outcome.loss, "rate": multiplier, "grad_norm": outcome.grad_norm}
        return row | outcome.terms | {"tokens_per_second": round(speed, 1), "skipped": self.state.skipped}

    def _tokens(self) -> int:
        return self.state.step * self.recipe.train.batch_tokens

    def _told(self) -> bool:
        self._ending = self._ending or (self._stop is not None and any_of(self.ranks, self._stop()))
        return self._ending

    def _validate(self, record: Record, progress: Progress) -> None:
        """Measure and record; given up when the run is told to stop before its end, and made when it goes on."""
        source, state = self.source, self.state
        state.unvalidated = False

        def batches() -> Iterator[Batch]:
            for i in range(source.validation_batches):
                state.unvalidated = state.step < self.recipe.train.steps and self._told()
                if state.unvalidated:
                    return
                yield source.validation(i)

        loss = validation_loss(self.stepper, batches())
        if state.unvalidated:
            return
        progress.show(record.write("validation", state.step, {"tokens": self._tokens(), "loss": loss}))
        if state.judge(loss) and self.recipe.train.keep_best:
            self._write_model(self.best)

    def _sample(self, progress: Progress) -> None:
        """Show and keep texts of the model as it is now, where they are due: by the first process; others wait."""
        tokenizer, train, step = self.source.tokenizer, self.recipe.train, self.state.step
        if tokenizer is None or self.state.unvalidated or not due(train, step):
            return
        whole = self._whole()
        if whole is not None:
            for one in keep(self.out, list(written(whole.model, tokenizer, train, step))):
                progress.show(one.row())
        wait(self.ranks)

    @property
    def _judges(self) -> bool:
        """Whether anything depends on a validation, so that the last one is made even if the run is stopped in it."""
        return self.recipe.train.keep_best or self.recipe.train.early_stopping > 0

    def _ended(self) -> bool:
        """Whether the validation loss has not fallen for as long as the recipe has patience."""
        return 0 < self.recipe.train.early_stopping <= self.state.waited

    def _tell_best(self, record: Record, progress: Progress) -> None:
        """At the end: keep the step it ended early at, and tell the lowest validation loss."""
        state, train = self.state, self.recipe.train
        if self._ended() and state.step != self._saved:
            self._checkpoint(record)
        if state.best_loss is None or not (train.keep_best or train.early_stopping):
            return
        told = f"lowest validation loss {state.best_loss:.4f} at step {state.best_step}"
        told = f"stopped early, {state.waited} validations without a lower loss; {told}" if self._ended() else told
        told += f", its model in {self.best}" if train.keep_best and self.best.is_dir() else ""
        progress.show(record.write("event", state.step, {"event": told}))

    def _checkpoint(self, record: Record) -> None:
        """Begin to write it, once the one before is on the disk."""
        self.saver.wait()
        if self.ranks.rank == 0:
            record.sync()
        self._saved, count = self.state.step, self.recipe.train.keep_checkpoints
        folder = place_of(self.out, self._saved)
        self.saver.begin(self._saved, folder, self._files(), lambda: drop_old(self.out, count))

    def _files(self) -> dict[str, Writer]:
        """What this process writes of a checkpoint."""
        if self.ranks.in_parts:
            return part_files(self.state, self.trained, self._parts(), self.ranks)
        tensors = collected(self.ranks, self.optimisers.tensors())
        return whole_files(self.state, self.trained, tensors) if self.ranks.rank == 0 else {}

    def _finish(self) -> Path:
        final = self.out / "final"
        self._write_model(final, self.out / "adapters")
        return final

    def _write_model(self, folder: Path, adapters: Path | None = None) -> None:
        """A model folder of the model as it is now, and where asked for one of its adapters, if it has any."""
        whole = self._whole()
        if whole is not None:
            whole.save(folder, self._extra())
            if adapters is not None:
                whole.save_adapters(adapters, self._extra())
        wait(self.ranks)

    def _whole(self) -> Trained | None:
        """The model in one piece, in the first process alone. All of them call it."""
        if self.ranks.in_parts:
            return self.trained.of_parts(self._parts(), self.ranks)
        return self.trained if self.ranks.rank == 0 else None

    def _parts(self) -> Parts:
        owners = self.optimisers.owners
        assert owners is not None
        release(self.model)  # in all of them, for reading a model's tensors does so
        places = dict(zip(owners.names, owners.owner, strict=True))
        weights = {name: owners.named[name].detach() for name in owners.own}
        return Parts(places, weights, self.optimisers.tensors())

    def _extra(self) -> dict[str, Any]:
        """What config.json says of the run."""
        return {
            "name": self.recipe.name,
            "identity": self.state.recipe,
            "data": self.state.data,
            "step": self.state.step,
            "tokens": self._tokens(),
            "compute": self.state.compute,
            "recipe": to_dict(self.recipe),
        }

    def told(self) -> list[str]:
        """What there is to tell of a fresh start: the model it is from, and what of it is trained."""
        if not self.recipe.train.init_from:
            return []
        lines = self.trained.attached.lines() if self.trained.attached else ["every weight is trained"]
        return [*start_told(self.recipe, self.source.template), *lines]
