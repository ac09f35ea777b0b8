"""The demonstration: train a small pair here and now, measure it and the packaged pair far beyond their length, report.

The packaged models bring their recipes. The same recipes, on plain text and for as many tokens as the minutes allow on
this machine, make the pair that is trained here. Nothing is taken from an earlier demonstration but the prepared text,
and that only when its hashes hold.
"""

import math
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from atma.commands.bars import bars
from atma.config import DataConfig, EvaluationConfig, Recipe, from_dict
from atma.data.dataset import TokenSet
from atma.data.prepare import Preparation, prepare
from atma.data.sources import describe
from atma.eval import evaluate, score
from atma.eval.loaded import tokenizer_of
from atma.generation import Settings, generate
from atma.loading import Loaded, load
from atma.report import Report, Run, Section, environment, headline, page
from atma.report.figures import Figure, loss_by_length, needles
from atma.train import read_record, terminal_progress, train

if TYPE_CHECKING:
    from rich.console import Console

PROMPT = 'import os\n\n\ndef read_lines(path):\n    """'
SAMPLE = Settings(max_tokens=160, temperature=0.7, top_p=0.95)
LEAST_STEPS, PROBE_STEPS, VALIDATIONS = 6, 6, 6


@dataclass(frozen=True)
class Plan:
    """What is shown, and how time is divided: shares are of the time that is left when a stage begins."""

    source: str = "stdlib"
    vocab_size: int = 1024
    packaged: tuple[str, str] = ("nano", "nano-rope")
    """Packaged names or model folders: ATMA and its control."""
    names: tuple[str, str] = ("ATMA", "RoPE control")
    """What the models trained here are called."""
    doublings: int = 6
    """The greatest length is the training length doubled this often: 6 is 64×."""
    training_share: float = 0.5
    trained_share: float = 0.33
    """For measuring the pair trained here."""
    packaged_share: float = 0.8
    """For measuring the packaged pair, needles included."""
    sizes: tuple[int, int] = (4, 64)
    """The fewest and the most documents, and needles, whatever the time allows."""


@dataclass(frozen=True)
class Packaged:
    """A packaged model with the recipe that made it."""

    name: str
    loaded: Loaded
    recipe: Recipe

    @staticmethod
    def open(name: str) -> "Packaged":
        """ValueError if there is no such model, or its config.json tells no recipe."""
        loaded = load(name)
        recipe = loaded.info.get("extra", {}).get("recipe")
        if recipe is None:
            raise ValueError(f"{loaded.path}: its config.json holds no recipe; save it with `atma train`")
        return Packaged(loaded.path.name if Path(name).exists() else name, loaded, from_dict(Recipe, recipe))


@dataclass
class Demo:
    """A demonstration under way: where it writes, what it shows, and the seconds it may take."""

    out: Path
    plan: Plan
    seconds: float
    seeds: int
    console: "Console"
    stamp: str = field(default_factory=lambda: time.strftime("%Y%m%d-%H%M%S"))
    began: float = field(default_factory=time.monotonic)

    @property
    def folder(self) -> Path:
        """A fresh folder for the runs and rows of this demonstration."""
        return self.out / f"runs-{self.stamp}"

    def seconds_for(self, share: float) -> float:
        """A share of the time that is left, at least a moment."""
        return share * max(self.seconds - (time.monotonic() - self.began), 1.0)

    def say(self, text: str) -> None:
        gone = round(time.monotonic() - self.began)
        self.console.print(f"\n{gone // 60}:{gone % 60:02} of {self.seconds / 60:.3g} min  {text}", highlight=False)

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


def demo(out: str | Path = Path("runs/demo"), minutes: float = 11.0, seeds: int = 1, plan: Plan | None = None) -> Path:
    """Run the demonstration into folder `out`; returns the path of its report.html.

    minutes: what it may take in all, by choosing training tokens, documents and needles by this machine's measured
    speed; seeds: how many pairs to train in that time. ValueError at once if the packaged pair is missing.
    """
    from rich.console import Console

    if not 0 < minutes < math.inf or seeds < 1:
        raise ValueError(f"a demonstration needs time and a seed, not {minutes} minutes and {seeds} seeds")
    run = Demo(Path(out), plan or Plan(), minutes * 60, seeds, Console())
    pair = [Packaged.open(name) for name in run.plan.packaged]
    own = run.corpus("text", "bpe")
    theirs = _their_text(run, own, pair[0].loaded)
    sections = [trained_section(run, pair, own), packaged_section(run, pair, theirs)]
    command = f"atma demo --out {out} --minutes {minutes:g} --seeds {seeds}"
    path = page(Report("ATMA: trained short, run long", command, environment(), sections), run.out / "report.html")
    for section in sections:
        _print_section(run.console, section)
    run.say(f"report: {path}")
    return path


