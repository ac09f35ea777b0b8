"""The stages of a demonstration in their order, each within its share of the time."""

import contextlib
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from atma import threads
from atma.bars import bars
from atma.config import DataConfig, Recipe
from atma.data.dataset import TokenSet
from atma.data.prepare import Preparation, prepare
from atma.data.sources import describe
from atma.demo.measuring import Measured, measure
from atma.demo.pace import Pace, Stage, ending_on_interrupt
from atma.demo.plan import Packaged, Plan
from atma.demo.recall import recall, text_of
from atma.demo.show import say_report
from atma.demo.training import Trained, learners, train_together
from atma.eval.language_model import OwnModel
from atma.eval.loaded import tokenizer_of
from atma.eval.results import add_rows
from atma.generation import Settings, generate
from atma.loading import load
from atma.report import Report, Run, Section, environment, page
from atma.report.content import Recall
from atma.report.opening import opening
from atma.train import read_record

if TYPE_CHECKING:
    from rich.console import Console

PROMPT = 'import os\n\n\ndef read_lines(path):\n    """'
SAMPLE = Settings(max_tokens=160, temperature=0.7, top_p=0.95)


def _console() -> "Console":
    from rich.console import Console

    return Console()


@dataclass
class Demo:
    """A demonstration under way: where it writes, what it shows, and the time it has."""

    out: Path
    plan: Plan
    pace: Pace
    seeds: int
    packaged: list[Packaged]
    text: Path | None = None
    threads: int = 0
    console: "Console" = field(default_factory=_console)
    stamp: str = field(default_factory=lambda: time.strftime("%Y%m%d-%H%M%S"))

    @property
    def folder(self) -> Path:
        """A fresh folder for the runs and rows of this demonstration."""
        return self.out / f"runs-{self.stamp}"

    @property
    def trained_length(self) -> int:
        return self.packaged[0].recipe.train.length

    @property
    def trainable(self) -> list[Packaged]:
        """Those that are not another's weights, read differently."""
        return [model for model in self.packaged if model.contender.stretch is None]

    def interruptible(self) -> contextlib.AbstractContextManager[None]:
        """Ctrl-C ends with what there is."""
        return ending_on_interrupt(self.pace, self.say)

    def settle(self) -> None:
        """Measure how many threads to use, before a stage: the machine may have become busier, or quieter."""
        self.say(str(threads.settle(self.threads)))

    def say(self, text: str) -> None:
        gone = round(self.pace.gone)
        start = f"\n{gone // 60}:{gone % 60:02} of {self.pace.seconds / 60:.3g} min  "
        self.console.print(start + text, markup=False, highlight=False)

    def corpus(self, name: str, tokenizer: str) -> TokenSet:
        """The validation split of the source prepared in folder `name`, reused where its hashes hold."""
        folder = self.out / name
        if folder.exists():
            try:
                token_set = TokenSet.open(folder, "validation", verify=True)
                TokenSet.open(folder, "train", verify=True)
                if token_set.manifest["source"] == describe(self.plan.source):
                    self.say(f"text: {folder} is there already and its hashes hold")
                    return token_set
            except ValueError as error:
                self.say(f"text: {error}")
        self.say(f"text: preparing {folder} from {describe(self.plan.source)}")
        with bars() as progress:
            prepare(self.plan.source, folder, Preparation(tokenizer, self.plan.vocab_size), progress)
        return TokenSet.open(folder, "validation")


def recall_stage(run: Demo) -> Recall:
    """What the packaged models recall at length, shown as it happens."""
    run.settle()
    models = [(model.name, model.reader()) for model in run.packaged]
    text, lengths = text_of(run.text), run.plan.lengths(run.trained_length)
    names = " and ".join(name for name, _ in models)
    run.say(
        f"recall: a fact is told, then up to {lengths[-1]:,} tokens of {text[1]}, and at the end {names}, trained at "
        f"{lengths[0]} tokens, must write it"
    )
    stage = run.pace.stage(run.plan.recall_share)
    return recall(models, text, lengths, run.plan.sizes[1], stage, lambda line: run.console.print(line, markup=False))


def trained_section(run: Demo) -> Section:
    """Train every contender on the same tokens, as many as fit, and measure them."""
    title = "Trained here, just now"
    if run.pace.left <= 0:
        return Section(title, [])
    text = run.corpus("text", "bpe")
    run.settle()
    made, note = _trained(run, text)
    readers = [OwnModel(load(folder)) for _, folder in made]
    stage = run.pace.stage(run.plan.trained_share)
    run.say("measuring the models trained here")
    found = _measured(run, "the models trained here", readers, text, (stage, Stage(run.pace, stage.pace.now())))
    caveats = [one.contender.caveat for _ in range(run.seeds) for one in run.trainable]
    runs = [
        Run(recipe.name, recipe, read_record(folder), rows, caveat=caveat)
        for (recipe, folder), rows, caveat in zip(made, found.rows, caveats, strict=True)
    ]
    return Section(title, runs, note)


def packaged_section(run: Demo) -> Section:
    """Measure the packaged models on losses and needles and let them write."""
    title = "The packaged models"
    if run.pace.left <= 0:
        return Section(title, [])
    text = _their_text(run)
    run.settle()
    whole = run.pace.stage(run.plan.packaged_share)
    losses = Stage(run.pace, whole.end - 0.6 * whole.left)
    run.say("measuring the packaged models: losses, then needles")
    readers = [model.reader() for model in run.packaged]
    found = _measured(run, "the packaged models", readers, text, (losses, whole))
    runs = [_packaged_run(run, model, rows) for model, rows in zip(run.packaged, found.rows, strict=True)]
    return Section(title, runs, f"Trained beforehand, each by its recipe below. {_held_out(run.packaged, text)}")