def trained_section(run: Demo, pair: list[Packaged], text: TokenSet) -> Section:
    """Train ATMA and the control on the same tokens, as many as fit, and measure both."""
    plain = [replace(model.recipe, data=DataConfig(path=str(run.out / "text"))) for model in pair]
    made, note = trained_runs(run, plain, text)
    models = [load(folder) for _, folder in made]
    seconds = run.seconds_for(run.plan.trained_share)
    settings = evaluation(run.plan, plain[0].train.length, models, seconds, 0.0)
    run.say(f"measuring the pair trained here on {settings.documents} documents")
    runs = [
        Run(recipe.name, recipe, read_record(folder), measured(run, model, text, settings))
        for (recipe, folder), model in zip(made, models, strict=True)
    ]
    return Section("Trained here, just now", runs, note)


def trained_runs(run: Demo, recipes: list[Recipe], text: TokenSet) -> tuple[list[tuple[Recipe, Path]], str]:
    """Train every recipe with every seed; returns what was run, in which folders, and the choice of tokens in words."""
    speeds = [training_speed(recipe) for recipe in recipes]
    seconds = run.seconds_for(run.plan.training_share)
    tokens = seconds / run.seeds * together(speeds)
    chosen = [shortened(r, name, tokens, 0) for r, name in zip(recipes, run.plan.names, strict=True)]
    note = (
        f"Trained in this demonstration on the {text.manifest['source']}, plain text only. This machine makes "
        f"{' and '.join(f'{speed:,.0f}' for speed in speeds)} training tokens a second; {seconds:.0f} s for "
        f"{2 * run.seeds} trainings allow {chosen[0].train.tokens:,} tokens, the same for both models. No needles "
        "here: recall takes longer to learn."
    )
    run.say(note)
    made = []
    for seed in range(run.seeds):
        for recipe in chosen:
            seeded = replace(recipe, train=replace(recipe.train, seed=seed))
            folder = run.folder / f"{recipe.name.replace(' ', '-')}-{seed}"
            train(seeded, folder, progress=terminal_progress())
            made.append((seeded, folder))
    return made, note


def packaged_section(run: Demo, pair: list[Packaged], text: TokenSet) -> Section:
    """Measure the packaged pair on losses and needles and let both write."""
    seconds = run.seconds_for(run.plan.packaged_share)
    length = pair[0].recipe.train.length
    settings = evaluation(run.plan, length, [model.loaded for model in pair], seconds, 0.6)
    run.say(f"the packaged pair: {settings.documents} documents, {settings.needle_trials} needles a length")
    runs = []
    for model in pair:
        rows = measured(run, model.loaded, text, settings)
        sample = generate(model.loaded.model, tokenizer_of(model.loaded), PROMPT, SAMPLE)
        log = read_record(model.loaded.path) if (model.loaded.path / "metrics.jsonl").is_file() else []
        runs.append(Run(model.name, model.recipe, log, rows, sample, PROMPT))
    note = f"Trained beforehand, each by its recipe below. {_held_out(pair, text)}"
    return Section("The packaged pair", runs, note)


def shortened(recipe: Recipe, name: str, tokens: float, seed: int) -> Recipe:
    """The recipe for about `tokens` tokens, in whole steps, with a few validations on the way."""
    batch = recipe.train.batch_tokens
    steps = max(LEAST_STEPS, int(tokens / batch))
    pause = -(-steps // VALIDATIONS)
    settings = {"tokens": steps * batch, "seed": seed, "evaluate_every": pause, "checkpoint_every": steps}
    return replace(recipe, name=name, train=replace(recipe.train, **settings, evaluation_tokens=4 * batch))


def training_speed(recipe: Recipe) -> float:
    """Tokens/s of the recipe on this machine: the median of a few steps after the first two."""
    batch = recipe.train.batch_tokens
    settings = replace(recipe.train, tokens=PROBE_STEPS * batch, evaluate_every=0)
    with tempfile.TemporaryDirectory() as folder:
        train(replace(recipe, train=settings), Path(folder) / "probe")
        speeds = [row["tokens_per_second"] for row in read_record(Path(folder) / "probe") if row["kind"] == "train"]
    return statistics.median(speeds[2:])


def reading_seconds(model: Loaded, lengths: Sequence[int]) -> dict[int, float]:
    """Seconds to score one row of each length: a T + b T² through the times at an eighth and a half of the last."""
    short, long = max(1, lengths[-1] // 8), max(2, lengths[-1] // 2)
    rates = []
    for length in (short, long):
        tokens = torch.zeros(1, length + 1, dtype=torch.int64)
        began = time.perf_counter()
        score(model.model, tokens)
        rates.append((time.perf_counter() - began) / length)
    growth = max(0.0, (rates[1] - rates[0]) / (long - short))
    return {length: length * (rates[1] + growth * (length - long)) for length in lengths}


def together(speeds: list[float]) -> float:
    """Tokens/s at which all of them get one token more, one after the other."""
    return 1 / sum(1 / speed for speed in speeds)


def evaluation(plan: Plan, length: int, models: list[Loaded], seconds: float, needle_share: float) -> EvaluationConfig:
    """As many documents, and needles in their share of the time, as `seconds` allow for all models together."""
    lengths = tuple(length * 2**i for i in range(plan.doublings + 1))
    began = time.monotonic()
    costs = [reading_seconds(model, lengths) for model in models]
    seconds -= time.monotonic() - began
    fixed, longest = sum(sum(cost.values()) for cost in costs), sum(cost[lengths[-1]] for cost in costs)
    documents = _fitting(plan, seconds * (1 - needle_share) / (fixed + longest))
    trials = _fitting(plan, seconds * needle_share / (2 * fixed)) if needle_share else 0
    return EvaluationConfig(lengths, documents, min(128, length // 2), trials, junk=False)


def measured(run: Demo, model: Loaded, text: TokenSet, settings: EvaluationConfig) -> list[dict]:
    """Evaluation rows of a model, kept in the demonstration's folder too."""
    run.say(f"measuring {model.path} to {settings.lengths[-1]:,} tokens")
    with bars() as progress:
        return evaluate(model, text, settings, progress, run.folder / "results.jsonl")


def _fitting(plan: Plan, most: float) -> int:
    least, limit = plan.sizes
    return int(min(max(most, least), limit))


def _their_text(run: Demo, own: TokenSet, model: Loaded) -> TokenSet:
    """Text for the packaged pair: the same if its tokenizer is the one trained here, else prepared with theirs."""
    if own.tokenizer is not None and own.tokenizer.hash() == tokenizer_of(model).hash():
        return own
    return run.corpus("text-packaged", str(model.path / "tokenizer.json"))


def _held_out(pair: list[Packaged], text: TokenSet) -> str:
    source = text.manifest["source"]
    if all(model.loaded.info["extra"].get("data") == text.hash for model in pair):
        return f"Measured on the held-out files of the {source}, the text it was trained on."
    return (
        f"Measured on the {source}, which is not exactly the text it was trained on: some files may have been among "
        "its training files, in another version."
    )


def _print_section(console: "Console", section: Section) -> None:
    console.rule(section.title)
    for figure in (loss_by_length(section, "fixed"), loss_by_length(section, "nested"), needles(section)):
        if figure is not None:
            _print_table(console, figure)
    for sentence in headline(section):
        console.print(sentence, markup=False, highlight=False)
    for run in section.runs:
        if run.sample:
            console.print(f"\n{run.name} writes:", style="bold")
            console.print(run.prompt + run.sample, markup=False, highlight=False)


def _print_table(console: "Console", figure: Figure) -> None:
    from rich.table import Table
    from rich.text import Text

    table = Table(title=figure.title)
    for name in figure.table.header:
        table.add_column(Text(name), justify="right")
    for row in figure.table.rows:
        table.add_row(*map(Text, row))
    console.print(table)