def report_stage(run: Demo, command: str, recalled: Recall, sections: list[Section]) -> Path:
    """Write the page and say what is on it."""
    title = "ATMA: trained short, run long"
    names = [model.name for model in run.packaged]
    told = opening(names, run.trained_length, recalled)
    facts = environment() | {"minutes": f"{run.pace.gone / 60:.1f} of {run.pace.seconds / 60:.3g}"}
    report = Report(title, command, facts, sections, told, recalled if recalled.answers else None, run.pace.cuts)
    path = page(report, run.out / "report.html")
    say_report(run.console, report)
    run.say(f"report: {path}")
    return path


def _trained(run: Demo, text: TokenSet) -> tuple[list[tuple[Recipe, Path]], str]:
    """Recipes as trained and their model folders, and the choice of tokens in words."""
    data = DataConfig(path=str(run.out / "text"))
    recipes = [replace(one.recipe, name=one.contender.name, data=data) for one in run.trainable]
    group = learners(recipes, run.seeds, run.folder)
    stage = run.pace.stage(run.plan.training_share)
    run.say(f"training {len(group)} models side by side, in turn, for about {stage.left:.0f} s")
    with _lines(run) as show:
        trained, schedule = train_together(group, stage, run.plan.most_steps, show)
    made = [(one.finish(replace(one.recipe.train, **_followed(schedule))), one.folder) for one in group]
    note = _training_words(run, text, trained, schedule.tokens)
    run.say(note)
    return made, note


def _followed(schedule: object) -> dict[str, object]:
    return {name: getattr(schedule, name) for name in ("tokens", "constant_share")}


def _training_words(run: Demo, text: TokenSet, trained: Trained, tokens: int) -> str:
    if trained.steps < 0.97 * trained.planned_steps:
        run.pace.cuts.append(
            f"Training: {trained.steps} steps and not the {trained.planned_steps} planned at first, because "
            "the machine became slower or the time ran out; the rate was planned again to fall to zero at the new end."
        )
    unfinished = f" It was stopped while the rate was still at {trained.rate:.0%}." if trained.rate > 0.01 else ""
    return (
        f"Trained in this demonstration on the {text.manifest['source']}, plain text only, side by side on the same "
        f"{tokens:,} tokens each, at {trained.speed:,.0f} tokens a second together.{unfinished} Few tokens: so these "
        "models show how loss changes with length, not recall, which takes longer to learn."
    )


def _measured(
    run: Demo, what: str, models: Sequence[OwnModel], text: TokenSet, stages: tuple[Stage, Stage]
) -> Measured:
    wanted = run.plan.lengths(run.trained_length)
    with _lines(run) as show:
        found = measure(models, text, wanted, run.plan.sizes, stages, show)
    for rows in found.rows:
        add_rows(run.folder / "results.jsonl", rows)
    if not found.documents:
        run.pace.cuts.append(f"Losses of {what} were not measured: there was no time to read one document.")
        return found
    if found.lengths[-1] < wanted[-1]:
        reach = f"to {found.lengths[-1]:,} tokens and not {wanted[-1]:,}"
        run.pace.cuts.append(f"Losses of {what}: {reach}, for want of time or text.")
    if found.documents < run.plan.sizes[0]:
        run.pace.cuts.append(f"Losses of {what}: {found.documents} documents, fewer than {run.plan.sizes[0]}.")
    return found


def _packaged_run(run: Demo, model: Packaged, rows: list[dict]) -> Run:
    writes = run.pace.left > 0 and model.contender.stretch is None
    sample = generate(model.loaded.model, tokenizer_of(model.loaded), PROMPT, SAMPLE) if writes else ""
    log = read_record(model.loaded.path) if (model.loaded.path / "metrics.jsonl").is_file() else []
    return Run(model.name, model.recipe, log, rows, sample, PROMPT, model.contender.caveat)


@contextlib.contextmanager
def _lines(run: Demo):
    """A live bar in a terminal, and elsewhere a line whenever another tenth is done."""
    said: dict[str, int] = {}
    with bars() as progress:

        def show(stage: str, done: int, total: int) -> None:
            tenth = 10 * done // max(1, total)
            if run.console.is_terminal:
                progress(stage.partition(":")[0], done, total)
            elif stage not in said or tenth > said[stage]:
                run.say(f"{stage}: {done} of {total}")
            said[stage] = tenth

        yield show


def _their_text(run: Demo) -> TokenSet:
    """Text for the packaged models: the same if its tokenizer is the one trained here, else prepared with theirs."""
    own, model = TokenSet.open(run.out / "text", "validation"), run.packaged[0].loaded
    if own.tokenizer is not None and own.tokenizer.hash() == tokenizer_of(model).hash():
        return own
    return run.corpus("text-packaged", str(model.path / "tokenizer.json"))


def _held_out(packaged: list[Packaged], text: TokenSet) -> str:
    source = text.manifest["source"]
    if all(model.loaded.info["extra"].get("data") == text.hash for model in packaged):
        return f"Measured on the held-out files of the {source}, the text they were trained on."
    return (
        f"Measured on the {source}, which is not exactly the text they were trained on: some files may have been among "
        "the training files, in another version."
    )
